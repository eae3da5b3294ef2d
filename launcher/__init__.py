"""Starts command lines on machines, watches them, starts them again. Knows nothing of models or data.

A rank gets the torchrun variables in its environment and answers with an exit code.
"""

from __future__ import annotations

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError, LauncherError
from launcher.exits import ExitCode, Outcome, RankExit, classify, describe
from launcher.heartbeat import Heartbeat, read_heartbeat
from launcher.job import Attempt, EventCallback, Job, JobSpec, JobState, Sidecar
from launcher.local import LocalJob, LocalLauncher
from launcher.rank_env import RankEnvironment
from launcher.ray import PrivateRay, check_cluster, client_environment, require_ray
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
    "PrivateRay",
    "RankEnvironment",
    "RankExit",
    "RestartPolicy",
    "Sidecar",
    "Supervisor",
    "SupervisorState",
    "check_cluster",
    "classify",
    "client_environment",
    "describe",
    "read_heartbeat",
    "require_ray",
]
