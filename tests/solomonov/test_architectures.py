"""What is refused of encoders so far: to train them, and to use one as if it predicted the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from solomonov.architectures import require_decoder, require_objective
from solomonov.errors import ConfigurationError
from solomonov.evaluate import evaluate
from solomonov.generate import generate
from solomonov.loading import LoadedModel
from solomonov.model.stacks import Architecture
from tests.solomonov.model.common import VOCAB, spread_model, tiny_config
from tests.support.runs import load
from tests.support.user import User

OTHERS: tuple[Architecture, ...] = ("encoder", "encoder_decoder")


def test_a_decoder_may_do_everything() -> None:
    require_objective(tiny_config())
    for verb in ("evaluate", "generate"):
        require_decoder(tiny_config(), verb)


@pytest.mark.parametrize("architecture", OTHERS)
def test_what_no_objective_trains_is_not_started(architecture: str, user: User) -> None:
    from solomonov.start import prepare_run

    loaded = load(user, f"model.architecture={architecture}")
    with pytest.raises(ConfigurationError) as caught:
        prepare_run(loaded, ranks_per_node=1, launch={})
    assert caught.value.exit_code == 78
    assert caught.value.what == f"architecture {architecture} cannot be trained yet"
    assert "only a decoder predicts" in caught.value.rule
    assert caught.value.remedy.startswith("set model.architecture to decoder")


@pytest.mark.parametrize("architecture", OTHERS)
def test_what_is_trained_is_not_used_as_a_decoder(architecture: Architecture, tmp_path: Path) -> None:
    """Each verb at its own door, before it reads a tokenizer or data."""
    model = spread_model(tiny_config(architecture=architecture))
    tokenizer = tmp_path / "tokenizer.model"
    loaded = LoadedModel(model.config, model.state_dict(), VOCAB, tokenizer, 16, 3, tmp_path, None)
    doors: dict[str, Any] = {
        "evaluate": lambda: evaluate(loaded, tmp_path, torch.device("cpu"), max_bytes=9),
        "generate": lambda: generate(model, [1], max_new_tokens=2),
    }
    for verb, door in doors.items():
        with pytest.raises(ConfigurationError, match=f"^{verb} knows decoders only") as caught:
            door()
        assert caught.value.got == f"model.architecture: {architecture}"
        assert caught.value.exit_code == 78
    assert not list(tmp_path.iterdir()), "nothing was written"
