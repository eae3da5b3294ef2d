"""The Ray that a command uses beside its ranks: one that runs, or a private one for as long as the command does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import LaunchConfig
from launcher.ray import PrivateRay, check_cluster, client_environment
from launcher.slurm_ray import SlurmRay
from launcher.slurm_step import Allocation


@dataclass(frozen=True)
class RayAccess:
    """A Ray cluster that may be joined."""

    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a process needs in its environment before it imports Ray."""
    dashboard_url: str | None = None


@contextmanager
def ray_access(
    launch: LaunchConfig, *, cpus: int, allocation: Allocation | None = None, log: Path | None = None
) -> Iterator[RayAccess]:
    """The cluster at launch.ray_address, looked at first; without one, a private Ray on this machine, or on all
    machines of the allocation.

    Args:
        cpus: what its workers on each machine may reserve together.
        log: of an allocation's nodes.

    Raises:
        LaunchConfigurationError: it cannot be joined, or Ray is not installed or cannot be started.
    """
    if launch.ray_address is not None:
        check_cluster(launch.ray_address, {})
        yield RayAccess(launch.ray_address, client_environment())
    elif allocation is not None and log is not None:
        with SlurmRay(allocation, cpus, log) as over_nodes:
            yield RayAccess(over_nodes.address, over_nodes.environment)
    else:
        with PrivateRay(cpus) as ray:
            yield RayAccess(ray.address, ray.environment)
