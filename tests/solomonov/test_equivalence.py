"""Which layouts are drawn, against the definition of all pairs; verdicts on outcomes that differ where it is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solomonov.config import Config, parse_config
from solomonov.equivalence import (
    REFERENCE,
    Case,
    Outcome,
    Trial,
    all_cases,
    compare,
    draw_cases,
    legal_cases,
    optimizer_of,
    parameters_held,
    relative,
    scale_down,
)
from solomonov.model.counts import parameter_count, parameter_shapes
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.residual import branch_form
from solomonov.topology import stage_bounds

MODEL = "layers: 24, d_model: 256, heads: 8, kv_heads: 2"


def config(model: str = MODEL, more: str = "", overrides: tuple[str, ...] = ()) -> Config:
    text = f"run: {{name: a, seed: 3}}\nmodel: {{{model}}}\ndata: {{folder: d, sources: [{{name: o, path: t}}]}}\n"
    return parse_config(f"{text}training: {{total_steps: 9}}\n{more}", overrides, where="here").config


def trial(ranks: int = 4, model: str = MODEL) -> Trial:
    return scale_down(config(model), ranks)


# --- scaling ------------------------------------------------------------------------------------------------


def test_a_deep_model_is_scaled_down_and_each_change_is_told() -> None:
    found = trial()
    assert (found.model.layers, found.model.d_model, found.model.heads, found.model.kv_heads) == (4, 32, 4, 1)
    assert found.model.residual == "scaled", "24 layers are deeper than 12"
    assert branch_form(found.model, 0).scale == 0.5 == branch_form(config().model, 0).scale
    assert found.changed["model.layers"] == (24, 4)
    assert found.changed["tokenizer.vocab_size"] == (8192, 97)
    assert found.changed["optimizer.eps"] == (1e-8, 1e-5)
    assert found.rows == 48, "1, 2, 3 and 4 ranks with 4 micro-batches divide it"
    assert Trial.model_validate_json(found.model_dump_json()) == found, "the ranks read what was written"


def test_a_window_is_scaled_down_with_the_rows_that_it_moves_over() -> None:
    found = trial()
    flags = found.model.attention
    assert (flags.preset, flags.window_tokens, flags.pattern) == ("hybrid", 5, "LLLG")
    assert found.changed["model.attention.window_tokens"] == (128, 5)
    assert [found.model.layer_attention(layer).window for layer in range(4)] == [5, 5, 5, None]
    assert "model.attention.window_tokens" not in trial(model=MODEL + ", attention: {preset: rope}").changed


TWO = "architecture: encoder_decoder, layers: 24, encoder_layers: 6, d_model: 256, heads: 8, kv_heads: 2"


def test_two_stacks_are_scaled_down_to_as_many_layers_and_read_a_longer_source() -> None:
    found = trial(model=TWO)
    assert (found.model.architecture, found.model.layers, found.model.encoder_layers) == ("encoder_decoder", 2, 2)
    assert (found.sequence_tokens, found.source_tokens) == (16, 22)
    assert found.model.residual == "scaled"
    assert branch_form(found.model, 0).scale == branch_form(config(TWO).model, 0).scale == 0.5
    assert found.changed["model.encoder_layers"] == (6, 2)
    deep = trial(model="architecture: encoder_decoder, layers: 100, d_model: 32, heads: 4").model
    assert (deep.residual, deep.encoder_layers) == ("deepnorm", None)
    assert [trial(model=f"architecture: {kind}, {MODEL}").source_tokens for kind in ("encoder", "decoder")] == [
        None
    ] * 2
    assert Trial.model_validate_json(found.model_dump_json()) == found
    for longest, expected in ((16, 16), (20, 20), (512, 22)):
        positions = f", attention: {{position: learned, train_tokens: {longest}}}"
        told = scale_down(config(TWO + positions, overrides=("data.sequence_tokens=16",)), 4)
        assert told.source_tokens == expected, "no further than there are positions"


@settings(max_examples=60)
@given(
    layers=st.integers(1, 200),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 4), (6, 3), (8, 1), (16, 4), (5, 5)]),
    width=st.sampled_from([2, 6, 8, 64, 128]),
    head_dim=st.booleans(),
    tied=st.booleans(),
    ranks=st.integers(1, 16),
)
def test_any_model_scales_down_to_one_of_its_kind(
    layers: int, groups: tuple[int, int], width: int, head_dim: bool, tied: bool, ranks: int
) -> None:
    heads, keys = groups
    words = f"layers: {layers}, heads: {heads}, kv_heads: {keys}, tie_embeddings: {str(tied).lower()}"
    words += f", head_dim: {width}, d_model: 96" if head_dim else f", d_model: {heads * width}"
    before, found = config(words).model, trial(ranks, words)
    assert found.model.residual_mode == before.residual_mode
    assert (branch_form(found.model, 0).scale == 1.0) == (branch_form(before, 0).scale == 1.0)
    assert found.model.heads // found.model.kv_head_count == heads // keys
    assert found.model.tie_embeddings == tied
    assert found.model.layers == min(layers, 4)
    assert parameter_count(found.model, found.vocab_size) < 200_000
    assert all(found.rows % (ranks_ * 4) == 0 for ranks_ in {1, ranks})


# --- which layouts ------------------------------------------------------------------------------------------


def axes(case: Case) -> list[object]:
    again = (case.recompute, case.every)
    return [case.zero_stage, (case.pipeline, case.sequence), case.offload, case.ranks, case.accumulation, again]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_each_two_values_that_may_meet_do(ranks: int) -> None:
    drawn = draw_cases(trial(ranks), ranks, "fp32")
    assert drawn == draw_cases(trial(ranks), ranks, "fp32")
    assert len(set(drawn)) == len(drawn)
    assert REFERENCE not in drawn
    pairs = {pair for case in legal_cases(trial(ranks), ranks) for pair in combinations(enumerate(axes(case)), 2)}
    assert pairs == {pair for case in drawn for pair in combinations(enumerate(axes(case)), 2)}
    assert len(drawn) < 45


@pytest.mark.parametrize(("architecture", "shares"), [("encoder", True), ("encoder_decoder", False)])
def test_other_architectures_are_drawn_in_every_layout_but_shared_rows_with_a_source(
    architecture: str, shares: bool
) -> None:
    of = trial(model=f"architecture: {architecture}, layers: 6, d_model: 64, heads: 4")
    drawn = draw_cases(of, 4, "fp32")
    cuts = {(case.pipeline, case.sequence) for case in drawn}
    assert cuts == {*((stages, 1) for stages in (1, 2, 3, 4)), *(((1, 2), (1, 4)) if shares else ())}
    pairs = {pair for case in legal_cases(of, 4) for pair in combinations(enumerate(axes(case)), 2)}
    assert pairs == {pair for case in drawn for pair in combinations(enumerate(axes(case)), 2)}
    assert max(case.every for case in drawn) == 2


def test_four_ranks_see_every_kind_of_layout_in_about_thirty() -> None:
    drawn = draw_cases(trial(), 4, "auto")
    assert 28 <= len(drawn) <= 42
    assert [case.ranks for case in drawn] == sorted(case.ranks for case in drawn)
    assert {case.zero_stage for case in drawn} == {0, 1, 2, 3}
    assert {(case.zero_stage, case.pipeline) for case in drawn if case.pipeline > 1} == set(product((0, 1), (2, 3, 4)))
    assert {(case.zero_stage, case.offload) for case in drawn if case.offload != "none"} == {
        (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")
    }  # fmt: skip
    assert Case(ranks=4, zero_stage=3, accumulation=2, precision="bf16") in drawn
    assert Case(ranks=4, zero_stage=2, sequence=2, precision="bf16") in drawn
    assert not any(case.sequence > 1 for case in draw_cases(trial(), 3, "auto") if case.ranks == 3)
    assert {case.precision for case in draw_cases(trial(), 4, "bf16_autocast")} == {"fp32", "bf16_autocast"}
    assert {case.precision for case in draw_cases(trial(), 4, "fp32")} == {"fp32"}


def test_all_are_all_that_are_legal_each_once_and_again_in_bf16() -> None:
    found = all_cases(trial(), 4, "auto")
    assert len(found) == len(set(found))
    assert {case for case in found if case.precision == "fp32"} == set(legal_cases(trial(), 4))
    reduced = [case for case in found if case.precision == "bf16"]
    assert {case.model_copy(update={"precision": "fp32"}) for case in reduced} == {
        case for case in legal_cases(trial(), 4) if case.zero_stage
    }, "DeepSpeed has no stage 0 with bf16 parameters"
    assert set(all_cases(trial(), 4, "fp32")) == set(legal_cases(trial(), 4))
    # One rank, by hand: stages 0 to 3 without offload, 1 to 3 with the optimizer, 3 with parameters.
    kinds = {(case.zero_stage, case.offload) for case in found if case.ranks == 1}
    assert kinds == {*product(range(4), ["none"]), *product((1, 2, 3), ["optimizer"]), (3, "parameters")}
    assert sum(case.ranks == 1 and case.precision == "fp32" for case in found) == 8 * 3 * 4 - 1


def test_a_model_of_one_layer_has_no_pipeline_and_no_groups() -> None:
    drawn = draw_cases(trial(2, "layers: 1, d_model: 32, heads: 4"), 2, "fp32")
    assert {case.pipeline for case in drawn} == {case.every for case in drawn} == {1}


# --- verdicts -----------------------------------------------------------------------------------------------


def outcome(case: Case, of: Trial) -> Outcome:
    """As of ranks that ran what was asked; gradients and state are drawn."""
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(of.model, of.vocab_size)
    state = {
        (name, kind): torch.randn(math.prod(shape), generator=generator)
        for name, shape in shapes.items()
        for kind in ("gradient", "master", "exp_avg", "ema")
    }
    layouts = [
        {
            "optimizer": optimizer_of(case),
            "zero_stage": case.zero_stage,
            "pipeline": case.pipeline,
            "sequence": case.sequence,
            "offload": case.offload,
            "world": case.ranks,
            "data_parallel": case.data_parallel,
            "accumulation": case.accumulation,
            "precision": case.precision,
            "parameters_held": held,
        }
        for held in parameters_held(case, of)
    ]
    return Outcome([5.0, 4.0, 3.0], [1.0, 2.0, 3.0], layouts, state)


def changed(found: Outcome, *keys: tuple[str, str], by: float = 1e-3) -> Outcome:
    return replace(found, state={**found.state, **{key: found.state[key] * (1 + by) for key in keys}})


CASE = Case(ranks=2, zero_stage=3, accumulation=2)


def test_equal_is_to_the_bit_and_the_bound_is_the_promise() -> None:
    of = trial()
    expected = outcome(CASE, of)
    assert compare(CASE, of, expected, expected).verdict == "equal"
    near = compare(CASE, of, changed(expected, ("head.weight", "master"), by=5e-6), expected)
    assert (near.verdict, near.parts, near.holds) == ("within bound", None, True)
    assert near.master == pytest.approx(5e-6, rel=1e-2)
    for found in (
        changed(expected, ("head.weight", "master"), by=2e-5),
        changed(expected, ("head.weight", "exp_avg"), by=2e-5),
        changed(expected, ("head.weight", "ema"), by=2e-5),
        replace(expected, losses=[5.0, 4.0, 3.0 * (1 + 2e-5)]),
        replace(expected, norms=[1.0, 2.0, 3.0 * (1 + 2e-5)]),
        replace(expected, losses=[5.0, math.nan, 3.0]),
    ):
        verdict = compare(CASE, of, found, expected)
        assert (verdict.verdict, verdict.holds) == ("differs", False)
        assert verdict.parts


def test_the_first_layer_that_parts_is_the_one_that_the_backward_pass_comes_to_first() -> None:
    """Behind it in the backward pass others are wrong too; at the end all are."""
    of = trial()
    expected = outcome(CASE, of)
    wrong = [(f"layers.{layer}.attention.v.weight", "gradient") for layer in (0, 1, 2)]
    later = [key for key in expected.state if key[1] == "master"]
    verdict = compare(CASE, of, changed(expected, *wrong, *later), expected)
    assert verdict.parts == "layers.2, by the gradient of layers.2.attention.v.weight in step 1: 1.0e-03"
    verdict = compare(CASE, of, changed(expected, ("layers.3.feed_forward.up.weight", "exp_avg")), expected)
    assert verdict.parts == "layers.3, by exp_avg of layers.3.feed_forward.up.weight after step 3: 1.0e-03"
    verdict = compare(CASE, of, replace(expected, norms=[1.0, 2.1, 3.1]), expected)
    assert verdict.parts == "no layer; loss or gradient norm in step 2"


def test_the_encoder_s_layers_come_last_in_the_backward_pass_and_have_names_of_their_own() -> None:
    of = trial(model=TWO)
    expected = outcome(CASE, of)
    wrong = [(f"encoder.{name}", "gradient") for name in ("layers.0.attention.v.weight", "layers.1.attention.v.weight")]
    wrong += [key for key in expected.state if key[1] == "master"]
    verdict = compare(CASE, of, changed(expected, *wrong), expected)
    assert str(verdict.parts).startswith("encoder.layers.1, by the gradient of encoder.layers.1.attention.v.weight")
    verdict = compare(CASE, of, changed(expected, *wrong, ("layers.0.cross_attention.k.weight", "gradient")), expected)
    assert str(verdict.parts).startswith("layers.0, by the gradient of layers.0.cross_attention.k.weight in step 1")
    verdict = compare(CASE, of, changed(expected, ("encoder.final_norm.weight", "exp_avg")), expected)
    assert str(verdict.parts).startswith("encoder.final_norm, by exp_avg of encoder.final_norm.weight after step 3")


@pytest.mark.parametrize("tied", ["false", "true"])
def test_stages_of_two_stacks_hold_all_parameters_once(tied: str) -> None:
    """But for the head's copy of a tied matrix."""
    of = trial(model=f"{TWO}, tie_embeddings: {tied}")
    again = parameter_shapes(of.model, of.vocab_size)["embedding.weight"] if tied == "true" else (0, 0)
    for stages in (2, 3, 4):
        held = parameters_held(Case(ranks=stages, zero_stage=1, pipeline=stages), of)
        assert sum(held) == parameter_count(of.model, of.vocab_size) + math.prod(again)
        assert len(held) == stages


