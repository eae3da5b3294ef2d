"""The configuration: strict, frozen, with errors that name the key and the nearest valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from solomonov.config import Config, flatten, load_config, parse_config
from solomonov.errors import ConfigurationError

MINIMAL = """
run: {name: a}
model: {layers: 2, d_model: 32, heads: 4}
data: {folder: d, sources: [{name: s, path: "*.txt"}]}
training: {total_steps: 3}
"""


def parse(text: str = MINIMAL, *overrides: str) -> Any:
    return parse_config(text, overrides, where="test.yaml")


def refusal(text: str = MINIMAL, *overrides: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == 78
    return caught.value


def test_defaults_origins_and_overrides() -> None:
    loaded = parse(MINIMAL, "optimizer.lr=1e-3", "training.total_steps=9", "data.sources.0.weight=2.5")
    assert loaded.config.optimizer.lr == 0.001
    assert loaded.config.training.total_steps == 9
    assert loaded.config.data.sources[0].weight == 2.5
    assert loaded.origins["optimizer.lr"] == "override"
    assert loaded.origins["model.layers"] == "config"
    assert "schedule.kind" not in loaded.origins


EVERYDAY = """
run:        {name: own-text, seed: 7}
model:      {architecture: decoder, layers: 12, d_model: 256, heads: 8, kv_heads: 8, d_ff: 688, residual: auto,
             attention: {position: rope, pattern: LLLG, window_tokens: 256, qk_norm: true, output_gate: true,
                         log_n_scale: true, global_position: nope, sink: false}}
tokenizer:  {kind: unigram, vocab_size: 8192}
data:       {folder: datasets/own-text,
             sources: [{name: own, path: "text/**/*.txt", weight: 1.0}],
             sequence_tokens: 512, packing: best_fit,
             prepare: {workers: 2, shard_bytes: 67108864, backend: local},
             workers: {backend: ray, count: 2}}
objective:  {kind: clm}
training:   {total_steps: 1000, global_batch_tokens: 16384, micro_batch_sequences: 8, precision: auto,
             activation_checkpointing: none, compile: auto}
