"""Chunked cross-entropy against torch's own on whole logits, in float64, and against a float64 loop; z-loss too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solomonov.model.loss import cross_entropy_and_z_sums, cross_entropy_sum, pipeline_loss
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


def _naive_sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(2,) float64: cross-entropy and ln^2 Z from exp, sum and log of whole logits, label by label."""
    logits = (hidden @ weight.T)[0]
    rows = [(logits[i], int(label)) for i, label in enumerate(labels[0]) if int(label) >= 0]
    log_z = [row.exp().sum().log() for row, _ in rows]
    losses = [z - row[label] for z, (row, label) in zip(log_z, rows, strict=True)]
    return torch.stack([torch.stack(losses).sum(), torch.stack([z * z for z in log_z]).sum()])


@pytest.mark.parametrize("coefficient", [1e-4, 0.3])
@given(chunk_tokens=st.integers(1, 13))
def test_z_loss_and_its_gradients_equal_naive_ones_for_any_chunk(chunk_tokens: int, coefficient: float) -> None:
    hidden, weight, labels = _case()
    found = cross_entropy_and_z_sums(hidden, weight, labels, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(found[0] + coefficient * found[1], (hidden, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = _naive_sums(*wide, labels)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected[0] + coefficient * expected[1], wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        pipeline_loss((hidden, weight), labels, with_z=True), cross_entropy_and_z_sums(hidden, weight, labels)
    )


def test_z_loss_of_large_logits_is_finite() -> None:
    hidden, weight, labels = _case()
    found = cross_entropy_and_z_sums(hidden * 1e3, weight, labels)
    assert torch.isfinite(found).all()
    assert found[0].item() == pytest.approx(cross_entropy_sum(hidden * 1e3, weight, labels).item(), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [4, 4096])
def test_without_labels_loss_and_gradients_are_zero(chunk_tokens: int) -> None:
    hidden, weight, labels = _case()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100), chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)
    with_z = cross_entropy_and_z_sums(hidden, weight, torch.full_like(labels, -100), chunk_tokens=chunk_tokens)
    assert with_z.tolist() == [0.0, 0.0]
    assert all(not gradient.any() for gradient in torch.autograd.grad(with_z.sum(), (hidden, weight)))


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


@pytest.mark.parametrize("chunk_tokens", [3, 100])
@pytest.mark.parametrize("with_z", [False, True])
def test_a_heads_bias_is_added_to_the_logits(with_z: bool, chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((7, 4), (6, 4), (6,)))
    labels = torch.tensor([1, -100, 5, 0, 2, 2, -100])
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    loss_of = cross_entropy_and_z_sums if with_z else cross_entropy_sum
    loss = loss_of(hidden, weight, labels, bias, chunk_tokens=chunk_tokens)
    logits = hidden.double() @ weight.double().T + bias.double()
    counts = labels != -100
    expected = [functional.cross_entropy(logits[counts], labels[counts], reduction="sum")]
    expected += [logits[counts].logsumexp(-1).square().sum()] if with_z else []
    torch.testing.assert_close(loss.double().view(-1), torch.stack(expected), rtol=1e-6, atol=0.0)
    assert torch.equal(pipeline_loss((hidden, weight, bias), labels, with_z=with_z), loss_of(*given[:2], labels, bias))
    found, wanted = (torch.autograd.grad(each.sum(), given) for each in (loss, torch.stack(expected)))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_of", [cross_entropy_sum, cross_entropy_and_z_sums])
def test_whole_logits_never_exist(loss_of: Callable[..., Tensor]) -> None:
    hidden, weight, labels = _case(tokens=64, width=2, vocab=50)
    with _LargestResult() as seen:  # type: ignore[no-untyped-call]
        loss_of(hidden, weight, labels, chunk_tokens=8).sum().backward()  # type: ignore[no-untyped-call]
    assert seen.largest == 8 * 50
