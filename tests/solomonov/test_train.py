"""The loop on the pool's ranks against a plain PyTorch loop over the same rows; stops, saves that the disk refuses,
resumes, numbers that are not finite, and the held-out loss against one forward over all rows."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.dataset import Dataset
from data_pipeline.rows import RowBatch
from data_pipeline.stream import HeldOutRows, Stream
from solomonov.batch import to_tensors
from solomonov.checkpoint.reader import digest
from solomonov.distributed import Control
from solomonov.exits import AGAIN, DONE
from solomonov.heartbeat import Heartbeat
from solomonov.loading import load_model
from solomonov.model.transformer import Transformer
from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder, write_atomically
from solomonov.signals import StopRequest
from tests.solomonov.checkpoint.common import small_disk
from tests.support.events import read_events, read_scalars
from tests.support.ranks import run_ranks
from tests.support.runs import model_state
from tests.support.tiny import CPU
from tests.support.tiny_run import lines_of, make_run, train_run
from tests.support.user import unexpected

pytestmark = pytest.mark.dist(world=2)
SHORT = ("training.total_steps=6", "checkpoint.every_steps=2", "evaluation.every_steps=3", "evaluation.rows=5")


def made(folder: Path, *overrides: str, ranks: int = 2) -> RunFolder:
    return make_run(folder, ranks=ranks, overrides=(*SHORT, *overrides))


def train(run: RunFolder, world: int = 2) -> list[int]:
    """One attempt on all ranks; their exit codes."""
    return run_ranks(train_run, world, run.path, timeout=120)


def free_of_time(run: RunFolder) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines_of(run)]


# --- numbers -------------------------------------------------------------------------------------------------


def plain_losses(
    run: RunFolder,
    z_terms: list[float] | None = None,
    pieces: Sequence[int] = (32,) * 6,
    sizes: Sequence[int] = (8,) * 6,
) -> list[tuple[float, float, float]]:
    """(loss, norm, rate) of each step: torch's AdamW on the whole batch, the schedule from its definition.

    Args:
        z_terms: gets the z-loss of each step.
        pieces: length of the pieces of each step, trained on as rows of their own.
        sizes: rows of each step.
    """
    config = run.config()
    model = Transformer(config.model, config.tokenizer.vocab_size, seed=config.run.seed)
    plain = [p for name, p in model.named_parameters() if p.dim() < 2 or name == "embedding.weight"]
    decaying = [p for p in model.parameters() if not any(p is other for other in plain)]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    found = []
    with Dataset.open(run.data_folder()) as dataset:
        weights = {source.name: source.weight for source in config.data.sources}
        stream = Stream(dataset, sequence_tokens=32, packing=config.data.packing, seed=config.run.seed, weights=weights)
        for step in range(6):
            rows = stream.rows(range(sum(sizes[:step]), sum(sizes[: step + 1])))
            arrays = (rows.input_ids, rows.labels, rows.document_ids)
            short = RowBatch(
                np.arange(sizes[step] * 32 // pieces[step]), *(array.reshape(-1, pieces[step]) for array in arrays)
            )
            batch = to_tensors(short, CPU)
            # wsd: up over 4 updates, down to 0 over the last fifth (1 of 6), which would end at update 6.
            rate = 0.003 * (min(1.0, (step + 1) / 4) if step < 5 else 1.0)
            loss = model(batch.input_ids, batch.document_ids, batch.labels) / batch.valid_tokens
            logits = model(batch.input_ids, batch.document_ids)[batch.labels != -100]
            z = config.training.z_loss * logits.exp().sum(-1).log().square().mean()
            (loss + z).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            found.append((float(loss.detach()), float(norm), rate))
            if z_terms is not None:
                z_terms.append(float(z.detach()))
    return found


@pytest.mark.parametrize("pipeline", [1, 2])
def test_z_loss_is_minimised_and_recorded_beside_the_loss(pipeline: int, tmp_path: Path) -> None:
    layout = (f"parallel.pipeline={pipeline}", "metrics.tensorboard=true")
    run = made(tmp_path, "training.z_loss=0.002", *layout)
    assert train(run) == [DONE, DONE]
    expected: list[float] = []
    for line, (loss, norm, _) in zip(lines_of(run), plain_losses(run, expected), strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
    points = read_scalars(run.path / "tensorboard")["train/z_loss"]
    assert list(points.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=2",)], ids=["two-ranks", "pipeline"])
def test_short_pieces_at_first_are_short_rows(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """8 of 32 tokens at first, to 32 over 1,000 = 4 steps less 24 tokens: 8 + 24 * (0, 256, 512, 768) / 1,000."""
    words = ("schedule.sequence_warmup.from_tokens=8", "schedule.sequence_warmup.tokens=1000")
    run = made(tmp_path, *words, *overrides)
    assert train(run) == [DONE, DONE]
    pieces, lines = [8, 8, 16, 16, 32, 32], lines_of(run)
    assert [line["attended_tokens"] for line in lines] == pieces
    for line, (loss, norm, _) in zip(lines, plain_losses(run, pieces=pieces), strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
    assert prove_record(run).holds


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        *[(2, (f"parallel.zero_stage={stage}", "training.micro_batch_sequences=1")) for stage in (0, 1, 2, 3)],
        (1, ("training.micro_batch_sequences=2",)),
        (2, ("parallel.pipeline=2", "training.micro_batch_sequences=2")),
        (2, ("parallel.zero_stage=2", "training.micro_batch_sequences=1", "parallel.offload=optimizer")),
    ],
    ids=["zero0", "zero1", "zero2", "zero3", "one-rank", "pipeline", "offloaded"],
)
@pytest.mark.spare
def test_small_batches_at_first_are_small_batches(world: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """3 of 8 rows at first, to 8 over 18 rows: 3 + 5 n / 18 allows 6 from row 12 on. Ranks and micro-batches of two
    rows do not share out 3; with one rank, 3 rows take two forwards, of four."""
    words = ("schedule.batch_warmup.from_tokens=96", "schedule.batch_warmup.tokens=570")
    run = made(tmp_path, *words, *overrides, ranks=world)
    assert train(run, world) == [DONE] * world
    sizes, lines = [3, 3, 3, 3, 6, 8], lines_of(run)
    assert [line["rows"] for line in lines] == sizes
    for line, (loss, norm, rate) in zip(lines, plain_losses(run, sizes=sizes), strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
    assert prove_record(run).holds


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ("parallel.zero_stage=0",)),
        (2, ()),
        (2, ("parallel.zero_stage=3", "training.micro_batch_sequences=1")),
        (2, ("parallel.zero_stage=2", "parallel.offload=optimizer")),
    ],
    ids=["one-rank-zero0", "two-ranks-zero1", "two-ranks-zero3", "two-ranks-zero2-offloaded"],
)
def test_the_loop_is_a_plain_loop(world: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = made(tmp_path, *overrides, ranks=world)
    assert train(run, world) == [DONE] * world
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, (loss, norm, rate) in zip(lines, plain_losses(run), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
    layout = run.journal.last("resumed")
    assert layout is not None
    assert layout["layout"]["world"] == world
    assert layout["layout"]["zero_stage"] == run.config().parallel.zero_stage
    assert layout["layout"]["offload"] == run.config().parallel.offload
    assert run.journal.last("training_finished")["tokens"] == sum(line["tokens"] for line in lines)  # type: ignore[index]
    assert not unexpected(list(run.journal.events()))


def test_auto_takes_a_layout_and_says_why_and_what_memory_it_took(tmp_path: Path) -> None:
    run = made(tmp_path, "parallel=auto")
    assert train(run) == [DONE, DONE]
    for line, (loss, norm, _) in zip(lines_of(run), plain_losses(run), strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
    chosen, resumed = run.journal.last("layout_chosen"), run.journal.last("resumed")
    assert chosen is not None
    assert resumed is not None
    assert (chosen["zero_stage"], chosen["pipeline"]) == (0, 1), "on a machine with room the plainest"
    assert resumed["layout"]["zero_stage"] == 0
    assert chosen["reason"] == "no legal layout is plainer, and none that fits is clearly faster"
    (memory,) = run.journal.events("memory")
    assert 0 < memory["measured_bytes"] < memory["device_bytes"]
    assert memory["rank"] in (0, 1)
    assert not unexpected(list(run.journal.events()))


@pytest.mark.spare
def test_a_deep_model_s_signal_is_told_once_and_a_shallow_one_s_never(tmp_path: Path) -> None:
    deep = ("model.layers=66", "model.residual=postnorm", "training.total_steps=2", "schedule.warmup_steps=1")
    run = made(tmp_path / "deep", *deep, ranks=1)
    assert train(run, 1) == [DONE]
    (found,) = run.journal.events("signal")
    assert found["verdict"] in ("uneven", "broken")
    assert "model.residual: scaled" in found["advice"]
    assert "the gradient of the first eighth is" in found["reading"]
    shallow = made(tmp_path / "shallow", *deep[2:], ranks=1)
    assert train(shallow, 1) == [DONE]
    assert not list(shallow.journal.events("signal"))


def expected_evaluation(run: RunFolder, *, ema: bool = False) -> tuple[float, float]:
    """Loss of the last checkpoint on five held-out rows at once, and its bits per byte of the split."""
    module = load_model(str(run.path), ema=ema).module(CPU)
    with Dataset.open(run.data_folder()) as dataset, torch.no_grad():
        held_out = HeldOutRows(dataset, sequence_tokens=32, packing=run.config().data.packing)
        batch = to_tensors(held_out.rows([index * len(held_out) // 5 for index in range(5)]), CPU)
        loss = float(module(batch.input_ids, batch.document_ids, batch.labels)) / batch.valid_tokens
        return loss, loss * held_out.tokens / held_out.text_bytes / math.log(2)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_held_out_loss_is_that_of_one_forward(stage: int, tmp_path: Path) -> None:
    """Five rows over two ranks: one of them has less, and still takes part in every forward."""
    run = made(tmp_path, f"parallel.zero_stage={stage}")
    assert train(run) == [DONE, DONE]
    events = list(run.journal.events("evaluated"))
    assert [event["step"] for event in events] == [3, 6]
    loss, bits = expected_evaluation(run)
    assert events[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert events[-1]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert events[-1]["rows"] == 5


def go_on(run: RunFolder, decay: float | None, steps: int) -> None:
    """With another decay, up to another step; the record is changed behind the command's back."""
    record = run.resolved()
    record["values"]["training.ema_decay"]["value"] = decay
    record["values"]["training.total_steps"]["value"] = steps
    write_atomically(run.resolved_path, json.dumps(record))
    again(run)
    assert train(run) == [DONE, DONE]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.spare
