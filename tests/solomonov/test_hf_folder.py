"""Folders that Hugging Face's classes wrote against these classes themselves: logits, and what is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solomonov.errors import ConfigurationError, DamagedCheckpointError
from solomonov.hf_folder import load_hf
from tests.support.foreign import (
    TOLERANCE,
    foreign_model,
    our_logits,
    our_pairs,
    random_documents,
    relative_difference,
    saved,
    their_logits,
    their_pairs,
)

GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "sliding_window": 5,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama of old, tied": (
        "LlamaForCausalLM",
        {"num_key_value_heads": None, "tie_word_embeddings": True, "rms_norm_eps": 0.01, "rope_theta": 500.0},
    ),
    "llama with gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh", "head_dim": 8}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3, last layers local": (
        "Qwen3ForCausalLM",
        {"head_dim": 6, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
    "qwen3, local and global": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL],
        },
    ),
    "qwen3, global and local": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": [GLOBAL, LOCAL, GLOBAL, GLOBAL],
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite, not tied": ("GraniteForCausalLM", {"attention_multiplier": 0.1, "logits_scaling": 0.5}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "smollm3, every second": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "smollm3, the others": ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 0, 0, 1]}),
    "smollm3, none at the ends": ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1, 1, 0]}),
    "smollm3, all with positions": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 1, 1]}),
    "smollm3, none with positions": ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 0, 0, 0]}),
    "smollm3, windows with positions": (
        "SmolLM3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
        },
    ),
    "smollm3, windows without positions": (
        "SmolLM3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [0, 1, 0, 1]},
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo2 with heads of a width, tied": (
        "Olmo2ForCausalLM",
        {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 500.0, "num_key_value_heads": 1},
    ),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma2 with silu, not tied": (
        "Gemma2ForCausalLM",
        GEMMA | {"hidden_activation": "silu", "tie_word_embeddings": False, "layer_types": [GLOBAL] * 4},
    ),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | {"num_hidden_layers": 7}),
    "gemma3, one in three": (
        "Gemma3ForCausalLM",
        GEMMA | {"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL], "sliding_window": 40},
    ),
}


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "bert of another shape, not tied": (
        "BertForMaskedLM",
        {"hidden_act": "relu", "layer_norm_eps": 0.01, "tie_word_embeddings": False, "type_vocab_size": 1},
    ),
    "eurobert": ("EuroBertForMaskedLM", {}),
    "eurobert, tied": ("EuroBertForMaskedLM", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
}
PAIRS: dict[str, dict[str, Any]] = {
    "scaled": {"scale_embedding": True, "activation_function": "swish"},
    "not scaled": {"activation_function": "relu"},
    "of odd width": {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
}


def _rewritten(folder: Path, **keys: Any) -> Path:
    """The folder with these keys in its config.json; a value of ... takes a key out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_their_logits_are_ours(tmp_path: Path, name: str) -> None:
    architecture, keys = MODELS[name]
    theirs = foreign_model(architecture, **keys)
    config, state, sequence_tokens = load_hf(saved(theirs, tmp_path))
    assert sequence_tokens == 32
    for lengths in ((32,), (9, 1, 14, 5)):
        documents = random_documents(*lengths)
        expected = their_logits(theirs, documents)
        assert relative_difference(our_logits(config, state, documents), expected) <= TOLERANCE
    # Packed, they would be others: the documents are told apart.
    assert relative_difference(their_logits(theirs, [torch.cat(documents)]), expected) > 0.01


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_of_their_encoders_are_ours(tmp_path: Path, name: str) -> None:
    """Packed here, and there in a batch with padding."""
    architecture, keys = ENCODERS[name]
    theirs = foreign_model(architecture, **keys)
    config, state, sequence_tokens = load_hf(saved(theirs, tmp_path))
    assert (config.architecture, sequence_tokens) == ("encoder", 32)
    documents = random_documents(9, 1, 17, 5)
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.arange(17) < torch.tensor([len(document) for document in documents])[:, None]
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask][None]
    assert relative_difference(our_logits(config, state, documents), expected) <= TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_logits_of_their_pairs_are_ours(tmp_path: Path, name: str) -> None:
    theirs = foreign_model("MarianMTModel", **PAIRS[name])
    config, state, _ = load_hf(saved(theirs, tmp_path))
    assert (config.architecture, config.encoder_depth, config.layers) == ("encoder_decoder", 3, 2)
    assert config.tie_embeddings == (name == "scaled")
    sources, targets = random_documents(9, 3, 29, 5), random_documents(4, 1, 11, 26, seed=5)
    expected = their_pairs(theirs, sources, targets)
    assert relative_difference(our_pairs(config, state, sources, targets), expected) <= TOLERANCE


