"""One live rank of the pool in `tests.support.ranks`: joins its group once, then runs what it is sent.

Requests and answers are pickles sent as bytes. `Connection.send` would not do: torch teaches its pickler to
pass tensors as shared memory, which is gone when the sender ends.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # above the deadline of any call, which reports


@dataclass(frozen=True)
class Request:
    """A call of a module-level function."""

    module: str
    qualname: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """An exception, as text: the parent need not be able to import or unpickle its type."""

    kind: str
    message: str
    trace: str


def resolve(module: str, qualname: str) -> Any:
    """The object that `module:qualname` names."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def close_engines() -> None:
    """Engines that a function leaves would live on, and their process groups with them: see `Engine.close`."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from solomonov.engine import Engine

    for thing in gc.get_objects():
        if issubclass(type(thing), Engine):
            thing.close()
        elif issubclass(type(thing), DeepSpeedEngine):
            thing.destroy()


def answer(request: bytes) -> bytes:
    """Runs one pickled request and returns the pickled (ok, value or Failure)."""
    import torch

    from solomonov.distributed import groups_end_within
    from tests.support import measuring

    environment, folder = dict(os.environ), os.getcwd()
    torch.manual_seed(0)
    try:
        call: Request = pickle.loads(request)
        function = resolve(call.module, call.qualname)
        with groups_end_within(), measuring.briefly():
            reply = pickle.dumps((True, function(*call.args, **call.kwargs)))
            close_engines()
    except BaseException as error:  # noqa: BLE001 - whatever a test raises is its result
        trace = "".join(traceback.format_exception(error))
        reply = pickle.dumps((False, Failure(type(error).__qualname__, str(error), trace)))
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        gc.collect()
    return reply


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--stacks", type=Path, required=True)
    options = parser.parse_args()
    if os.getppid() != options.parent:  # the parent ended before the kernel was asked to tell
        sys.exit(1)
    stacks = options.stacks.open("wb")
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True)

    import deepspeed.ops
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build at the first engine
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=GROUP_TIMEOUT,
    )
    channel = Connection(options.channel)
    channel.send_bytes(b"ready")
    while True:
        try:
            request = channel.recv_bytes()
        except EOFError:  # the parent closed its end: the pool is closed
            break
        reply = answer(request)
        sys.stdout.flush()
        sys.stderr.flush()
        channel.send_bytes(reply)
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.support import rank_worker  # so that pickled classes have one module name, not __main__

    rank_worker.main()
