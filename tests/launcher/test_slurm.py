"""What is asked of Slurm, word by word as sbatch gets it, what is refused before, and what its answers come to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.config import LaunchConfig, SlurmConfig
from launcher.errors import LaunchConfigurationError
from launcher.job import JobState, take_request
from launcher.slurm import (
    SlurmJob,
    SlurmLauncher,
    SlurmRequest,
    check_request,
    exit_code_of,
    newest_logs,
    state_of,
)
from launcher.slurm_commands import JobRecord, Partition, SlurmError, run_slurm
from launcher.slurm_cycle import cancel_mark
from tests.support.fake_slurm import calls, fake_commands

MAIN = Partition("main", True, True, 4, 600, 2, 16)
LOW = Partition("low", False, True, 9, None, 0, 8)
DOWN = Partition("broken", False, False, 9, None, 8, 8)
CLUSTER = [MAIN, LOW, DOWN]
SINFO = 'case "$*" in *%o*) printf "%s\\n" NODES;; *) echo "main*|up|infinite|4|gpu:2|2";; esac'
"""Of one partition; NODES: addresses of its nodes."""
HERE, ELSEWHERE = "127.0.0.11 127.0.0.12", "127.0.0.11 192.0.2.7"
NAMES = [
    "own",
    "a b",
    "--wrap=id",
    "$(id)",
    "`id`",
    "a;b",
    "a&b|c",
    "*",
    "'",
    '"',
    "\\",
    "%j",
    "ü 漢",
    "#SBATCH",
    "-",
    "~",
]


def launch(**values: object) -> LaunchConfig:
    return LaunchConfig.model_validate(values)


def request(folder: Path = Path("runs/own"), **changes: Any) -> SlurmRequest:
    usual: dict[str, Any] = {
        "name": "own",
        "folder": folder,
        "log_folder": folder / "logs",
        "config": launch(nodes=2),
        "ranks_per_node": 2,
        "script": Path("/code/slurm/train.sbatch"),
        "python": "/venv/bin/python",
    }
    return SlurmRequest(**{**usual, **changes})


# --- the command ---------------------------------------------------------------------------------------------


def test_the_least_that_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert request().command == [
        "sbatch",
        "--parsable",
        "--job-name=own",
        "--nodes=2",
        "--ntasks-per-node=2",
        f"--output={tmp_path}/runs/own/logs/slurm-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--export=ALL",
        "--requeue",
        "/code/slurm/train.sbatch",
        f"{tmp_path}/runs/own",
        "/venv/bin/python",
        "solomonov.cli",
    ]


def test_the_most_that_is_asked() -> None:
    slurm = {
        "account": "ada",
        "qos": "high",
        "constraint": "h100&nvlink",
        "time_minutes": 90,
        "gpus_per_node": 8,
        "cpus_per_rank": 12,
        "memory_mib_per_node": 0,
        "exclusive": True,
        "exclude": ("n1", "n2"),
        "dependency": "afterok:7",
        "save_seconds": 300,
        "options": ("--reservation=a b", "--comment=$x"),
    }
    command = request(config=launch(nodes=3, partition="main", slurm=slurm), module="launcher").command
    assert set(command) >= {
        *("--partition=main", "--account=ada", "--qos=high", "--constraint=h100&nvlink", "--time=90"),
        *("--gpus-per-node=8", "--cpus-per-task=12", "--mem=0M", "--exclusive", "--exclude=n1,n2"),
        *("--dependency=afterok:7", "--signal=B:USR1@300", "--reservation=a b", "--comment=$x", "--nodes=3"),
    }
    assert command[-1] == "launcher"
    assert command.index("--comment=$x") < command.index("/code/slurm/train.sbatch")


def test_no_gpus_are_asked_for_where_none_are_wanted() -> None:
    assert not [word for word in request(config=launch(slurm={"gpus_per_node": 0})).command if "gpu" in word]


def test_an_array_numbers_its_elements_and_their_folders(tmp_path: Path) -> None:
    """Slurm puts the element's number where %a is; all else in the path is the user's own."""
    folder = tmp_path / "100%j" / "own-%a"
    made = request(folder, elements=3)
    escaped = f"{tmp_path}/100%%j/own-%a/logs/slurm-%A_%a.log"
    assert [word for word in made.command if word.startswith(("--array", "--output"))] == [
        f"--output={escaped}",
        "--array=0-2",
    ]
    assert str(folder) in made.command, "the batch script knows its element by itself"
    assert "--array=0-2%2" in replace(made, at_once=2).command
    assert "--array=0-0" in replace(made, elements=1).command
    assert not [word for word in request(folder, at_once=2).command if word.startswith("--array")]


hostile = st.one_of(st.sampled_from(NAMES), st.text(st.characters(codec="utf-8"), min_size=1)).filter(str.isprintable)
paths = st.lists(hostile.map(lambda text: text.replace("/", "_")), min_size=1, max_size=3).map("/".join)


@pytest.fixture(scope="module")
def sbatch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sbatch that notes its arguments and its environment; its folder, and the PATH with it."""
    folder = tmp_path_factory.mktemp("sbatch")
    script = f"env -0 > '{folder}/environment'; echo 77\\;cluster"
    return folder, fake_commands(folder, sbatch=script)["PATH"]