def test_old_files_of_both_are_read(tmp_path: Path) -> None:
    """With other heads and other names of norms in a BERT, and with what is computed in a Marian."""
    theirs = foreign_model("BertForMaskedLM")
    weights = saved(theirs, tmp_path / "bert") / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(weights).items()
    }
    others = {"bert.pooler.dense.weight": torch.ones(24, 24), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(tensors | others, weights)
    config, state, _ = load_hf(tmp_path / "bert")
    documents = random_documents(7, 12)
    expected = their_logits(theirs, documents)
    assert relative_difference(our_logits(config, state, documents), expected) <= TOLERANCE

    pair = foreign_model("MarianMTModel")
    weights = saved(pair, tmp_path / "marian") / "model.safetensors"
    computed = {name: value.clone() for name, value in pair.state_dict().items() if "embed_" in name}
    save_file(load_file(weights) | computed, weights)
    config, state, _ = load_hf(_rewritten(tmp_path / "marian", normalize_before=False, num_beams=6))
    targets = random_documents(4, 9, seed=5)
    expected = their_pairs(pair, documents, targets)
    assert relative_difference(our_pairs(config, state, documents, targets), expected) <= TOLERANCE
    moved = {name: value + 0.1 if "positions" in name else value for name, value in computed.items()}
    save_file(load_file(weights) | moved, weights)
    with pytest.raises(ConfigurationError, match=r"embed_positions\.weight"):
        load_hf(tmp_path / "marian")


def test_a_marian_without_a_bias_of_the_logits_has_none(tmp_path: Path) -> None:
    theirs = foreign_model("MarianMTModel")
    theirs.final_logits_bias.zero_()
    weights = saved(theirs, tmp_path) / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "final_logits_bias"}, weights)
    config, state, _ = load_hf(tmp_path)
    sources, targets = random_documents(9, 3), random_documents(4, 8, seed=5)
    expected = their_pairs(theirs, sources, targets)
    assert relative_difference(our_pairs(config, state, sources, targets), expected) <= TOLERANCE


