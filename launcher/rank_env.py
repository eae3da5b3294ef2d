"""The environment that tells a rank who it is: the torchrun variables, written and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import LaunchConfigurationError


@dataclass(frozen=True)
class RankEnvironment:
    """One rank's place in the world."""

    rank: int
    """Number in the whole world, from 0."""
    world_size: int
    """Ranks in the whole world."""
    local_rank: int
    """Number on this machine, from 0."""
    local_world_size: int
    """Ranks on this machine."""
    group_rank: int
    """Number of this machine, from 0."""
    master_addr: str
    """Address of rank 0's machine."""
    master_port: int
    """TCP port at which the ranks meet."""

    def to_environment(self) -> dict[str, str]:
        """The variables, as torchrun sets them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.group_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> RankEnvironment:
        """Read the variables (of this process by default).

        Raises:
            LaunchConfigurationError: one is missing, is not a number, or they contradict each other.
        """
        given = os.environ if environment is None else environment
        found = cls(
            rank=_number(given, "RANK"),
            world_size=_number(given, "WORLD_SIZE"),
            local_rank=_number(given, "LOCAL_RANK"),
            local_world_size=_number(given, "LOCAL_WORLD_SIZE"),
            group_rank=_number(given, "GROUP_RANK"),
            master_addr=_text(given, "MASTER_ADDR"),
            master_port=_number(given, "MASTER_PORT"),
        )
        legal = (
            0 <= found.local_rank < found.local_world_size <= found.world_size
            and found.local_rank <= found.rank < found.world_size
            and found.group_rank >= 0
            and 0 < found.master_port < 65536
        )
        if not legal:
            raise LaunchConfigurationError(
                "the torchrun variables contradict each other",
                got=" ".join(f"{name}={value}" for name, value in found.to_environment().items()),
                rule="0 <= LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE, LOCAL_RANK <= RANK < WORLD_SIZE, "
                "and a TCP port",
                remedy="start ranks through `solomonov train`, torchrun or the scripts in slurm/",
            )
        return found


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise LaunchConfigurationError(
            f"the environment variable {name} is not set",
            got=f"{name}={value!r}",
            rule="a rank needs the torchrun variables",
            remedy="start ranks through `solomonov train`, torchrun or the scripts in slurm/",
        )
    return value


def _number(environment: Mapping[str, str], name: str) -> int:
    value = _text(environment, name)
    if not (value.isascii() and value.isdigit()):
        raise LaunchConfigurationError(
            f"the environment variable {name} is not a number",
            got=f"{name}={value!r}",
            rule="a whole number, 0 or greater",
            remedy="start ranks through `solomonov train`, torchrun or the scripts in slurm/",
        )
    return int(value)
