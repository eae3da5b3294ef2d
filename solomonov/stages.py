"""A model as DeepSpeed's pipeline: its stages, and the sum of a tied weight's gradients over them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from solomonov.engine_spec import EngineSpec
from solomonov.model.pipeline import BlockStage, pipeline_layers
from solomonov.model.recompute import in_groups, in_turn
from solomonov.model.transformer import compile_blocks
from solomonov.topology import RankGrid, stage_bounds


def pipeline_module(spec: EngineSpec, grid: RankGrid | None, loss: Callable[..., torch.Tensor]) -> torch.nn.Module:
    """The named layers as a DeepSpeed PipelineModule, cut evenly by what they compute.

    Args:
        grid: where each rank stands; None: the first ranks are the first stage, and so on.
        loss: of the last stage's outputs and labels.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    bounds = stage_bounds(spec.model, spec.vocab_size, spec.plan.sequence_tokens, spec.pipeline)

    class Stages(PipelineModule):  # type: ignore[misc]
        """Cut where we say: DeepSpeed balances parameters, of which the embedding has many that cost nothing."""

        def _partition_layers(self, method: str = "") -> None:
            stage = self._topo.get_coord(self.global_rank).pipe
            self.parts = list(bounds)
            self._set_bounds(start=bounds[stage], stop=bounds[stage + 1])

        def forward(self, forward_input: Any) -> Any:
            """Groups begin with the first block of the stage; DeepSpeed's begin with the first layer, and a group
            in which there is another layer than blocks it does not run again."""
            carry, again = forward_input, spec.recompute
            for of_blocks, run in groupby(self.forward_funcs, lambda layer: isinstance(layer, BlockStage)):
                layers = list(run)
                if of_blocks and again.mode == "full":
                    carry = in_groups(layers, carry, again.every)
                else:
                    carry = in_turn(layers, carry)
            return carry

    topology = PipeDataParallelTopology(num_pp=spec.pipeline, num_dp=spec.plan.data_parallel)
    if grid is not None:
        topology.mapping = {
            topology.ProcessCoord(pipe=stage, data=replica): rank
            for rank, (stage, replica) in sorted(grid.coordinates().items())
        }
    selective = spec.recompute.mode == "selective"
    layers = []
    for layer in pipeline_layers(spec.model, spec.vocab_size, spec.seed, selective=selective):
        if layer.tied_key is None:
            layers.append(LayerSpec(layer.module_type, *layer.arguments))
        else:
            tied = (layer.tied_key, layer.module_type, *layer.arguments)
            layers.append(TiedLayerSpec(*tied, tied_weight_attr=["weight"]))
    module = Stages(layers=layers, topology=topology, loss_fn=loss)
    for tied in module.tied_modules.values():
        for name, parameter in tied.named_parameters():
            if name != "weight":
                # DeepSpeed takes all that a tied module holds for a copy, and leaves it out of the gradient's norm.
                parameter.ds_pipe_replicated = False
    if spec.compile:
        compile_blocks(module)
    return module


def sum_tied_gradients(pipeline: Any) -> None:
    """Add up the gradients of a tied weight over the stages that hold it, once all micro-batches are done.

    In the place of DeepSpeed's own, which looks for them where all optimizers but that of an offloaded bf16 one have
    them, and finds none there: each stage would go on with its part of them.
    """
    for weight, group in pipeline.module.get_tied_weights_and_groups():
        accumulated = getattr(weight, "grad_accum", None)
        gradient = weight.grad if accumulated is None else accumulated
        assert gradient is not None, "a tied weight has no gradient after all micro-batches"
        dist.all_reduce(gradient, group=group)
