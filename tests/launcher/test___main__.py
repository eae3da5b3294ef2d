"""`python -m launcher` as a program: what it refuses, and a job that may not start again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.__main__ import _job, main, write_job
from launcher.config import LaunchConfig
from launcher.hang import HangLimits
from launcher.job import JobSpec
from launcher.slurm_cycle import NO_PROGRESS, CycleRecord
from tests.support.fake_slurm import calls, fake_commands
from tests.support.processes import program_environment, run_program

SECONDS = 60.0
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}


def run(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    bare = {name: value for name, value in program_environment(**environment).items() if name not in ALLOCATION}
    command = [sys.executable, "-m", "launcher", *words]
    return run_program(command, log=folder / "log", deadline=SECONDS, env={**bare, **environment})


def test_without_a_command_the_usage_is_shown(tmp_path: Path) -> None:
    for words in ([], ["supervise"], ["requeue", "folder"], ["no-such-command"]):
        code, output = run(tmp_path, *words)
        assert code == 2
        assert "supervise FOLDER" in output


def test_a_job_outside_of_an_allocation_is_refused(tmp_path: Path) -> None:
    for words in (["supervise", "."], ["requeue", ".", "75"]):
        code, output = run(tmp_path, *words)
        assert code == 78, output
        assert "this process is not in a Slurm job" in output.splitlines()[-4]
        assert "solomonov submit" in output


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = JobSpec(["a", "b c"], tmp_path / "logs", nodes=3, hang=HangLimits(allowances={"data": 4.0}))
    config = LaunchConfig.model_validate({"nodes": 3, "slurm": {"exclude": ("n1", "n2"), "time_minutes": 9}})
    write_job(tmp_path, spec, config, tmp_path / "rank.sh")
    read, read_config, rank_script = _job(tmp_path)
    assert (read_config, rank_script) == (config, tmp_path / "rank.sh")
    assert read.to_json() == spec.to_json()


def test_a_start_that_leads_nowhere_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_job(tmp_path, JobSpec(["true"], tmp_path / "logs"), LaunchConfig(max_no_progress=2), tmp_path / "rank.sh")
    CycleRecord(starts=(0, 0), restart=1).write(tmp_path / "logs", "7")
    path = fake_commands(tmp_path / "bin", srun="exit 0")["PATH"]
    code, output = run(tmp_path, "supervise", str(tmp_path), **ALLOCATION, PATH=path, SLURM_RESTART_COUNT="2")
    assert (code, output) == (
        NO_PROGRESS,
        "Slurm has started the job 2 times without a checkpoint newer than step 0\n",
    )
    assert calls(tmp_path / "bin", "srun") == []
    assert CycleRecord.read(tmp_path / "logs", "7").starts == (0, 0, 0)


def test_a_step_that_slurm_refuses_is_a_crash_of_every_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    step = {"container_image": "image.sqsh", "container_mounts": "/data:/data", "cpus_per_rank": 3}
    config = LaunchConfig.model_validate({"max_restarts": 1, "restart_backoff_seconds": 0.0, "slurm": step})
    write_job(tmp_path, JobSpec(["true"], tmp_path / "logs", ranks=2), config, tmp_path / "rank.sh")
    refusal = "echo 'srun: error: Unable to create step' >&2; exit 1"
    path = fake_commands(tmp_path / "bin", srun=refusal)["PATH"]
    code, output = run(tmp_path, "supervise", str(tmp_path), **ALLOCATION, PATH=path)
    events = [json.loads(line) for line in output.splitlines()]
    assert code == 1, output
    assert [event["event"] for event in events].count("attempt_started") == 2
    ended = [(event["exit_code"], event["signal"]) for event in events if event["event"] == "rank_exited"]
    assert ended == [(1, None)] * 4
    assert "Unable to create step" in (tmp_path / "logs" / "attempt-1" / "srun.log").read_text()
    started = calls(tmp_path / "bin", "srun")
    assert len(started) == 2
    assert started[0][-6:] == ["-m", "launcher", "agent", str(tmp_path / "logs" / "attempt-1"), "1", "true"]
    assert {"--ntasks=2", "--nodes=1", "--kill-on-bad-exit=0", str(tmp_path / "rank.sh")} <= set(started[0])
    assert {"--container-image=image.sqsh", "--container-mounts=/data:/data", "--cpus-per-task=3"} <= set(started[0])


def test_the_commands_are_functions_too(tmp_path: Path) -> None:
    assert main([]) == 2
