"""What a rank records while it trains: metrics.jsonl, journal, TensorBoard and the rank's own log, behind one object.

Only rank 0 writes files; the other ranks hold the same object so that the loop has no branches.
"""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from solomonov import pictures
from solomonov.checkpoint.store import ResumeFact
from solomonov.config import Config, flatten
from solomonov.metrics import MetricsLog, replay_differences
from solomonov.model.counts import flops_per_token
from solomonov.plan import BatchPlan
from solomonov.runfolder import RunFolder
from solomonov.tensorboard import DIAGNOSTICS_LAYOUT, LAYOUT, TensorBoardLog

if TYPE_CHECKING:
    from solomonov.diagnostics import Diagnosis


@dataclass
class StepLine:
    """All that is known of one step."""

    step: int
    """Number of the update, from 1."""
    loss: float = math.nan
    """Mean cross-entropy over the update's predicted tokens (nats)."""
    log_z_squared: float = 0.0
    """Mean of ln^2 Z over them, where there is a z-loss."""
    grad_norm: float = math.nan
    """Global L2 norm before clipping."""
    lr: float = 0.0
    tokens: int = 0
    """Predicted tokens."""
    rows: int = 0
    """Rows, over all ranks."""
    attended_tokens: int = 0
    """Length of the pieces of a row within which it attended."""
    data_digest: str = ""
    """16 hexadecimal digits."""
    skipped: bool = False
    data_reissued: int = 0
    """Requests to data workers that were sent again, on all ranks, in this attempt."""
    data_workers_lost: int = 0
    """Losses of data workers as the ranks saw them, on all ranks, in this attempt."""
    padding: float = 0.0
    """Share of the row positions that predict nothing."""
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the step."""
    _mark: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._mark
        self._mark = now

    @property
    def seconds(self) -> float:
        """Wall time of all laps."""
        return sum(self.laps.values())

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl. A number that is not finite stands as null."""
        return {
            "step": self.step,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "lr": self.lr,
            "tokens": self.tokens,
            "rows": self.rows,
            "attended_tokens": self.attended_tokens,
            "skipped": self.skipped,
            "data_digest": self.data_digest,
            "seconds": round(self.seconds, 6),
        }


