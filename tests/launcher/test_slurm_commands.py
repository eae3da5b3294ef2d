"""How Slurm's answers are read, against the forms that its manuals name, hostile ones, and a real cluster's own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import launcher.slurm_commands
from launcher.errors import LaunchConfigurationError
from launcher.slurm_commands import (
    Partition,
    SlurmError,
    batch_environment,
    count_gpus,
    have_slurm,
    minutes,
    node_addresses,
    parse_job,
    partitions,
    require_node_name,
    run_slurm,
    show_job,
)
from tests.support.fake_slurm import calls, fake_commands

NO_JOB = "4294967000"
HOSTILE = "x JobState=FAILED Restarts=9 ExitCode=7:0 PreemptTime=2030-01-01T00:00:00 NodeList=evil"

# What scontrol of release 22.05 prints, the free texts being {hostile}.
SHOWN = """\
JobId=7 JobName={hostile}
   UserId=ada(1001) GroupId=ada(1001) MCS_label=N/A
   Priority=4294901757 Nice=0 Account=(null) QOS=(null)
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode={code}
   DerivedExitCode=0:0
   RunTime=00:00:06 TimeLimit=365-00:00:00 TimeMin=N/A
   SubmitTime=2026-11-24T20:25:53 EligibleTime=2026-11-24T20:25:53
   AccrueTime=2026-11-24T20:25:53
   StartTime=2026-11-24T20:25:53 EndTime=2026-11-24T20:25:59 Deadline=N/A
{preempted}   SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-24T20:25:53 Scheduler=Backfill
   Partition=main AllocNode:Sid=localhost:3289
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList={nodes}
   BatchHost=node1
   NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=/jobs/{hostile}
   SubmitLine=sbatch --job-name={hostile}
   WorkDir=/home/{hostile}
   AdminComment={hostile}
   SystemComment={hostile}
   Comment={hostile}
   StdErr=/logs/{hostile}
   StdIn=/dev/null
   StdOut=/logs/{hostile}
