"""The real Slurm of this machine: jobs that a test leaves behind are cancelled, nodes that it killed come back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from launcher.slurm_commands import show_job
from tests.support.processes import wait_for

END_SECONDS = 90.0


def slurm(*command: str) -> str:
    """Run one of Slurm's commands; its stdout."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class SlurmCluster:
    """What a test does to the cluster; used in a `with` statement.

    Args:
        folder: for logs of jobs that the test itself submits.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs_before = self._jobs()
        self._killed: dict[str, tuple[list[str], str | None]] = {}

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(self, *details: object) -> None:
        for node in list(self._killed):
            self.revive(node)
        left = self._jobs() - self._jobs_before
        if left:
            slurm("scancel", *left)
        wait_for(lambda: not self._jobs() - self._jobs_before, deadline=END_SECONDS, what="the test's jobs have left")
        wait_for(self._idle, deadline=END_SECONDS, what="all nodes are idle again")

    @staticmethod
    def _jobs() -> set[str]:
        return set(slurm("squeue", "--noheader", "--format=%A").split())

    @staticmethod
    def _idle() -> bool:
        return set(slurm("sinfo", "--noheader", "--format=%T").split()) <= {"idle", "mixed", "allocated"}

    def sbatch(self, *words: str) -> str:
        """Submit a job; returns its number."""
        output = f"--output={self._folder}/other-%j.log"
        return slurm("sbatch", "--parsable", output, *words).strip()

    def urgent(self, nodes: int, seconds: float = 1.0) -> str:
        """A job on whole nodes of the partition that preempts the others; returns its number."""
        return self.sbatch("--partition=main", "--exclusive", f"--nodes={nodes}", f"--wrap=sleep {seconds}")

    def kill_node(self, node: str) -> None:
        """SIGKILL to the slurmd of a node: what it has started lives on, and Slurm loses sight of it."""
        daemon = self._daemon(node)
        self._killed[node] = daemon.cmdline(), daemon.environ().get("SLURM_CONF")
        daemon.send_signal(signal.SIGKILL)

    def revive(self, node: str) -> None:
        """Start the slurmd of a node again."""
        command, configuration = self._killed.pop(node)
        # The other files of the configuration lie beside this one, and not beside a link to it.
        environment = {**os.environ, **({"SLURM_CONF": configuration} if configuration is not None else {})}
        # Under the host name of the node, where this user may give it one.
        names = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node]
        own = subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True).returncode == 0
        subprocess.run([*names, *command] if own else command, check=True, capture_output=True, env=environment)
        wait_for(lambda: self._up(node), deadline=END_SECONDS, what=f"{node} is back")

    @staticmethod
    def _up(node: str) -> bool:
        state = slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split()[0]
        if state.startswith(("down", "drain")) and not state.endswith("*"):
            slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return state in ("idle", "mixed", "allocated", "completing")

    @staticmethod
    def _daemon(node: str) -> psutil.Process:
        (found,) = [
            process
            for process in psutil.process_iter(["cmdline", "name"])
            if process.info["name"] == "slurmd" and process.info["cmdline"][-1:] == [node]
        ]
        return found


def state_of_job(job: str) -> str:
    """As the controller calls it; empty where it does not know the job."""
    shown = show_job(job)
    return shown.state if shown is not None else ""


def wait_for_state(job: str, *states: str, deadline: float = 120.0) -> str:
    """Wait until a job is in one of these states."""
    return wait_for(
        lambda: found if (found := state_of_job(job)) in states else "",
        deadline=deadline,
        what=f"Slurm's job {job} is {' or '.join(states)}",
    )


def first_node(job: str) -> str:
    """The node on which a job's script runs."""
    shown = show_job(job)
    assert shown is not None
    return slurm("scontrol", "show", "hostnames", shown.nodes).split()[0]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Live processes that were started for a folder, on whichever node."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words: Sequence[str] = process.info["cmdline"] or ()
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def nothing_left(folder: Path) -> None:
    """Wait until no process of a folder is left."""
    wait_for(lambda: not processes_of(folder), deadline=END_SECONDS, what=f"no process of {folder}")


def number_of(text: str) -> str:
    """The job's number in what `solomonov submit` prints."""
    found = re.search(r"^job\s+(\d+)$", text, re.MULTILINE)
    assert found, text
    return found[1]
