"""Where a run stands: from its own records, and from whoever runs it as far as that answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from solomonov import exits
from solomonov.display import last_line
from solomonov.runfolder import RunFolder
from solomonov.start import finished_step

LIVE = ("pending", "running", "stopping")
NO_END = ("created", "lost")
"""States of a run that does not live, and whose records know of no end."""
_BY_EXIT_CODE = {exits.DONE: "done", exits.AGAIN: "saved", exits.INTERRUPTED: "cancelled"}


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    run: str
    state: str
    """created, pending, running, stopping, done, saved, cancelled, failed, lost: it ended without a word;
    unknown: its scheduler does not answer."""
    backend: str | None
    job: str | None
    step: int
    """Updates done."""
    total_steps: int
    loss: float | None
    durable_step: int
    attempt: int
    restarts: int
    """Of the ranks, since the newest submission."""
    exit_code: int | None
    """Of the newest command that ended."""
    reason: str | None
    seconds_since_step: float | None

    @property
    def is_live(self) -> bool:
        """It runs, or will."""
        return self.state in LIVE

    def sentence(self) -> str:
        """One line for people."""
        where = f"step {self.step} of {self.total_steps}"
        job = f", {self.backend} job {self.job}" if self.job is not None else ""
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.run}: {self.state}, {where}{job}{why}"

    def row(self) -> dict[str, Any]:
        """For a table of runs."""
        return {
            "run": self.run,
            "state": self.state,
            "where": self.backend or "here",
            "job": self.job or "",
            "step": f"{self.step}/{self.total_steps}",
            "loss": f"{self.loss:.4f}" if self.loss is not None else "",
            "attempt": self.attempt,
        }


@dataclass(frozen=True)
class Live:
    """What whoever runs a run says of it."""

    state: str | None = None
    """One of LIVE; None: it does not live."""
    reason: str | None = None


def read_status(run: RunFolder, live: Live) -> RunStatus:
    """Where a run stands now.

    Args:
        live: what whoever runs it says.

    Raises:
        ConfigurationError: it is no run.
    """
    config = run.config()
    submission: dict[str, Any] | None = None
    ended: dict[str, Any] | None = None
    attempt = restarts = durable = 0
    for event in run.journal.events():
        kind = event["event"]
        if kind == "submitted":
            submission, ended, restarts = event, None, 0
        elif kind == "attempt_started":
            attempt, ended = event["attempt"], None
        elif kind == "restart":
            restarts += 1
        elif kind in ("finished", "left"):
            ended = event
        elif kind == "requeued":
            ended = None
        elif kind == "checkpoint_durable":
            durable = event["step"]
    total = int(run.resolved()["derived"].get("total_steps", config.training.total_steps or 0))
    state, reason = live.state, live.reason
    code = ended["exit_code"] if ended is not None else None
    if state is None:
        done = finished_step(run, total) is not None
        if done:
            state = "done"
        elif ended is not None:
            state = _BY_EXIT_CODE.get(ended["exit_code"], "failed")
        else:
            state = "created" if attempt == 0 and submission is None else "lost"
        reason = ended["reason"] if ended is not None else reason
        code = exits.DONE if done else code
    line = last_line(run)
    return RunStatus(
        run=run.path.name,
        state=state,
        backend=submission["backend"] if submission is not None else None,
        job=submission["job"] if submission is not None else None,
        step=line["step"] if line is not None else 0,
        total_steps=total,
        loss=line["loss"] if line is not None else None,
        durable_step=durable,
        attempt=attempt,
        restarts=restarts,
        exit_code=code,
        reason=reason,
        seconds_since_step=round(time.time() - run.metrics.stat().st_mtime, 1) if line is not None else None,
    )
