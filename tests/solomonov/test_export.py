"""Exports against `transformers` and our own tokenizer: logits, ids and text, sizes, damage, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from solomonov import bundled
from solomonov.bundled import forcing_flags
from solomonov.errors import ConfigurationError, DamagedCheckpointError, NumericalError
from solomonov.export import AUTO_CLASSES, export_hf
from solomonov.fast_tokenizer import build_tokenizer
from solomonov.hf_folder import load_hf
from solomonov.interop_families import FAMILIES
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import tiny_config

VOCAB = 400
TEXTS = (
    "def f(x):\n\treturn [x, 'é', \"日本\"]\n\n\n        if x:      # seven   spaces ......\n",
    "tabs\t\t\tand\r\nold\rline ends\n",
    "😀 family 👨‍👩‍👧, null \x00, \u200b\ufeff, ﷽ and \u2581 itself",
    "<s> </s> <pad> <unk> <0x41> are only text",
    "",
    " ",
    "\n",
    "=" * 70 + "-" * 33 + " " * 41 + "#" * 9,
)


def _source_text() -> Iterator[str]:
    """Source files of this Python's standard library: real text with every kind of indentation."""
    folder = Path(json.__file__).parent.parent
    for name in ("argparse.py", "ast.py", "difflib.py", "doctest.py", "inspect.py", "turtle.py", "tarfile.py"):
        yield (folder / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(train_tokenizer(_source_text(), kind=request.param, vocab_size=1000))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(_source_text(), kind="unigram", vocab_size=VOCAB))
    return path