def test_the_average_is_evaluated_beside_the_weights_and_training_is_the_same(stage: int, tmp_path: Path) -> None:
    """Its loss is that of what is exported of it; turned off, and on again, when the run goes on."""
    layout = (f"parallel.zero_stage={stage}", "checkpoint.keep_last=9")
    run, plain = made(tmp_path / "a", *layout, "training.ema_decay=0.5"), made(tmp_path / "b", *layout)
    assert train(run) == train(plain) == [DONE, DONE]
    assert free_of_time(run) == free_of_time(plain)
    events = list(run.journal.events("evaluated"))
    loss, bits = expected_evaluation(run, ema=True)
    assert events[-1]["ema_loss"] == pytest.approx(loss, rel=1e-5)
    assert events[-1]["ema_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert events[-1]["loss"] == next(reversed(list(plain.journal.events("evaluated"))))["loss"]
    assert abs(events[-1]["ema_loss"] - events[-1]["loss"]) > 1e-3, "the two must differ for this to say anything"
    assert not list(run.journal.events("ema_begun", "ema_dropped"))
    shutil.rmtree(run.checkpoints / "step-00000006")
    go_on(run, None, 6)
    go_on(run, 0.5, 8)
    [dropped], [begun] = run.journal.events("ema_dropped"), run.journal.events("ema_begun")
    assert (dropped["step"], begun["step"], begun["decay"]) == (4, 6, 0.5)
    assert load_model(str(run.path), ema=True).step == 8
    assert not list(run.journal.events("replay_mismatch"))


@pytest.mark.parametrize("every", [0, 4])
def test_evaluation_comes_when_it_is_due(every: int, tmp_path: Path) -> None:
    run = made(tmp_path, f"evaluation.every_steps={every}", ranks=1)
    assert train(run, 1) == [DONE]
    assert [event["step"] for event in run.journal.events("evaluated")] == ([4, 6] if every else [])


DIAGNOSED = ("metrics.tensorboard=true", "metrics.diagnostics_every_steps=4")


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.zero_stage=0",),
        ("parallel.zero_stage=3", "training.activation_checkpointing=full"),
        ("parallel.pipeline=2", "training.micro_batch_sequences=2"),
        ("parallel.sequence=2",),
    ],
    ids=str,
)
@pytest.mark.spare
def test_diagnostics_are_shown_and_training_is_the_same(layout: tuple[str, ...], tmp_path: Path) -> None:
    """All that they draw and compute leaves the lines of metrics.jsonl as they are, to the bit."""
    run, plain = made(tmp_path / "a", *layout, *DIAGNOSED), made(tmp_path / "b", *layout)
    assert train(run) == train(plain) == [DONE, DONE]
    assert free_of_time(run) == free_of_time(plain)
    assert digest(run.checkpoints / "step-00000006") == digest(plain.checkpoints / "step-00000006")
    assert [event["step"] for event in run.journal.events("diagnosed")] == [4], "not after the last update"
    assert not list(plain.journal.events("diagnosed"))
    assert not list(run.journal.events("diagnostics_left_out"))
    assert not unexpected(list(run.journal.events()))
    parts, words = ("0", "1"), ("least", "mean", "most", *map(str, range(4)))
    expected = {f"depth/{kind}/{part}" for kind in ("update_to_weight", "growth", "skip_eighth") for part in parts}
    expected |= {"depth/growth/embedding"}
    expected |= {f"attention/{kind}/{p}/{word}" for kind in ("distance", "entropy") for p in parts for word in words}
    scalars = read_scalars(run.path / "tensorboard")
    assert {tag for tag in scalars if tag.startswith(("depth/", "attention/"))} == expected
    assert all(list(scalars[tag]) == [4] and math.isfinite(scalars[tag][4]) for tag in expected)
    # Of 32 positions in packed rows a query sees a few; of its own one alone the entropy would be 0.
    assert 0.0 < scalars["attention/entropy/1/mean"][4] < math.log(32)
    assert 0.0 < scalars["attention/distance/1/mean"][4] < 31.0
    [image] = read_events(run.path / "tensorboard").Images("depth/layers")
    assert (image.step, image.width, image.encoded_image_string[1:4]) == (4, 990, b"PNG")


