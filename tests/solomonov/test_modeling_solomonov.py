"""The code that goes into exports against our own model, for every form, flag and preset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from solomonov.bundled import bundled_config
from solomonov.configuration_solomonov import SolomonovConfig
from solomonov.model.residual import MODES
from solomonov.modeling_solomonov import SolomonovForCausalLM, SolomonovForMaskedLM, SolomonovForSeq2SeqLM
from tests.solomonov.model.common import ATTENTION, BIASES, tiny_config
from tests.support.foreign import (
    TOLERANCE,
    VOCAB,
    our_logits,
    our_pairs,
    our_weights,
    random_documents,
    relative_difference,
    their_logits,
    their_pairs,
)

CASES: list[dict[str, Any]] = [
    *({"residual": mode, "layers": 3, "base_layers": 2} for mode in MODES),
    *({"residual": mode, "norm": "layernorm", "feed_forward": "gelu", "layers": 2} for mode in MODES),
    *({"attention": flags, "layers": 3} for flags in ATTENTION.values()),
    {"attention": ATTENTION["vanilla"], "tie_embeddings": True},
    {"attention": {"preset": "alibi"}, "heads": 6, "head_dim": 4},
    {"feed_forward": "relu2", "kv_heads": 4},
    {"feed_forward": "geglu", "kv_heads": 1, "norm_eps": 0.1},
    *({"value_residual": True, "residual": mode, "layers": 3} for mode in ("prenorm", "lns", "keel")),
]
WITH_BIASES: list[dict[str, Any]] = [
    BIASES,
    {**BIASES, "tie_embeddings": True, "feed_forward": "silu", "residual": "prenorm"},
    {**BIASES, "attention": ATTENTION["much at once"], "feed_forward": "swiglu", "norm": "rmsnorm"},
    {**BIASES, "attention": ATTENTION["vanilla"], "feed_forward": "relu", "output_head": "bias"},
    {**BIASES, "value_residual": True, "layers": 3},
]
TWO_WAYS = ("vanilla", "rope", "normed together", "local", "hybrid")
"""Those of which an encoder can have what concerns it: its positions are not how far back a key is."""
PAIRS: list[dict[str, Any]] = [
    *({"residual": mode, "layers": 2, "encoder_layers": 3, "base_layers": 2} for mode in MODES),
    {"residual": "keel", "layers": 3, "encoder_layers": 1},
    *({"attention": ATTENTION[name], "layers": 3, "encoder_layers": 2} for name in TWO_WAYS),
    {"attention": {"output_gate": True, "sink": True}, "layers": 2, "encoder_layers": 2, "kv_heads": 4},
    {"value_residual": True, "layers": 3, "encoder_layers": 2, "kv_heads": 1},
    {**BIASES, "layers": 2, "encoder_layers": 2, "tie_embeddings": True},
    {**BIASES, "attention": ATTENTION["vanilla"], "layers": 1, "encoder_layers": 2, "output_head": "bias"},
]
"""An encoder before a decoder: as many layers, more, fewer and none behind the first."""
ENCODERS: list[dict[str, Any]] = [
    {},
    {"residual": "deepnorm", "kv_heads": 1, "tie_embeddings": True},
    {"attention": {"preset": "vanilla", "output_gate": True}, "tie_embeddings": True},
    {"attention": {"position": "nope", "qk_norm_over": "all"}, "residual": "layerscale"},
    BIASES,
    {**BIASES, "value_residual": True, "layers": 3},
]


def _loaded(changes: dict[str, Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    """Our configuration, the bundled model of it, and the weights that both have."""
    config = tiny_config(**changes)
    state = our_weights(config)
    kind = {
        "decoder": SolomonovForCausalLM,
        "encoder": SolomonovForMaskedLM,
        "encoder_decoder": SolomonovForSeq2SeqLM,
    }[config.architecture]
    tokens = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}
    model = kind(SolomonovConfig(**bundled_config(config, 32), vocab_size=VOCAB, **tokens))
    missing, strange = model.load_state_dict(state, strict=False)
    assert (missing, strange) == (["head.weight"] if config.tie_embeddings else [], [])
    model.tie_weights()
    return config, model.eval(), state


@pytest.mark.parametrize(
    "changes", [*CASES, *WITH_BIASES, *({**each, "architecture": "encoder"} for each in ENCODERS)], ids=str
)
def test_its_logits_are_ours(changes: dict[str, Any]) -> None:
    config, model, state = _loaded(changes)
    documents = random_documents(13, 1, 9)
    expected = our_logits(config, state, documents)
    assert relative_difference(their_logits(model, documents), expected) <= TOLERANCE


@pytest.mark.parametrize("changes", PAIRS, ids=str)
def test_its_logits_of_pairs_are_ours(changes: dict[str, Any]) -> None:
    """Sources and targets of several lengths: with padding there, in one row of documents here."""
    config, model, state = _loaded({**changes, "architecture": "encoder_decoder"})
    sources, targets = random_documents(9, 1, 12), random_documents(4, 11, 2, seed=2)
    expected = our_pairs(config, state, sources, targets)
    assert relative_difference(their_pairs(model, sources, targets), expected) <= TOLERANCE


@pytest.mark.parametrize("flags", TWO_WAYS)
def test_pairs_are_continued_from_a_cache_of_both_stacks_and_have_a_loss(flags: str) -> None:
    changes = {"attention": ATTENTION[flags], "layers": 2, "encoder_layers": 3, "value_residual": True}
    config, model, state = _loaded({**changes, "residual": "keel", "architecture": "encoder_decoder"})
    long, short = random_documents(8, 5)
    ids, mask = torch.stack((long, torch.cat((short, torch.zeros(3, dtype=torch.long))))), torch.ones(2, 8).long()
    mask[1, 5:] = 0
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    read_again = []
    model.encoder.layers[0].register_forward_hook(lambda *_: read_again.append(True))
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False), made)
    assert len(read_again) == 1, "the source is read once"
    for row, source in zip(made, (long, short), strict=True):
        target = torch.tensor([1])
        for _ in range(5):
            target = torch.cat((target, our_pairs(config, state, [source], [target])[0, -1].argmax()[None]))
        assert torch.equal(row, target)
    labels = made[:, 1:].clone()
    labels[0, 3:] = -100
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=mask, labels=labels)
        beams = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=3)

    def likelihoods(source: Tensor, row: Tensor) -> Tensor:
        logs = our_pairs(config, state, [source], [row[:-1]])[0].log_softmax(-1)
        return logs.gather(1, row[1:, None])[:, 0]

    of_long, of_short = likelihoods(long, made[0]), likelihoods(short, made[1])
    torch.testing.assert_close(found.loss, -torch.cat((of_long[:3], of_short)).mean())
    for source, row, greedy in zip((long, short), beams, (of_long, of_short), strict=True):
        assert float(likelihoods(source, row).sum()) >= float(greedy.sum()) - 1e-4, "three beams find no worse"


def test_a_target_without_a_source_finds_nothing_in_it_and_none_at_all_is_refused() -> None:
    config, model, state = _loaded({"architecture": "encoder_decoder", "layers": 2, "encoder_layers": 2})
    [source], [target] = random_documents(4), random_documents(6, seed=2)
    with torch.inference_mode():
        found = model(input_ids=source[None], attention_mask=torch.zeros(1, 4).long(), decoder_input_ids=target[None])
    assert relative_difference(found.logits, our_pairs(config, state, [target[:0]], [target])) <= TOLERANCE
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(input_ids=source[None])


@pytest.mark.parametrize("flags", ATTENTION)
def test_padding_and_a_cache_change_nothing(flags: str) -> None:
    _, model, _ = _loaded({"attention": ATTENTION[flags], "layers": 3, "residual": "keel", "value_residual": True})
    long, short = random_documents(12, 7)
    ids = torch.stack((long, torch.cat((torch.zeros(5, dtype=torch.long), short))))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.inference_mode():
        expected = [model(input_ids=each[None]).logits[0] for each in (long, short)]
        whole = model(input_ids=ids, attention_mask=mask)
        assert whole.past_key_values is None
        first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        parts = [first.logits]
        for token in range(6, 12):
            step = model(
                input_ids=ids[:, token : token + 1],
                attention_mask=mask[:, : token + 1],
                past_key_values=first.past_key_values,
                use_cache=True,
            )
            parts.append(step.logits)
    for logits in (whole.logits, torch.cat(parts, dim=1)):
        assert relative_difference(logits[0], expected[0]) <= TOLERANCE
        assert relative_difference(logits[1, 5:], expected[1]) <= TOLERANCE


def test_padding_on_either_side_of_an_encoder_changes_nothing_and_it_has_a_loss() -> None:
    _, model, _ = _loaded({**BIASES, "architecture": "encoder"})
    long, short = random_documents(12, 7)
    fill = torch.zeros(5, dtype=torch.long)
    ids = torch.stack((long, torch.cat((short, fill)), torch.cat((fill, short))))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, :5] = 0, 0
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 2] = 5, 7
    with torch.inference_mode():
        expected = [model(input_ids=each[None]).logits[0] for each in (long, short)]
        found = model(input_ids=ids, attention_mask=mask, labels=labels)
    rows = (found.logits[0], found.logits[1, :7], found.logits[2, 5:])
    for row, logits in zip(rows, (*expected, expected[1]), strict=True):
        assert relative_difference(row, logits) <= TOLERANCE
    losses = [-logits.log_softmax(-1)[at, label] for logits, at, label in zip(expected, (3, 2), (5, 7), strict=True)]
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_it_generates_and_has_a_loss() -> None:
    config, model, state = _loaded({"attention": ATTENTION["hybrid"], "residual": "keel", "layers": 3})
    [ids] = random_documents(5)
    made = model.generate(input_ids=ids[None], max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    row = ids
    for _ in range(4):
        row = torch.cat((row, our_logits(config, state, [row])[0, -1].argmax()[None]))
    assert torch.equal(made, row)
    labels = row.clone()
    labels[:2] = -100
    found = model(input_ids=row[None], labels=labels[None]).loss
    expected = torch.nn.functional.cross_entropy(our_logits(config, state, [row])[0, 1:-1], row[2:])
    torch.testing.assert_close(found.detach(), expected)
