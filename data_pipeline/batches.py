"""Which rows of the stream a step trains on: a function of three numbers, never of the machines."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchRows:
    """Consecutive rows for each step, of batches that may grow at first.

    With B = `full`, b = `first` and W = `over`, a step before which n rows were trained on has as many rows as the
    greatest multiple of b that is not above b + (B - b) n / W, and B where n >= W. So the batches are a few runs of
    equal ones, of b, 2b, 3b rows and so on.

    Raises:
        ValueError: a number that makes no sense.
    """

    full: int
    """Rows of a step in the end."""
    first: int = 0
    """Rows of the first step; 0: `full`."""
    over: int = 0
    """Rows that are trained on until a step has `full`; 0: it has them from the beginning."""

    def __post_init__(self) -> None:
        if self.full < 1 or not 0 <= self.first <= self.full or self.over < 0 or (self.over and not self.first):
            raise ValueError(
                f"batches of {self.full} rows, of {self.first} at first and over {self.over} rows: at least 1 row, at"
                " first between 1 and so many, over 0 rows or more"
            )

    def before(self, step: int) -> int:
        """Number of rows of the steps before `step`, which is that of the first row of it."""
        begin, row, rows = self._runs[bisect_right(self._runs, step, key=lambda run: run[0]) - 1]
        return row + (step - begin) * rows

    def rows(self, step: int) -> range:
        """The rows of a step (counted from 0)."""
        return range(self.before(step), self.before(step + 1))

    def steps(self, rows: int) -> int:
        """The least number of steps that have so many rows together."""
        begin, row, size = self._runs[bisect_right(self._runs, rows, key=lambda run: run[1]) - 1]
        return begin - (row - rows) // size

    @property
    def warmup_steps(self) -> int:
        """Steps with less rows than `full`."""
        return self._runs[-1][0]

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """(first step, first row, rows of a step) of each run of equal batches."""
        runs, step, row = [], 0, 0
        for size in range(self.first, self.full, self.first) if self.over else ():
            # The line passes size + first at ceil(size W / (B - b)) rows, but the last run ends at W.
            next_size = size + self.first
            end = self.over if next_size > self.full else -(-size * self.over // (self.full - self.first))
            steps = max(0, -(-(end - row) // size))
            if steps:
                runs.append((step, row, size))
            step, row = step + steps, row + steps * size
        return [*runs, (step, row, self.full)]
