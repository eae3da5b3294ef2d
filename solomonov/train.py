"""The training loop: one function, `train`, that reads as what happens in a step, in order."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.stream import HeldOutRows, Stream
from solomonov import pictures
from solomonov.batch import TokenBatch, to_tensors
from solomonov.branch import branch_of, open_branch
from solomonov.checkpoint.checkpointer import Checkpointer
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.config import Config
from solomonov.devices import this_device
from solomonov.diagnostics import Diagnostics, left_out
from solomonov.distributed import Control, RankInfo
from solomonov.engine import Engine
from solomonov.engine_spec import EngineSpec, resolve_precision
from solomonov.errors import ConfigurationError, NumericalError, SolomonovError
from solomonov.exits import AGAIN, DONE
from solomonov.feed import ClusterPlace, Feed, idle_feed, open_feed
from solomonov.heartbeat import Heartbeat
from solomonov.held_out import held_out_loss
from solomonov.layouts import batch_of
from solomonov.memory import WORTH_FORESEEING, PeakMemory, describe
from solomonov.model.counts import parameter_count
from solomonov.parallel import ParallelConfig
from solomonov.partition import EMA
from solomonov.plan import BatchPlan
from solomonov.planner import Question, choose, estimate
from solomonov.record import RunRecord, StepLine
from solomonov.runfolder import RunFolder
from solomonov.schedule import lr_factor
from solomonov.signal_check import DEEP_LAYERS, check_signal
from solomonov.signals import StopRequest
from solomonov.start import make_stream
from solomonov.toolchain import compiler_problem
from solomonov.topology import Place, rank_grid


@dataclass
class TrainState:
    """What moves while training, beside the weights; equal on all ranks."""

    step: int = 0
    """Updates done; the next update trains on the rows `plan.batches.rows(step)`."""
    tokens: int = 0
    """Tokens predicted so far."""
    skipped: int = 0
    """Updates skipped in a row for a non-finite gradient, up to now."""


@dataclass
class Trainer:
    """The finished parts of a run, as `build` makes them."""

    config: Config
    plan: BatchPlan
    device: torch.device
    control: Control
    engine: Engine
    stream: Stream
    held_out: HeldOutRows | None
    checkpointer: Checkpointer
    record: RunRecord
    heartbeat: Heartbeat
    stop: StopRequest
    question: Question
    """What the run's layout is planned from."""
    parallel: ParallelConfig
    """The layout, resolved."""
    memory: PeakMemory
    diagnostics: Diagnostics
    state: TrainState = field(default_factory=TrainState)
    first_step: int = 0
    """Updates that were done before this attempt."""


def train(
    run: RunFolder,
    control: Control,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
    place: ClusterPlace | None = None,
    attempt: int | None = None,
) -> int:
    """Train a run from where it stands to its end, or to a request to stop.

    Args:
        place: where the run's data workers are, if it has any.
        attempt: number of this attempt over the run's life; None: that of the newest one in the journal.

    Returns:
        the exit code: DONE, or AGAIN where it was asked to stop and saved.

    Raises:
        NumericalError: more updates in a row were skipped than the configuration allows.
    """
    with ExitStack() as stack:
        trainer = build(run, control, device, stop, heartbeat, stack, attempt)
        engine, state, plan, record = trainer.engine, trainer.state, trainer.plan, trainer.record
        if control.sum_integers([int(stop.requested)])[0]:
            record.event("preempted", step=state.step, signal=stop.received)
            return AGAIN
        steps = iter(feed := stack.enter_context(_feed(trainer, place)))
        while state.step < plan.total_steps:
            trainer.diagnostics.before(state.step + 1)
            line = StepLine(step=state.step + 1)
            heartbeat.beat("data", line.step)
            batches = [to_tensors(rows.cut(plan.attended_tokens(state.step)), device) for rows in next(steps)]
            line.tokens = control.sum_integers([_tokens(engine, batches)])[0]
            line.lap("data_wait")

            heartbeat.beat("forward_backward")
            line.lr = trainer.config.optimizer.lr * lr_factor(trainer.config.schedule, state.step, plan.total_steps)
            forwards = plan.micro_batches(state.step)
            loss_sum = engine.forward_backward(batches, line.tokens, line.lr, forwards, update=state.step)
            _finish(device)
            line.lap("forward_backward")

            heartbeat.beat("update")
            update = engine.update()
            _finish(device)
            line.lap("update")

            heartbeat.beat("log")
            state.step, state.tokens = line.step, state.tokens + line.tokens
            state.skipped = state.skipped + 1 if update.skipped else 0
            line.loss, line.log_z_squared = _means(control, (float(loss_sum), engine.z_sum), line.tokens)
            line.grad_norm, line.skipped = update.grad_norm, update.skipped
            told = [*_digests(engine, batches), int(stop.requested), int(record.superseded()), *feed.faults()]
            digest, of_losses, stopping, superseded, *faults = control.sum_integers(told)
            if superseded:  # its files are another attempt's now
                record.event("superseded", step=state.step)
                return AGAIN
            if of_losses != digest * trainer.parallel.sequence % 2**64:
                raise _rows_differ(line.step, digest, of_losses)
            line.data_digest = f"{digest:016x}"
            line.data_reissued, line.data_workers_lost = faults
            line.padding = 1.0 - line.tokens / (len(plan.batches.rows(line.step - 1)) * plan.sequence_tokens)
            record.step(line)
            _refuse_endless_skipping(trainer, line)
            _tell_memory(trainer)

            last = state.step == plan.total_steps
            if not stopping:
                _measure_if_due(trainer, last)
            if stopping or _due(state.step, trainer.config.checkpoint.every_steps, last):
                heartbeat.beat("save")
                if not save(trainer) and (stopping or last):
                    raise _not_saved(trainer)
            if stopping and not last:
                record.event("preempted", step=state.step, signal=stop.received)
                return AGAIN
        heartbeat.beat("leave")
        record.event("training_finished", step=state.step, tokens=state.tokens)
        return DONE


