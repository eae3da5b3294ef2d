"""The ranks' logs, each line behind the number of its rank."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from solomonov.runfolder import RunFolder

FOLLOW_SECONDS = 0.3
"""Between two looks at the files."""


STARTERS = {-1: ("ray", "holder.log"), -2: ("srun", "srun.log")}
"""In place of a rank: what starts the ranks of an attempt elsewhere, what it is called here, and its log."""


def newest_attempt(run: RunFolder) -> tuple[int, list[tuple[int, Path]]]:
    """Number of the newest attempt and (rank, log) of each of its ranks; (0, []) before the first.

    Of an attempt on a cluster that has started no rank (one of STARTERS, log), which says why.
    """
    attempts = _numbered(run.logs, r"attempt-(\d+)")
    if not attempts:
        return 0, []
    number, folder = attempts[-1]
    ranks = _numbered(folder, r"rank-(\d+)\.log")
    starters = [(place, folder / log) for place, (_, log) in STARTERS.items()]
    return number, ranks or [(place, log) for place, log in starters if log.exists()]


def _label(rank: int) -> str:
    return f"[{STARTERS[rank][0]}]" if rank in STARTERS else f"[{rank}]"


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(pattern, path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def show(run: RunFolder, *, lines: int) -> None:
    """The last lines of every rank of the newest attempt, rank by rank."""
    number, logs = newest_attempt(run)
    ranks = sum(rank not in STARTERS for rank, _ in logs)
    print(f"{run.path}: attempt {number}, {ranks} ranks" if logs else f"{run.path}: no attempt has begun yet")
    for rank, path in logs:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]:
            print(f"{_label(rank)} {line}")


def follow(run: RunFolder, *, lines: int, goes_on: Callable[[], bool]) -> None:
    """All ranks' lines as they come, over attempts, until the run has ended.

    Args:
        lines: how many old ones of each rank are shown first.
        goes_on: tells whether more may come.
    """
    current = 0
    files: dict[int, _Tail] = {}
    while True:
        live = goes_on()
        number, logs = newest_attempt(run)
        if number != current:
            _flush(files)
            print(f"--- attempt {number}", flush=True)
            files = {}
        for rank, path in logs:
            if rank not in files:
                files[rank] = _Tail(path, lines if current == 0 else None)
        current = number
        _flush(files)
        if not live:
            return
        time.sleep(FOLLOW_SECONDS)


def _flush(files: dict[int, _Tail]) -> None:
    for rank, tail in sorted(files.items()):
        for line in tail.new_lines():
            sys.stdout.write(f"{_label(rank)} {line}\n")
    sys.stdout.flush()


class _Tail:
    """The lines of one growing file."""

    def __init__(self, path: Path, last: int | None) -> None:
        self._path, self._offset, self._last = path, 0, last

    def new_lines(self) -> list[str]:
        """Whole lines that were not given before; of the first ones only the last."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = whole.decode("utf-8", errors="replace").splitlines()
        last, self._last = self._last, None
        return found if last is None else found[-last:]
