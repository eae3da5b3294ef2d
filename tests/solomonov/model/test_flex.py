"""What the CUDA kernel is told against the masks and biases of the CPU; the kernel itself where there is CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from solomonov.model import attention, flex
from solomonov.model import window as windows
from solomonov.model.attention import Attention, attend, attention_context
from solomonov.model.flex import flex_plan, flex_suits, key_blocks, mask_function, score_function
from solomonov.model.init import initialise
from solomonov.model.layers import Block
from solomonov.model.positions import alibi_slopes
from tests.solomonov.model.common import tiny_config
from tests.solomonov.model.test_window import documents_of


def grid(heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, head, query and key numbers that broadcast to (1, heads, tokens, tokens)."""
    return (
        torch.zeros(1, 1, 1, 1, dtype=torch.int32),
        torch.arange(heads).view(1, -1, 1, 1),
        torch.arange(tokens).view(1, 1, -1, 1),
        torch.arange(tokens).view(1, 1, 1, -1),
    )


runs = st.lists(st.integers(1, 150), min_size=1, max_size=5)


@given(runs=runs, padding=st.integers(0, 4))
def test_of_all_to_all_the_mask_and_the_blocks_are_those_of_the_documents(runs: list[int], padding: int) -> None:
    documents = documents_of(runs, padding)
    size = flex.BLOCK_TOKENS
    seen = windows.same_document(documents, documents)
    assert torch.equal(mask_function(documents, None, causal=False)(*grid(1, documents.shape[1]))[0], seen)
    counts, numbers = key_blocks(documents, None, causal=False)
    for block in range(counts.shape[1]):
        listed = numbers[0, block, : int(counts[0, block])].tolist()
        rows = seen[0, block * size : (block + 1) * size]
        needed = sorted({key // size for key in rows.any(dim=0).nonzero().flatten().tolist()})
        assert listed == list(range(needed[0], needed[-1] + 1))


@given(runs=runs, padding=st.integers(0, 4), window=st.none() | st.integers(1, 300))
def test_the_mask_function_is_the_mask(runs: list[int], padding: int, window: int | None) -> None:
    documents = documents_of(runs, padding)
    tokens = documents.shape[1]
    found = mask_function(documents, window)(*grid(1, tokens))
    assert torch.equal(found[0], windows.visible(documents, tokens, window))


@settings(deadline=None)
@example(runs=[300], padding=0, window=2)
@given(runs=runs, padding=st.integers(0, 4), window=st.none() | st.integers(1, 300))
def test_the_blocks_that_are_looked_at_are_those_in_which_something_is_seen(
    runs: list[int], padding: int, window: int | None
) -> None:
    """All of them; and beyond these at most those from the first query's begin on."""
    documents = documents_of(runs, padding)
    tokens, size = documents.shape[1], flex.BLOCK_TOKENS
    counts, numbers = key_blocks(documents, window)
    seen = mask_function(documents, window)(*grid(1, tokens))[0, 0]
    for block in range(counts.shape[1]):
        listed = numbers[0, block, : int(counts[0, block])].tolist()
        rows = seen[block * size : (block + 1) * size]
        needed = {key // size for key in rows.any(dim=0).nonzero().flatten().tolist()}
        assert needed <= set(listed)
        of_first_query = int(rows[0].nonzero()[0, 0]) // size
        assert listed == list(range(of_first_query, block + 1))
    dense = flex_plan(documents, window, None).blocks.to_dense()[0, 0].bool()
    for block in range(counts.shape[1]):
        assert dense[block].nonzero().flatten().tolist() == numbers[0, block, : int(counts[0, block])].tolist()


@pytest.mark.parametrize("heads", [3, 8])
def test_the_score_function_is_the_bias(heads: int) -> None:
    slopes = torch.tensor(alibi_slopes(heads))
    seen = torch.ones(1, 9, 9, dtype=torch.bool)
    found = score_function(slopes)(torch.full((), 0.5), *grid(heads, 9))
    torch.testing.assert_close(found, windows.biased(seen, slopes) + 0.5)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_as_operations_on_a_cpu_it_gives_the_same(monkeypatch: pytest.MonkeyPatch, sink: bool, alibi: bool) -> None:
    """The forward pass with all scores written out; torch has no other on a CPU."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention.flex_attention)
    documents, heads = documents_of([100, 70, 25], 5), 4
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 200, count, 16, generator=generator) for count in (heads, 2, 2))
    slopes = torch.tensor(alibi_slopes(heads)) if alibi else None
    logits = torch.linspace(-1.0, 2.0, heads) if sink else None
    mask = windows.visible(documents, 200, 33)
    mask = mask[:, None] if slopes is None else windows.biased(mask, slopes)
    mask = windows.with_room_for_sink(mask) if sink else mask
    expected = attend(query, key, value, mask=mask, sink=logits)
    found = attend(query, key, value, mask=None, flex=flex_plan(documents, 33, slopes), sink=logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_takes_it_in_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler reads of it, run as operations, over two batches with documents of other lengths."""
    config = tiny_config(
        d_model=64,
        attention={"position": "alibi", "window_tokens": 33, "pattern": "LG", "sink": True, "output_gate": "head"},
    )
    block = Block(config, 0)
    initialise(block, config, 0, prefix="layers.0.")
    x = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    for runs in ([100, 70, 25], [30, 150, 15]):
        documents = documents_of(runs, 5)
        (expected,) = block((x,), attention_context(documents, config))
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(attention, "flex_suits", lambda *_: True)
            context = attention_context(documents, config)
            assert context.flex is not None
            torch.testing.assert_close(compiled((x,), context)[0], expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "the second batch was compiled again"


def test_cuda_takes_it_for_all_but_narrow_heads() -> None:
    for width, device, suits in ((16, "cuda", True), (8, "cuda", False), (16, "cpu", False)):
        assert flex_suits(tiny_config(head_dim=width), torch.device(device)) == suits


@pytest.mark.gpu
@pytest.mark.parametrize(
    "keys", [{}, {"window_tokens": 33}, {"position": "alibi"}, {"sink": True, "window_tokens": 33}], ids=str
)
def test_the_kernel_gives_what_the_cpu_gives(keys: dict[str, Any]) -> None:
    """Outputs and gradients in fp32 within 1e-4 (bf16 products are not in play), 200 tokens of several documents."""
    config = tiny_config(attention=keys, head_dim=16)
    module = Attention(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    documents = documents_of([100, 70, 25], 5)
    found = []
    for device in ("cpu", "cuda"):
        module = module.to(device)
        x = torch.randn(1, 200, config.d_model, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        context = attention_context(documents.to(device), config)
        assert (context.flex is not None) == (device == "cuda")
        answer = module(x, context)
        answer.square().sum().backward()
        assert x.grad is not None
        gradients = [parameter.grad.cpu() for parameter in module.parameters() if parameter.grad is not None]
        found.append([answer.detach().cpu(), x.grad.cpu(), *gradients])
        module.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
