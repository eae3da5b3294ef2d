"""The `launch` section: how many ranks are started where, and how often they are started again."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from launcher.section import Section

PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
"""Text that stays on one line of whatever shows it."""
Line = Annotated[str, Field(pattern=PRINTABLE)]


def _is_yes(value: object) -> object:
    return "yes" if value is True else value  # as YAML reads the word


class SlurmConfig(Section):
    """What is asked of Slurm; each key is the sbatch option of that name unless it says otherwise."""

    account: Line | None = None
    """Who is charged; null: the user's default."""
    qos: Line | None = None
    """Quality of service; null: the user's default."""
    constraint: Line | None = None
    """Features that a node must have."""
    time_minutes: int | None = Field(default=None, ge=1)
    """Time limit of one start of the job (`--time`); null: the partition's own. A run that needs longer saves
    before the limit and goes on in the next one."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """null: `launch.ranks_per_node` where the partition has GPUs, else none."""
    cpus_per_rank: int | None = Field(default=None, ge=1)
    """`--cpus-per-task`."""
    memory_mib_per_node: int | None = Field(default=None, ge=0)
    """`--mem`; 0: all that a node has."""
    exclusive: bool = False
    """No other job on its nodes."""
    exclude: tuple[Line, ...] = ()
    """Nodes to avoid."""
    dependency: Line | None = None
    """What must have happened before it starts, for instance `afterok:123` or `singleton`."""
    array_at_once: int | None = Field(default=None, ge=1)
    """Runs of a sweep (`solomonov submit --sweep`) that may run at a time; null: as many as there is room for."""
    save_seconds: int = Field(default=120, ge=1)
    """How long before the time limit the ranks are asked to save (`--signal`); it may come up to a minute earlier."""
    setup_script: Line | None = None
    """A bash file to source on the first node before anything is started: `module load`, a virtual environment."""
    container_image: Line | None = None
    """Image in which the ranks run (srun's `--container-image`, of the Pyxis plug-in)."""
    container_mounts: Line | None = None
    """Folders of the node that the container sees (`--container-mounts`)."""
    options: tuple[Line, ...] = ()
    """More options for sbatch, as they are, for instance `--reservation=night`."""

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not re.match(r"--[a-z]", option):
                raise ValueError(f"{option!r} is no option: each begins with `--`, its value follows after `=`")
        return options

    @property
    def srun_options(self) -> list[str]:
        """Options of the step in which the ranks run; srun does not take the CPUs of a rank from the job."""
        given = {
            "container-image": self.container_image,
            "container-mounts": self.container_mounts,
            "cpus-per-task": self.cpus_per_rank,
        }
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


class RayConfig(Section):
    """What is asked of Ray, where it starts the run."""

    cpus_per_rank: float = Field(default=1.0, gt=0.0)
    """CPUs that a rank reserves."""
    gpus_per_rank: float | None = Field(default=None, ge=0.0)
    """GPUs that a rank reserves; null: one where the cluster has any, else none."""
    min_ranks: int | None = Field(default=None, ge=1)
    """The run goes on with as few ranks as this when nodes are gone, and with more when they are back, up to
    `launch.nodes` times `launch.ranks_per_node`, in numbers that divide the batch; null: always with all of them."""
    start_seconds: float = Field(default=60.0, gt=0.0)
    """How long a start waits for room in the cluster, and then for its processes."""


class LaunchConfig(Section):
    """Where the ranks run, and what happens when one of them dies."""

    nodes: int = Field(default=1, ge=1)
    """Machines that the run spans; `train` and `submit --on local` know one."""
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
    slurm: SlurmConfig = SlurmConfig()
    """What else is asked of Slurm, where it starts the run."""
    ray: RayConfig = RayConfig()
    """What else is asked of Ray, where it starts the run."""
    ray_address: str | None = Field(default=None, min_length=1)
    """host:port of the head of a Ray cluster that runs, with a node on this machine, where something wants Ray;
    null: a private Ray is started on this machine for as long as the command runs."""
    shared_folder: Annotated[Literal["auto", "yes"], BeforeValidator(_is_yes)] = "auto"
    """Whether the machines of a cluster see the run's folder. `auto`: `submit` refuses a folder in the memory of this
    machine, or on its disk where the cluster has other machines, unless it is exported by NFS; `yes`: they do, under
    the same path, whatever it looks like here."""