def _tell_signal(trainer: Trainer) -> None:
    """Before the first update of a deep model: whether a signal comes through its layers, see `signal_check`."""
    model = trainer.config.model
    if trainer.control.rank == 0 and trainer.state.step == 0 and model.depth > DEEP_LAYERS:
        check = check_signal(model, seed=trainer.config.run.seed)
        trainer.record.event("signal", verdict=check.verdict, reading=check.reading, advice=check.advice)


def _tell_memory(trainer: Trainer) -> None:
    """The memory of the rank that has taken the most, beside what the plan foresees for it: once, after the second
    update, from which on moments and buffers are all there."""
    if trainer.state.step != trainer.first_step + 2:
        return
    measured = trainer.control.all_gather_object(trainer.memory.measured())
    if trainer.control.rank == 0:
        fields: dict[str, Any] = {"measured_bytes": max(measured), "rank": measured.index(max(measured))}
        if (
            trainer.device.type == "cuda"
            or parameter_count(trainer.config.model, trainer.question.vocab_size) >= WORTH_FORESEEING
        ):
            foreseen = estimate(trainer.question, trainer.parallel).footprint
            fields |= {"foreseen_bytes": foreseen.total, "foreseen": describe(foreseen)}
        trainer.record.event("memory", **fields, device_bytes=trainer.question.device.memory_bytes)


def _means(control: Control, sums: Sequence[float], tokens: int) -> list[float]:
    """What the ranks' sums are for each of the update's predicted tokens."""
    return [total / max(1, tokens) for total in control.sum_floats(sums)]


def _due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many updates, and after the last one, is due; 0: never."""
    return bool(every) and (last or step % every == 0)


def _measure_if_due(trainer: Trainer, last: bool) -> None:
    """The held-out loss, and how depth and attention are used, each after so many updates."""
    step = trainer.state.step
    if _due(step, trainer.config.evaluation.every_steps, last):
        trainer.heartbeat.beat("evaluate")
        evaluate_held_out(trainer)
    if trainer.diagnostics.due(step):
        trainer.heartbeat.beat("diagnose")
        started = time.monotonic()
        found = trainer.diagnostics.measure()
        trainer.record.diagnosed(step, found, time.monotonic() - started)


def _finish(device: torch.device) -> None:
    """Wait for the device, so that the time of each part of a step is its own. CPU work is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _not_saved(trainer: Trainer) -> SolomonovError:
    """The end of a run whose last checkpoint the disk refused: not 75, since nothing of it is saved."""
    folder = trainer.checkpointer.folder
    trainer.record.event("left_without_checkpoint", step=trainer.state.step)
    return SolomonovError(
        "the last checkpoint could not be written",
        got=f"step {trainer.state.step}: the disk refused it (see checkpoint_failed in journal.jsonl)",
        rule=f"{folder} takes a checkpoint before the run is left",
        remedy="free space there; the same command goes on from the newest checkpoint",
    )