def test_weights_in_shards_and_of_16_bits_are_read(tmp_path: Path) -> None:
    theirs = foreign_model("Qwen3ForCausalLM", head_dim=8).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, state, _ = load_hf(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    documents = random_documents(12)
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    expected = their_logits(again, documents)
    assert relative_difference(our_logits(config, state, documents), expected) <= TOLERANCE


def test_configurations_of_old_versions_are_read(tmp_path: Path) -> None:
    """Before version 5 the base of rotary frequencies stood beside the other keys, and Gemma's pattern was a number."""
    theirs = foreign_model("Gemma3ForCausalLM", **GEMMA, num_hidden_layers=7)
    kept, thetas = _rewritten(saved(theirs, tmp_path)), {"rope_theta": 300.0, "rope_local_base_freq": 50.0}
    old = {"rope_parameters": ..., "rope_scaling": None, "layer_types": ..., "_sliding_window_pattern": ...}
    config, state, _ = load_hf(_rewritten(kept, **old, **thetas, sliding_window_pattern=6))
    again = type(theirs).from_pretrained(tmp_path)
    documents = random_documents(20, 3)
    expected = their_logits(again, documents)
    assert relative_difference(our_logits(config, state, documents), expected) <= TOLERANCE
    assert relative_difference(their_logits(theirs, documents), expected) > 1e-3


@pytest.mark.parametrize(
    ("architecture", "keys", "absent"),
    [
        ("LlamaForCausalLM", {"num_key_value_heads": None}, ("num_key_value_heads", "head_dim", "attention_bias")),
        ("Olmo2ForCausalLM", {"num_key_value_heads": 4}, ("num_key_value_heads", "rms_norm_eps", "hidden_act")),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 3}, ("no_rope_layers", "layer_types", "tie_word_embeddings")),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layer_interval": 1, "use_sliding_window": True, "sliding_window": 3},
            ("no_rope_layers", "layer_types"),
        ),
        (
            "Qwen3ForCausalLM",
            {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
            ("layer_types", "rope_parameters"),
        ),
        ("Qwen3ForCausalLM", {"head_dim": 8, "sliding_window": 3, "max_window_layers": 0}, ("layer_types",)),
        ("Gemma2ForCausalLM", GEMMA, ("layer_types", "tie_word_embeddings", "hidden_activation", "rope_parameters")),
        ("BertForMaskedLM", {"layer_norm_eps": 1e-12}, ("layer_norm_eps", "hidden_act", "tie_word_embeddings")),
        ("EuroBertForMaskedLM", {"num_key_value_heads": 4}, ("num_key_value_heads", "rms_norm_eps", "hidden_act")),
        ("Gemma3ForCausalLM", GEMMA, ("attn_logit_softcapping", "final_logit_softcapping", "rope_parameters")),
    ],
    ids=str,
)
def test_what_a_key_means_that_is_absent(
    tmp_path: Path, architecture: str, keys: dict[str, Any], absent: tuple[str, ...]
) -> None:
    theirs = foreign_model(architecture, **keys)
    folder = _rewritten(saved(theirs, tmp_path), **dict.fromkeys(absent, ...))
    config, state, _ = load_hf(folder)
    documents = random_documents(20, 3)
    again = type(theirs).from_pretrained(folder)
    assert relative_difference(our_logits(config, state, documents), their_logits(again, documents)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias: True"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: relu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type: linear"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_scaling.type: yarn"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"layer_types": [LOCAL] * 4}, "use_sliding_window: False"),
        ("qwen3, local and global", {"layer_types": ["chunked_attention"] * 4}, "layer_types.*chunked_attention"),
        ("smollm3, windows with positions", {"no_rope_layers": [1, 1, 0, 0]}, "no_rope_layers"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50"),
        ("gemma2", {"final_logit_softcapping": ...}, "final_logit_softcapping: 30"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        (
            "gemma3",
            {"rope_parameters": {GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
            f"rope_parameters.{GLOBAL}.rope_type: linear",
        ),
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("bert", {"is_decoder": True}, "is_decoder: True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: relative_key"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act: gelu_new"),
        ("bert", {"embedding_size": 12}, "embedding_size: 12"),
        ("eurobert", {"mlp_bias": True}, "mlp_bias: True"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings: False"),
        ("marian", {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ("marian", {"decoder_vocab_size": 36}, "decoder_vocab_size: 36"),
        ("marian", {"decoder_ffn_dim": 36}, "decoder_ffn_dim: 36"),
        ("marian", {"encoder_attention_heads": 2}, "decoder_attention_heads: 4"),
        ("marian", {"activation_function": "gelu_new"}, "activation_function: gelu_new"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(tmp_path: Path, name: str, keys: dict[str, Any], named: str) -> None:
    architecture, others = (MODELS | ENCODERS | {"marian": ("MarianMTModel", {})})[name]
    folder = _rewritten(saved(foreign_model(architecture, **others), tmp_path), **keys)
    with pytest.raises(ConfigurationError, match=named):
        load_hf(folder)


def test_tensors_that_have_no_place_are_refused_and_idle_ones_are_not(tmp_path: Path) -> None:
    theirs = foreign_model("LlamaForCausalLM", tie_word_embeddings=True)
    weights = saved(theirs, tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    idle = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": torch.ones(37, 24)}
    save_file(tensors | idle, weights)
    assert "head.weight" not in load_hf(tmp_path)[1]
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}, weights)
    with pytest.raises(ConfigurationError, match=r"self_attn\.q_proj\.bias"):
        load_hf(tmp_path)


def test_what_is_missing_is_damage(tmp_path: Path) -> None:
    folder = saved(foreign_model("LlamaForCausalLM"), tmp_path)
    with pytest.raises(DamagedCheckpointError, match=r"model\.layers\.4\.input_layernorm\.weight is missing"):
        load_hf(_rewritten(folder, num_hidden_layers=5))
    with pytest.raises(DamagedCheckpointError, match="hidden_size"):
        load_hf(_rewritten(folder, num_hidden_layers=4, hidden_size=...))
    with pytest.raises(DamagedCheckpointError, match="heads 4 is not a multiple of kv_heads 3"):
        load_hf(_rewritten(folder, hidden_size=24, num_key_value_heads=3))
    with pytest.raises(DamagedCheckpointError, match=r"mlp\.gate_proj\.weight is \(40, 24\)"):
        load_hf(_rewritten(folder, num_key_value_heads=2, intermediate_size=39))
    (folder / "config.json").write_text("[]")
    with pytest.raises(DamagedCheckpointError, match="not an object"):
        load_hf(folder)