class RunRecord:
    """The records of one attempt, on one rank.

    Args:
        attempt: its number over the run's life; None: that of the newest one in the journal.
    """

    def __init__(
        self, run: RunFolder, config: Config, plan: BatchPlan, *, rank: int, attempt: int | None = None
    ) -> None:
        self._run, self._config, self._plan, self._rank = run, config, plan, rank
        self._journal = run.journal
        self._metrics: MetricsLog | None = None
        self._tensorboard: TensorBoardLog | None = None
        self._replay: dict[int, dict[str, Any]] = {}
        self._layouts: dict[int, dict[str, Any]] = {}
        self._layout: dict[str, Any] = {}
        self._flops = 0.0
        self.attempt = attempt if attempt is not None else max(1, self._journal.next_attempt() - 1)
        """Number of this attempt over the run's life."""
        self._journal_size = -1

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._metrics is not None:
            self._metrics.close()

    def superseded(self) -> bool:
        """A later attempt has begun: a cluster lost sight of this one, and started the run elsewhere. Rank 0 knows."""
        if self._rank:
            return False
        try:
            size = self._journal.path.stat().st_size
        except OSError:
            return False
        if size == self._journal_size:
            return False
        self._journal_size = size
        return self._journal.next_attempt() > self.attempt + 1

    def event(self, kind: str, **fields: Any) -> None:
        """A line in the journal and in the rank's log."""
        if self._rank == 0:
            self._journal.try_write(kind, **{"attempt": self.attempt, **fields})
            print(f"{kind} {json.dumps(fields)}", flush=True)

    def rank_event(self, kind: str, **fields: Any) -> None:
        """What happened on this rank alone, whichever it is: a line in the journal and in its log."""
        self._journal.try_write(kind, **{"attempt": self.attempt, "rank": self._rank, **fields})
        print(f"{kind} {json.dumps(fields)}", flush=True)

    def resumes(self) -> list[ResumeFact]:
        """Where earlier attempts went on from, for fencing."""
        return [ResumeFact(*fact) for fact in self._journal.resumes()]

    def begin(self, step: int, layout: dict[str, Any], *, resumed: bool) -> None:
        """Open the records at `step`: lines of later steps are superseded, and what is replayed will be compared."""
        self._layout = layout
        if self._rank:
            return
        earlier = list(self._journal.events("resumed"))
        self._layouts = {int(event["attempt"]): event["layout"] for event in earlier}

        def writer(written: int) -> int:
            """The attempt that wrote a line: the last one that had gone on from below its step."""
            return max((int(e["attempt"]) for e in earlier if e["step"] < written), default=0)

        self._metrics = MetricsLog(self._run.metrics, lambda message: self.event("metrics_failed", message=message))
        self._replay = self._metrics.resume(step, writer)
        # Not try_write: this line fences off what earlier attempts may still write, so it must stand before training.
        fields = {"step": step, "of": self._plan.total_steps, "layout": layout, "plan": self._plan.describe()}
        self._journal.write("resumed", attempt=self.attempt, **fields)
        print(f"resumed {json.dumps(fields)}", flush=True)
        if self._config.metrics.tensorboard:
            self._tensorboard = TensorBoardLog(
                self._run.path / "tensorboard",
                purge_step=step + 1,
                on_failure=lambda message: self.event("tensorboard_failed", message=message),
                layout=LAYOUT | (DIAGNOSTICS_LAYOUT if self._config.metrics.diagnostics_every_steps else {}),
            )
            if not resumed:
                rows = "\n".join(f"| {key} | `{value}` |" for key, value in flatten(self._config).items())
                self._tensorboard.text(0, "run/configuration", f"| key | value |\n|---|---|\n{rows}")

    def step(self, line: StepLine) -> None:
        """One step is done."""
        line.lap("log")
        if self._rank:
            return
        line.rows = len(self._plan.batches.rows(line.step - 1))
        line.attended_tokens = self._plan.attended_tokens(line.step - 1)
        assert self._metrics is not None, "begin() comes before step()"
        record = line.to_json()
        self._metrics.append(record)
        before = self._replay.pop(line.step, None)
        if before is not None:
            self._compare(before, record)
        if line.skipped:
            self.event("update_skipped", step=line.step, reason="the gradient norm is not finite")
        if line.step % self._config.metrics.every_steps == 0 or line.step == self._plan.total_steps:
            rate = line.tokens / max(line.seconds, 1e-9)
            print(
                f"step {line.step}/{self._plan.total_steps} loss {line.loss:.4f} grad_norm {line.grad_norm:.3f}"
                f" lr {line.lr:.2e} tokens/s {rate:,.0f}",
                flush=True,
            )
            if self._tensorboard is not None:
                self._tensorboard.scalars(line.step, self._scalars(line, rate))

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint was written, or refused by the disk."""
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, {"perf/checkpoint_stall_seconds": seconds})

    def evaluated(self, step: int, loss: float, bits_per_nat: float, rows: int, ema_loss: float | None = None) -> None:
        """A held-out evaluation is done.

        Args:
            loss: nats a token.
            bits_per_nat: bits a byte of text for each nat a token.
            ema_loss: of the moving average of the weights, if one is kept.
        """
        found = {"loss": loss, "bits_per_byte": loss * bits_per_nat}
        if ema_loss is not None:
            found |= {"ema_loss": ema_loss, "ema_bits_per_byte": ema_loss * bits_per_nat}
        self.event("evaluated", step=step, **found, rows=rows)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, {f"eval/{name}": value for name, value in found.items()})

    def diagnosed(self, step: int, found: Diagnosis, seconds: float) -> None:
        """Depth and attention were measured, in so many seconds."""
        self.event("diagnosed", step=step, seconds=round(seconds, 3))
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, found.scalars())
            if pictures.problem() is None:
                self._tensorboard.picture(step, "depth/layers", lambda: pictures.of_layers(found))

    def sync(self) -> None:
        """Before a checkpoint: no durable step may lack its line or its point."""
        if self._metrics is not None:
            self._metrics.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """A replayed step must be what it was (data to the bit always, numbers by the promise of the layout)."""
        exact = self._layout["device"] == "cpu" or self._config.run.deterministic
        same = exact and self._layouts.get(before["attempt"]) == self._layout
        differences = replay_differences(before, now, same_layout=same, precision=str(self._layout["precision"]))
        if differences:
            self.event("replay_mismatch", step=now["step"], differences=differences, same_layout=same)

    def _scalars(self, line: StepLine, rate: float) -> dict[str, float]:
        values = {
            "train/loss": line.loss,
            "train/grad_norm": line.grad_norm,
            "train/lr": line.lr,
            "perf/tokens_per_second": rate,
            "perf/step_seconds": line.seconds,
            **{f"perf/{name}_seconds": seconds for name, seconds in line.laps.items()},
            "perf/model_tflops_per_second": rate * self._flops_per_token() / 1e12,
            # ru_maxrss is in KiB on Linux.
            "memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "data/padding_rate": line.padding,
            "train/batch_rows": float(line.rows),
            "train/attended_tokens": float(line.attended_tokens),
            "health/update_skipped": float(line.skipped),
        }
        if self._config.training.z_loss:
            values["train/z_loss"] = self._config.training.z_loss * line.log_z_squared
        if self._config.data.workers.backend == "ray":
            values["data/reissued_requests"] = float(line.data_reissued)
            values["data/workers_lost"] = float(line.data_workers_lost)
        if torch.cuda.is_available():
            values["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def _flops_per_token(self) -> float:
        if not self._flops:
            vocabulary = self._config.tokenizer.vocab_size
            lengths = self._plan.sequence_tokens, self._plan.source_tokens
            self._flops = flops_per_token(self._config.model, vocabulary, *lengths)
        return self._flops
