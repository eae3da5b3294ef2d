"""Attention document by document against all scores written out in float64, and what it takes of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from solomonov.activations import Allocated
from solomonov.model import packed
from solomonov.model.attention import attention_context
from solomonov.model.init import initialise
from solomonov.model.layers import Block
from solomonov.model.packed import PackedPlan, attend_documents, packed_attend
from solomonov.model.positions import alibi_slopes
from tests.solomonov.model.common import tiny_config

HEADS, WIDTH = 3, 8


def rows_of(rows: list[list[int]], first: int = 0) -> Tensor:
    """(B, T) documents: runs of these lengths, filled up with padding."""
    ids = [[first + number for number, size in enumerate(row) for _ in range(size)] for row in rows]
    most = max(map(len, ids))
    return torch.tensor([row + [-1] * (most - len(row)) for row in ids], dtype=torch.int32)


def plan_of(documents: Tensor, kind: str, window: int | None = None) -> PackedPlan:
    """Of tokens that see each other: `causal`, `alibi` or `all`."""
    slopes = torch.tensor(alibi_slopes(HEADS)) if kind == "alibi" else None
    return PackedPlan(documents, documents, kind != "all", slopes, window)


def written_out(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, sink: Tensor | None) -> Tensor:
    """Softmax of all scores, by its definition; of no keys nothing."""
    scores = query @ key.transpose(2, 3) / WIDTH**0.5
    sees = (plan.queries[:, :, None] == plan.keys[:, None, :])[:, None]
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    if plan.causal:
        sees = sees & (distance >= 0)
    if plan.window is not None:
        sees = sees & (distance < plan.window)
    if plan.slopes is not None:
        scores = scores - plan.slopes.double()[:, None, None] * distance
    weights = torch.where(sees, scores, -torch.inf).exp()
    total = weights.sum(dim=3, keepdim=True)
    if sink is not None:
        total = total + sink.exp()[:, None, None]
    return (weights / torch.where(total > 0, total, 1.0)) @ value


def both(plan: PackedPlan, sink: bool, dtype: torch.dtype, seed: int = 0) -> list[list[Tensor]]:
    """Result and gradients, of all scores in float64 and of the kernel."""
    generator = torch.Generator().manual_seed(seed)
    rows, asking, asked = *plan.queries.shape, plan.keys.shape[1]
    sizes = [(rows, HEADS, tokens, WIDTH) for tokens in (asking, asked, asked)]
    inputs = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    logits = torch.linspace(-1.0, 2.0, HEADS) if sink else None
    weights = torch.randn(sizes[0], generator=generator).to(dtype)
    found = []
    for function, kind in ((written_out, torch.float64), (packed_attend, dtype)):
        mine = [x.to(kind).requires_grad_() for x in inputs]
        own = None if logits is None else logits.to(torch.float64 if kind == torch.float64 else torch.float32)
        if own is not None:
            own.requires_grad_()
        mixed = function(*mine, plan, own)
        gradients = torch.autograd.grad((mixed * weights.to(kind)).sum(), [*mine, *([] if own is None else [own])])
        found.append([mixed.detach(), *gradients])
    return found


lengths = st.lists(st.lists(st.integers(1, 160), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@example(rows=[[300], [300]], kind="alibi", window=None, sink=True, seed=0)
@example(rows=[[1], [1]], kind="causal", window=None, sink=False, seed=0)
@example(rows=[[300], [300]], kind="causal", window=130, sink=True, seed=0)
@given(
    rows=lengths, kind=st.sampled_from(["causal", "alibi", "all"]), window=st.none() | st.integers(1, 170),
    sink=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_results_and_gradients_are_those_of_all_scores(
    rows: list[list[int]], kind: str, window: int | None, sink: bool, seed: int
) -> None:
    plan = plan_of(rows_of(rows), kind, None if kind == "all" else window)
    for expected, found in zip(*both(plan, sink, torch.float32, seed), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(asking=lengths, asked=lengths, shift=st.integers(-2, 2), sink=st.booleans())
def test_documents_of_two_kinds_of_rows_find_each_other_or_nothing(
    asking: list[list[int]], asked: list[list[int]], shift: int, sink: bool
) -> None:
    rows = min(len(asking), len(asked))
    plan = PackedPlan(rows_of(asking[:rows]), rows_of(asked[:rows], first=max(0, shift)), causal=False)
    for expected, found in zip(*both(plan, sink, torch.float32), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "window"), [("causal", None), ("alibi", None), ("causal", 7)])
def test_numbers_of_a_head_need_not_lie_side_by_side(kind: str, window: int | None) -> None:
    """The kernel takes it for granted; a rotation of heads of two does not, and the gradient of a sum is one number."""
    plan = plan_of(rows_of([[20, 13], [33]]), kind, window)
    inputs = [torch.randn(2, HEADS, 33, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = []
    for layout in (torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        mine = [layout(x).requires_grad_() for x in inputs]
        mixed = packed_attend(*mine, plan, None)
        expanded = torch.autograd.grad(mixed.sum(), mine, retain_graph=True)
        strewn = torch.autograd.grad(mixed, mine, layout(torch.ones_like(mixed)))
        found.append([mixed.detach(), *expanded, *strewn])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(found[0][1:4], found[0][4:], strict=True))


@pytest.mark.parametrize(
    ("kind", "window"), [("causal", None), ("alibi", None), ("all", None), ("causal", 100), ("causal", 250)]
)
def test_in_bf16_it_is_as_near_as_bf16_is(kind: str, window: int | None) -> None:
    """Within 2 of its steps of 2^-8 of the largest value; sums over some queries at a time included (300 tokens)."""
    plan = plan_of(rows_of([[300, 40], [90, 200]]), kind, window)
    for expected, found in zip(*both(plan, True, torch.bfloat16), strict=True):
        assert float((found.double() - expected).abs().max()) <= 2 * 2.0**-8 * float(expected.abs().max())


def test_what_a_key_gets_from_many_queries_is_summed_in_fp32() -> None:
    """In bf16 the sixteen sums of a row would leave an error of 1.6 of its steps of 2^-8, of the whole gradient."""
    plan = plan_of(rows_of([[2048]]), "causal", 1500)
    for expected, found in zip(*both(plan, False, torch.bfloat16), strict=True):
        assert float((found.double() - expected).norm()) <= 1.25 * 2.0**-8 * float(expected.norm())


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [None, 9, 1000])
def test_torch_finds_the_operation_sound(sink: bool, alibi: bool, window: int | None) -> None:
    """Its schema, its shapes and strides without values, its gradient, and both as a compiler traces them."""
    documents = rows_of([[20, 13], [33]])
    inputs = [torch.randn(2, 33, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3)]
    slopes = torch.tensor(alibi_slopes(HEADS)) if alibi and window is not None else None
    logits = torch.zeros(HEADS, requires_grad=True) if sink else None
    found = torch.library.opcheck(attend_documents, (*inputs, documents, documents, window, slopes, logits))
    assert set(found.values()) == {"SUCCESS"}


def test_a_compiled_block_takes_it_in_whole_and_once() -> None:
    config = tiny_config(attention={"preset": "rope", "sink": True})
    block = Block(config, 0)
    initialise(block, config, 0, prefix="layers.0.")
    x = torch.randn(1, 60, config.d_model, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    for runs in ([30, 20, 10], [60]):
        found = []
        for way in (block, compiled):
            (answer,) = way((x,), attention_context(rows_of([runs]), config))
            found.append([answer, *torch.autograd.grad(answer.square().sum(), list(block.parameters()))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "other documents were compiled again"


_CHILD = """
import json, resource, sys, torch
from solomonov.model.packed import PackedPlan, packed_attend
tokens, kind = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
documents = torch.zeros(1, tokens, dtype=torch.int32)
slopes = torch.tensor([0.5]) if kind == "alibi" else None
plan = PackedPlan(documents, documents, True, slopes, 512 if kind == "window" else None)
inputs = [torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
packed_attend(*inputs, plan, None).sum().backward()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("kind", ["causal", "alibi", "window"])
def test_the_memory_of_a_process_holds_no_square_of_the_row(kind: str) -> None:
    """At 8,192 tokens a mask of bytes is 64 MiB, one of fp32 is 256 MiB; here it is less than 48 MiB in all."""
    arguments: list[Any] = [sys.executable, "-c", _CHILD, str(2**13), kind]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 48 * 1024, "KiB"


@pytest.mark.parametrize("sink", [False, True])
def test_a_window_keeps_no_more_than_none(sink: bool) -> None:
    """Bytes between forward and backward pass, at 16 windows a row: those of attention to all, and no mask."""

    def kept(window: int | None) -> int:
        plan = plan_of(torch.zeros(1, 1024, dtype=torch.int32), "causal", window)
        with Allocated() as allocated:
            inputs = [torch.randn(1, HEADS, 1024, WIDTH, requires_grad=True) for _ in range(3)]
            mixed = packed_attend(*inputs, plan, torch.zeros(HEADS, requires_grad=True) if sink else None)
            found = allocated.now
            assert mixed.requires_grad
        return found

    assert kept(64) == kept(None)


def test_a_window_is_computed_for_keys_in_sight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of query and key that reach torch's kernels: of T tokens and a window w at most T * (w + 127), once in each
    direction."""
    pairs = []

    def counted(kernel: Any, query: int) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            asking, asked = inputs[query : query + 2]
            pairs.append(asking.shape[0] * asking.shape[2] * asked.shape[2])
            return kernel(*inputs, **options)

        return run

    monkeypatch.setattr(packed, "_kernel", counted(packed._kernel, 0))
    monkeypatch.setattr(packed, "_kernel_backward", counted(packed._kernel_backward, 1))
    plan = plan_of(rows_of([[4096], [4096]]), "causal", 100)
    inputs = [torch.randn(2, HEADS, 4096, WIDTH, requires_grad=True) for _ in range(3)]
    mixed = packed_attend(*inputs, plan, None)
    assert pairs == [2 * 128 * 128, *[2 * 128 * (128 + 99)] * 31]
    forward = list(pairs)
    mixed.sum().backward()
    assert pairs == 2 * forward