def submitted(sbatch: tuple[Path, str], made: SlurmRequest) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment with which sbatch was really started."""
    folder, path = sbatch
    (folder / "sbatch.calls").unlink(missing_ok=True)
    assert run_slurm(made.command, environment={**made.job_environment, "PATH": path}) == "77;cluster\n"
    (words,) = calls(folder, "sbatch")
    text = (folder / "environment").read_bytes().decode(errors="surrogateescape")
    return words, dict(item.split("=", 1) for item in text.split("\0") if item)


@given(name=hostile, folder=paths, logs=paths, value=hostile, python=hostile)
@example(name="--wrap=id", folder="-o/%j", logs="%j/%%/\\", value="~no-such-user", python="a b")
def test_every_value_arrives_as_one_argument(
    sbatch: tuple[Path, str], name: str, folder: str, logs: str, value: str, python: str
) -> None:
    """Whatever people call things, sbatch gets it whole, as one word, and takes no value for an option."""
    values = {"account": value, "constraint": value, "setup_script": value, "options": (f"--comment={value}",)}
    made = request(
        Path(folder),
        name=name,
        log_folder=Path(logs),
        python=python,
        config=launch(partition=value, slurm=values),
        environment={"SOLOMONOV_TEST_VALUE": value},
    )
    words, environment = submitted(sbatch, made)
    here = Path.cwd()
    assert words == [
        "--parsable",
        f"--job-name={name}",
        "--nodes=1",
        "--ntasks-per-node=2",
        f"--output={str(here / logs).replace('%', '%%')}/slurm-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--export=ALL",
        f"--partition={value}",
        f"--account={value}",
        f"--constraint={value}",
        "--requeue",
        f"--comment={value}",
        "/code/slurm/train.sbatch",
        str(here / folder),
        python,
        "solomonov.cli",
    ]
    assert environment["SOLOMONOV_TEST_VALUE"] == value
    assert environment["SOLOMONOV_SETUP"] == str(here / os.path.expanduser(value))


@given(st.text(st.characters(categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=1), st.integers(0, 2))
@example("\n", 1)
@example("\0", 1)
def test_control_characters_are_refused(control: str, place: int) -> None:
    text = "own"[:place] + control + "own"[place:]
    for changes in ({"name": text}, {"folder": Path(text)}, {"log_folder": Path(text)}):
        with pytest.raises(LaunchConfigurationError, match="cannot be given to Slurm") as caught:
            request(**changes)
        assert repr(text) in caught.value.got
    with pytest.raises(LaunchConfigurationError, match="the job's name"):
        request(name="")


@given(st.characters(categories=["Cc"], max_codepoint=127))
def test_control_characters_are_refused_in_options_too(control: str) -> None:
    for name in ("account", "qos", "constraint", "dependency", "setup_script"):
        with pytest.raises(ValidationError, match=name):
            SlurmConfig.model_validate({name: f"a{control}b"})


def test_the_job_inherits_our_environment_but_no_allocation(
    sbatch: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "9")
    monkeypatch.setenv("OF_THE_USER", "1")
    monkeypatch.setenv("BOTH", "ours")
    _, environment = submitted(sbatch, request(environment={"BOTH": "given"}))
    assert "SLURM_NTASKS" not in environment
    assert "SOLOMONOV_SETUP" not in environment
    assert (environment["OF_THE_USER"], environment["BOTH"]) == ("1", "given")


# --- what is refused -----------------------------------------------------------------------------------------


def refused(made: SlurmRequest, found: list[Partition]) -> LaunchConfigurationError:
    with pytest.raises(LaunchConfigurationError) as caught:
        check_request(made, found)
    assert caught.value.exit_code == 78
    return caught.value


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm whose nodes are all on this machine; the folder of its commands."""
    found = fake_commands(tmp_path / "bin", sinfo=SINFO.replace("NODES", HERE), sbatch="echo '77;cluster'")
    monkeypatch.setenv("PATH", found["PATH"])
    return tmp_path / "bin"