"""


def shown(**fields: str) -> str:
    usual = {"hostile": "own", "state": "RUNNING", "reason": "None", "code": "0:0", "preempted": "", "nodes": "n[1-2]"}
    return SHOWN.format(**{**usual, **fields})


# --- times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 30),
        ("30:00", 30),
        ("30:01", 31),
        ("1:30:00", 90),
        ("1:30:59", 91),
        ("2-00:00:00", 2880),
        ("365-00:00:00", 525600),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("0", 0),
        ("infinite", None),
        ("UNLIMITED", None),
        ("n/a", None),
        ("NOT_SET", None),
    ],
)
def test_limits_as_slurm_writes_them(limit: str, expected: int | None) -> None:
    assert minutes(limit) == expected


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_every_time_is_read_in_every_form_that_can_say_it(days: int, hours: int, mins: int, seconds: int) -> None:
    total = days * 86400 + hours * 3600 + mins * 60 + seconds
    forms = [f"{days}-{hours:02}:{mins:02}:{seconds:02}", f"{total // 3600}:{mins:02}:{seconds:02}"]
    forms += [f"{total // 60}:{seconds:02}"]
    forms += [f"{days}-{hours}:{mins}", str(total // 60)] if not seconds else []
    forms += [f"{days}-{hours}"] if not seconds and not mins else []
    assert {minutes(form) for form in forms} == {-(-total // 60)}


# --- GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", 0),
        ("", 0),
        ("gpu:2", 2),
        ("gpu:h100:8(S:0-1),nvme:1", 8),
        ("gpu:tesla:1,gpu:kepler:2,bandwidth:lustre:no_consume:4G", 3),
        ("gpu:a:1(S:0),gpu:b:2(S:1)", 3),
        ("nvme:3,gpu:2", 2),
        ("gpu:a100:no_consume:4", 4),
        ("gpu_memory:80,mygpu:3,craynetwork:4", 0),
        ("gpu:nvidia_a100_3g.39gb:2", 2),
    ],
)
def test_gpus_in_a_list_of_resources(gres: str, expected: int) -> None:
    assert count_gpus(gres) == expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["gpu", "nvme", "shard", "gpux"]),
            st.sampled_from(["", ":h100", ":3g.20gb"]),
            st.integers(0, 16),
            st.sampled_from(["", "(S:0)", "(S:0-1)"]),
        ),
        max_size=5,
    )
)
def test_the_gpus_of_every_list_add_up(items: list[tuple[str, str, int, str]]) -> None:
    gres = ",".join(f"{name}{kind}:{count}{sockets}" for name, kind, count, sockets in items)
    assert count_gpus(gres) == sum(count for name, _, count, _ in items if name == "gpu")


# --- jobs ----------------------------------------------------------------------------------------------------


def test_what_people_call_a_job_is_not_taken_for_its_state() -> None:
    fields = parse_job(shown(hostile=HOSTILE))
    assert fields == parse_job(shown(hostile="own"))
    assert {name: fields[name] for name in ("JobState", "Restarts", "ExitCode", "NodeList")} == {
        "JobState": "RUNNING",
        "Restarts": "2",
        "ExitCode": "0:0",
        "NodeList": "n[1-2]",
    }
    assert "PreemptTime" not in fields
    assert fields["CPUs/Task"] == "1"


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40))
@example(HOSTILE)
@example("JobId=1 JobState=FAILED")
def test_no_name_changes_what_is_read(name: str) -> None:
    assert parse_job(shown(hostile=name)) == parse_job(shown(hostile="own"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"state": "RUNNING", "reason": "None", "restarts": 2, "exit_code": 0, "nodes": "n[1-2]"}),
        ({"hostile": HOSTILE}, {"state": "RUNNING", "restarts": 2, "exit_code": 0, "preempted": False}),
        ({"state": "PENDING", "reason": "Priority", "nodes": "(null)"}, {"nodes": "", "reason": "Priority"}),
        ({"state": "FAILED", "code": "75:0"}, {"state": "FAILED", "exit_code": 75}),
        ({"state": "CANCELLED", "code": "0:15"}, {"exit_code": 143}),
        ({"preempted": "   PreemptEligibleTime=2026-11-24T20:25:53 PreemptTime=None\n"}, {"preempted": False}),
        ({"preempted": "   PreemptEligibleTime=2026-11-24T20:25:53 PreemptTime=2026-11-24T20:30:00\n"},
         {"preempted": True}),
    ],
)  # fmt: skip
def test_the_record_of_a_job(
    fields: dict[str, str], expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shown").write_text(shown(**fields))
    sinfo = "echo 'main*|up|infinite|3|gpu:2|2'; echo 'low|up|infinite|9|(null)|2'; echo 'main*|up|infinite|2|(null)|2'"
    made = fake_commands(tmp_path / "bin", scontrol=f"cat '{tmp_path}/shown'", sinfo=sinfo)
    monkeypatch.setenv("PATH", made["PATH"])
    record = show_job("7")
    assert record is not None
    assert {name: getattr(record, name) for name in expected} == expected
    assert (record.partition, record.partition_nodes) == ("main", 5)
    assert record.end_time == "2026-11-24T20:25:59"


@pytest.mark.slurm
def test_a_job_that_the_cluster_does_not_know() -> None:
    assert show_job(NO_JOB) is None


def test_a_controller_that_is_down_is_no_unknown_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    monkeypatch.setenv("PATH", fake_commands(tmp_path, scontrol=script)["PATH"])
    with pytest.raises(SlurmError, match="Unable to contact"):
        show_job("7")


# --- partitions ----------------------------------------------------------------------------------------------


def test_kinds_of_nodes_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a*|up|1-00:00:00|4|gpu:h100:8(S:0-1)|96", "b|down|30:00|1|(null)|8+", "a*|up|1-00:00:00|2|gpu:4|128"]
    script = "\n".join(f"echo '{line}'" for line in lines)
    monkeypatch.setenv("PATH", fake_commands(tmp_path, sinfo=script)["PATH"])
    assert partitions() == [Partition("a", True, True, 6, 1440, 8, 128), Partition("b", False, False, 1, 30, 0, 8)]


@pytest.mark.slurm
def test_partitions_as_the_controller_describes_them() -> None:
    """sinfo, as it is read, against what scontrol says of partitions and nodes."""

    def blocks(what: str) -> list[dict[str, str]]:
        lines = run_slurm(["scontrol", "--oneliner", "show", what]).splitlines()
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]

    nodes = {block["NodeName"]: block for block in blocks("node")}
    expected = {}
    for block in blocks("partition"):
        names = run_slurm(["scontrol", "show", "hostnames", block["Nodes"]]).split()
        gpus = [sum(map(int, re.findall(r"gpu:(?:\w+:)?(\d+)", nodes[name]["Gres"]))) for name in names]
        expected[block["PartitionName"]] = (
            block["Default"] == "YES",
            block["State"] == "UP",
            int(block["TotalNodes"]),
            max(gpus),
            max(int(nodes[name]["CPUTot"]) for name in names),
            block["MaxTime"] == "UNLIMITED",
        )
    assert expected
    assert {
        part.name: (
            part.is_default,
            part.is_up,
            part.nodes,
            part.gpus_per_node,
            part.cpus_per_node,
            part.time_limit_minutes is None,
        )
        for part in partitions()
    } == expected


def test_each_address_of_a_partition_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_commands(tmp_path, sinfo="printf '%s \\n' 10.0.0.1 gpu2.cluster 10.0.0.1")["PATH"])
    assert node_addresses(["gpu", "low"]) == ["10.0.0.1", "gpu2.cluster"]
    assert calls(tmp_path, "sinfo") == [["--noheader", "--Node", "--partition=gpu,low", "--format=%o"]]


@pytest.mark.slurm
def test_addresses_as_the_controller_describes_them() -> None:
    lines = run_slurm(["scontrol", "--oneliner", "show", "node"]).splitlines()
    nodes = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]
    for part in partitions():
        expected = {node["NodeAddr"] for node in nodes if part.name in node["Partitions"].split(",")}
        assert set(node_addresses([part.name])) == expected


# --- names and environments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node1", "gpu-7.cluster", "A_b"])
def test_names_of_nodes(name: str) -> None:
    assert require_node_name(name) == name


@pytest.mark.parametrize("name", ["", "node1,node2", "node[1-9]", "a b", "node1\n", "ALL;x", "ü", "a=b"])
def test_what_is_no_name_of_a_node_is_refused(name: str) -> None:
    with pytest.raises(SlurmError) as caught:
        require_node_name(name)
    assert caught.value.got == repr(name)


def test_an_allocation_around_us_does_not_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PATH": "/bin", "HOME": "/home/ada", "SLURM_CONF": "/etc/slurm.conf", "MY_SLURM_X": "1", "EMPTY": ""}
    imposed = ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SALLOC_QOS", "SRUN_DEBUG", "PMI_RANK", "PMIX_RANK")
    given_environment = {**kept, **dict.fromkeys(imposed, "1")}
    assert batch_environment(given_environment) == kept
    monkeypatch.setenv("SLURM_NTASKS", "9")
    monkeypatch.setenv("KEPT_AS_IT_IS", "$x `y` \"z\"")  # fmt: skip
    ours = batch_environment()
    assert "SLURM_NTASKS" not in ours
    assert ours["KEPT_AS_IT_IS"] == "$x `y` \"z\""  # fmt: skip


# --- running them --------------------------------------------------------------------------------------------


def test_arguments_reach_the_command_as_they_are(tmp_path: Path) -> None:
    words = ["$HOME", "a b", "'", '"', "`id`", "-x", "", "*", "a\nb"]
    assert run_slurm(["printf", "<%s>", *words]) == "".join(f"<{word}>" for word in words)
    assert run_slurm(["sh", "-c", "echo $ONE $TWO"], environment={"PATH": "/usr/bin:/bin", "ONE": "1"}) == "1\n"


def test_a_command_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not have_slurm()
    with pytest.raises(LaunchConfigurationError, match="sbatch is not on the PATH") as caught:
        run_slurm(["sbatch", "--version"])
    assert caught.value.exit_code == 78
    assert caught.value.got == f"PATH={tmp_path}"
    assert "--on local" in caught.value.remedy
    (tmp_path / "sbatch").touch(mode=0o644)
    with pytest.raises(LaunchConfigurationError, match="sbatch is not on the PATH"):
        run_slurm(["sbatch", "--version"])
    (tmp_path / "sbatch").chmod(0o755)
    assert have_slurm()


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(SlurmError, match="sh failed") as caught:
        run_slurm(["sh", "-c", "echo out; echo 'sbatch: error: no such account' >&2; exit 3"])
    assert caught.value.got == "sbatch: error: no such account"
    with pytest.raises(SlurmError) as caught:
        run_slurm(["sh", "-c", "echo only out; exit 1"])
    assert caught.value.got == "only out"
    with pytest.raises(SlurmError) as caught:
        run_slurm(["sh", "-c", "exit 9"])
    assert caught.value.got == "exit code 9"


def test_a_controller_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.slurm_commands, "COMMAND_SECONDS", 0.1)
    with pytest.raises(SlurmError, match="sleep does not answer") as caught:
        run_slurm(["sleep", "600"])
    assert caught.value.got == "nothing for 0.1 s"


def test_no_command_waits_for_our_input_or_chokes_on_bytes() -> None:
    assert run_slurm(["cat"]) == ""
    assert run_slurm(["printf", r"a\377b"]) == "a�b"


@pytest.mark.slurm
def test_a_real_refusal() -> None:
    assert have_slurm()
    with pytest.raises(SlurmError, match="scontrol failed") as caught:
        run_slurm(["scontrol", "show", "partition", "there-is-none-of-this-name"])
    direct = subprocess.run(
        [str(shutil.which("scontrol")), "show", "partition", "there-is-none-of-this-name"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert caught.value.got == (direct.stderr or direct.stdout).strip() != ""