optimizer:  {kind: adamw, lr: 0.003}
schedule:   {kind: wsd, warmup_steps: 100}
parallel:   {zero_stage: 1, pipeline: 1, sequence: 1, offload: none}
checkpoint: {every_steps: 100, keep_last: 3}
resilience: {hang_minimum_seconds: 10}
evaluation: {every_steps: 200}
metrics:    {every_steps: 1}
launch:     {nodes: 1, ranks_per_node: 2, max_restarts: 10, partition: null}
"""
"""The names that everyone types: they stay as they are."""


def test_the_names_that_everyone_types_are_taken() -> None:
    loaded = parse(EVERYDAY)
    flags = loaded.config.model.attention
    assert [flags.is_global(layer, 12) for layer in range(12)] == [False, False, False, True] * 3
    assert (flags.window_tokens, flags.output_gate, flags.log_n_scale) == (256, True, True)


def test_a_misspelt_key_names_the_nearest() -> None:
    error = refusal(MINIMAL + "optimizer: {learning_rate: 1, weight_decya: 0.1}\nmodell: {}\n")
    assert "test.yaml has 3 mistakes" in error.what
    assert "optimizer.weight_decya: there is no such key; did you mean optimizer.weight_decay?" in error.got
    assert "modell: there is no such key; did you mean model?" in error.got
    assert "optimizer.learning_rate" in error.got


def test_a_misspelt_key_in_a_nested_section_and_in_a_list() -> None:
    error = refusal(MINIMAL, "model.attention.qknorm=true", "data.sources.0.wieght=1")
    assert "did you mean model.attention.qk_norm?" in error.got
    assert "did you mean data.sources.0.weight?" in error.got


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_any_architecture_is_a_configuration(architecture: str) -> None:
    """To plan with and to prove; training it is refused where a run is started."""
    assert parse(MINIMAL, f"model.architecture={architecture}").config.model.architecture == architecture
    assert "there is one stack" in refusal(MINIMAL, "model.architecture=encoder", "model.encoder_layers=2").got


def test_launch_is_split_off() -> None:
    loaded = parse(MINIMAL + "launch: {ranks_per_node: 2}\n", "launch.max_restarts=4")
    assert loaded.launch == {"ranks_per_node": 2, "max_restarts": 4}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=-1.0", "greater than 0"),
        ("training.total_steps=2.5", "training.total_steps"),
        ("run.name=../x", "run.name"),
        ("model.heads=3", "does not divide"),
        ("training.total_tokens=5", "exactly one"),
        ("total_steps=5", "not of the form"),
        ("data.sources.4.weight=1", "does not exist"),
        ("training.total_steps=[", "not valid YAML"),
    ],
)
def test_bad_values_are_named(override: str, words: str) -> None:
    assert words in str(refusal(MINIMAL, override))


def test_diagnostics_that_are_written_nowhere_are_refused() -> None:
    message = str(refusal(MINIMAL, "metrics.diagnostics_every_steps=50", "metrics.tensorboard=false"))
    assert "diagnostics_every_steps 50 with tensorboard false" in message
    assert "Set tensorboard to true" in message
    assert parse(MINIMAL, "metrics.diagnostics_every_steps=50").config.metrics.diagnostics_every_steps == 50


@pytest.mark.parametrize(
    "text",
    [
        "run: {name: a",
        "- a\n- b\n",
        "run: {name: a}\nrun: {name: b}\n",
        "run: !!python/object:os.system {}\n",
        "1: {name: a}\n",
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str) -> None:
    refusal(text)


def test_the_length_of_a_row_reaches_the_model() -> None:
    """As what a preset's window and the log-n scale start from; what is given stands."""
    attention = parse().config.model.attention
    assert (attention.train_tokens, attention.window_tokens) == (512, 128), "the default of data.sequence_tokens"
    given = ("data.sequence_tokens=256", "model.attention.preset=hybrid")
    attention = parse(MINIMAL, *given).config.model.attention
    assert (attention.train_tokens, attention.window_tokens) == (256, 64)
    attention = parse(MINIMAL, *given, "model.attention.train_tokens=128").config.model.attention
    assert (attention.train_tokens, attention.window_tokens) == (128, 32)
    attention = parse(MINIMAL, *given, "model.attention.train_tokens=null").config.model.attention
    assert (attention.train_tokens, attention.window_tokens) == (256, 64)
    assert "data.sequence_tokens: Input should be a valid integer" in refusal(MINIMAL, "data.sequence_tokens=x").got
    assert "train_tokens" not in refusal(MINIMAL, "data.sequence_tokens=x").got
    assert "model.attention" in refusal(MINIMAL, "model.attention=3").got


def test_learned_positions_reach_as_far_as_rows_do() -> None:
    given = ("data.sequence_tokens=256", "model.attention.position=learned")
    assert parse(MINIMAL, *given).config.model.longest_tokens == 256
    assert parse(MINIMAL, *given, "model.attention.train_tokens=512").config.model.longest_tokens == 512
    error = refusal(MINIMAL, *given, "model.attention.train_tokens=255")
    assert "there are positions for 255 tokens" in error.got
    assert "model.attention.train_tokens to 256" in error.got


def test_attention_flags_that_do_not_go_together_are_named_with_their_key() -> None:
    error = refusal(MINIMAL, "model.attention.preset=rope", "model.attention.pattern=LLLG")
    assert "model.attention: pattern without window_tokens" in error.got


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_frozen() -> None:
    config = parse().config
    with pytest.raises(ValidationError, match="frozen"):
        config.run.name = "b"


def leaves_of_config() -> list[str]:
    return sorted(flatten(parse().config))


@given(st.data())
def test_any_unknown_key_anywhere_is_refused_with_its_path(data: st.DataObject) -> None:
    leaf = data.draw(st.sampled_from(leaves_of_config()))
    parent = leaf.rpartition(".")[0]
    word = data.draw(st.from_regex(r"[a-z]{3,12}_zz", fullmatch=True))
    assert f"{parent}.{word}" in str(refusal(MINIMAL, f"{parent}.{word}=1"))


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = parse().config
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path).config == config
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("number", ["1e-3", "3E4", "2.5e-8", "1e+2", "-1e-1"])
def test_numbers_with_an_exponent_are_numbers(number: str) -> None:
    from solomonov.config import parse_yaml

    assert parse_yaml(f"a: {number}", where="x")["a"] == float(number)