def test_bf16_is_held_to_its_loss_alone() -> None:
    of, case = trial(), Case(ranks=2, zero_stage=2, precision="bf16")
    expected = outcome(CASE, of)
    found = replace(outcome(case, of), losses=[5.02, 4.0, 3.0], norms=[9.0] * 3, state={})
    assert compare(case, of, found, expected).verdict == "within bound"
    verdict = compare(case, of, replace(found, losses=[5.0, 4.03, 3.0]), expected)
    assert (verdict.verdict, verdict.parts) == ("differs", "step 2, by its loss")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer", "AdamW", "optimizer of rank 1 is AdamW, not DeepSpeedZeroOptimizer_Stage3"),
        ("zero_stage", 2, "zero_stage of rank 1 is 2, not 3"),
        ("pipeline", 2, "pipeline of rank 1 is 2, not 1"),
        ("offload", "optimizer", "offload of rank 1 is optimizer, not none"),
        ("accumulation", 1, "accumulation of rank 1 is 1, not 2"),
        ("parameters_held", 10**6, "the ranks hold"),
    ],
)
def test_a_layout_that_did_not_run_proves_nothing(key: str, value: object, words: str) -> None:
    of = trial()
    expected = outcome(CASE, of)
    layouts = [expected.layouts[0], {**expected.layouts[1], key: value}]
    verdict = compare(CASE, of, replace(expected, layouts=layouts), expected)
    assert (verdict.verdict, verdict.holds) == ("did not run", False)
    assert words in str(verdict.problem)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_pipeline_holds_what_its_stages_are_made_of(tied: str) -> None:
    """The embedding has positions and a norm, the head a bias and a transform: of a tied matrix both have a copy."""
    words = "bias: true, embedding_norm: true, output_head: transform, attention: {position: learned}"
    of, case = trial(model=f"{MODEL}, {words}, tie_embeddings: {tied}"), Case(ranks=4, zero_stage=1, pipeline=2)
    built = [layer.build() for layer in pipeline_layers(of.model, of.vocab_size, seed=0)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in built]
    _, cut, _ = stage_bounds(of.model, of.vocab_size, of.sequence_tokens, 2)
    assert parameters_held(case, of) == sorted([sum(sizes[:cut]), sum(sizes[cut:])] * 2)


def test_relative_difference_by_hand() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert relative(a, b) == pytest.approx(4 / 3)
    zero = torch.zeros(2)
    assert (relative(zero, zero), relative(a, zero), relative(a * math.nan, a)) == (0.0, math.inf, math.inf)