def test_what_the_cluster_can_run_passes(cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "setup.sh").touch()
    slurm = {"time_minutes": 600, "gpus_per_node": 2, "setup_script": str(tmp_path / "setup.sh")}
    check_request(request(config=launch(nodes=4, slurm=slurm)), CLUSTER)
    check_request(request(config=launch(nodes=9, partition="low", slurm={"time_minutes": 9999})), CLUSTER)
    check_request(request(config=launch(nodes=9, partition="broken,low")), CLUSTER)


@pytest.mark.parametrize(
    ("values", "what", "got", "remedy"),
    [
        ({"partition": "gpu"}, "no such partition", "gpu", "launch.partition=NAME"),
        ({"partition": "broken"}, "down", "broken", "main, low"),
        ({"nodes": 5}, "fewer nodes", "launch.nodes = 5, main has 4", "at most 4"),
        ({"nodes": 10, "partition": "low"}, "fewer nodes", "low has 9", "at most 9"),
        ({"slurm": {"time_minutes": 601}}, "time limit", "601, main allows 600", "at most 600"),
        ({"slurm": {"gpus_per_node": 3}}, "fewer GPUs", "3, nodes of main have 2", "launch.ranks_per_node"),
        ({"partition": "low", "slurm": {"gpus_per_node": 1}}, "fewer GPUs", "low have 0", "another partition"),
        ({"slurm": {"setup_script": "no/such/file"}}, "setup script", "no/such/file", "mend the path"),
        ({"slurm": {"setup_script": "~no-such-user/x"}}, "setup script", "~no-such-user/x", "mend the path"),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(
    values: dict[str, object], what: str, got: str, remedy: str, tmp_path: Path
) -> None:
    error = refused(request(tmp_path, config=launch(**values)), CLUSTER)
    assert what in error.what
    assert got in error.got
    assert remedy in error.remedy


SRUN_HELP = """cat <<'END'
Usage: srun [OPTIONS(0)... [executable(0) [args(0)...]]]
      --container=<path>      Path to OCI container bundle
      --container-id=<id>     OCI container ID
Options provided by plugins:
      PYXIS
END"""


def test_a_container_is_refused_where_srun_knows_none(cluster: Path, tmp_path: Path) -> None:
    wanted = request(tmp_path, config=launch(slurm={"container_image": "torch.sqsh", "container_mounts": "/data"}))
    fake_commands(cluster, srun=SRUN_HELP.replace("PYXIS", "--not-container-image=x --container-image-save=x"))
    error = refused(wanted, CLUSTER)
    assert "starts no containers" in error.what
    assert "torch.sqsh" in error.got
    assert "Pyxis" in error.rule
    assert "launch.slurm.setup_script" in error.remedy
    assert calls(cluster, "srun") == [["--help"]]
    fake_commands(cluster, srun=SRUN_HELP.replace("PYXIS", "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"))
    check_request(wanted, CLUSTER)
    error = refused(request(tmp_path, config=launch(slurm={"container_mounts": "/data"})), CLUSTER)
    assert "no container" in error.what
    assert "container_image" in error.remedy
    check_request(request(tmp_path), CLUSTER)
    assert len(calls(cluster, "srun")) == 2, "nobody else asks"


def test_the_partitions_are_named_where_there_is_no_such_one(tmp_path: Path) -> None:
    assert "main, low, broken" in refused(request(tmp_path, config=launch(partition="gpu")), CLUSTER).rule
    assert "sinfo shows none" in refused(request(tmp_path), []).rule
    assert "no default partition" in refused(request(tmp_path), [LOW]).what


def test_a_folder_in_the_memory_of_this_machine_is_refused() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        error = refused(request(Path(folder) / "runs" / "own"), CLUSTER)
    assert "is not on shared storage" in error.what
    assert f"{folder}/runs/own is on tmpfs" in error.got
    assert "run.folder" in error.remedy


def test_a_disk_of_this_machine_is_refused_where_nodes_are_elsewhere(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the nodes of the job's partitions that are asked for."""
    (tmp_path / "mountinfo").write_text(f"30 20 0:9999 / {tmp_path} rw - xfs /dev/sdb1 rw\n")
    monkeypatch.setattr("launcher.shared_storage.MOUNTS", tmp_path / "mountinfo")
    made = request(tmp_path / "runs" / "own", config=launch(nodes=2, partition="low,main"))
    check_request(made, CLUSTER)
    asked = [["--noheader", "--Node", "--partition=main,low", "--format=%o"]]
    assert calls(cluster, "sinfo") == asked
    fake_commands(cluster, sinfo=SINFO.replace("NODES", ELSEWHERE))
    for nodes in (1, 2):  # a job of one node may start on either
        error = refused(replace(made, config=launch(nodes=nodes)), CLUSTER)
        assert error.what == "the run's folder is not on shared storage"
        assert "is on xfs" in error.got
        assert "192.0.2.7 is another one" in error.got
    check_request(replace(made, config=launch(nodes=2, shared_folder="yes")), CLUSTER)


def test_nothing_is_submitted_that_was_refused(cluster: Path) -> None:
    with pytest.raises(LaunchConfigurationError, match="fewer nodes"):
        SlurmLauncher().submit(request(config=launch(nodes=5)))
    assert calls(cluster, "sbatch") == []
    made = request()
    job = SlurmLauncher().submit(made)
    assert (job.job_id, job.log_folder) == ("77", Path("runs/own/logs"))
    assert calls(cluster, "sbatch") == [made.command[1:]]


def test_each_element_of_an_array_is_a_job(cluster: Path) -> None:
    folder = Path("runs/own-%a")
    with pytest.raises(LaunchConfigurationError, match="fewer nodes"):
        SlurmLauncher().submit_array(request(folder, config=launch(nodes=5), elements=2))
    assert calls(cluster, "sbatch") == []
    made = request(folder, elements=2)
    jobs = SlurmLauncher().submit_array(made)
    assert [(job.job_id, job.log_folder) for job in jobs] == [
        ("77_0", Path("runs/own-0/logs")),
        ("77_1", Path("runs/own-1/logs")),
    ]
    assert calls(cluster, "sbatch") == [made.command[1:]]


# --- what became of it ---------------------------------------------------------------------------------------

SHOWN = JobRecord("RUNNING", "None", 0, 0, False, False, "node1", "", "main", 4)


@pytest.mark.parametrize(
    ("state", "exit_code", "expected", "left_with"),
    [
        *[(name, 0, JobState.PENDING, None) for name in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")],
        *[(name, 0, JobState.PENDING, None) for name in ("RESV_DEL_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")],
        *[(name, 0, JobState.RUNNING, None) for name in ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")],
        *[(name, 0, JobState.STOPPING, None) for name in ("COMPLETING", "STAGE_OUT")],
        ("COMPLETED", 0, JobState.DONE, 0),
        ("CANCELLED", 0, JobState.CANCELLED, 130),
        ("CANCELLED", 143, JobState.CANCELLED, 130),
        ("FAILED", 75, JobState.SAVED, 75),
        ("FAILED", 78, JobState.FAILED, 78),
        ("FAILED", 137, JobState.FAILED, 137),
        ("TIMEOUT", 0, JobState.FAILED, 1),
        ("TIMEOUT", 75, JobState.FAILED, 75),
        *[(name, 0, JobState.FAILED, 1) for name in ("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")],
        *[(name, 0, JobState.FAILED, 1) for name in ("PREEMPTED", "REVOKED")],
    ],
)
def test_every_state_of_the_manual(state: str, exit_code: int, expected: JobState, left_with: int | None) -> None:
    shown = replace(SHOWN, state=state, exit_code=exit_code)
    assert state_of(shown) is expected
    assert expected.is_terminal is (left_with is not None)
    if left_with is not None:
        assert exit_code_of(shown) == left_with


def test_the_logs_of_the_newest_attempt_by_number(tmp_path: Path) -> None:
    assert newest_logs(tmp_path) == []
    for name in ("attempt-9/rank-0.log", "attempt-10/rank-10.log", "attempt-10/rank-9.log", "attempt-11x/rank-0.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("attempt-10/rank-9.log.old", "attempt-10/srun.log", "attempt-10/heartbeat-0", "slurm-12.log"):
        (tmp_path / name).touch()
    expected = [tmp_path / "attempt-10" / "rank-9.log", tmp_path / "attempt-10" / "rank-10.log"]
    assert newest_logs(tmp_path) == SlurmJob("7", tmp_path).logs() == expected


Knows = Callable[[str], SlurmJob]


@pytest.fixture
def knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Knows:
    """Makes job 7, of which scontrol tells the given state; empty: it does not know it any more."""
    scontrol = (
        f"[ -s '{tmp_path}/state' ] || {{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }}\n"
    )
    scontrol += f"echo 'JobId=7 JobName=own'; cat '{tmp_path}/state'"
    made = fake_commands(tmp_path / "bin", scontrol=scontrol, scancel=":", sinfo="echo 'main*|up|infinite|4|gpu:2|2'")
    monkeypatch.setenv("PATH", made["PATH"])

    def tell(state: str) -> SlurmJob:
        (tmp_path / "state").write_text(state)
        return SlurmJob("7", tmp_path)

    return tell


def test_a_job_is_followed_until_slurm_forgets_it(knows: Knows) -> None:
    job = knows("JobState=RUNNING Reason=None\n Restarts=0 ExitCode=0:0\n")
    assert (job.state, job.exit_code, job.reason) == (JobState.RUNNING, None, "RUNNING (None)")
    with pytest.raises(TimeoutError, match=r"job 7 has not ended: RUNNING \(None\)"):
        job.wait(0.0)
    knows("JobState=FAILED Reason=NonZeroExitCode\n Restarts=0 ExitCode=75:0\n")
    assert (job.state, job.exit_code) == (JobState.SAVED, 75)
    knows("")
    assert (job.state, job.exit_code, job.wait(0.0)) == (JobState.SAVED, 75, 75), "what was said last"
    assert job.reason == "FAILED (NonZeroExitCode)"


def test_a_job_that_slurm_never_knew(knows: Knows) -> None:
    job = knows("")
    assert (job.state, job.exit_code, job.cancel()) == (JobState.FAILED, None, False)
    assert "does not know" in job.reason
    with pytest.raises(SlurmError, match="does not know this job") as caught:
        job.wait(0.0)
    assert f"{job.log_folder}/slurm-7.log" in caught.value.remedy


@pytest.mark.parametrize(
    ("state", "now", "asked"),
    [
        ("RUNNING", False, ["--batch", "--signal=USR1", "7"]),
        ("RUNNING", True, []),
        ("PENDING", False, ["7"]),
        ("PENDING", True, ["7"]),
        ("COMPLETED", False, None),
        ("CANCELLED", True, None),
    ],
)
def test_a_cancelled_job_is_marked_and_asked(
    state: str, now: bool, asked: list[str] | None, knows: Knows, tmp_path: Path
) -> None:
    job = knows(f"JobState={state} Reason=None\n Restarts=0 ExitCode=0:0\n")
    assert job.cancel(now=now) is (asked is not None)
    assert calls(tmp_path / "bin", "scancel") == ([asked] if asked else [])
    assert take_request(job.log_folder / "request") == ("now" if asked == [] else None), "ranks that Slurm asks save"
    assert cancel_mark(tmp_path, "7").exists() is (asked is not None)


def test_a_setup_script_is_named_by_its_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given_path in ("~/setup.sh", "setup.sh", f"{tmp_path}/setup.sh"):
        made = request(config=launch(slurm={"setup_script": given_path}))
        assert made.job_environment["SOLOMONOV_SETUP"] == f"{tmp_path}{os.sep}setup.sh"
