"""A data worker: builds any rows of the stream that it is asked for. It has no state but a cache.

The class knows nothing of Ray; `cluster.py` makes an actor of it.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError, DataError
from data_pipeline.files import NO_PERMISSION
from data_pipeline.rows import RowBatch
from data_pipeline.spec import ServiceSpec
from data_pipeline.stream import Stream


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request for rows: the rows, or why there are none."""

    pid: int
    """Who answered."""
    arrays: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]] | None = None
    """Input ids, labels and document ids, (B, T) each, in the order of the request."""
    error: Mapping[str, Any] | None = None
    """`what`, `got`, `rule`, `remedy`, whether the data is `damaged`, and whether it may be gone the next time
    (`passing`)."""
    blocks_read: int = 0
    """Blocks that this worker read from shards so far."""

    def rows(self, numbers: NDArray[np.int64]) -> RowBatch:
        """The rows as a batch.

        Raises:
            DamagedDataError, DataConfigurationError: the worker could not build them.
        """
        if self.arrays is None:
            raise error_of(self.error or {})
        return RowBatch(numbers, *self.arrays)


def error_of(fields: Mapping[str, Any]) -> DataError:
    """The error that a worker met, from the fields of its reply."""
    kind = DamagedDataError if fields.get("damaged") else DataConfigurationError
    return kind(fields["what"], got=fields["got"], rule=fields["rule"], remedy=fields["remedy"])


class DataWorker:
    """Serves rows of one stream.

    Args:
        spec: a ServiceSpec as JSON values.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._values = spec  # read when first needed: an error in a constructor could not be told
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._over = threading.Event()

    def check(self) -> dict[str, Any]:
        """Facts of this process: pid, started (seconds since 1970), host, and `error` if it cannot serve."""
        import psutil

        facts = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
        return {**facts, "error": self._attempt(lambda: self._opened()).error}

    def ping(self) -> None:
        """Answers."""

    def stay(self) -> None:
        """Never answers: the call ends when this process does."""
        self._over.wait()

    def rows(self, numbers: NDArray[np.int64]) -> Reply:
        """Rows (B,) of the stream by number."""

        def build() -> Reply:
            stream = self._opened()
            batch = stream.rows(numbers)
            arrays = (batch.input_ids, batch.labels, batch.document_ids)
            return Reply(os.getpid(), arrays=arrays, blocks_read=stream.blocks_read)

        return self._attempt(build)

    def _opened(self) -> Stream:
        with self._lock:
            if self._stream is None:
                self._stream = open_stream(ServiceSpec.from_json(self._values))
            return self._stream

    def _attempt(self, work: Callable[[], Any]) -> Reply:
        """What `work` returns, or the error that it met, with the machine's name."""
        where = f"on {socket.gethostname()} (pid {os.getpid()})"
        try:
            answer = work()
        except (DamagedDataError, DataConfigurationError) as error:
            fields = {"what": error.what, "got": f"{error.got}, {where}", "rule": error.rule, "remedy": error.remedy}
            return Reply(os.getpid(), error={**fields, "damaged": isinstance(error, DamagedDataError)})
        except OSError as error:
            fields = {
                "what": "A data worker cannot read the shards.",
                "got": f"{error.strerror or error}: {error.filename or self._values.get('dataset')}, {where}",
                "rule": "every node with a data worker reads data.folder under the same path",
                "remedy": "share the folder with that node, or set data.workers.backend: inline",
            }
            # Anything else may be gone the next time: a server that restarts, a limit that was reached.
            passing = error.errno not in (errno.ENOENT, errno.ENOTDIR, *NO_PERMISSION)
            return Reply(os.getpid(), error={**fields, "damaged": False, "passing": passing})
        return answer if isinstance(answer, Reply) else Reply(os.getpid())


def open_stream(spec: ServiceSpec) -> Stream:
    """The stream that the ranks expect.

    Raises:
        DataConfigurationError: the folder is not here, or holds another dataset.
        DamagedDataError: a file of the dataset is missing or has another size.
        OSError: it cannot be read.
    """
    if not os.path.isdir(spec.dataset):
        raise DataConfigurationError(
            "A data worker has no access to the shards.",
            got=f"no folder {spec.dataset}",
            rule="every node with a data worker reads data.folder under the same path",
            remedy="share the folder with that node, or set data.workers.backend: inline",
        )
    stream = Stream(
        Dataset.open(spec.dataset),
        sequence_tokens=spec.sequence_tokens,
        packing=spec.packing,
        seed=spec.seed,
        weights=spec.weights,
        cache_bytes=spec.cache_bytes,
    )
    if stream.identity != spec.stream:
        raise DataConfigurationError(
            "A data worker would serve other rows than the run trains on.",
            got=f"stream {stream.identity} from {spec.dataset}",
            rule=f"stream {spec.stream}, as the run began",
            remedy="give all nodes the same data.folder and the same version of this package",
        )
    return stream