def train_without_pictures(path: Path) -> int:
    """On a machine without matplotlib."""
    from solomonov import pictures

    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    pictures.problem.cache_clear()
    try:
        return train_run(path)
    finally:
        del sys.modules["matplotlib.figure"]
        pictures.problem.cache_clear()


def test_what_is_left_out_is_told_once(tmp_path: Path) -> None:
    """No matplotlib, and a data set that holds nothing out: updates are compared all the same."""
    run = make_run(tmp_path, ranks=1, overrides=(*SHORT, *DIAGNOSED, "metrics.diagnostics_every_steps=2"), held_out=0)
    assert run_ranks(train_without_pictures, 1, run.path) == [DONE]
    first, second = run.journal.events("diagnostics_left_out")
    assert (first["reason"], first["what"].split(", ")[0]) == ("the data set holds nothing out", "depth/growth")
    assert second["what"] == "the picture of all layers"
    assert second["reason"].endswith("pip install 'solomonov[science]'")
    assert [event["step"] for event in run.journal.events("diagnosed")] == [2, 4, 6]
    scalars = read_scalars(run.path / "tensorboard")
    tags = {tag for tag in scalars if tag.startswith(("depth/", "attention/"))}
    assert tags == {"depth/update_to_weight/0", "depth/update_to_weight/1"}
    assert not read_events(run.path / "tensorboard").Tags()["images"]


