"""The ranks' logs as a person sees them, against files that grow while they are read."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import solomonov.logs
from solomonov.logs import follow, newest_attempt, show
from solomonov.runfolder import RunFolder
from tests.support.processes import wait_for

SECONDS = 60.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def log(run: RunFolder, attempt: int, rank: int, data: bytes | str) -> Path:
    """Append to a rank's log."""
    path = run.logs / f"attempt-{attempt}" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def test_the_newest_attempt_is_the_highest_number(run: RunFolder) -> None:
    assert newest_attempt(run) == (0, [])
    run.logs.mkdir()
    assert newest_attempt(run) == (0, [])
    log(run, 9, 0, "old")
    logs = [log(run, 10, rank, "new") for rank in (0, 2, 10)]
    log(run, 10, 1, "").rename(run.logs / "attempt-10" / "rank-1.log.gz")
    (run.logs / "attempt-11.bak").mkdir()
    (run.logs / "slurm-12.log").touch()
    assert newest_attempt(run) == (10, list(zip((0, 2, 10), logs, strict=True)))


def test_the_last_lines_of_every_rank_are_shown(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    show(run, lines=2)
    assert capsys.readouterr().out == f"{run.path}: no attempt has begun yet\n"
    log(run, 1, 0, "of an earlier one\n")
    log(run, 2, 1, "a\nb\nc\n")
    log(run, 2, 0, b"only \xff\nhalf a li")
    show(run, lines=2)
    assert capsys.readouterr().out == f"{run.path}: attempt 2, 2 ranks\n[0] only �\n[0] half a li\n[1] b\n[1] c\n"


def test_ray_is_heard_where_no_rank_was_started(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (log(run, 1, 0, "of a rank\n").parent / "holder.log").write_text("of Ray\n")
    show(run, lines=3)
    assert capsys.readouterr().out == f"{run.path}: attempt 1, 1 ranks\n[0] of a rank\n", "the ranks say what happens"
    log(run, 2, 0, "").rename(run.logs / "attempt-2" / "holder.log")
    (run.logs / "attempt-2" / "holder.log").write_text("one\ntwo\nthe start timed out\nno room\n")
    show(run, lines=2)
    assert capsys.readouterr().out == f"{run.path}: attempt 2, 0 ranks\n[ray] the start timed out\n[ray] no room\n"


def test_srun_is_heard_where_no_rank_was_started(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, 1, 0, "").rename(run.logs / "attempt-1" / "srun.log")
    (run.logs / "attempt-1" / "srun.log").write_text("srun: one\nsrun: unrecognized option\n")
    show(run, lines=1)
    assert capsys.readouterr().out == f"{run.path}: attempt 1, 0 ranks\n[srun] srun: unrecognized option\n"
    follow(run, lines=2, goes_on=looks(lambda: None, lambda: log(run, 1, 0, "of a rank\n")))
    assert capsys.readouterr().out.splitlines() == [
        "--- attempt 1",
        "[srun] srun: one",
        "[srun] srun: unrecognized option",
        "[0] of a rank",
    ]


def looks(*acts: Callable[[], object]) -> Callable[[], bool]:
    """`goes_on` of a run that does one thing before each look, and has ended after the last."""
    left = list(acts)

    def goes_on() -> bool:
        left.pop(0)()
        return bool(left)

    return goes_on


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solomonov.logs, "FOLLOW_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_lines_are_shown_once_and_whole_over_attempts(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def dies() -> None:
        log(run, 1, 0, "last words\n")
        log(run, 2, 0, "again 1\nagain 2\nagain 3\n")

    follow(
        run,
        lines=1,
        goes_on=looks(
            lambda: None,
            lambda: log(run, 1, 0, "old\nold too\nha"),
            lambda: log(run, 1, 0, "lf\n"),
            lambda: log(run, 1, 1, "late\nbut whole\n"),
            lambda: None,
            dies,
            lambda: log(run, 2, 0, "the end\n"),
        ),
    )
    assert capsys.readouterr().out.splitlines() == [
        "--- attempt 1",
        "[0] old too",
        "[0] half",
        "[1] late",
        "[1] but whole",
        "[0] last words",
        "--- attempt 2",
        "[0] again 1",
        "[0] again 2",
        "[0] again 3",
        "[0] the end",
    ]


def test_what_came_before_the_end_was_noticed_is_shown(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    follow(run, lines=20, goes_on=looks(lambda: log(run, 1, 0, "all of it\n")))
    assert capsys.readouterr().out == "--- attempt 1\n[0] all of it\n"


def test_a_run_without_an_attempt_ends_silently(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    follow(run, lines=20, goes_on=lambda: False)
    assert capsys.readouterr().out == ""


@given(st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"a", b"\n")), max_size=8))
def test_whatever_the_pieces_every_whole_line_comes_once(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    """Also where a piece ends within a character."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    log(run, 1, 0, "")
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(solomonov.logs, "FOLLOW_SECONDS", 0.0)
        acts = [lambda: log(run, 1, 0, "first\n"), *[lambda piece=piece: log(run, 1, 0, piece) for piece in pieces]]
        follow(run, lines=10**6, goes_on=looks(*acts))
    whole = b"first\n" + b"".join(pieces)
    whole = whole[: whole.rfind(b"\n") + 1]
    expected = [f"[0] {line}\n" for line in whole.decode("utf-8", errors="replace").splitlines()]
    assert shown.getvalue() == "--- attempt 1\n" + "".join(expected)


def test_a_growing_log_is_followed_as_it_grows(run: RunFolder) -> None:
    """With real time between the looks."""
    shown, ended = io.StringIO(), threading.Event()
    log(run, 1, 0, "1\n")

    def has(line: str) -> bool:
        return line in shown.getvalue()

    with contextlib.redirect_stdout(shown):
        thread = threading.Thread(target=lambda: follow(run, lines=20, goes_on=lambda: not ended.is_set()))
        thread.start()
        try:
            for number in range(2, 5):
                before = f"[0] {number - 1}\n"
                wait_for(partial(has, before), deadline=SECONDS, what="the line before")
                log(run, 1, 0, f"{number}\n")
        finally:
            ended.set()
            thread.join(SECONDS)
    assert shown.getvalue() == "--- attempt 1\n" + "".join(f"[0] {number}\n" for number in range(1, 5))
