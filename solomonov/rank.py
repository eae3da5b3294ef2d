"""One rank of a run: `python -m solomonov.rank RUN_DIR`. Its answer is its exit code.

It needs the torchrun variables and reads no others, but for SOLOMONOV_HEARTBEAT, the file of its sign of life,
SOLOMONOV_ATTEMPT, the number that its supervisor counts it under, SOLOMONOV_NODE, what its machine is called, and
SOLOMONOV_RAY_ADDRESS and SOLOMONOV_RAY_NAMESPACE, where its data workers are.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from solomonov.heartbeat import Heartbeat
from solomonov.output import Unfailing, protect_output
from solomonov.runfolder import RunFolder, run_lock
from solomonov.signals import StopRequest

if TYPE_CHECKING:
    import torch

    from solomonov.distributed import RankInfo
    from solomonov.errors import SolomonovError


def main(arguments: list[str] | None = None) -> int:
    """Run this rank to its end.

    Returns:
        an exit code of `solomonov.exits`; a crash is an exception with its traceback and code 1.
    """
    (folder,) = sys.argv[1:] if arguments is None else arguments
    # Signals and stacks first: a request to stop that comes while torch is imported must not kill the rank.
    stop = StopRequest().install()
    protect_output()
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    heartbeat = Heartbeat(os.environ.get("SOLOMONOV_HEARTBEAT"))
    heartbeat.beat("start", 0)
    run = RunFolder(Path(folder))

    from data_pipeline.errors import DataError
    from solomonov.errors import SolomonovError

    try:
        with ExitStack() as stack:
            return _run(run, stop, heartbeat, stack)
    except (SolomonovError, DataError) as error:
        # Messages for people; the peers learn of it by this rank's end.
        print(f"error: {error}", file=sys.stderr, flush=True)
        run.journal.try_write(
            "fault", rank=int(os.environ.get("RANK", "0")), kind=type(error).__name__, message=str(error)
        )
        return error.exit_code
    finally:
        heartbeat.close()


def _run(run: RunFolder, stop: StopRequest, heartbeat: Heartbeat, stack: ExitStack) -> int:
    config = run.config()
    if config.run.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from solomonov.distributed import Control, RankInfo, meet, pick_device, start_process_group, stop_process_group
    from solomonov.feed import ClusterPlace
    from solomonov.memory import is_refusal
    from solomonov.preflight import Preflight
    from solomonov.train import train

    info = RankInfo.from_environment()
    given = os.environ.get("SOLOMONOV_ATTEMPT")
    if given is None and info.rank == 0:
        _own_the_run(run, stack)
    torch.use_deterministic_algorithms(config.run.deterministic)
    device = pick_device(info)
    store, look = meet(info), None
    if config.resilience.preflight == "always" or (config.resilience.preflight == "auto" and info.several_machines):
        look = Preflight(run, info, device, store)
        look.exchange()
    start_process_group(info, device, store)
    control = Control()
    if look is not None:
        look.measure(control)
    attempt = int(given) if given is not None else None
    try:
        code = train(run, control, device, stop, heartbeat, ClusterPlace.from_environment(), attempt)
    except (RuntimeError, MemoryError) as error:
        if not is_refusal(error):
            raise
        raise _no_memory(run, info, device, error) from error
    stop_process_group()
    return code


def _no_memory(run: RunFolder, info: RankInfo, device: torch.device, error: BaseException) -> SolomonovError:
    """What the plan says to an allocation that failed on this rank."""
    from data_pipeline.dataset import Dataset
    from solomonov.devices import this_device
    from solomonov.engine_spec import resolve_precision
    from solomonov.memory import peak_bytes
    from solomonov.planner import Question, cannot_allocate

    config = run.config()
    with Dataset.open(run.data_folder()) as dataset:
        vocab_size = dataset.manifest.vocab_size
    precision = resolve_precision(config.training.precision, device)
    question = Question(config, vocab_size, info.world, this_device(info.local_world), precision)
    return cannot_allocate(question, error, peak_bytes(device))


def _own_the_run(run: RunFolder, stack: ExitStack) -> None:
    """Without a supervisor, which would hold the lock, rank 0 takes it and counts the attempt."""
    stack.enter_context(run_lock(run))
    run.journal.write("attempt_started", attempt=run.journal.next_attempt(), supervisor=None)


def _leave_on_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what happened and leave at once: after a fault the collectives' threads may wait for peers that are gone."""
    # Not sys.stderr: torch.distributed wraps this hook and catches in memory what is written there.
    if sys.__stderr__ is not None:
        log = Unfailing(sys.__stderr__)
        traceback.print_exception(kind, error, trace, file=log)
        log.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.excepthook = _leave_on_crash
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
