"""The allocation that a process runs in, against the variables that Slurm's manual names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LaunchConfigurationError
from launcher.slurm_step import Allocation, tasks_ended

GIVEN = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}


def test_the_first_start_has_no_count() -> None:
    assert Allocation.from_environment(GIVEN) == Allocation("77", 0, 3, "node[1-3]")


def test_a_requeued_job_knows_its_count() -> None:
    found = Allocation.from_environment({**GIVEN, "SLURM_RESTART_COUNT": "4"})
    assert found == Allocation("77", 4, 3, "node[1-3]")
    assert found.name == "77"


def test_the_older_name_of_the_number_of_nodes() -> None:
    older = {name: value for name, value in GIVEN.items() if name != "SLURM_JOB_NUM_NODES"}
    found = Allocation.from_environment({**older, "SLURM_NNODES": "5"})
    assert found is not None
    assert found.nodes == 5


def test_an_element_of_an_array_is_called_by_its_number() -> None:
    """Its own id, where it is not the last element, is one that Slurm gave out on the side."""
    found = Allocation.from_environment({**GIVEN, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"})
    assert found is not None
    assert (found.job_id, found.name) == ("77", "70_2")


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_an_allocation_there_is_none(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    assert Allocation.require() == Allocation.from_environment() is not None
    monkeypatch.delenv(missing)
    assert Allocation.from_environment() is None
    with pytest.raises(LaunchConfigurationError, match="not in a Slurm job") as caught:
        Allocation.require()
    assert caught.value.exit_code == 78
    assert "--on slurm" in caught.value.remedy


def test_what_an_allocation_says_of_the_launch_section() -> None:
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    found = Allocation.from_environment(given)
    assert found is not None
    assert found.as_overrides == ["launch.nodes=2"]
    found = Allocation.from_environment({**given, "SLURM_NTASKS_PER_NODE": "8"})
    assert found is not None
    assert found.as_overrides == ["launch.nodes=2", "launch.ranks_per_node=8"]


SAID = """srun: error: node2: task 1: Segmentation fault
srun: error: node[1-2]: tasks 0,2-4: Killed
something that a rank wrote: srun: error: node2: task 9: Killed
srun: error: Node failure on node3
srun: launch/slurm: _task_finish: Received task exit notification for 1 task of StepId=8.0 (status=0x000b).
srun: error: node1: task 7: Exited with exit code 1
srun: error: node1: task 8: Exi"""


def test_tasks_that_ended_by_the_log_of_srun() -> None:
    assert tasks_ended(SAID.encode()) == [1, 0, 2, 3, 4, 7]


@given(st.binary(max_size=60))
def test_whatever_a_log_holds_is_read(text: bytes) -> None:
    assert tasks_ended(b"srun: error: n: task 5: " + text.replace(b"\n", b"") + b"\n") == [5]
    assert isinstance(tasks_ended(b"srun: error: n: tasks " + text + b": x\n"), list)
