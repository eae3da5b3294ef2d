"""The allocation that a process runs in, against the variables that Slurm's manual names, and ends that nobody reports.

Steps of a real Slurm are in tests/e2e.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.agent import PREFIX
from launcher.errors import LaunchConfigurationError
from launcher.exits import RankExit
from launcher.job import Attempt, JobSpec
from launcher.slurm_step import Allocation, SlurmGang, tasks_ended
from tests.support.fake_slurm import fake_commands
from tests.support.processes import wait_for

SECONDS = 60.0

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


# --- a step whose agents do not live to tell -----------------------------------------------------------------

# Two agents that begin, with a sign of life of the second; then it dies, and srun says so. Orders reach the first one
# until it was told to kill its rank; `deaf`: until it is ended itself.
SRUN = f"""
[ -e "$FOLDER/refuses" ] && {{ echo "srun: unrecognized option '--container-image'" >&2; exit 3; }}
say() {{ printf '%s%s\\n' '{PREFIX}' "$1"; }}
say '{{"kind": "started", "rank": 0, "host": "node1", "pid": 11}}'
say '{{"kind": "started", "rank": 1, "host": "node2", "pid": 12}}'
say '{{"kind": "beat", "rank": 1, "step": 7, "section_id": 2, "section": "update", "age_seconds": 0.0}}'
echo "no report"
[ -e "$FOLDER/silent" ] && exit 0
echo "srun: error: node2: task 1: Killed" >&2
while read -r order; do
    echo "$order" >> "$FOLDER/orders"
    if [ "$order" = kill ] && [ ! -e "$FOLDER/deaf" ]; then
        say '{{"kind": "ended", "rank": 0, "pid": 11, "code": -9, "killed": true, "host": "node1"}}'
        exit 0
    fi
done
"""


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmGang]:
    """A step of two ranks by a program with srun's name; files in the test's folder say how it behaves."""
    environment = fake_commands(tmp_path / "bin", srun=SRUN)
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setenv("FOLDER", str(tmp_path))
    wake, writer = os.pipe()
    spec = JobSpec(["true"], tmp_path, ranks=1, nodes=2)
    script = tmp_path / "rank.sh"
    (tmp_path / "srun.log").write_text("srun: error: node1: task 0: Killed\n")  # of an earlier start in the same folder
    allocation = Allocation("7", 0, 2, "node[1-2]")
    with SlurmGang(
        spec, tmp_path, attempt=1, master_port=1, wake_fd=wake, allocation=allocation, rank_script=script
    ) as gang:
        yield gang
    os.close(wake)
    os.close(writer)


def ends_of(gang: SlurmGang, count: int) -> list[RankExit]:
    """Wait for so many ends; what else was seen meanwhile is no end."""
    found: list[RankExit] = []
    end = time.monotonic() + SECONDS
    while len(found) < count and time.monotonic() < end:
        found += gang.wait(0.2)
    return found


def test_a_rank_whose_agent_is_gone_is_lost_while_its_peer_waits(step: SlurmGang, tmp_path: Path) -> None:
    [lost] = ends_of(step, 1)
    assert (lost.rank, lost.pid, lost.code, lost.killed, lost.lost) == (1, 12, -signal.SIGKILL, False, True)
    assert (lost.host, lost.step, lost.section) == ("node2", 7, "update")
    assert step.alive, "the first one waits for it"
    assert step.beats() == {}
    step.terminate()
    step.dump_stacks()
    step.kill()
    [killed] = ends_of(step, 1)
    assert (killed.rank, killed.killed, killed.lost, killed.host) == (0, True, False, "node1")
    assert not step.alive
    assert (tmp_path / "orders").read_text().split() == ["terminate", "stacks", "kill"]
    assert "no report" in (tmp_path / "srun.log").read_text()


def test_a_step_that_ends_without_a_word_has_lost_its_ranks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "silent").touch()
    ends = ends_of(request.getfixturevalue("step"), 2)
    assert [(end.rank, end.lost, end.killed, end.host) for end in ends] == [
        (0, True, False, "node1"),
        (1, True, False, "node2"),
    ]


def test_a_step_that_srun_does_not_begin_ends_as_srun_did(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No rank was killed: there was none."""
    (tmp_path / "refuses").touch()
    step = request.getfixturevalue("step")
    ends = ends_of(step, 2)
    assert [(end.rank, end.code, end.lost, end.killed, end.host) for end in ends] == [
        (0, 3, False, False, None),
        (1, 3, False, False, None),
    ]
    assert not step.alive
    attempt = Attempt(1, tmp_path, 2, [], 1, exits=ends)
    assert attempt.describe() == "rank 0: exit code 3 (crashed)"
    assert attempt.tail[-1] == "srun: unrecognized option '--container-image'", "why, from what should have started it"


def test_agents_that_do_not_obey_are_ended_with_their_step(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """That says nothing about their ranks: it was our doing."""
    (tmp_path / "deaf").touch()
    step = request.getfixturevalue("step")
    ends_of(step, 1)
    step.kill()
    wait_for((tmp_path / "orders").exists, deadline=SECONDS, what="the order has come")
    assert step.alive
    step.kill()
    [end] = ends_of(step, 1)
    assert (end.rank, end.killed, end.lost) == (0, True, False)
