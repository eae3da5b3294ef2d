"""The door to Slurm's commands: what is asked of them, and how their answers are read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import LaunchConfigurationError, SlurmError

COMMAND_SECONDS = 60.0
"""The controller may be busy; Slurm's commands give up by themselves after 10 s or so."""
UNLIMITED = ("UNLIMITED", "infinite", "INVALID", "n/a", "N/A", "NOT_SET")


def run_slurm(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's commands, without a shell.

    Returns:
        Its stdout.

    Raises:
        LaunchConfigurationError: it is not on the PATH.
        SlurmError: it failed, or did not answer.
    """
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=COMMAND_SECONDS,
            env=dict(environment) if environment is not None else None,
        )
    except (FileNotFoundError, PermissionError) as error:  # the latter where a folder on the PATH is closed to us
        raise LaunchConfigurationError(
            f"{command[0]} is not on the PATH",
            got=f"PATH={os.environ.get('PATH', '')}",
            rule="submitting to Slurm is done on a machine that has its commands (sbatch, scontrol, sinfo, scancel)",
            remedy="log in to a machine of the cluster, load its module, or use --on local",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} does not answer",
            got=f"nothing for {COMMAND_SECONDS:g} s",
            rule="the controller of the cluster answers",
            remedy="try again; see `scontrol ping`",
        ) from error
    if done.returncode:
        raise SlurmError(
            f"{command[0]} failed",
            got=(done.stderr or done.stdout).strip() or f"exit code {done.returncode}",
            rule="Slurm takes the request",
            remedy="mend what it names; see `scontrol ping` where it names nothing",
        )
    return done.stdout


def srun_has(option: str) -> bool:
    """Whether srun takes a long option; its help lists those of the cluster's plug-ins, too.

    Raises:
        LaunchConfigurationError: srun is not on the PATH.
        SlurmError: it does not answer.
    """
    return re.search(rf"--{re.escape(option)}(?![\w-])", run_slurm(["srun", "--help"])) is not None


def have_slurm() -> bool:
    """Its commands are on the PATH."""
    return shutil.which("sbatch") is not None


@dataclass(frozen=True)
class JobRecord:
    """What the controller says of a job."""

    state: str
    """As Slurm calls it: PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
    reason: str
    restarts: int
    exit_code: int
    """Of the batch script, 0 to 255; 128 + n where signal n ended it."""
    preempted: bool
    out_of_time: bool
    """It has run for as long as it may."""
    nodes: str
    """Node list; empty while there is none."""
    end_time: str
    partition: str
    partition_nodes: int


def show_job(job: str) -> JobRecord | None:
    """What the controller says of a job; None where it does not know it (any more).

    Raises:
        SlurmError: the controller does not answer.
    """
    try:
        text = run_slurm(["scontrol", "show", "job", job])
    except SlurmError as error:
        if "Invalid job id" in error.got:
            return None
        raise
    fields = parse_job(text)
    code, _, signal_number = fields.get("ExitCode", "0:0").partition(":")
    partition = fields.get("Partition", "")
    return JobRecord(
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
        exit_code=128 + int(signal_number) if int(signal_number or 0) else int(code),
        preempted=fields.get("PreemptTime", "None") != "None",
        out_of_time=_out_of_time(fields),
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        end_time=fields.get("EndTime", ""),
        partition=partition,
        partition_nodes=sum(found.nodes for found in partitions() if found.name == partition),
    )


def parse_job(text: str) -> dict[str, str]:
    """The fields of `scontrol show job` that have no spaces in them.

    Names and paths come from people and may hold anything, `JobState=` included: lines with them are left out.
    """
    free = (
        *("JobId=", "Command=", "SubmitLine=", "WorkDir=", "StdErr=", "StdIn=", "StdOut="),
        *("Comment=", "AdminComment=", "SystemComment=", "Extra="),
    )
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip().startswith(free):
            for name, value in re.findall(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(\S+)", line):
                fields.setdefault(name, value)
    return fields


@dataclass(frozen=True)
class Partition:
    """A partition, as sinfo tells it."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    time_limit_minutes: int | None
    """None: no limit."""
    gpus_per_node: int
    """The most that one of its nodes has."""
    cpus_per_node: int


def partitions() -> list[Partition]:
    """All partitions that this user sees.

    Raises:
        LaunchConfigurationError: sinfo is not on the PATH.
        SlurmError: the controller does not answer.
    """
    lines = run_slurm(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%c"]).splitlines()
    found: dict[str, Partition] = {}
    for line in lines:
        name, up, limit, nodes, gres, cpus = line.split("|")
        part = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            is_up=up == "up",
            nodes=int(nodes),
            time_limit_minutes=minutes(limit),
            gpus_per_node=count_gpus(gres),
            cpus_per_node=int(re.sub(r"\D", "", cpus) or 0),
        )
        before = found.get(part.name)
        if before is not None:  # one line for each kind of node
            part = Partition(
                part.name,
                part.is_default,
                part.is_up,
                before.nodes + part.nodes,
                part.time_limit_minutes,
                max(before.gpus_per_node, part.gpus_per_node),
                max(before.cpus_per_node, part.cpus_per_node),
            )
        found[part.name] = part
    return list(found.values())


def seconds(time: str) -> int | None:
    """A time as Slurm writes it (`30` minutes, `30:00`, `1:30:00`, `2-00:00:00`) in seconds; None: no limit."""
    if time in UNLIMITED:
        return None
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 1:
        hours, mins, secs = 0, parts[0], 0
    else:
        hours, mins, secs = (0, *parts) if len(parts) == 2 else (parts[0], parts[1], parts[2])
    return int(days or 0) * 86400 + hours * 3600 + mins * 60 + secs


def minutes(time: str) -> int | None:
    """The same in minutes, rounded up."""
    found = seconds(time)
    return -(-found // 60) if found is not None else None


def _out_of_time(fields: Mapping[str, str]) -> bool:
    limit = seconds(fields.get("TimeLimit", "UNLIMITED"))
    return limit is not None and (seconds(fields.get("RunTime", "0:00")) or 0) >= limit


def count_gpus(gres: str) -> int:
    """GPUs in a list of generic resources: `gpu:2`, `gpu:h100:8(S:0-1),nvme:1`."""
    found = re.findall(r"(?:^|,)gpu(?::[^:,()]+)*?:(\d+)(?=\(|,|$)", gres)
    return sum(int(number) for number in found)


def node_names(node_list: str) -> list[str]:
    """The nodes of a list as Slurm writes it (`gpu[01-04,07]`)."""
    return run_slurm(["scontrol", "show", "hostnames", node_list]).split()


def node_addresses(names: Sequence[str]) -> list[str]:
    """Names or addresses at which the nodes of some partitions are reached.

    Raises:
        SlurmError: the controller does not answer.
    """
    command = ["sinfo", "--noheader", "--Node", f"--partition={','.join(names)}", "--format=%o"]
    return list(dict.fromkeys(run_slurm(command).split()))


def require_node_name(name: str) -> str:
    """The name of a node, which must be one.

    Raises:
        SlurmError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise SlurmError(
            "this is no name of a node",
            got=repr(name),
            rule="letters, digits, `.`, `_`, `-`",
            remedy="look at the host name of that machine",
        )
    return name


def batch_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for sbatch: without what an allocation that we may be in ourselves would impose."""
    given = os.environ if environment is None else environment
    imposed = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "PMI", "PMIX")
    return {name: value for name, value in given.items() if name == "SLURM_CONF" or not name.startswith(imposed)}
