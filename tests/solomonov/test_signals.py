"""Real signals to a real process: what is remembered, what changes nothing, and what ends it at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from solomonov.exits import INTERRUPTED
from solomonov.signals import SAVE_SIGNALS, StopRequest
from tests.support.processes import ROOT, Program, program_environment

# Prints what is remembered after each signal; `signal.pause` returns when a handler has run.
CODE = """
import signal
from solomonov.signals import StopRequest
stop = StopRequest().install()
print("ready", stop.requested, flush=True)
while True:
    signal.pause()
    print("signal", stop.requested, stop.received, flush=True)
"""


@contextmanager
def child(folder: Path) -> Iterator[Program]:
    argv = [sys.executable, "-c", CODE]
    with Program(argv, log=folder / "log.txt", cwd=ROOT, env=program_environment()) as program:
        program.wait_for(lambda: "ready False" in program.output(), deadline=60, what="the handlers")
        yield program


def send(program: Program, number: int, *, lines: int) -> str:
    """Sends a signal and waits until the program has said as many lines; the last one."""
    program.send(number)
    program.wait_for(lambda: program.output().count("signal ") >= lines, deadline=30, what=f"signal {number}")
    return program.output().splitlines()[-1]


@pytest.mark.parametrize("number", SAVE_SIGNALS)
def test_each_signal_asks_to_save_and_ends_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with child(tmp_path) as program:
        assert send(program, number, lines=1) == f"signal True {number.name}"
        assert program.running


def test_the_first_one_is_remembered_whatever_follows(tmp_path: Path) -> None:
    with child(tmp_path) as program:
        for count, number in enumerate((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM), start=1):
            assert send(program, number, lines=count) == "signal True SIGUSR1"
        assert program.running


def test_the_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    with child(tmp_path) as program:
        assert send(program, signal.SIGINT, lines=1) == "signal True SIGINT"
        program.send(signal.SIGINT)
        assert program.wait(deadline=30) == INTERRUPTED


def test_nothing_is_requested_before() -> None:
    stop = StopRequest()
    assert not stop.requested
    assert stop.received is None