def build(
    run: RunFolder,
    control: Control,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
    stack: ExitStack,
    attempt: int | None = None,
) -> Trainer:
    """Make all parts of a run and bring them to the newest checkpoint that verifies, or to the start."""
    config = run.config()
    precision = resolve_precision(config.training.precision, device)
    dataset = stack.enter_context(Dataset.open(run.data_folder()))
    question = _question(config, dataset.manifest.vocab_size, precision, control)
    parallel, why = (config.parallel, "") if config.parallel else choose(question)
    plan = batch_of(config, parallel, precision=precision, world=control.size)
    stream = make_stream(config, dataset)
    held_out = HeldOutRows(dataset, sequence_tokens=config.data.sequence_tokens, packing=config.data.packing)
    record = stack.enter_context(RunRecord(run, config, plan, rank=control.rank, attempt=attempt))
    if why:
        record.event("layout_chosen", **parallel.model_dump(), reason=why)
    compile_blocks = config.training.compile is True or (config.training.compile == "auto" and device.type == "cuda")
    if compile_blocks:
        problems = [text for text in control.all_gather_object(compiler_problem(device)) if text]
        if problems:
            record.event("fallback", what="torch.compile", to="eager", reason=problems[0])
            compile_blocks = False
    spec = EngineSpec(
        model=config.model,
        vocab_size=dataset.manifest.vocab_size,
        seed=config.run.seed,
        plan=plan,
        precision=precision,
        zero_stage=parallel.zero_stage,
        optimizer=config.optimizer,
        gradient_clipping=config.training.gradient_clipping,
        recompute=config.training.recompute,
        compile=compile_blocks,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        offload=parallel.offload,
        z_loss=config.training.z_loss,
        ema_decay=config.training.ema_decay,
    )
    info = RankInfo.from_environment()
    memory = PeakMemory(device)
    places = control.all_gather_object(Place(info.node, info.local_rank))
    engine = Engine(spec, device, rank_grid(places, spec.pipeline * spec.sequence))
    checkpointer = Checkpointer(
        run.checkpoints,
        control,
        run_id=run.run_id(),
        attempt=record.attempt,
        keep_last=config.checkpoint.keep_last,
        on_event=lambda kind, fields: record.event(kind, **fields),
    )
    rows = held_out if len(held_out) else None
    trainer = Trainer(
        config, plan, device, control, engine, stream, rows, checkpointer, record, heartbeat, stop, question, parallel,
        memory, Diagnostics(engine, control, rows, config.metrics.diagnostics_every_steps),
    )  # fmt: skip
    checkpointer.check_writable()
    resume(trainer)
    return trainer


def _question(config: Config, vocab_size: int, precision: str, control: Control) -> Question:
    """The run on the smallest of its ranks' devices."""
    devices = control.all_gather_object(this_device(RankInfo.from_environment().local_world))
    return Question(config, vocab_size, control.size, min(devices, key=lambda d: d.memory_bytes), precision)


def resume(trainer: Trainer) -> None:
    """Restore the newest checkpoint that verifies, or else the one that the run branches from, if there is any, and
    open the records at its step."""
    control, record = trainer.control, trainer.record
    reader = own = trainer.checkpointer.find(record.resumes())
    branch = None if own is not None else branch_of(trainer.config)
    if branch is not None:
        reader = open_branch(branch, control)
        record.event("branched", **branch.facts(reader))
    if reader is not None:
        _check_same_stream(trainer, reader)
        trainer.engine.restore(reader, int(reader.scalars["optimizer_step"]))
        before, now = reader.manifest.topology["precision"], trainer.engine.spec.precision
        if before != now:
            record.event("fallback", what=f"precision {before}", to=now, reason="training.precision resolved anew")
        _tell_average(trainer, reader)
        saved = reader.state
        trainer.state = TrainState(step=saved["step"], tokens=saved["tokens"], skipped=saved["skipped"])
    trainer.first_step = trainer.state.step
    layout = trainer.engine.layout
    record.begin(trainer.state.step, layout, resumed=own is not None)
    _tell_signal(trainer)
    if control.rank == 0 and trainer.config.metrics.diagnostics_every_steps:
        for fields in left_out(trainer.held_out, pictures.problem()):
            record.event("diagnostics_left_out", **fields)
    control.barrier()
    if branch is not None:
        save(trainer)  # the run can go on from here, whatever becomes of the other one


