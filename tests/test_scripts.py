"""The scripts in slurm/ as real programs, before a scontrol that answers from a list: what a rank is told, and how the
batch script passes on what Slurm tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_slurm import calls, fake_commands
from tests.support.processes import Program, assert_no_process
from tests.support.source_tree import ROOT

SCRIPTS = ROOT / "slurm"
SECONDS = 60.0
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_bash_understands_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- rank.sh -------------------------------------------------------------------------------------------------


def bare(environment: dict[str, str]) -> dict[str, str]:
    """Without what a run or a job around the tests might have set."""
    return {
        name: value for name, value in environment.items() if name not in TORCHRUN and not name.startswith("SLURM_")
    }


def told(folder: Path, *, node: int, tasks: str, local: int = 0, **more: str) -> dict[str, str]:
    """The torchrun variables of a task on the given node."""
    hosts = "printf 'node%s\\n' 4 5 6 7 8"
    given = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NODELIST": "node[4-8]",
        "SLURM_JOB_ID": "1234567",
    }
    environment = {**bare(fake_commands(folder / "bin", scontrol=hosts)), **given, **more}
    command = [SCRIPTS / "rank.sh", "env", "-0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    return {name: found[name] for name in TORCHRUN if name in found}


def test_srun_can_start_it() -> None:
    assert os.access(SCRIPTS / "rank.sh", os.X_OK)


def test_a_rank_is_told_its_place(tmp_path: Path) -> None:
    assert told(tmp_path, node=2, tasks="2(x3),1", local=1) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "node4",
        "MASTER_PORT": "24567",
    }
    assert calls(tmp_path / "bin", "scontrol") == [["show", "hostnames", "node[4-8]"]]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("2(x3),1", [2, 2, 2, 1]),
        ("4", [4]),
        ("8(x2)", [8, 8]),
        ("1,2,3", [1, 2, 3]),
        ("16(x10),2(x2),1", [16] * 10 + [2, 2, 1]),
    ],
)
def test_the_tasks_of_each_node(tasks: str, expected: list[int], tmp_path: Path) -> None:
    found = [told(tmp_path, node=node, tasks=tasks)["LOCAL_WORLD_SIZE"] for node in range(len(expected))]
    assert found == [str(count) for count in expected]
    assert "LOCAL_WORLD_SIZE" not in told(tmp_path, node=len(expected), tasks=tasks), "there is no such node"


def test_a_port_that_is_given_is_kept_and_one_that_is_derived_is_legal(tmp_path: Path) -> None:
    assert told(tmp_path, node=0, tasks="4", MASTER_PORT="29500")["MASTER_PORT"] == "29500"
    assert told(tmp_path, node=0, tasks="4", SLURM_JOB_ID="9")["MASTER_PORT"] == "20009"
    assert told(tmp_path, node=0, tasks="4", SLURM_JOB_ID="4294939999")["MASTER_PORT"] == "29999"


def test_the_rank_takes_the_place_of_the_script(tmp_path: Path) -> None:
    """Same process, arguments as they are, its exit code: signals and codes need nobody between."""
    environment = {
        **bare(fake_commands(tmp_path / "bin", scontrol="echo node1")),
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"},
        **{"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "node1"},
    }
    show = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(75)"
    words = ["a b", "$HOME", "*", "", "'"]
    command = [SCRIPTS / "rank.sh", sys.executable, "-c", show, *words]
    with Program(command, log=tmp_path / "log", env=environment) as program:
        assert program.wait(deadline=SECONDS) == 75
        assert program.output() == f"{program.pid} {words}\n"


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"])
def test_outside_a_step_nothing_is_started(missing: str, tmp_path: Path) -> None:
    given = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    given |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "node1", "SLURM_JOB_ID": "1"}
    environment = {**bare(fake_commands(tmp_path / "bin", scontrol="echo node1")), **given}
    del environment[missing]
    command = [SCRIPTS / "rank.sh", "touch", tmp_path / "started"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert missing in done.stderr
    assert not (tmp_path / "started").exists()


# --- train.sbatch --------------------------------------------------------------------------------------------

# Stands for the module: a supervisor that does as it is told, and a requeue that says with what code it was asked.
MODULE = """
import os, signal, sys, time
folder = sys.argv[2]
if sys.argv[1] == "requeue":
    print("requeue", sys.argv[3], flush=True)
    sys.exit(int(os.environ.get("REQUEUE_CODE", sys.argv[3])))
