"""A model as DeepSpeed's pipeline: its stages, and what is done otherwise than by DeepSpeed in their backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from solomonov.engine_spec import EngineSpec
from solomonov.model.pipeline import BlockStage, pipeline_layers
from solomonov.model.recompute import in_groups, in_turn
from solomonov.model.stacks import Stack
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

    plan = spec.plan
    bounds = stage_bounds(spec.model, spec.vocab_size, plan.sequence_tokens, spec.pipeline, plan.source_tokens)

    class Stages(PipelineModule):  # type: ignore[misc]
        """Cut where we say: DeepSpeed balances parameters, of which the embedding has many that cost nothing."""

        def _partition_layers(self, method: str = "") -> None:
            stage = self._topo.get_coord(self.global_rank).pipe
            self.parts = list(bounds)
            self._set_bounds(start=bounds[stage], stop=bounds[stage + 1])

        def forward(self, forward_input: Any) -> Any:
            """Groups are of one stack and begin with its first block on the stage; DeepSpeed's begin with the first
            layer, and a group in which there is another layer than blocks it does not run again."""
            carry, again = forward_input, spec.recompute

            def stack_of_block(layer: Any) -> Stack | None:
                return layer.stack if isinstance(layer, BlockStage) else None

            for stack, run in groupby(self.forward_funcs, stack_of_block):
                layers = list(run)
                if stack is not None and again.mode == "full":
                    carry = in_groups(layers, carry, again.every)
                else:
                    carry = in_turn(layers, carry)
            return carry

    topology = PipeDataParallelTopology(num_pp=spec.pipeline, num_dp=plan.data_parallel)
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


def instructions(accumulates: bool) -> dict[type, Callable[..., None]]:
    """What of DeepSpeed's schedule is done otherwise.

    Args:
        accumulates: whether the optimizer keeps the gradients of micro-batches in an attribute of its own.
    """
    from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads

    ours: dict[type, Callable[..., None]] = {BackwardPass: backward_together}
    return ours | ({ReduceTiedGrads: sum_tied_gradients} if accumulates else {})


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


class _Together(torch.autograd.Function):
    """One tensor in the place of several: its backward pass is that of all of them, with the gradients they have."""

    @staticmethod
    def forward(context: Any, gradients: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        """Nothing is computed from the outputs."""
        context.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(context: Any, _: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of the outputs."""
        return None, *context.gradients


def backward_together(pipeline: Any, buffer_id: int) -> None:
    """The backward pass of a stage before the last one, from all that it handed on at once.

    DeepSpeed goes through the stage once for each tensor: where the encoder ends and the decoder begins on one stage,
    twice through the encoder, for what is made of it there and for what is handed on.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    outputs, gradients = pipeline.pipe_buffers["outputs"][buffer_id], pipeline.grad_layer
    if not pipeline.is_last_stage() and len(gradients) > 1:
        floating = [output for output in outputs if output.is_floating_point()]
        together = _Together.apply(gradients, *floating)  # type: ignore[no-untyped-call]
        pipeline.pipe_buffers["outputs"][buffer_id] = together
        pipeline.grad_layer = torch.ones_like(together)
    PipelineEngine._exec_backward_pass(pipeline, buffer_id)
    pipeline.grad_layer = gradients
