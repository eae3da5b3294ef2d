"""Models from checkpoints and exports against the tensors that were saved; and what is refused with a way out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from solomonov.errors import ConfigurationError, DamagedCheckpointError
from solomonov.export import export_hf
from solomonov.hf_folder import EXPORT_MARKER
from solomonov.loading import LoadedModel, load_model
from solomonov.runfolder import RunFolder
from tests.solomonov.checkpoint.common import flip
from tests.support.runs import begin_run, model_state, write_checkpoint
from tests.support.user import User

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 300, 2]])


def assert_equal_state(model: LoadedModel, expected: dict[str, torch.Tensor]) -> None:
    assert model.state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model.state[name], tensor), name


@pytest.mark.parametrize(("step", "expected"), [(None, 6), (3, 3), (6, 6)])
def test_a_run_gives_the_saved_tensors(step: int | None, expected: int, trained: tuple[User, RunFolder]) -> None:
    user, run = trained
    model = load_model(str(run.path), step=step)
    assert model.step == expected
    assert_equal_state(model, model_state(run, expected))
    assert model.config == run.config().model
    assert (model.vocab_size, model.sequence_tokens) == (320, 32)
    assert model.tokenizer_model == user.folder / "dataset/tokenizer/tokenizer.model"
    assert model.source == run.checkpoints / f"step-{expected:08d}"
    module = model.module(CPU)
    assert not module.training
    assert all(torch.equal(value, model.state[name]) for name, value in module.named_parameters())


def test_the_newest_that_verifies_is_taken(run: RunFolder) -> None:
    flip(run.checkpoints / "step-00000006/rank-00000.safetensors", 8000)
    model = load_model(str(run.path))
    assert model.step == 3
    assert_equal_state(model, model_state(run, 3))
    with pytest.raises(DamagedCheckpointError, match="rank-00000"):
        load_model(str(run.path), step=6)


def test_an_export_gives_the_same_logits(trained: tuple[User, RunFolder], tmp_path: Path) -> None:
    original = load_model(str(trained[1].path))
    export_hf(original.state, original.config, original.tokenizer_model, tmp_path / "e", sequence_tokens=32)
    exported = load_model(str(tmp_path / "e"))
    assert exported.run is None
    assert exported.step is None
    assert (exported.vocab_size, exported.sequence_tokens) == (320, 32)
    assert exported.tokenizer_model.read_bytes() == original.tokenizer_model.read_bytes()
    expected = original.module(CPU)(IDS, torch.zeros_like(IDS))
    torch.testing.assert_close(exported.module(CPU)(IDS, torch.zeros_like(IDS)), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_without_our_tokenizer_is_no_export(trained: tuple[User, RunFolder], tmp_path: Path) -> None:
    original = load_model(str(trained[1].path))
    export_hf(original.state, original.config, original.tokenizer_model, tmp_path / "e", sequence_tokens=32)
    (tmp_path / "e" / EXPORT_MARKER).unlink()
    with pytest.raises(ConfigurationError, match=r"(?s)not an export of ours.*no solomonov\.json") as caught:
        load_model(str(tmp_path / "e"))
    assert "solomonov export" in caught.value.remedy


def test_the_average_is_loaded_in_the_place_of_the_weights(run: RunFolder) -> None:
    weights, average = model_state(run, 9), model_state(run, 10)
    write_checkpoint(run, 9, weights, average)
    assert_equal_state(load_model(str(run.path), ema=True), average)
    assert_equal_state(load_model(str(run.path)), weights)
    with pytest.raises(ConfigurationError, match="holds no average") as caught:
        load_model(str(run.path), step=6, ema=True)
    assert "step-00000006, which holds master" in caught.value.got


def test_a_tied_head_is_the_embedding(user: User) -> None:
    run = begin_run(user, "model.tie_embeddings=true")
    state = model_state(run, 1)
    assert "head.weight" not in state
    write_checkpoint(run, 1, state)
    module = load_model(str(run.path)).module(CPU)
    assert module.head.weight is module.embedding.weight
    assert torch.equal(module.head.weight, state["embedding.weight"])


def test_weights_of_another_model_are_refused(user: User) -> None:
    run = begin_run(user)
    state = model_state(run, 1)
    state["layers.9.strange"] = state.pop("final_norm.weight")
    write_checkpoint(run, 1, state)
    with pytest.raises(ConfigurationError, match="do not fit") as caught:
        load_model(str(run.path)).module(CPU)
    assert caught.value.got == "missing ['final_norm.weight'], unknown ['layers.9.strange']"


def test_what_is_not_there_is_refused_with_what_to_do(run: RunFolder) -> None:
    with pytest.raises(ConfigurationError, match="there is no such run"):
        load_model("nowhere")
    with pytest.raises(ConfigurationError, match="no checkpoint of that step") as caught:
        load_model("own", step=4)
    assert "solomonov checkpoints list" in caught.value.remedy
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigurationError, match="no checkpoint yet") as caught:
        load_model("own")
    assert "train it first" in caught.value.remedy


def test_another_tokenizer_in_the_data_folder_is_refused(run: RunFolder) -> None:
    """The folder was prepared anew since: same size, same vocabulary, other pieces."""
    path = run.data_folder() / "tokenizer" / "tokenizer.model"
    original = path.read_bytes()
    index = original.index(b"ing")
    path.write_bytes(original[:index] + b"ign" + original[index + 3 :])
    try:
        with pytest.raises(ConfigurationError, match="not the one that the run was trained with"):
            load_model(str(run.path))
    finally:
        path.write_bytes(original)
    load_model(str(run.path))
