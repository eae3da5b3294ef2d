"""Chunked cross-entropy against torch's own on whole logits, in float64, and against a float64 loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solomonov.model.loss import cross_entropy_sum, pipeline_loss
from tests.support import naive


def _case(tokens: int = 11, width: int = 6, vocab: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens), generator=generator, dtype=torch.int32)
    labels[0, 2::4] = -100
    return hidden, weight, labels


@given(chunk_tokens=st.integers(1, 13))
def test_value_and_gradients_equal_torch_for_any_chunk(chunk_tokens: int) -> None:
    hidden, weight, labels = _case()
    loss = cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(loss, (hidden, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = (wide[0] @ wide[1].T).reshape(11, 9)
    reference = functional.cross_entropy(logits, labels.reshape(-1).long(), reduction="sum", ignore_index=-100)
    expected = torch.autograd.grad(reference, wide)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_value_equals_a_loop() -> None:
    hidden, weight, labels = _case()
    logits = (hidden.detach().double() @ weight.detach().double().T)[0].numpy()
    expected = sum(naive.cross_entropy(logits[i], int(labels[0, i])) for i in range(11) if int(labels[0, i]) >= 0)
    assert pipeline_loss((hidden, weight), labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [4, 4096])
def test_without_labels_loss_and_gradients_are_zero(chunk_tokens: int) -> None:
    hidden, weight, labels = _case()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100), chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)


def test_bf16_logits_are_summed_in_fp32() -> None:
    hidden, weight, labels = _case(tokens=2000)
    loss = cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), labels, chunk_tokens=100)
    logits = functional.linear(hidden.bfloat16(), weight.bfloat16()).double()[0]
    reference = functional.cross_entropy(logits, labels[0].long(), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)


class _LargestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most values that any operation returned in one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_whole_logits_never_exist() -> None:
    hidden, weight, labels = _case(tokens=64, width=2, vocab=50)
    with _LargestResult() as seen:  # type: ignore[no-untyped-call]
        cross_entropy_sum(hidden, weight, labels, chunk_tokens=8).backward()  # type: ignore[no-untyped-call]
    assert seen.largest == 8 * 50