# --- stops and resumes ---------------------------------------------------------------------------------------


class Asking(Heartbeat):
    """A heartbeat that asks its own rank to stop: before anything, or while the first update is made."""

    def __init__(self, stop: StopRequest, when: str) -> None:
        super().__init__(None)
        self._stop, self._when = stop, when
        self.beat("start")

    def beat(self, section: str, step: int | None = None) -> None:
        super().beat(section, step)
        if section == self._when:
            self._stop.received = "SIGTERM"


def train_until_asked(path: Path, rank: int, when: str = "update") -> int:
    """One rank is asked to stop, the others are not."""
    import torch.distributed as dist

    from solomonov.train import train as loop

    stop = StopRequest()
    heartbeat = Asking(stop, when) if dist.get_rank() == rank else Heartbeat(None)
    return loop(RunFolder(path), Control(), CPU, stop, heartbeat)


def test_a_request_before_the_first_step_trains_nothing(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert run_ranks(train_until_asked, 2, run.path, 1, "start") == [AGAIN, AGAIN]
    assert not lines_of(run)
    assert [event["step"] for event in run.journal.events("preempted")] == [0]


def again(run: RunFolder) -> None:
    run.journal.write("attempt_started", attempt=run.journal.next_attempt())


def test_one_rank_that_is_asked_stops_all_with_what_they_have(tmp_path: Path) -> None:
    run, undisturbed = made(tmp_path / "a"), made(tmp_path / "b")
    assert run_ranks(train_until_asked, 2, run.path, 1) == [AGAIN, AGAIN]
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-00000001"]
    event = run.journal.last("preempted")
    assert event is not None
    assert event["step"] == 1
    again(run)
    assert train(run) == train(undisturbed) == [DONE, DONE]
    assert free_of_time(run) == free_of_time(undisturbed)
    assert [event["step"] for event in run.journal.events("resumed")] == [0, 1]
    assert digest(run.checkpoints / "step-00000006") == digest(undisturbed.checkpoints / "step-00000006")


def test_a_request_at_the_last_step_is_no_reason_to_come_again(tmp_path: Path) -> None:
    run = made(tmp_path, "training.total_steps=1", "schedule.warmup_steps=0")
    assert run_ranks(train_until_asked, 2, run.path, 0) == [DONE, DONE]
    assert run.journal.last("preempted") is None


def train_message(path: Path) -> tuple[str, str]:
    """Kind and message of the error that ends the training."""
    from solomonov.errors import SolomonovError

    try:
        train_run(path)
    except SolomonovError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_disk_that_refuses_the_last_checkpoint_is_no_good_end(tmp_path: Path) -> None:
    run = made(tmp_path)
    with small_disk("64k") as disk:
        run.checkpoints.rmdir()
        run.checkpoints.symlink_to(disk)
        for kind, message in run_ranks(train_message, 2, run.path, timeout=120):
            assert kind == "SolomonovError"
            assert "the last checkpoint could not be written" in message
            assert "step 6" in message
        assert [event["step"] for event in run.journal.events("checkpoint_failed")] == [2, 4, 6]
        assert [event["step"] for event in run.journal.events("left_without_checkpoint")] == [6]
        assert run.journal.last("training_finished") is None
        assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6], "the run went on"
        run.checkpoints.unlink()
    run.checkpoints.mkdir()
    again(run)
    assert train(run) == [DONE, DONE]
    assert not list(run.journal.events("replay_mismatch")), "from the beginning, and the same"