def save(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
how = os.environ["HOW"]
if how.isdigit():
    sys.exit(int(how))
if how.startswith("SIG"):
    signal.signal(signal.Signals[how], signal.SIG_DFL) if how != "SIGKILL" else None
    os.kill(os.getpid(), signal.Signals[how])
print("ready", os.environ.get("FROM_SETUP"), flush=True)
while True:
    time.sleep(0.02)
"""


def batch(folder: Path, how: str, **environment: str) -> Program:
    (folder / "own_module.py").write_text(MODULE)
    command = ["bash", SCRIPTS / "train.sbatch", folder / "a run", sys.executable, "own_module"]
    made = {**os.environ, "PYTHONPATH": str(folder), "HOW": how, **environment}
    return Program(command, log=folder / "log", env=made)


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("75", 75), ("78", 78), ("SIGKILL", 137), ("SIGSEGV", 139)])
def test_the_end_of_the_supervisor_is_what_the_requeue_decides_on(how: str, code: int, tmp_path: Path) -> None:
    with batch(tmp_path, how, REQUEUE_CODE="3") as script:
        assert script.wait(deadline=SECONDS) == 3, "and the script leaves with what that says"
        assert f"requeue {code}\n" in script.output()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_what_slurm_tells_the_script_reaches_the_supervisor(name: str, tmp_path: Path) -> None:
    with batch(tmp_path, "waits") as script:
        script.wait_for(lambda: "ready" in script.output(), deadline=SECONDS, what="it runs")
        script.send(signal.Signals[name])
        script.wait_for(lambda: "got SIGUSR1" in script.output(), deadline=SECONDS, what="it is told")
        assert script.wait(deadline=SECONDS) == 75
        assert script.output() == "ready None\ngot SIGUSR1\nrequeue 75\n", "asked once, after the end of the save"
    assert_no_process(str(tmp_path))


def test_the_setup_is_read_first_and_a_failing_one_ends_the_job(tmp_path: Path) -> None:
    setup = tmp_path / "a setup.sh"
    setup.write_text("export FROM_SETUP='one two'\n")
    with batch(tmp_path, "waits", SOLOMONOV_SETUP=str(setup)) as script:
        script.wait_for(lambda: "ready one two" in script.output(), deadline=SECONDS, what="it has the setup")
    setup.write_text("false\n")
    (tmp_path / "log").unlink()
    with batch(tmp_path, "0", SOLOMONOV_SETUP=str(setup)) as script:
        assert script.wait(deadline=SECONDS) == 78
        assert script.output() == "", "nothing was started"


# Stands for the copy of the code of each element.
OWN = """
import sys
from pathlib import Path
print(sys.argv[1], Path(sys.argv[2]).name, "by", Path(__file__).parent.name, flush=True)
"""


def test_each_element_of_an_array_has_its_folder_and_its_code(tmp_path: Path) -> None:
    """Also where it goes by a path of several places; what is decided at its end is decided by its code, too."""
    for element in ("0", "13"):
        (tmp_path / f"code-{element}").mkdir()
        (tmp_path / f"code-{element}" / "own_module.py").write_text(OWN)
    command = ["bash", SCRIPTS / "train.sbatch", tmp_path / "own-%a", sys.executable, "own_module"]
    for element in ("0", "13"):
        path = f"{tmp_path}/empty-%a:{tmp_path}/code-%a"
        environment = {**os.environ, "PYTHONPATH": path, "SLURM_ARRAY_TASK_ID": element}
        with Program(command, log=tmp_path / f"log-{element}", env=environment) as script:
            assert script.wait(deadline=SECONDS) == 0
            expected = [f"{verb} own-{element} by code-{element}" for verb in ("supervise", "requeue")]
            assert script.output().splitlines() == expected


def test_a_job_that_is_no_element_takes_its_folder_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "code-%a").mkdir()
    (tmp_path / "code-%a" / "own_module.py").write_text(OWN)
    command = ["bash", SCRIPTS / "train.sbatch", tmp_path / "own-%a", sys.executable, "own_module"]
    environment = {**bare(dict(os.environ)), "PYTHONPATH": str(tmp_path / "code-%a")}
    with Program(command, log=tmp_path / "log", env=environment) as script:
        assert script.wait(deadline=SECONDS) == 0
        assert script.output().splitlines()[0] == "supervise own-%a by code-%a"


def test_an_element_without_a_path_of_its_own_gets_none(tmp_path: Path) -> None:
    """An empty entry would be the folder in which the job happens to start."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "${PYTHONPATH-none}"\n')
    show.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["bash", SCRIPTS / "train.sbatch", tmp_path / "own-%a", show]
    with Program(command, log=tmp_path / "log", env={**environment, "SLURM_ARRAY_TASK_ID": "1"}) as script:
        assert script.wait(deadline=SECONDS) == 0
        assert script.output().splitlines() == ["none", "none"]


def test_the_usage_is_shown_without_a_folder() -> None:
    done = subprocess.run(["bash", SCRIPTS / "train.sbatch"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
