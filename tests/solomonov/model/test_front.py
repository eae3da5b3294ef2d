"""Patches and frames against torch's convolutions and float64 loops; packed against alone; a task that is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from solomonov.model.cache import KeyValueCache
from solomonov.model.config import ModelConfig, Recompute
from solomonov.model.counts import layer_flops, parameter_count, parameter_shapes
from solomonov.model.cross import Source
from solomonov.model.front import Front, example, patches_of
from solomonov.model.init import initialise
from solomonov.model.loss import pipeline_loss
from solomonov.model.naming import canonical, layer_names
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, float64_state, random_ids, spread_model, tiny_config
from tests.support import naive

PATCHES = {"kind": "patches", "image_size": [12, 20], "patch_size": 4, "channels": 2}
"""Three rows of five patches of 32 numbers."""
FRAMES = {"kind": "frames", "mels": 6}
FRONTS: list[dict[str, Any]] = [PATCHES, FRAMES, {**FRAMES, "stride": 2}]
POSITIONS = ["rope", "sinusoidal", "nope"]


def encoder(front: dict[str, Any], position: str = "rope", **changes: Any) -> ModelConfig:
    given = {"architecture": "encoder", "front": front, "attention": {"position": position}, "residual": "prenorm"}
    return tiny_config(**given | changes)


def spread_front(config: ModelConfig) -> Front:
    """A front in float64, of any values."""
    front = Front(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in front.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return front


def draw(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


# --- patches -----------------------------------------------------------------------------------------------


def test_patches_are_embedded_as_by_a_convolution_whose_stride_is_its_kernel() -> None:
    front = spread_front(encoder(PATCHES))
    state = dict(front.named_parameters())
    images = draw(2, 2, 12, 20, dtype=torch.float64)
    weight = state["projection.weight"].view(16, 2, 4, 4)
    expected = functional.conv2d(images, weight, state["projection.bias"], stride=4).flatten(2).transpose(1, 2)
    documents = torch.zeros(2, 15, dtype=torch.int32)
    found, same = front(images, documents)
    assert same is documents
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cut, _ = front(patches_of(images, 4), documents)
    assert torch.equal(cut, found), "cut before, in a data worker say"
    assert torch.equal(patches_of(images, 4)[1, 7], images[1, :, 4:8, 8:12].flatten()), "row 1, column 2 of 3 x 5"


def naive_front(front: Front, x: Tensor) -> list[naive.Array]:
    """One document's vectors, by loops in float64 over patches, or over frames with zeros beside them."""
    state = {name: value.detach().double().numpy() for name, value in front.named_parameters()}
    stream = [each.double().numpy() for each in x]
    if front.config.kind == "patches":
        return [state["projection.weight"] @ each + state["projection.bias"] for each in stream]
    for name, stride in zip(("first", "second"), (front.config.stride // 2, 2), strict=True):
        weight = state[f"{name}.weight"].reshape(len(state[f"{name}.bias"]), -1, 3)
        following = []
        for centre in range(0, len(stream), stride):
            total = state[f"{name}.bias"].copy()
            for tap in range(3):
                if 0 <= centre + tap - 1 < len(stream):
                    total += weight[:, :, tap] @ stream[centre + tap - 1]
            following.append(functional.gelu(torch.from_numpy(total)).numpy())
        stream = following
    return stream


def naive_places(config: ModelConfig, stream: list[naive.Array]) -> list[naive.Array]:
    """The same with sinusoids, of patches half by row and half by column."""
    if config.attention.position != "sinusoidal":
        return stream
    width = config.d_model
    if config.front.kind == "frames":
        return [x + naive.sinusoid(place, width) for place, x in enumerate(stream)]
    grid = [divmod(place, config.front.columns) for place in range(len(stream))]
    halves = [(naive.sinusoid(row, width // 2), naive.sinusoid(column, width - width // 2)) for row, column in grid]
    return [x + np.concatenate(half) for x, half in zip(stream, halves, strict=True)]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_logits_of_an_encoder_equal_float64_loops(front: dict[str, Any], position: str) -> None:
    config = encoder(front, position)
    model = spread_model(config)
    x = draw(1, 13, config.front.features)
    found = model(x, torch.zeros(1, 13, dtype=torch.int32)).detach().numpy()[0]
    assert model.front is not None
    stream = naive_places(config, naive_front(model.front, x[0]))
    state = float64_state(model)
    expected = [state["head.weight"] @ each for each in naive.through(state, config, "", stream, [])]
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_logits_of_an_encoder_decoder_equal_float64_loops(front: dict[str, Any]) -> None:
    """The encoder's rotation is by row and column, the decoder's by place."""
    config = encoder(front, architecture="encoder_decoder", encoder_layers=1)
    model = spread_model(config)
    x, ids = draw(1, 13, config.front.features), random_ids(1, 7)
    source = Source(x, torch.zeros(1, 13, dtype=torch.int32))
    found = model(ids, torch.zeros_like(ids), source=source).detach().numpy()[0]
    assert model.front is not None
    state = float64_state(model)
    memory = naive.through(state, config, "encoder.", naive_front(model.front, x[0]), [])
    stream = naive.through(state, config, "", naive.embedded(state, config, ids[0].tolist()), memory)
    np.testing.assert_allclose(found, np.stack([state["head.weight"] @ each for each in stream]), atol=2e-4, rtol=2e-4)


# --- frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 16, 23])
def test_frames_go_through_two_convolutions(frames: int, stride: int) -> None:
    front = spread_front(encoder({**FRAMES, "stride": stride}))
    state = dict(front.named_parameters())
    x = draw(2, frames, 6, dtype=torch.float64)
    expected = x.transpose(1, 2)
    for name, each, inputs in (("first", stride // 2, 6), ("second", 2, 16)):
        weight = state[f"{name}.weight"].view(16, inputs, 3)
        expected = functional.gelu(functional.conv1d(expected, weight, state[f"{name}.bias"], each, padding=1))
    found, documents = front(x, torch.zeros(2, frames, dtype=torch.int32))
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert documents.shape == (2, -(-frames // stride))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    front=st.sampled_from(FRONTS),
    position=st.sampled_from(POSITIONS),
)
def test_packed_documents_equal_single_ones(
    lengths: list[int], padding: int, front: dict[str, Any], position: str
) -> None:
    """Images of any number of patches, recordings of any number of frames, begun at multiples of the stride; what
    stands in padding does not matter."""
    config = encoder(front, position)
    model, each = spread_model(config), config.front.inputs_per_token
    row: list[int] = []
    for document, inputs in enumerate(lengths):
        row += [document] * inputs + [-1] * (-inputs % each)
    documents = torch.tensor([row + [-1] * padding])
    x = 100.0 * draw(1, documents.shape[1], config.front.features)
    x = torch.where((documents == -1)[..., None], x, x / 100.0)
    packed = model(x, documents)
    assert bool(torch.isfinite(packed).all())
    begin = 0
    for document, inputs in enumerate(lengths):
        mine = documents[0] == document
        alone = model(x[:, mine], documents[:, mine])
        tokens = config.front.tokens_of(inputs)
        assert alone.shape[1] == tokens
        torch.testing.assert_close(
            packed[:, begin : begin + tokens], alone, rtol=0.0, atol=2e-5 * float(alone.detach().abs().max())
        )
        begin += tokens


def test_what_a_decoder_looks_at_of_packed_frames_is_its_own_document() -> None:
    config = encoder(FRAMES, architecture="encoder_decoder")
    model = spread_model(config)
    lengths = [5, 9]
    of_source = torch.tensor([[0] * 5 + [-1] * 3 + [1] * 9 + [-1] * 4])
    x, ids = draw(1, 21, 6), random_ids(1, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    packed = model(ids, documents, source=Source(x, of_source))
    for document in range(len(lengths)):
        mine, theirs = documents[0] == document, of_source[0] == document
        alone = model(ids[:, mine], documents[:, mine], source=Source(x[:, theirs], of_source[:, theirs]))
        torch.testing.assert_close(packed[:, mine], alone, rtol=0.0, atol=2e-5 * float(alone.detach().abs().max()))


@pytest.mark.parametrize("front", FRONTS, ids=str)
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_cached_logits_behind_a_front_equal_those_of_the_whole_row(position: str, front: dict[str, Any]) -> None:
    config = encoder(front, position, architecture="encoder_decoder")
    model = spread_model(config).eval()
    ids = random_ids(1, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    source = Source(draw(1, 16, config.front.features), torch.tensor([[0] * 5 + [-1] * 3 + [1] * 8]))
    cache = KeyValueCache(config, batch_rows=1, capacity_tokens=7)
    with torch.no_grad():
        whole = model(ids, documents, source=source)
        pieces = [
            model(ids[:, begin:end], documents[:, begin:end], cache=cache, source=None if begin else source)
            for begin, end in ((0, 2), (2, 6), (6, 7))
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0.0, atol=1e-5 * float(whole.abs().max()))


# --- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "shape"),
    [
        (PATCHES, (1, 3, 31)),
        (PATCHES, (1, 3, 12, 20)),
        (PATCHES, (1, 2, 12, 24)),
        (PATCHES, (1, 2, 13, 20)),
        (FRAMES, (9, 6)),
    ],
    ids=str,
)
def test_what_the_front_does_not_read_is_refused(front: dict[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="it reads floats"):
        Front(encoder(front))(torch.zeros(shape), torch.zeros(1, 3))


@pytest.mark.parametrize("shape", [(1, 15), (1, 2, 12, 20)], ids=str)
def test_integers_are_refused(shape: tuple[int, ...]) -> None:
    """Token ids, and pixels from 0 to 255, which are 128 times too large."""
    with pytest.raises(ValueError, match=r"got torch\.uint8 of shape"):
        spread_model(encoder(PATCHES))(torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, 15))


def test_images_may_be_higher_and_are_read_in_bf16() -> None:
    model = spread_model(encoder(PATCHES, "sinusoidal")).bfloat16()
    logits = model(draw(1, 2, 24, 20), torch.tensor([[0] * 15 + [1] * 15]))
    assert (logits.shape, logits.dtype) == ((1, 30, VOCAB), torch.bfloat16)


ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "encoder"},
    {"architecture": "encoder_decoder", "encoder_layers": 3},
    {"architecture": "encoder_decoder", "tie_embeddings": True},
]


@pytest.mark.parametrize("front", FRONTS, ids=str)
@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_shapes_names_and_counts_are_those_of_the_module(changes: dict[str, Any], front: dict[str, Any]) -> None:
    config = encoder(front, **changes)
    built = {name: tuple(p.shape) for name, p in Transformer(config, VOCAB, seed=None).named_parameters()}
    assert list(parameter_shapes(config, VOCAB).items()) == list(built.items()), "also in the order of the layers"
    assert parameter_count(config, VOCAB) == sum(int(np.prod(shape)) for shape in built.values())
    names = layer_names(config)
    reads_tokens = config.architecture == "encoder_decoder"
    assert names[:2] == ["front", "embedding" if reads_tokens else "layers.0"]
    assert ("embedding.weight" in built) == reads_tokens


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
@pytest.mark.parametrize("front", FRONTS, ids=str)
@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_pipeline_layers_give_the_same_loss_and_gradients(
    changes: dict[str, Any], front: dict[str, Any], position: str
) -> None:
    config = encoder(front, position, **changes)
    plain = Transformer(config, VOCAB, seed=9)
    x, _ = example(config.front, 2, 4, torch.Generator().manual_seed(1))
    documents = torch.zeros(x.shape[:2], dtype=torch.int32)
    documents[1, -1] = -1
    ids, labels = random_ids(2, 4), random_ids(2, 4, seed=1)
    own = torch.zeros_like(ids)
    both = config.architecture == "encoder_decoder"
    carry: tuple[Tensor, ...] = (x, documents, ids, own) if both else (x, documents)
    expected = plain(ids, own, labels, source=Source(x, documents)) if both else plain(x, documents, labels)
    modules = nn.ModuleDict()
    for number, layer in enumerate(pipeline_layers(config, VOCAB, seed=9)):
        modules[str(number)] = stage = layer.build()
        if layer.tied_key and layer.name == "head":
            stage.weight = modules["1"].weight  # the embedding's, behind the front: for the sum of both gradients
        carry = stage(carry)
    loss = pipeline_loss(carry, labels)
    assert torch.equal(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()
    names = layer_names(config)
    found = {canonical(name, names): parameter.grad for name, parameter in modules.named_parameters()}
    reference = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert gradient is not None
        assert torch.equal(found[name], gradient), name
        assert bool(gradient.any()), name


@pytest.mark.parametrize("changes", ARCHITECTURES[:2], ids=str)
def test_a_pipeline_may_be_cut_anywhere(changes: dict[str, Any]) -> None:
    """Stages as DeepSpeed runs them: what one is given are leaves, and all of floats but what the front reads have a
    gradient to send back."""
    config = encoder(FRAMES, **changes)
    layers = [layer.build() for layer in pipeline_layers(config, VOCAB, seed=9)]
    x, documents = example(config.front, 2, 4, torch.Generator().manual_seed(1))
    ids, labels = random_ids(2, 4), random_ids(2, 4, seed=1)
    for cut in range(1, len(layers)):
        carry: tuple[Tensor, ...] = (x, documents)
        if config.architecture == "encoder_decoder":
            carry = (x, documents, ids, torch.zeros_like(ids))
        for layer in layers[:cut]:
            carry = layer(carry)
        carry = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in carry)
        last = carry
        for layer in layers[cut:]:
            last = layer(last)
        pipeline_loss(last, labels).backward()  # type: ignore[no-untyped-call]
        assert all(each.grad is not None for each in carry if each.is_floating_point()), cut


@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_flops_are_two_a_product_of_a_token(front: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = encoder(front)
    x, documents = example(config.front, 2, 12, torch.Generator())
    module = Front(config)
    with FlopCounterMode(display=False) as counter:
        module(x, documents)
    assert layer_flops(config, VOCAB, 12)["front"] * 2 * 12 == counter.get_total_flops()
    both = encoder(front, architecture="encoder_decoder")
    costs = layer_flops(both, VOCAB, 4, 12)
    assert costs["front"] * 2 * 4 == counter.get_total_flops(), "a token of the target has three of the source"
    assert costs["embedding"] == 0


@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_what_comes_out_is_of_the_size_that_went_in(front: dict[str, Any]) -> None:
    config = encoder(front, "nope", d_model=512)
    module = Front(config)
    initialise(module, config, 3, prefix="front.")
    hidden, _ = module(*example(config.front, 4, 200, torch.Generator().manual_seed(0)))
    assert float(hidden.square().mean().sqrt().detach()) == pytest.approx(1.0, rel=0.1)


def _learned(
    config: ModelConfig, recompute: Recompute, batch: tuple[Tensor, Tensor, Tensor], steps: int
) -> list[float]:
    model = Transformer(config, VOCAB, seed=0, recompute=recompute)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(*batch) / (batch[2] != -100).sum()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_an_encoder_learns_where_a_bright_patch_is(position: str) -> None:
    """Drawn images of 3 x 3 patches in noise, each seen once: the first patch says which of the nine is bright, at
    chance with a loss of ln 9 = 2.2. Without positions it could say no more than whether it is itself: 8/9 ln 8 = 1.85.
    """
    config = encoder({"kind": "patches", "image_size": [6, 6], "patch_size": 2, "channels": 1}, position, d_model=32)
    generator = torch.Generator().manual_seed(4)
    model = Transformer(config, VOCAB, seed=0)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.005)
    losses = []
    for _ in range(150):
        place = torch.randint(0, 9, (32,), generator=generator)
        grid = functional.one_hot(place, 9).view(32, 1, 3, 3)
        bright = grid.repeat_interleave(2, 2).repeat_interleave(2, 3)
        images = 0.3 * torch.randn(32, 1, 6, 6, generator=generator) + 2.0 * bright
        labels = torch.full((32, 9), -100)
        labels[:, 0] = place
        loss = model(images, torch.zeros_like(labels), labels) / 32
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.2
    assert sum(losses[-5:]) / 5 < 0.5


@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_recomputed_activations_change_no_bit(front: dict[str, Any]) -> None:
    config = encoder(front)
    batch = *example(config.front, 2, 6, torch.Generator().manual_seed(0)), random_ids(2, 6).long()
    kept = _learned(config, Recompute(), batch, 3)
    assert kept == _learned(config, Recompute("full"), batch, 3) == _learned(config, Recompute("selective"), batch, 3)
    assert kept[-1] < kept[0]
