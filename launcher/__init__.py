"""Starts command lines on machines, watches them, starts them again. Knows nothing of models or data.

A rank gets the torchrun variables in its environment and answers with an exit code.
"""

from __future__ import annotations

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError, LauncherError
from launcher.exits import ExitCode, Outcome, RankExit, classify, describe
from launcher.heartbeat import Heartbeat, read_heartbeat
from launcher.job import Attempt, EventCallback, Job, JobSpec, JobState
from launcher.local import LocalJob, LocalLauncher
from launcher.rank_env import RankEnvironment
from launcher.supervisor import Action, Decision, RestartPolicy, Supervisor, SupervisorState

__all__ = [
    "Action",
    "Attempt",
    "Decision",
    "EventCallback",
    "ExitCode",
    "Heartbeat",
    "Job",
    "JobSpec",
    "JobState",
    "LaunchConfig",
    "LaunchConfigurationError",
    "LauncherError",
    "LocalJob",
    "LocalLauncher",
    "Outcome",
    "RankEnvironment",
    "RankExit",
    "RestartPolicy",
    "Supervisor",
    "SupervisorState",
    "classify",
    "describe",
    "read_heartbeat",
]
