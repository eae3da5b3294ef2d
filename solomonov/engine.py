"""The door to DeepSpeed: its engine, its optimizer's pieces.

Its pipelines are built in stages.py, as the groups of ranks that share rows; its JSON is made in engine_spec.py;
nothing else knows it. The loop in train.py sees five verbs: forward_backward, update, evaluate, fragments, restore.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from solomonov.batch import TokenBatch, empty_batch, padded
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.distributed import share_rows
from solomonov.ema import WeightAverage
from solomonov.engine_spec import EngineSpec, deepspeed_config
from solomonov.host import cpu_model
from solomonov.model.attention import SequenceShare
from solomonov.model.layers import Block
from solomonov.model.loss import pipeline_loss
from solomonov.model.naming import canonical, layer_names
from solomonov.model.stacks import block_place
from solomonov.model.transformer import Transformer, compile_blocks
from solomonov.muon import Muon
from solomonov.optim import make_optimizer
from solomonov.partition import (
    EMA,
    Piece,
    base_optimizer,
    create_state,
    forget_gradients,
    kinds,
    local_pieces,
    offloaded,
    parameter_shape,
    refresh_parameters,
)
from solomonov.stages import instructions, pipeline_module
from solomonov.topology import RankGrid


@dataclass(frozen=True)
class Update:
    """What one optimizer update was."""

    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    skipped: bool
    """True where the norm was not finite and no rank changed its weights."""


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without its start-up compilation on CPU and without its chatter.

    On CPU DeepSpeed would compile a shared-memory op at the first start (minutes, and it fails without a compiler);
    the op serves inference only, so it is declared unavailable first.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils.logging import logger

    logger.setLevel("WARNING")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def forget_earlier_engines(deepspeed: Any) -> None:
    """Take back what earlier engines of this process left in DeepSpeed's module globals: the grid of a pipeline, over
    which a plain engine stumbles, and that one autocast, after which a bf16 one accumulates in bf16."""
    from deepspeed.runtime import torch_autocast

    deepspeed.utils.groups.mpu = None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


class Engine:
    """A model, its optimizer and their layout over the ranks, behind DeepSpeed.

    Args:
        spec: what is built.
        device: of this rank.
        grid: where each rank stands in a pipeline, or among the ranks that share rows: there a stage is a run of each
            row's tokens. None: the first ranks are the first stage, and so on.
    """

    def __init__(self, spec: EngineSpec, device: torch.device, grid: RankGrid | None = None) -> None:
        deepspeed = import_deepspeed(device)
        forget_earlier_engines(deepspeed)
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", dist_init_required=False)
        self.spec = spec
        self.device = device
        self._layers = layer_names(spec.model)
        self._norm = math.nan
        self._sums = self._no_sums()
        self._share, self._copy = None, dist.get_rank()
        self._row_group: Any = None  # of the ranks that share rows
        if spec.sequence > 1:
            self._share, self._copy, self._row_group = share_rows(spec.sequence, grid)
        model: torch.nn.Module
        if spec.pipeline > 1:
            model = pipeline_module(spec, grid, self._stage_loss)
        else:
            plain = Transformer(spec.model, spec.vocab_size, seed=spec.seed, recompute=spec.recompute)
            plain.share = self._share
            if spec.compile:
                compile_blocks(plain)
            model = plain.to(device)
        named = [(canonical(name, self._layers), p) for name, p in model.named_parameters()]
        fused = device.type == "cuda" or spec.offload != "none"
        optimizer = make_optimizer(named, spec.optimizer, spec.model, fused=fused, fill=spec.pipeline > 1)
        ours = {p for _, p in named}
        fillers = [p for group in optimizer.param_groups for p in group["params"] if p not in ours]
        for number, p in enumerate(fillers):
            model.register_parameter(f"filler{number}", p)  # DeepSpeed knows only those of the module
        if spec.optimizer.kind == "muon":
            self._muon().take_over_step(optimizer)
        self._take_over_step(optimizer)
        self._ds, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(spec, device), dist_init_required=False
        )
        if spec.pipeline > 1:
            accumulates = getattr(self._optimizer, "use_grad_accum_attribute", False)
            self._ds._INSTRUCTION_MAP = self._ds._INSTRUCTION_MAP | instructions(accumulates)
        drops = spec.model.stochastic_depth > 0.0
        self._dropping = [m for m in self._ds.module.modules() if isinstance(m, Block)] if drops else []
        self.names: dict[torch.nn.Parameter, str] = {
            p: canonical(name, self._layers) for name, p in self._ds.module.named_parameters() if p not in set(fillers)
        }
        frozen = [name for p, name in self.names.items() if not p.requires_grad]
        assert not frozen, f"frozen parameters are in no optimizer and would not be saved: {frozen}"
        decay = spec.ema_decay
        self._average = WeightAverage(decay, self._optimizer) if decay is not None else None

    # ----------------------------------------------------------------------------------------------- training

    def forward_backward(
        self,
        batches: Sequence[TokenBatch],
        valid_tokens: int,
        lr: float,
        micro_batches: int | None = None,
        *,
        update: int,
    ) -> torch.Tensor:
        """Forward and backward of all micro-batches of one update.

        Args:
            batches: this rank's micro-batches, at most `micro_batches` of them; none where it needs no rows.
            valid_tokens: number of predicted tokens in the whole update, over all ranks.
            lr: learning rate of this update.
            micro_batches: forwards of every rank; those that it has no rows for are padding. None:
                `plan.accumulation`, and at most so many.
            update: how many updates the run has made before this one, skipped ones among them: the same on all ranks.

        Returns:
            this rank's sum of cross-entropy over its predicted tokens (nats), float64, detached.

        The loss of a micro-batch is the sum over its tokens divided by the update's global count, so that a token
        weighs the same wherever it is. DeepSpeed divides by its accumulation steps and averages over the ranks that
        have their own tokens, those that share rows among them; the factor below undoes both. The z-loss
        is weighed alike; what is returned is without it.
        """
        plan = self.spec.plan
        forwards = plan.accumulation if micro_batches is None else micro_batches
        assert 1 <= forwards <= plan.accumulation, f"{forwards} micro-batches of at most {plan.accumulation}"
        wanted = forwards if self.needs_rows else 0
        assert len(batches) <= wanted, f"{len(batches)} micro-batches, the plan says {wanted}"
        full = len(batches) == wanted or micro_batches is not None
        assert full, f"{len(batches)} micro-batches, the plan says {wanted}"
        missing = wanted - len(batches)
        batches = [*batches, *(self.empty_batch() for _ in range(missing))]
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._sums = self._no_sums()
        self._draw(update)
        if self.spec.pipeline > 1:
            self._pipeline_batch(batches, forwards, forwards * plan.data_parallel / max(1, valid_tokens))
            return self._sums[0]
        self._ds.train()
        scale = plan.accumulation * plan.data_parallel * self.spec.sequence / max(1, valid_tokens)
        for number, batch in enumerate(batches, 1):
            # Not DeepSpeed's own count, which takes every update for as long as the first.
            self._ds.set_gradient_accumulation_boundary(number == forwards)
            found = self._ds(*self._own_tokens(batch), source=batch.source, with_z=self.spec.z_loss > 0.0)
            self._ds.backward(self._objective(found) * scale)
            if number < forwards:
                self._ds.step()
        return self._sums[0]

    def _draw(self, update: int) -> None:
        """Tell the blocks of which update the next forward passes are, where some of them drop out in some updates."""
        for block in self._dropping:
            block.draw(self.spec.seed, update)
        if self._dropping:
            forget_gradients(self._optimizer)

    @property
    def z_sum(self) -> float:
        """This rank's sum of ln^2 Z over the predicted tokens of the last `forward_backward`; 0 without z-loss."""
        return float(self._sums[1])

    def _no_sums(self) -> torch.Tensor:
        """Sums over an update's tokens on this rank, before the first: of cross-entropy, and of ln^2 Z."""
        return torch.zeros(2, dtype=torch.float64, device=self.device)

    def _objective(self, found: torch.Tensor) -> torch.Tensor:
        """What is minimised, a sum over the tokens of a micro-batch; takes note of its parts.

        Args:
            found: the sum of cross-entropy; with z-loss (2,), and that of ln^2 Z.
        """
        if not self.spec.z_loss:
            self._sums[0] += found.detach()
            return found
        self._sums += found.detach()
        return found[0] + self.spec.z_loss * found[1]

    def update(self) -> Update:
        """Clip and apply the gradients of `forward_backward`, on all ranks or on none."""
        if self.spec.pipeline == 1:
            self._ds.step()
        if self.spec.zero_stage:
            norm = self._ds.get_global_grad_norm()
            self._norm = math.nan if norm is None else float(norm)
        skipped = not math.isfinite(self._norm)
        if self._average is not None and not skipped:
            self._average.update()
        return Update(self._norm, skipped)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> float:
        """Sum of cross-entropy (nats) over the predicted tokens of one micro-batch of this rank; in a pipeline a share
        such that the sum over all ranks is that over all micro-batches. All ranks call it together."""
        if self.spec.pipeline > 1:
            # The stages have agreed on the size of what travels between them: short micro-batches are filled up.
            full = padded(batch, self.spec.plan.micro_rows)
            one = torch.ones(1, dtype=torch.float32, device=self.device)
            micro = [(full.carry(), (full.labels, one))] if self.needs_rows else []
            mean = self._ds.eval_batch(iter(micro), num_micro_batches=1)  # over the data-parallel ranks
            return float(mean) / self.spec.pipeline
        self._ds.eval()
        return float(self._ds(*self._own_tokens(batch), source=batch.source))

    def empty_batch(self) -> TokenBatch:
        """A micro-batch of padding, for where this rank has no rows and the others have."""
        plan = self.spec.plan
        return empty_batch(plan.sequence_tokens, self.device, source_tokens=plan.source_tokens)

    def blocks(self) -> dict[int, Block]:
        """This rank's blocks, by their number through all stacks: in a pipeline those of its stage, else all."""
        found: dict[int, Block] = {}
        for name, module in self._ds.module.named_modules():
            if isinstance(module, Block):
                place = block_place(self.spec.model, canonical(f"{name}.weight", self._layers))
                assert place is not None, f"{name} is a block and has no number"
                found[place] = module
        return found

    @property
    def share(self) -> SequenceShare | None:
        """This rank's share of rows that several ranks compute together; None: it has them whole."""
        return self._share

    def tokens_of_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, T/S, ...) of each rank that shares these rows -> (B, T, ...) in fp32 on all of them. A collective."""
        parts = [torch.empty_like(tensor, dtype=torch.float32) for _ in range(self.spec.sequence)]
        dist.all_gather(parts, tensor.float().contiguous(), group=self._row_group)
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        """Let go of memory and process groups, in a process that goes on without this engine: DeepSpeed's hooks on
        gradients hold it otherwise, where the garbage collector does not see them."""
        self._ds.destroy()
        if self.spec.pipeline > 1:
            from deepspeed.runtime.pipe import p2p
            from deepspeed.utils import groups

            p2p._grid = p2p._groups = groups.mpu = None
            # The last micro-batch's graph, whose hooks hold the engine.
            self._ds.pipe_buffers, self._ds.loss = {}, None

    def _own_tokens(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input ids, document ids and labels as the model takes them."""
        if self._share is None:
            return batch.input_ids, batch.document_ids, batch.labels
        mine = self._share.tokens(batch.input_ids.shape[1])
        return batch.input_ids[:, mine].contiguous(), batch.document_ids, batch.labels[:, mine].contiguous()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, `evaluate` uses the moving average of the weights, where `spec.ema_decay` asks for one. All ranks
        enter it together, between `update` and the next `forward_backward`."""
        assert self._average is not None, "no average is kept"
        return self._average.in_use()

    def _muon(self) -> Muon:
        """Muon over the pieces that this rank will hold."""
        asked = self.spec.optimizer.newton_schulz
        reduced = asked == "bf16" or (asked == "auto" and self.device.type == "cuda")
        return Muon(
            self.spec.optimizer.momentum,
            torch.bfloat16 if reduced else torch.float32,
            pieces=lambda: local_pieces(self._optimizer, self.names),
            group=lambda: self._optimizer.dp_process_group if self.spec.zero_stage else None,
            device=self.device,
        )

    def _take_over_step(self, optimizer: torch.optim.Optimizer) -> None:
        """At stage 0: norm, clipping and the verdict on a non-finite norm, between reduction and update."""
        if self.spec.zero_stage:
            return
        apply = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            # Of a tied weight each stage that holds it has the whole gradient: the first one's counts.
            counted = [p.grad for p in parameters if not getattr(p, "ds_pipe_replicated", False)]
            self._norm = self._global_norm(counted)
            if not math.isfinite(self._norm):
                return None
            limit = self.spec.gradient_clipping
            if limit and self._norm > limit:
                for gradient in gradients:
                    gradient.mul_(limit / (self._norm + 1e-6))
            return apply(*args, **kwargs)

        optimizer.step = step  # type: ignore[method-assign]

    def _global_norm(self, gradients: Sequence[torch.Tensor]) -> float:
        """L2 norm of reduced gradients; in a pipeline of those of all stages, the same on each."""
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
        if self.spec.pipeline == 1:
            return float(torch.linalg.vector_norm(torch.stack(norms)))
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for norm in norms:
            squares += norm.double().square()
        dist.all_reduce(squares, group=self._ds.grid.get_pipe_parallel_group())
        return math.sqrt(float(squares))

    # ----------------------------------------------------------------------------------------------- pipeline

    def _stage_loss(self, outputs: tuple[torch.Tensor, ...], labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """On the last stage, of one micro-batch: what is minimised, or in an evaluation the sum of cross-entropy.

        Args:
            labels: (B, T) labels and (1,) factor.
        """
        tokens, factor = labels
        if not self._ds.module.training:
            return pipeline_loss(outputs, tokens) * factor[0]
        return self._objective(pipeline_loss(outputs, tokens, with_z=self.spec.z_loss > 0.0)) * factor[0]

    def _pipeline_batch(self, batches: Sequence[TokenBatch], forwards: int, scale: float) -> None:
        """DeepSpeed's own schedule: all micro-batches, the update included. The last stage has the sums; the mean that
        train_batch returns is that of what is minimised, z-loss and all."""
        plan = self.spec.plan
        self._ds.set_train_batch_size(forwards * plan.micro_rows * plan.data_parallel)
        # The stages have agreed on the size of what travels between them: short micro-batches are filled up.
        batches = [padded(batch, plan.micro_rows) for batch in batches]
        factor = torch.full((1,), scale, dtype=torch.float32, device=self.device)
        micro = ((batch.carry(), (batch.labels, factor)) for batch in batches)
        self._ds.train_batch(data_iter=iter(micro))

    @property
    def data_rank(self) -> int:
        """Which of the `plan.data_parallel` shares of a batch is this rank's."""
        return self._copy if self.spec.pipeline == 1 else int(self._ds.grid.get_data_parallel_rank())

    @property
    def counts_rows(self) -> bool:
        """Whether sums over rows count this rank's: one rank of each share does, of a pipeline the first stage's, of
        those that share rows the one with the first tokens."""
        if self._share is not None:
            return self._share.rank == 0
        return self.spec.pipeline == 1 or bool(self._ds.is_first_stage())

    @property
    def takes_loss(self) -> bool:
        """Whether losses are computed on this rank: in a pipeline, on the last stage."""
        return self.spec.pipeline == 1 or bool(self._ds.is_last_stage())

    @property
    def needs_rows(self) -> bool:
        """Whether this rank computes from rows: in a pipeline, the first stage from tokens, the last from labels."""
        return self.counts_rows or self.takes_loss

    def _writes(self, name: str) -> bool:
        """A tied weight lives on the first pipeline stage and on the last: the first one writes it, both read it."""
        if self.spec.pipeline == 1 or name not in {f"{key}.weight" for key in self._ds.module.tied_comms}:
            return True
        return bool(self._ds.is_first_stage())

    # ----------------------------------------------------------------------------------------------- state

    @property
    def layout(self) -> dict[str, Any]:
        """What really runs, and all that decides the last bits of a sum: for the journal, the checkpoint's header
        and the tests."""
        held = sum(p.numel() if not hasattr(p, "ds_tensor") else p.ds_tensor.numel() for p in self.names)
        return {
            "optimizer": type(self._optimizer).__name__,
            "zero_stage": int(self._ds.zero_optimization_stage()),
            "pipeline": self.spec.pipeline,
            "sequence": self.spec.sequence,
            "offload": offloaded(self._optimizer),
            "world": dist.get_world_size(),
            "data_parallel": self.spec.plan.data_parallel,
            "micro_rows": self.spec.plan.micro_rows,
            "accumulation": self.spec.plan.accumulation,
            "precision": self.spec.precision,
            "compiled": self.spec.compile,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processor": cpu_model(),
            "parameters_held": held,
        }

    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(canonical name, kind) -> shape, for all state of this rank's parameters."""
        updated = bool(self.updates_applied())
        shapes = {name: parameter_shape(p) for p, name in self.names.items()}
        return {(name, kind): s for name, s in shapes.items() for kind in self._kinds(name, s, updated)}

    def _kinds(self, name: str, shape: tuple[int, ...], updated: bool) -> tuple[str, ...]:
        muon, ema = self.spec.optimizer.kind == "muon", self._average is not None
        return kinds(name, shape, muon=muon, updated=updated, ema=ema)

    def _values(self, piece: Piece, kind: str) -> torch.Tensor:
        """One kind of a piece, 1-D, sharing memory with what is trained."""
        if kind == "master":
            return piece.view(piece.flat)
        if kind == EMA:
            assert self._average is not None, "no average is kept"
            return piece.view(self._average.of(piece.flat))
        return piece.view(base_optimizer(self._optimizer).state[piece.flat][kind])

    def updates_applied(self) -> int:
        """AdamW's own count of updates; skipped ones are not in it."""
        for state in base_optimizer(self._optimizer).state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of masters, moments and average; over all ranks they tile everything once.

        They share memory with the optimizer: use them between `update` and the next `forward_backward`.
        """
        updated = bool(self.updates_applied())
        group = self._ds.seq_data_parallel_group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        for piece in local_pieces(self._optimizer, self.names):
            if not self._writes(piece.name):
                continue
            low, high = 0, piece.numel
            if not self.spec.zero_stage:  # replicated: every rank writes its share
                low, high = piece.numel * rank // size, piece.numel * (rank + 1) // size
            if low == high:
                continue
            for kind in self._kinds(piece.name, piece.shape, updated):
                data = self._values(piece, kind)[low:high]
                start = piece.start + low
                yield Fragment(piece.name, kind, piece.shape, start, start + data.numel(), data)

    def restore(self, reader: CheckpointReader, updates_applied: int) -> None:
        """Overwrite masters and moments from a verified checkpoint of any layout, and refresh the parameters.

        An average that is kept is overwritten as well, or begins as the masters where the checkpoint holds none.

        Raises:
            ConfigurationError: the checkpoint holds other parameters or shapes than this model.
        """
        reader.require_model({name: parameter_shape(p) for p, name in self.names.items()})
        create_state(self._optimizer, updates_applied)
        without = () if EMA in reader.kinds() else (EMA,)
        with torch.no_grad():
            for piece in local_pieces(self._optimizer, self.names):
                for kind in self._kinds(piece.name, piece.shape, bool(updates_applied)):
                    if kind not in without:
                        stored = reader.read(piece.name, kind, piece.start, piece.end)
                        self._values(piece, kind).copy_(stored)
        if self._average is not None and without:
            self._average.begin()
        refresh_parameters(self._optimizer)
