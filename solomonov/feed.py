"""Where a rank's rows come from: built in a thread of its own, or by the data workers of the run's Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from data_pipeline.cluster import ClusterLost, WorkerDirectory, join
from data_pipeline.loader import Loader
from data_pipeline.remote import RemoteRows
from data_pipeline.rows import RowBatch
from data_pipeline.spec import ServiceSpec
from data_pipeline.stream import Stream
from solomonov.config import Config
from solomonov.errors import ConfigurationError
from solomonov.plan import BatchPlan

OnEvent = Callable[..., None]


@dataclass(frozen=True)
class ClusterPlace:
    """The Ray cluster of a run's data workers, and where in it their names live."""

    address: str
    """host:port of the head."""
    namespace: str
    """Of the run and the command."""

    def to_environment(self) -> dict[str, str]:
        """The variables that tell a rank."""
        return {"SOLOMONOV_RAY_ADDRESS": self.address, "SOLOMONOV_RAY_NAMESPACE": self.namespace}

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> ClusterPlace | None:
        """What this rank was told; None without Ray."""
        address = environment.get("SOLOMONOV_RAY_ADDRESS")
        namespace = environment.get("SOLOMONOV_RAY_NAMESPACE")
        return ClusterPlace(address, namespace) if address and namespace else None


def service_spec(config: Config, stream_identity: str, place: ClusterPlace) -> ServiceSpec:
    """What the run's data service is told."""
    return ServiceSpec(
        address=place.address,
        namespace=place.namespace,
        workers=config.data.workers.count,
        cpus=config.data.workers.cpus,
        dataset=str(Path(config.data.folder).expanduser().absolute()),
        stream=stream_identity,
        sequence_tokens=config.data.sequence_tokens,
        packing=config.data.packing,
        seed=config.run.seed,
        weights={source.name: source.weight for source in config.data.sources},
        cache_bytes=config.data.cache_bytes,
    )


class Feed:
    """A rank's micro-batches, step by step, and what befell the data workers meanwhile."""

    def __init__(self, steps: Iterator[list[RowBatch]], remote: RemoteRows | None = None) -> None:
        self._steps, self._remote = steps, remote

    def __iter__(self) -> Iterator[list[RowBatch]]:
        return self._steps

    def faults(self) -> tuple[int, int]:
        """Requests that this rank sent again, and data workers that it lost, in this attempt."""
        return (self._remote.reissued, self._remote.lost) if self._remote is not None else (0, 0)


def idle_feed() -> Feed:
    """Of a rank that computes without rows (an inner stage of a pipeline): it asks for none."""
    return Feed(repeat([]))


@contextmanager
def open_feed(
    config: Config,
    plan: BatchPlan,
    stream: Stream,
    *,
    rank: int,
    first_step: int,
    place: ClusterPlace | None,
    on_event: OnEvent,
    hurry: Callable[[], bool] = lambda: False,
) -> Iterator[Feed]:
    """The micro-batches of this rank's coming steps.

    Args:
        place: the data workers' cluster, where the configuration wants them.
        on_event: told of faults of the data workers.
        hurry: says that the rank was asked to leave: it then waits no longer for data workers.

    Raises:
        ConfigurationError: data workers are wanted, and this rank was not told where.
    """
    with ExitStack() as stack:
        arguments = {"dp_rank": rank, "dp_size": plan.data_parallel}
        remote: RemoteRows | None = None
        if config.data.workers.backend == "ray" and _joined(config, place, on_event):
            numbers = Loader(stream, batches=plan.batches, **arguments, micro_batch_rows=1, prefetch_steps=0)
            remote = RemoteRows(
                WorkerDirectory(config.data.workers.count),
                stream,
                config.data.workers,
                rows_of=numbers.row_numbers,
                steps=range(first_step, plan.total_steps),
                on_event=on_event,
                hurry=hurry,
            )
        if remote is not None:
            stack.callback(remote.close)
        loader = Loader(
            stream if remote is None else remote,
            batches=plan.batches,
            **arguments,
            micro_batch_rows=plan.micro_rows,
            first_step=first_step,
            end_step=plan.total_steps,
            prefetch_steps=config.data.prefetch_steps,
        )
        feed = Feed(iter(stack.enter_context(loader)), remote)
        if remote is not None:
            stack.callback(remote.cancel)  # before the loader: its thread may be waiting for rows
        yield feed


def _joined(config: Config, place: ClusterPlace | None, on_event: OnEvent) -> bool:
    """Joins the data workers' cluster; False, and an event, where that cannot be done."""
    if place is None:
        raise ConfigurationError(
            "this rank was not told where its data workers are",
            got="data.workers.backend: ray, SOLOMONOV_RAY_ADDRESS or SOLOMONOV_RAY_NAMESPACE not in the environment",
            rule="ranks with Ray data workers are started by `solomonov train`, which sets both",
            remedy=f"start the run with `solomonov train`, or set data.workers.backend: inline (run {config.run.name})",
        )
    try:
        join(place.address, place.namespace)
    except ClusterLost as error:
        on_event("fallback", what="Ray data workers", to="inline", reason=str(error))
        return False
    return True
