"""Where DeepSpeed keeps each parameter's fp32 master and moments: this rank's pieces, by canonical name.

One reading of DeepSpeed's optimizers, used for saving and for restoring, without a gather and without DeepSpeed's
own checkpoint files. The four forms are told apart by the attributes that hold the masters:

    stage 0             the client optimizer itself     the parameter, whole, on every rank
    stage 1, 2          DeepSpeedZeroOptimizer          single_partition_of_fp32_groups, one flat tensor a group
    stage 1, bf16       BF16_Optimizer                  fp32_groups_flat_partition, one flat tensor a group
    stage 3             DeepSpeedZeroOptimizer_Stage3   fp32_partitioned_groups_flat, one flat tensor a sub-group

An offloaded optimizer has the same forms (at stage 1 with bf16 that of fp32): its flat tensors are the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from solomonov.model.naming import is_hidden_matrix
from solomonov.parallel import Offload

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments: kinds that a checkpoint holds beside the masters."""
MOMENTUM = "momentum"
"""Muon's one moment."""
EMA = "ema"
"""The exponential moving average of the weights (see `ema`)."""


@dataclass(frozen=True)
class Piece:
    """A range of one flattened parameter whose master and moments this rank holds."""

    name: str
    """Canonical name."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    flat: torch.Tensor
    """The optimizer's own tensor that holds the master (the key of its state)."""
    offset: int
    """First element of the range in `flat`, flattened."""
    numel: int
    """Elements in the range."""

    @property
    def end(self) -> int:
        """One past the last element of the range in the flattened parameter."""
        return self.start + self.numel

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The range inside `flat` or inside a moment that lies like it: 1-D, sharing memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's, or the optimizer itself."""
    inner: torch.optim.Optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return inner


def offloaded(optimizer: Any) -> Offload:
    """What DeepSpeed's optimizer really keeps in the host's memory."""
    if getattr(optimizer, "offload_param", False):
        return "parameters"
    moved = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    return "optimizer" if moved else "none"


def parameter_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO 3 has taken its data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_pieces(optimizer: Any, names: Mapping[torch.nn.Parameter, str]) -> Iterator[Piece]:
    """This rank's pieces of every trainable parameter.

    Args:
        optimizer: `engine.optimizer` of DeepSpeed.
        names: canonical name of every parameter of this rank; others (the fillers of a pipeline stage's groups) have
            no piece.

    Yields:
        pieces that together, over the ranks of a data-parallel group, tile each parameter exactly once; at stage 0
        every rank yields every parameter whole.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage3_pieces(optimizer, names)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _mapped_pieces(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _mapped_pieces(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    else:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in names:
                    yield Piece(names[p], tuple(p.shape), 0, p, 0, p.numel())


def _mapped_pieces(groups: Any, flats: Any, names: Mapping[torch.nn.Parameter, str]) -> Iterator[Piece]:
    """ZeRO 1, 2 and BF16_Optimizer: DeepSpeed's high-precision fragment mapping on each parameter."""
    for group, flat in zip(groups, flats, strict=True):
        for p in group:
            mapping = p._hp_mapping
            if mapping is None or p not in names:
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            if high.numel:
                yield Piece(names[p], tuple(p.shape), low.start, flat, high.start, high.numel)


def _stage3_pieces(optimizer: Any, names: Mapping[torch.nn.Parameter, str]) -> Iterator[Piece]:
    """ZeRO 3: each parameter is cut evenly over the ranks; the last ranks' pieces carry padding, which is dropped."""
    for sub_group in optimizer.fp16_groups:
        for p in sub_group:
            index, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            start = dist.get_rank(p.ds_process_group) * padded
            numel = max(0, min(p.ds_numel - start, padded))
            if numel:
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield Piece(names[p], tuple(p.ds_shape), start, flat, offset, numel)


def forget_gradients(optimizer: Any) -> None:
    """Set to 0 what DeepSpeed keeps of the last update's gradients where it overwrites those alone that a parameter has
    a new one for: at stage 3, and with an offloaded optimizer. Elsewhere it takes 0 for a gradient that is missing."""
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        optimizer.grad_partitions_flat_buffer.zero_()
    if offloaded(optimizer) != "none":
        for flat, _ in master_flats(optimizer):
            if flat.grad is not None:
                flat.grad.zero_()


def refresh_parameters(optimizer: Any) -> None:
    """After masters were overwritten: make the parameters that the forward uses equal to them (a collective)."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # A forward without a backward leaves parameters gathered, which the next one would use as they are; small ones
        # are always gathered.
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        optimizer._lazy_init_hp_params_optimizer_state()


def kinds(name: str, shape: tuple[int, ...], *, muon: bool, updated: bool, ema: bool) -> tuple[str, ...]:
    """What there is of a parameter: the master, its average if one is kept and, after the first update, its
    optimizer's moments.

    Args:
        muon: the run's hidden matrices are Muon's.
        updated: an update was applied.
        ema: the moving average of the weights is kept.
    """
    weights = ("master", EMA) if ema else ("master",)
    if not updated:
        return weights
    return (*weights, MOMENTUM) if muon and is_hidden_matrix(name, shape) else (*weights, *MOMENTS)


def create_state(optimizer: Any, step: int) -> None:
    """Give the optimizer's lazily created state its tensors (zeros), and set AdamW's update count to `step`."""
    base = base_optimizer(optimizer)
    fused = bool(base.defaults.get("fused") or base.defaults.get("capturable"))
    for flat, muon in master_flats(optimizer):
        state = base.state[flat]
        for moment in (MOMENTUM,) if muon else MOMENTS:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
        if not muon:
            # The fused kernel reads the count on the device; the plain one wants it on the CPU.
            device = flat.device if fused else torch.device("cpu")
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def master_flats(optimizer: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors that hold this rank's masters, and whether they are Muon's."""
    groups = base_optimizer(optimizer).param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield flat, groups[optimizer.sub_group_to_group_id[index]]["muon"]
        return
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            yield from zip(getattr(optimizer, name), (group["muon"] for group in groups), strict=True)
            return
    yield from ((p, group["muon"]) for group in groups for p in group["params"])
