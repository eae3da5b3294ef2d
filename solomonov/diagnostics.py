"""Whether a deep model uses its depth, and where its heads look, measured while it trains; training never feels it.

Four measures, every `metrics.diagnostics_every_steps` updates: how much the update changed each block, against its
size; the stream behind each block; by how much the held-out loss rises without an eighth of the blocks; and distance
and entropy of each head. The first is taken from the fp32 masters, wherever they lie; the others from the engine's own
evaluation of some held-out rows, so that each layout computes as it always does. All of it is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from data_pipeline.stream import HeldOutRows
from solomonov.batch import TokenBatch
from solomonov.checkpoint.fragments import Fragment
from solomonov.distributed import Control
from solomonov.engine import Engine
from solomonov.held_out import held_out_loss
from solomonov.model.signal import as_written, bypassed, eighths
from solomonov.model.stacks import block_place
from solomonov.model.watch import Watch

ROWS = 8
"""Held-out rows that are looked at: nine forward passes over them."""
MOST_HEADS = 64
"""Heads of all layers together up to which each has a scalar of its own; of more of them nobody looks at a thousand."""
COMPARED_ELEMENTS = 1 << 24
"""Elements of masters that are compared at a time: 64 MiB, and twice as much for their squares."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found after an update. Layers are counted from 0, through all stacks; L of them with H heads."""

    update_to_weight: tuple[float, ...]
    """||w' - w|| / ||w|| of all parameters of each block together, w before the update and w' after it."""
    update_to_weight_of_parts: tuple[float, ...]
    """Likewise of each eighth of the blocks."""
    stream_rms: tuple[float, ...] = ()
    """Root mean square of the stream behind the embedding and behind each block; empty, as those below, where the data
    set holds nothing out."""
    skip_eighth: tuple[float, ...] = ()
    """By how many nats a token the held-out loss rises when each eighth of the blocks is passed by."""
    distance: tuple[tuple[float, ...], ...] = ()
    """(L, H) tokens between a query and the keys that a head looks at, weighted as it looks at them."""
    entropy: tuple[tuple[float, ...], ...] = ()
    """(L, H) mean entropy of a query's weights in nats: 0 looks at one token, ln n at n alike."""

    @property
    def parts(self) -> list[range]:
        """The layers of each eighth, or single layers where there are at most eight."""
        return eighths(len(self.update_to_weight))

    def scalars(self) -> dict[str, float]:
        """TensorBoard's tags and their values; an eighth is named by its layers, as `12-23`, a single one as `3`."""
        found: dict[str, float] = {}
        names = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in self.parts]
        for name, value in zip(names, self.update_to_weight_of_parts, strict=True):
            found[f"depth/update_to_weight/{name}"] = value
        if not self.stream_rms:
            return found
        found["depth/growth/embedding"] = self.stream_rms[0]
        for name, part, rise in zip(names, self.parts, self.skip_eighth, strict=True):
            found[f"depth/growth/{name}"] = self.stream_rms[part[-1] + 1]
            found[f"depth/skip_eighth/{name}"] = rise
        for kind, values in (("distance", self.distance), ("entropy", self.entropy)):
            for name, part in zip(names, self.parts, strict=True):
                heads = [value for layer in part for value in values[layer]]
                spread = {"least": min(heads), "mean": sum(heads) / len(heads), "most": max(heads)}
                found |= {f"attention/{kind}/{name}/{word}": value for word, value in spread.items()}
            if len(values) * len(values[0]) <= MOST_HEADS:
                for layer, heads_of in enumerate(values):
                    found |= {f"attention/{kind}/{layer}/{head}": value for head, value in enumerate(heads_of)}
        return found