def _tell_average(trainer: Trainer, reader: CheckpointReader) -> None:
    """Where the moving average of the weights is kept and the checkpoint holds none, or the other way round."""
    kept, stored = trainer.config.training.ema_decay, EMA in reader.kinds()
    if kept is not None and not stored:
        trainer.record.event("ema_begun", step=reader.step, decay=kept, reason="the checkpoint holds no average")
    if kept is None and stored:
        trainer.record.event("ema_dropped", step=reader.step, reason="training.ema_decay is null")


def _check_same_stream(trainer: Trainer, reader: CheckpointReader) -> None:
    stored = reader.state["stream"]
    if stored != trainer.stream.identity:
        raise ConfigurationError(
            "the checkpoint was trained on another stream of rows",
            got=f"stream {stored} in the checkpoint, {trainer.stream.identity} from the data folder and configuration",
            rule="a run resumes on the data set, seed, row length, packing and weights that it began with",
            remedy="restore the data folder and these keys, or set run.name to a new name",
        )


def save(trainer: Trainer) -> bool:
    """Write a checkpoint of the current step; False where the disk refused it (the run goes on)."""
    started = time.monotonic()
    trainer.record.sync()
    engine, state = trainer.engine, trainer.state
    info = trainer.checkpointer.save(
        state.step,
        engine.fragments(),
        expected=engine.shapes(),
        scalars={"optimizer_step": engine.updates_applied()},
        state={
            "step": state.step,
            "tokens": state.tokens,
            "skipped": state.skipped,
            "next_row": trainer.plan.batches.before(state.step),
            "stream": trainer.stream.identity,
        },
        topology=engine.layout,
    )
    trainer.record.saved(state.step, time.monotonic() - started)
    return info is not None


def evaluate_held_out(trainer: Trainer) -> None:
    """Loss on `evaluation.rows` held-out rows, spread evenly over all of them, the same ones every time; also that of
    the moving average of the weights, if one is kept."""
    held_out = trainer.held_out
    if held_out is None:
        return
    rows = min(len(held_out), trainer.config.evaluation.rows)
    loss, ema_loss = held_out_loss(trainer.engine, trainer.control, held_out, rows), None
    if trainer.engine.spec.ema_decay is not None:
        with trainer.engine.averaged():
            ema_loss = held_out_loss(trainer.engine, trainer.control, held_out, rows)
    nats_to_bits_per_byte = held_out.tokens / max(1, held_out.text_bytes) / math.log(2)
    trainer.record.evaluated(trainer.state.step, loss, nats_to_bits_per_byte, rows, ema_loss)


def _feed(trainer: Trainer, place: ClusterPlace | None) -> AbstractContextManager[Feed]:
    if not trainer.engine.needs_rows:
        return nullcontext(idle_feed())
    return open_feed(
        trainer.config,
        trainer.plan,
        trainer.stream,
        rank=trainer.engine.data_rank,
        first_step=trainer.state.step,
        place=place,
        on_event=trainer.record.rank_event,
        hurry=lambda: trainer.stop.requested,
    )


def _tokens(engine: Engine, batches: Sequence[TokenBatch]) -> int:
    """This rank's part of the tokens that an update predicts."""
    return sum(batch.valid_tokens for batch in batches) * engine.counts_rows


def _digests(engine: Engine, batches: Sequence[TokenBatch]) -> tuple[int, int]:
    """This rank's parts of the digest of the step's rows: as counted, and as the losses were taken from them. The first
    stage of a pipeline and the last one, and all ranks that share rows, build the same rows, each for itself."""
    mine = sum(batch.digest() for batch in batches) % 2**64
    return mine * engine.counts_rows, mine * engine.takes_loss


def _rows_differ(step: int, counted: int, taken: int) -> SolomonovError:
    return SolomonovError(
        "ranks that compute on the same rows were given different ones",
        got=f"step {step}: the digest of the rows is {counted:016x}; where losses were taken the digests add up to"
        f" {taken:016x}",
        rule="the first and the last stage of a pipeline, or all ranks that share rows, have the same rows of a step",
        remedy="start the run again: it goes on from the newest checkpoint; tell its makers",
    )


def _refuse_endless_skipping(trainer: Trainer, line: StepLine) -> None:
    """End the run where skipping no longer helps; the last good checkpoint stays the newest."""
    limit = trainer.config.resilience.max_skipped_updates
    if trainer.state.skipped > limit:
        raise NumericalError(
            "the gradients are not finite any more",
            got=f"{trainer.state.skipped} updates skipped in a row up to step {line.step}, loss {line.loss}",
            rule=f"at most {limit} in a row (resilience.max_skipped_updates)",
            remedy="lower optimizer.lr or lengthen schedule.warmup_steps, and start under a new run.name",
        )
