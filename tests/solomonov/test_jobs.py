"""What `submit` hands over and what it refuses, before a Slurm that notes what it is asked; what becomes of the jobs is
in tests/e2e."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from launcher.job import write_request
from solomonov.cli import main
from solomonov.runfolder import RunFolder
from solomonov.supervise import request_file
from tests.support.fake_slurm import calls, fake_commands
from tests.support.runs import begin_run
from tests.support.user import User

SINFO = 'case "$*" in *%o*) printf "%s\\n" 127.0.0.11 127.0.0.12;; *) echo "main*|up|infinite|4|(null)|2";; esac'
TWO = ("--nodes", "2", "training.micro_batch_sequences=2")


@pytest.fixture
def slurm(user: User, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Slurm's commands; sbatch takes every job, as number 77, and notes its environment beside itself."""
    folder = user.folder.parent / "bin"
    environment = fake_commands(folder, sinfo=SINFO, sbatch=f"env -0 > '{folder}/environment'; echo 77")
    monkeypatch.setenv("PATH", environment["PATH"])
    return folder


def submit(*words: str) -> int:
    """`solomonov submit own.yaml WORDS`; its exit code."""
    return main(["submit", "own.yaml", *words])


def environment_of_the_job(slurm: Path) -> dict[str, str]:
    items = (slurm / "environment").read_text(errors="surrogateescape").split("\0")
    return dict(item.split("=", 1) for item in items if item)


@pytest.mark.parametrize("now", [False, True])
def test_a_request_that_was_meant_for_an_earlier_job_does_not_stop_the_next(now: bool, user: User, slurm: Path) -> None:
    """As that of a `cancel` which came after the end of the job."""
    run = begin_run(user)
    write_request(request_file(run), now=now)
    assert submit("--on", "slurm") == 0
    assert len(calls(slurm, "sbatch")) == 1
    assert not list(run.logs.glob("request*"))


def test_each_element_of_an_array_runs_its_own_copy_of_the_code(user: User, slurm: Path) -> None:
    """The place of the code is told once for all of them, with %a for the number."""
    assert submit("--on", "slurm", "--sweep", "run.seed=1,2") == 0
    path = environment_of_the_job(slurm)["PYTHONPATH"].split(os.pathsep)[0]
    for number in range(2):
        run = RunFolder(user.run(f"own-{number}"))
        [submitted] = run.journal.events("submitted")
        code = Path(path.replace("%a", str(number)))
        assert code == run.path / "code" / submitted["code"], "wherever the job starts"
        assert (code / "solomonov" / "cli.py").exists()


@pytest.mark.parametrize("backend", ["slurm", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_folder_in_the_memory_of_this_machine_is_refused(backend: str, user: User, slurm: Path) -> None:
    """By the command, with the way out; nothing is left of it. A cluster on this machine is no exception."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        words = ("--on", backend, "launch.ray_address=127.0.0.1:9", f"run.folder={memory}/runs", *TWO)
        code, output = user.solomonov("submit", "own.yaml", *words, PATH=os.environ["PATH"])
        assert not list(Path(memory).iterdir())
    assert code == 78
    assert "the run's folder is not on shared storage" in output
    assert f"got:    {memory}/runs/own is on tmpfs, mounted at /dev/shm: the memory of this machine" in output
    assert "remedy: set run.folder to a place on the cluster's shared file system" in output
    assert "launch.shared_folder=yes" in output
    assert "Traceback" not in output
    assert calls(slurm, "sbatch") == []


def test_the_word_of_the_user_is_taken_for_a_folder_that_looks_unshared(user: User, slurm: Path) -> None:
    """It is in the record, and so it holds for `resume`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        assert submit("--on", "slurm", f"run.folder={memory}/runs", "launch.shared_folder=yes", *TWO) == 0
        record = json.loads(Path(memory, "runs", "own", "resolved.json").read_text())
    assert record["launch"]["shared_folder"]["value"] == "yes"
    assert len(calls(slurm, "sbatch")) == 1


def test_a_scheduler_that_does_not_answer_hides_no_other_run(
    user: User, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_run(user, "run.name=other")
    assert submit("--on", "slurm") == 0
    fake_commands(slurm, scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    capsys.readouterr()
    assert main(["runs"]) == 0
    output, errors = capsys.readouterr()
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [["other", "created"], ["own", "unknown"]]
    assert "runs/own: scontrol failed (Unable to contact slurm controller)" in errors
    RunFolder(user.run()).journal.write("left", exit_code=75, reason="saved")
    assert main(["runs"]) == 0
    output, errors = capsys.readouterr()
    assert ("own", "saved") in [tuple(line.split()[:2]) for line in output.splitlines()], "its own records tell"
    assert errors == ""