class Diagnostics:
    """Measures when an update is due. All ranks call the same methods.

    Args:
        held_out: where rows are taken from; None: there are none, and only updates are measured.
        every_steps: updates from one measurement to the next; 0: never.
    """

    def __init__(self, engine: Engine, control: Control, held_out: HeldOutRows | None, every_steps: int) -> None:
        self._engine, self._control, self._held_out, self._every_steps = engine, control, held_out, every_steps
        self._before: list[Fragment] = []

    def due(self, step: int) -> bool:
        """Whether the update of this number is measured."""
        return bool(self._every_steps) and step % self._every_steps == 0

    def before(self, step: int) -> None:
        """Before `forward_backward` of an update that is due: keeps a copy of this rank's masters, in the host's memory
        (4 bytes for each parameter of a block, over the ranks that share it)."""
        self._before = [_kept(master) for master in self._masters()] if self.due(step) else []

    def measure(self) -> Diagnosis:
        """After that update, before the next `forward_backward`."""
        engine, model = self._engine, self._engine.spec.model
        layers = sum(stack.layers for stack in model.stacks)
        watch = Watch(model, engine.blocks(), engine.device, engine.share, engine.tokens_of_all)
        changes, rises = self._changes(layers), list[float]()
        if self._held_out is not None:
            rises = self._look(watch, self._held_out, layers)
        changes, streams, heads = self._summed(changes, watch.streams, watch.heads)
        parts = torch.stack([changes[part.start : part.stop].sum(dim=0) for part in eighths(layers)])
        updates = tuple(_ratios(changes.T).sqrt().tolist()), tuple(_ratios(parts.T).sqrt().tolist())
        if self._held_out is None:
            return Diagnosis(*updates)
        entropy, far, weight, queries = heads.unbind(dim=1)
        return Diagnosis(
            *updates,
            tuple(_ratios(streams.T).sqrt().tolist()),
            tuple(rises),
            tuple(map(tuple, _ratios((far, weight)).tolist())),
            tuple(map(tuple, _ratios((entropy, queries)).tolist())),
        )

    def _summed(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """The sums of all ranks' tensors, each of the same shape everywhere."""
        sizes = [part.numel() for part in parts]
        mine = torch.cat([part.flatten().cpu() for part in parts])
        total = torch.tensor(self._control.sum_floats(mine.tolist()), dtype=torch.float64)
        return [found.view_as(part) for found, part in zip(torch.split(total, sizes), parts, strict=True)]

    def _masters(self) -> Iterator[Fragment]:
        """This rank's share of the masters of all blocks; the shares of all ranks tile them."""
        for fragment in self._engine.fragments():
            if fragment.kind == "master" and block_place(self._engine.spec.model, fragment.name) is not None:
                yield fragment

    def _changes(self, layers: int) -> torch.Tensor:
        """(L, 2) float64, this rank's part: of each block the sums of (w' - w)^2 and of w^2."""
        sums = torch.zeros(layers, 2, dtype=torch.float64)
        for before, after in zip(self._before, self._masters(), strict=True):
            same = (before.name, before.start, before.end) == (after.name, after.start, after.end)
            assert same, f"{after.name} was {before.name}: this rank holds other pieces than before the update"
            place = block_place(self._engine.spec.model, after.name)
            assert place is not None, f"{after.name} is of no block"
            for old, new in zip(
                *(torch.split(data, COMPARED_ELEMENTS) for data in (before.data, after.data)), strict=True
            ):
                was = old.to(new.device)
                sums[place, 0] += float((new - was).double().square().sum())
                sums[place, 1] += float(was.double().square().sum())
        self._before = []
        return sums

    def _look(self, watch: Watch, held_out: HeldOutRows, layers: int) -> list[float]:
        """Rise of the held-out loss without each eighth; `watch` looks at the forward pass with all of them."""
        blocks = self._engine.blocks()

        def loss(before: Callable[[TokenBatch], None] | None = None) -> float:
            return held_out_loss(self._engine, self._control, held_out, min(len(held_out), ROWS), before)

        rises = []
        with as_written(blocks.values()):  # all of them alike: compiled code rounds otherwise
            with watch.looking():
                whole = loss(lambda batch: watch.rows(batch.document_ids, batch.source and batch.source.document_ids))
            for part in eighths(layers):
                with bypassed(blocks[layer] for layer in part if layer in blocks):
                    rises.append(loss() - whole)
        return rises


def _kept(fragment: Fragment) -> Fragment:
    """The same values, in the host's memory, whatever becomes of the fragment."""
    return replace(fragment, data=fragment.data.detach().to("cpu", copy=True))


def _ratios(sums: Iterable[torch.Tensor]) -> torch.Tensor:
    """a / b of the two tensors a and b; 0 where both are."""
    above, below = sums
    return torch.where((above == 0.0) & (below == 0.0), 0.0, above / below)


def left_out(held_out: HeldOutRows | None, picture_problem: str | None) -> Sequence[dict[str, str]]:
    """What a run that asked for diagnostics does not get, and why: fields of events."""
    missing = []
    if held_out is None:
        what = "depth/growth, depth/skip_eighth, attention/distance, attention/entropy"
        missing.append({"what": what, "reason": "the data set holds nothing out"})
    if picture_problem is not None:
        missing.append({"what": "the picture of all layers", "reason": picture_problem})
    return missing
