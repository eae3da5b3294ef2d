"""What an engine is built from, and DeepSpeed's own JSON for it, of which no key is known elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from solomonov.config import OptimizerConfig
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.counts import parameter_count
from solomonov.parallel import LIVE_PARAMETERS, Offload, ParallelConfig, bucket_elements, overlaps
from solomonov.plan import BatchPlan


@dataclass(frozen=True)
class EngineSpec:
    """All that an engine is built from."""

    model: ModelConfig
    vocab_size: int
    seed: int
    plan: BatchPlan
    precision: str
    """fp32, bf16 or bf16_autocast (resolved, never `auto`)."""
    zero_stage: int
    optimizer: OptimizerConfig
    gradient_clipping: float
    recompute: Recompute = NOTHING_AGAIN
    compile: bool = False
    pipeline: int = 1
    sequence: int = 1
    """Ranks that share a row; with more than 1 there is no pipeline."""
    offload: Offload = "none"
    z_loss: float = 0.0
    """Coefficient of the mean of ln^2 Z."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights; None: none is kept."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` -> bf16 on CUDA devices that compute it natively, else fp32."""
    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def deepspeed_config(spec: EngineSpec, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON for a layout on a kind of device."""
    bucket = bucket_elements(parameter_count(spec.model, spec.vocab_size))
    # At stage 3 DeepSpeed's buffers are made for it on any device.
    fields = {"zero_stage": spec.zero_stage, "pipeline": spec.pipeline, "offload": spec.offload}
    layout = ParallelConfig.model_validate(fields)
    beside = overlaps(layout, spec.precision) and (device.type == "cuda" or spec.zero_stage == 3)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.plan.micro_rows,
        "gradient_accumulation_steps": spec.plan.accumulation,
        # At stage 0 DeepSpeed neither reports the norm nor refuses a NaN: there norm, clipping and verdict are ours.
        "gradient_clipping": spec.gradient_clipping if spec.zero_stage else 0.0,
        "zero_optimization": {
            "stage": spec.zero_stage,
            "overlap_comm": beside,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": LIVE_PARAMETERS,
        },
        "steps_per_print": 2**31,
    }
    if spec.model.stochastic_depth:
        # At stage 3 DeepSpeed gathers ahead, and keeps what is needed again soon, by the order of the pass before,
        # which computed other layers: it finds out half-way through, and of a layer before that the parameters then
        # come and go otherwise when it is computed again, which selective recomputation refuses.
        ahead = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance", "stage3_param_persistence_threshold")
        config["zero_optimization"] |= dict.fromkeys(ahead, 0)
    if spec.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Without this DeepSpeed casts the accumulated fp32 gradients to bf16 for the reduction, even on one rank.
        config["communication_data_type"] = "fp32"
    elif spec.precision == "bf16_autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if spec.offload != "none":
        # Only page-locked memory is copied to and from a CUDA device at the speed of the bus, and beside its work.
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        config["zero_optimization"]["offload_optimizer"] = host
        if spec.offload == "parameters":
            config["zero_optimization"]["offload_param"] = host
        # Unless told otherwise DeepSpeed refuses every optimizer here but its own DeepSpeedCPUAdam, which is compiled
        # at the first start on each machine. torch's fused AdamW comes compiled, and passes over the memory once as
        # well: 15 GB/s on one core, of which its unfused form reaches 0.6. What is lost is the AVX-512 code of the
        # other one, where the cores and not the memory are the limit.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
