"""Progress: bars on a terminal, lines elsewhere, silence on request, times of phases in any case."""

from __future__ import annotations

import io

import pytest

from data_pipeline.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def work(progress: Progress, name: str = "phase", tasks: int = 3) -> None:
    with progress.phase(name, tasks) as phase:
        for _ in range(tasks):
            phase.advance()


def test_elsewhere_one_line_a_phase() -> None:
    stream = io.StringIO()
    with Progress(show=True, stream=stream) as progress:
        work(progress, "first")
        work(progress, "second", 1)
        progress.line("a remark [with brackets]")
    first, second, remark = stream.getvalue().splitlines()
    assert first.startswith("first: 3 of 3, ")
    assert second.startswith("second: 1 of 1, ")
    assert remark == "a remark [with brackets]"
    assert set(progress.seconds) == {"first", "second"}


def test_on_a_terminal_a_bar_that_ends_full() -> None:
    stream = Terminal()
    with Progress(show=True, stream=stream) as progress:
        work(progress, "first")
        progress.line("a remark [with brackets]")
    assert "first" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "a remark [with brackets]" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_is_shown_where_it_is_not_wanted(stream: io.StringIO) -> None:
    with Progress(show=False, stream=stream) as progress:
        work(progress)
        progress.line("a remark")
    assert stream.getvalue() == ""
    assert progress.seconds["phase"] >= 0


def test_a_phase_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    with Progress(show=True, stream=stream) as progress:
        phase = progress.phase("phase", 2)
        with pytest.raises(ZeroDivisionError), phase:
            divmod(1, 0)
    assert stream.getvalue() == ""