def test_numbers_that_are_not_finite_end_it_on_all_ranks(tmp_path: Path) -> None:
    run = made(tmp_path, "optimizer.lr=1e30", "schedule.warmup_steps=0", "resilience.max_skipped_updates=1")
    for kind, message in run_ranks(train_message, 2, run.path):
        assert kind == "NumericalError"
        assert "2 updates skipped in a row up to step 3" in message
        assert "at most 1 in a row" in message
    assert [line["skipped"] for line in lines_of(run)] == [False, True, True]


def test_another_order_of_rows_is_refused_at_a_resume(tmp_path: Path) -> None:
    """The record was changed behind the command's back, to another weight of a source: the checkpoint tells."""
    run = made(tmp_path, ranks=1)
    assert run_ranks(train_until_asked, 1, run.path, 0) == [AGAIN]
    record = run.resolved()
    record["values"]["data.sources"]["value"][1]["weight"] = 4.0
    write_atomically(run.resolved_path, json.dumps(record))
    again(run)
    [(kind, message)] = run_ranks(train_message, 1, run.path)
    assert kind == "ConfigurationError"
    assert "another stream of rows" in message
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-00000001"], "nothing was lost"


def compiled(path: Path, programs: str) -> str:
    """Train with compilation asked for and no compiler on the PATH."""
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    os.environ["PATH"] = programs
    try:
        train_run(path)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    return programs


def test_without_a_compiler_it_trains_eagerly_and_says_so(tmp_path: Path) -> None:
    run = made(tmp_path, "training.compile=true", "training.total_steps=1", "schedule.warmup_steps=0", ranks=1)
    run_ranks(compiled, 1, run.path, str(tmp_path / "nothing"))
    [event] = run.journal.events("fallback")
    assert (event["what"], event["to"]) == ("torch.compile", "eager")
    assert "compiler" in event["reason"]
    assert len(lines_of(run)) == 1


def test_a_first_checkpoint_holds_what_the_support_expects(tmp_path: Path) -> None:
    """The names of a real checkpoint are those of the checkpoints that other tests write by hand."""
    run = made(tmp_path, "training.total_steps=1", "schedule.warmup_steps=0", ranks=1)
    assert train(run, 1) == [DONE]
    assert load_model(str(run.path)).state.keys() == model_state(run, 1).keys()