def _state(config: ModelConfig) -> dict[str, Tensor]:
    """Weights far from their initial values."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in parameter_shapes(config, VOCAB).items()
    }


def _theirs(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logits(config: ModelConfig, state: dict[str, Tensor], ids: Tensor) -> Tensor:
    model = Transformer(config, VOCAB, seed=None)
    model.load_state_dict(state, strict=False)
    logits: Tensor = model(ids, torch.zeros_like(ids)).detach()
    return logits


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "Qwen3ForCausalLM"),
        ({"tie_embeddings": True, "head_dim": 6}, "Qwen3ForCausalLM"),
        ({"attention": {"qk_norm": False, "rope_theta": 500.0}, "norm_eps": 0.01}, "LlamaForCausalLM"),
        ({"residual": "scaled", "layers": 5, "base_layers": 2}, "Qwen3ForCausalLM"),
        ({"residual": "lns", "layers": 4}, "Qwen3ForCausalLM"),
        ({"tie_embeddings": True, "attention": {"qk_norm": False}, "kv_heads": 4}, "LlamaForCausalLM"),
        ({"attention": {"qk_norm": False, "position": "nope"}}, "SmolLM3ForCausalLM"),
        (
            {"residual": "peri", "tie_embeddings": True, "attention": {"preset": "local", "window_tokens": 8}},
            "Gemma3ForCausalLM",
        ),
    ],
)
def test_logits_of_transformers_are_ours(
    tmp_path: Path, tokenizer_path: Path, changes: dict[str, object], architecture: str
) -> None:
    config = tiny_config(**changes)
    state = _state(config)
    report = export_hf(state, config, tokenizer_path, tmp_path / "out", sequence_tokens=32)
    assert report.architecture == architecture
    assert report.parameters == sum(tensor.numel() for tensor in state.values())
    assert report.max_abs_difference <= 1e-4 * max(1.0, report.max_abs_logit)
    ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    theirs = _theirs(tmp_path / "out")
    assert type(theirs).__name__ == architecture
    expected = _logits(config, state, ids)
    found = theirs(input_ids=ids).logits.detach()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    # Read back by us, with branch factors folded.
    read, weights, sequence_tokens = load_hf(tmp_path / "out")
    assert (sequence_tokens, read.residual_mode) == (32, "peri" if config.residual == "peri" else "prenorm")
    assert list(weights) == list(parameter_shapes(read, VOCAB))
    torch.testing.assert_close(_logits(read, weights, ids), expected, rtol=1e-4, atol=1e-4)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "something was left aside"


BIASED: dict[str, Any] = {"bias": True, "norm": "layernorm", "norm_eps": 1e-5, "kv_heads": 4, "feed_forward": "relu"}
BERT: dict[str, Any] = {
    **BIASED,
    "architecture": "encoder",
    "embedding_norm": True,
    "output_head": "transform",
    "attention": {"position": "learned", "qk_norm": False, "train_tokens": 32},
}
MARIAN: dict[str, Any] = {
    **BIASED,
    "architecture": "encoder_decoder",
    "encoder_layers": 3,
    "tie_embeddings": True,
    "attention": {"preset": "vanilla"},
}


@pytest.mark.parametrize(
    ("changes", "architecture", "forced"),
    [
        ({**BERT, "residual": "deepnorm"}, "BertForMaskedLM", 0),
        ({**MARIAN, "residual": "deepnorm", "layers": 4}, "MarianMTModel", 0),
        ({"architecture": "encoder", "attention": {"qk_norm": False}, "residual": "scaled"}, "EuroBertForMaskedLM", 0),
        ({**BERT, "residual": "keel"}, "SolomonovForMaskedLM", 1),
        ({**BERT, "residual": "postnorm", "value_residual": True}, "SolomonovForMaskedLM", 1),
        ({"architecture": "encoder"}, "SolomonovForMaskedLM", 1),
        ({**MARIAN, "residual": "postnorm", "value_residual": True}, "SolomonovForSeq2SeqLM", 1),
        ({**MARIAN, "residual": "postnorm", "kv_heads": 2}, "SolomonovForSeq2SeqLM", 1),
        ({**MARIAN, "residual": "keel", "norm_eps": 1e-6}, "SolomonovForSeq2SeqLM", 2),
        ({**MARIAN, "residual": "postnorm", "tie_embeddings": False}, "SolomonovForSeq2SeqLM", 1),
    ],
    ids=str,
)
def test_encoders_and_pairs_are_written_as_a_class_that_holds_them(
    tmp_path: Path, tokenizer_path: Path, changes: dict[str, Any], architecture: str, forced: int
) -> None:
    import transformers

    config = tiny_config(**changes)
    report = export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=32)
    assert (report.architecture, len(report.forced_by)) == (architecture, forced), report.forced_by
    assert report.max_abs_difference <= 1e-5 * report.max_abs_logit
    auto, card = AUTO_CLASSES[config.architecture], (tmp_path / "out" / "README.md").read_text()
    assert f"{auto}.from_pretrained" in card
    kind = getattr(transformers, auto)
    theirs = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=bool(forced))
    assert type(theirs).__name__ == architecture
    read, weights, sequence_tokens = load_hf(tmp_path / "out")
    assert sequence_tokens == 32
    assert list(weights) == list(parameter_shapes(read, VOCAB))
    generates = (tmp_path / "out" / "generation_config.json").exists()
    assert generates == (config.architecture == "encoder_decoder")
    if generates:
        ids = torch.arange(1, 9)[None]
        made = theirs.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0]
        bos = Tokenizer.load(tokenizer_path).bos
        assert made[0] == theirs.config.decoder_start_token_id == bos, "as rows of a target begin"
        assert len(made) > 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**MARIAN, "residual": "prenorm"}, "model.residual: prenorm (not in MarianMTModel)"),
        ({**MARIAN, "residual": "postnorm", "bias": False}, "model.bias: False (not in MarianMTModel)"),
        ({**MARIAN, "residual": "postnorm", "norm_eps": 1e-6}, "model.norm_eps: 1e-06 (not in MarianMTModel)"),
        ({**MARIAN, "residual": "postnorm", "kv_heads": 2}, "model.kv_heads: 2 (not in MarianMTModel)"),
        ({"architecture": "encoder_decoder"}, "model.attention.position: rope (not in MarianMTModel)"),
    ],
    ids=str,
)
def test_flags_that_keep_a_pair_out_of_a_class_are_named(changes: dict[str, Any], named: str) -> None:
    assert named in forcing_flags(tiny_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "encoder", "attention": {"qk_norm": False}, "front": {"kind": "patches"}},
        {**MARIAN, "residual": "postnorm", "front": {"kind": "frames"}},
    ],
    ids=str,
)
def test_a_model_with_a_front_is_refused(tmp_path: Path, tokenizer_path: Path, changes: dict[str, Any]) -> None:
    """Also one whose blocks a class holds: that reads tokens."""
    config = tiny_config(**changes)
    with pytest.raises(ConfigurationError) as caught:
        export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=32)
    error = caught.value
    assert error.what == f"A model with a front of {config.front.kind} is not exported."
    assert error.got == f"model.front.kind: {config.front.kind}"
    assert "reads token ids" in error.rule
    assert "solomonov.loading.load_model" in error.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "forced_by"),
    [
        ({"residual": "keel", "layers": 3}, ["model.residual: keel (not in Qwen3ForCausalLM)"]),
        ({"value_residual": True, "layers": 3}, ["model.value_residual: True (not in Qwen3ForCausalLM)"]),
        (
            {
                "attention": {"preset": "hybrid", "window_tokens": 8, "pattern": "LG"},
                "residual": "scaled",
                "base_layers": 1,
            },
            [
                "model.attention.global_position: nope (not in Qwen3ForCausalLM)",
                "model.attention.output_gate: True (not in Qwen3ForCausalLM)",
                "model.attention.log_n_scale: True (not in Qwen3ForCausalLM)",
            ],
        ),
        (
            {"attention": {"preset": "vanilla"}, "tie_embeddings": True, "norm": "layernorm", "feed_forward": "gelu"},
            [
                "model.attention.position: sinusoidal (not in LlamaForCausalLM)",
                "model.norm: layernorm (not in LlamaForCausalLM)",
                "model.feed_forward: gelu (not in LlamaForCausalLM)",
            ],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_stock_class_holds_brings_its_code(
    tmp_path: Path, tokenizer_path: Path, changes: dict[str, object], forced_by: list[str], dtype: Any
) -> None:
    import transformers

    config, out = tiny_config(**changes), tmp_path / "out"
    state = _state(config)
    report = export_hf(state, config, tokenizer_path, out, sequence_tokens=32, dtype=dtype)
    assert (report.architecture, list(report.forced_by)) == ("SolomonovForCausalLM", forced_by)
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert all(flag in card for flag in forced_by)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    read, weights, sequence_tokens = load_hf(out)
    assert (sequence_tokens, read) == (32, config)
    if dtype == "float32":
        assert all(torch.equal(weights[name], state[name]) for name in state)
    expected = _logits(config, weights, ids)
    found = theirs(input_ids=ids).logits.detach()
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    (out / "solomonov.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"solomonov\.json"):
        load_hf(out)


def test_stock_classes_need_no_code(tmp_path: Path, tokenizer_path: Path) -> None:
    config = tiny_config()
    report = export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=32)
    assert report.forced_by == ()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_wrong_code_keeps_the_export_from_its_name(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(residual="keel", layers=3)
    models, layers, settings = bundled.FILES
    wrong, right = tmp_path / layers.name, layers.read_text()
    wrong.write_text(right.replace('self.form["alpha"] * hidden', "hidden"))
    assert wrong.read_text() != right
    monkeypatch.setattr(bundled, "FILES", (models, wrong, settings))
    with pytest.raises(NumericalError, match="largest difference"):
        export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=16)
    assert not (tmp_path / "out").exists()


def _assert_same_ids(tokenizer: Tokenizer, fast: Any, text: str) -> None:
    """Equal ids; where the scores are not rounded, ties may fall otherwise: as many tokens of the same text."""
    ours, theirs = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
    if all((piece.score * 256).is_integer() for piece in tokenizer.pieces()):
        assert theirs == ours
    else:
        assert (len(theirs), fast.decode(theirs)) == (len(ours), tokenizer.decode(ours))


def test_ids_are_ours_on_real_text(tokenizer: Tokenizer) -> None:
    fast = build_tokenizer(tokenizer)
    for text in (*_source_text(), *TEXTS):
        _assert_same_ids(tokenizer, fast, text)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab =.#\n\t\r0é日😀<s>/\u2581"), max_size=200) | st.text(max_size=60))
def test_ids_and_decoded_text_are_ours_on_any_text(tokenizer: Tokenizer, text: str) -> None:
    fast = build_tokenizer(tokenizer)
    _assert_same_ids(tokenizer, fast, text)
    ids = tokenizer.encode(text)
    assert fast.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("known", ["", "<", "<>", "<s>", "/x0123456789ABCDEF"])
def test_reserved_pieces_in_a_text_are_only_text_whatever_characters_have_pieces(kind: Any, known: str) -> None:
    """A corpus of prose has no piece for `<` or `>`: what spells a reserved piece must still not become it."""
    words = [*"abcdeghijklm", *known, "the", "and", "then", "than"]
    corpus = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 200)]
    # The 256 bytes, four reserved pieces, newline and space, every character, and a few longer pieces.
    tokenizer = Tokenizer(train_tokenizer(iter(corpus), kind=kind, vocab_size=266 + len({*"".join(words)})))
    fast = build_tokenizer(tokenizer)
    for text in ("<s>", "a<s>b", "</s><pad>", "<unk> <0x0A> the<0xFF>", "x <s", "0x41> then", "<0x41", "a/b <é>"):
        _assert_same_ids(tokenizer, fast, text)


def test_the_folder_loads_as_a_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    import transformers

    config = tiny_config()
    export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=32)
    ours, theirs = Tokenizer.load(tokenizer_path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    assert theirs.model_max_length == 32
    for text in TEXTS:
        ids = ours.encode(text)
        _assert_same_ids(ours, theirs.backend_tokenizer, text)
        assert theirs(text)["input_ids"] == [ours.bos, *theirs(text, add_special_tokens=False)["input_ids"]]
        assert len(theirs(text)["input_ids"]) == 1 + len(ids)
        assert theirs.decode([ours.bos, *ids, ours.eos], skip_special_tokens=True) == ours.decode(ids)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.model").digest == ours.digest


def test_large_models_are_sharded(tmp_path: Path, tokenizer_path: Path) -> None:
    config = tiny_config()
    state = _state(config)
    report = export_hf(state, config, tokenizer_path, tmp_path / "out", sequence_tokens=16, shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(FAMILIES[1].name_of(name) for name in state)
    assert report.weight_bytes == sum((tmp_path / "out" / file).stat().st_size for file in files)
    _, weights, _ = load_hf(tmp_path / "out")
    assert all(torch.equal(weights[name], state[name]) for name in state)


def test_bf16_rounds_the_weights_and_nothing_else(tmp_path: Path, tokenizer_path: Path) -> None:
    config = tiny_config(residual="scaled", layers=3, base_layers=1)
    state = _state(config)
    report = export_hf(state, config, tokenizer_path, tmp_path / "out", sequence_tokens=16, dtype="bfloat16")
    assert report.dtype == "bfloat16"
    read, weights, _ = load_hf(tmp_path / "out")
    assert torch.equal(weights["layers.1.attention.q.weight"], state["layers.1.attention.q.weight"].bfloat16().float())
    ids = torch.arange(16)[None]
    found = _theirs(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, _logits(read, weights, ids), rtol=1e-4, atol=1e-4)


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path, tokenizer_path: Path) -> None:
    config, out = tiny_config(), tmp_path / "out"
    state = _state(config)
    export_hf(state, config, tokenizer_path, out, sequence_tokens=16)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    export_hf(state, config, tokenizer_path, out, sequence_tokens=16)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    state["head.weight"] = state["head.weight"] + 1
    export_hf(state, config, tokenizer_path, out, sequence_tokens=16)
    assert torch.equal(load_hf(out)[1]["head.weight"], state["head.weight"])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match="no export wrote"):
        export_hf(state, config, tokenizer_path, tmp_path / "precious", sequence_tokens=16)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("change", ["missing", "shape", "strange"])
def test_another_models_weights_are_refused(tmp_path: Path, tokenizer_path: Path, change: str) -> None:
    config = tiny_config()
    state = _state(config)
    if change == "missing":
        del state["layers.1.feed_forward.up.weight"]
    elif change == "shape":
        state["layers.1.feed_forward.up.weight"] = torch.zeros(3, 3)
    else:
        state["layers.2.feed_forward.up.weight"] = torch.zeros(3, 3)
    with pytest.raises(ConfigurationError, match=r"layers\.[12]\.feed_forward\.up\.weight"):
        export_hf(state, config, tokenizer_path, tmp_path / "out", sequence_tokens=16)
    assert not list(tmp_path.iterdir())


def test_wrong_logits_keep_the_export_from_its_name(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(residual="scaled", layers=5, base_layers=2)
    monkeypatch.setattr("solomonov.interop._LAST", ("attention.out",))
    with pytest.raises(NumericalError, match="largest difference"):
        export_hf(_state(config), config, tokenizer_path, tmp_path / "out", sequence_tokens=16)
    assert not (tmp_path / "out").exists()


def test_damage_is_found(tmp_path: Path, tokenizer_path: Path) -> None:
    config, out = tiny_config(), tmp_path / "out"
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        load_hf(out)
    export_hf(_state(config), config, tokenizer_path, out, sequence_tokens=16)
    weights, settings_file = out / "model.safetensors", out / "config.json"
    whole, written = weights.read_bytes(), settings_file.read_text()
    weights.write_bytes(whole[:-10])
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        load_hf(out)
    weights.unlink()
    with pytest.raises(DamagedCheckpointError, match="no weight file"):
        load_hf(out)
    weights.write_bytes(whole)
    settings_file.write_text(written.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(DamagedCheckpointError, match=r"layers\.2.* is missing"):
        load_hf(out)
    settings_file.write_text(written.replace('"qwen3"', '"mamba"'))
    with pytest.raises(ConfigurationError, match="mamba"):
        load_hf(out)
    settings_file.write_text(written[:50])
    with pytest.raises(DamagedCheckpointError, match=r"config\.json"):
        load_hf(out)
