"""The `launch` section: how many ranks are started where, and how often they are started again."""

from __future__ import annotations

from pydantic import Field, field_validator

from launcher.section import Section


class LaunchConfig(Section):
    """Where the ranks run, and what happens when one of them dies."""

    nodes: int = Field(default=1, ge=1)
    """Machines that the run spans. This version launches on one machine."""
    ranks_per_node: int | None = Field(default=1, ge=1)
    """Processes on each machine, one a device; null: as many as the machine has devices."""
    max_restarts: int = Field(default=10, ge=0)
    """How often a crashed run is started again by one command before it gives up."""
    max_no_progress: int = Field(default=3, ge=1)
    """Crashes in a row without a newer durable step after which restarting is given up: the fault repeats."""
    restart_backoff_seconds: float = Field(default=1.0, ge=0.0)
    """Wait before a restart; doubled for each further crash without progress, at most a minute."""
    grace_seconds: float = Field(default=300.0, gt=0.0)
    """Time between asking the ranks to save and leave (SIGTERM) and killing them (SIGKILL)."""
    master_port: int | None = Field(default=None, ge=1, le=65535)
    """TCP port at which the ranks meet; null: a free one is found for each attempt."""
    partition: str | None = Field(default=None, min_length=1)
    """Partition (queue) of a cluster; means nothing to ranks on this machine."""

    ray_address: str | None = Field(default=None, min_length=1)
    """host:port of the head of a Ray cluster that runs, with a node on this machine, where something wants Ray;
    null: a private Ray is started on this machine for as long as the command runs."""

    @field_validator("nodes")
    @classmethod
    def _one_node(cls, nodes: int) -> int:
        if nodes != 1:
            raise ValueError(
                f"{nodes} nodes are not supported: this version launches on one machine; "
                "set launch.nodes: 1, and launch.ranks_per_node to the number of its devices"
            )
        return nodes
