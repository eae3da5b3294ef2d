"""Coverage for so long as it tells something: what it watches takes 2.5 times as long, imports of torch among it.

A test, and each call of live ranks, is watched in the first second that it computes; most that it runs later, it has
run by then. End-to-end tests are not watched, and nor is what they start, but for those marked `measured`.

Coverage watches by the interpreter's trace functions, and has one for threads that begin: with it a thread that was not
watched for a while begins anew. Its own stop and start would look through all modules, and patch the system again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import coverage

CPU_SECONDS = 1.0
CHILDREN = "COVERAGE_PROCESS_CONFIG"
"""By this variable the processes that we start are watched as well."""


@contextmanager
def briefly() -> Iterator[None]:
    """Within it, this thread is watched for CPU_SECONDS of its process; others, and other processes, all the time."""
    if coverage.Coverage.current() is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        sys.settrace(None)

    before = signal.signal(signal.SIGPROF, stop)
    signal.siginterrupt(signal.SIGPROF, False)  # libraries in C need not expect it
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
        if sys.gettrace() is None:
            sys.settrace(threading.gettrace())


@contextmanager
def not_at_all() -> Iterator[None]:
    """Within it, neither this thread nor the processes that are started are watched."""
    if coverage.Coverage.current() is None or CHILDREN not in os.environ:  # nothing is, already
        yield
        return
    children = os.environ.pop(CHILDREN)
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(threading.gettrace())
        os.environ[CHILDREN] = children
