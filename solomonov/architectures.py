"""What may be done with which architecture so far. Imports no torch."""

from __future__ import annotations

from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig


def require_objective(model: ModelConfig) -> None:
    """Before a run is started.

    Raises:
        ConfigurationError: no objective trains this architecture.
    """
    if model.architecture != "decoder":
        raise ConfigurationError(
            f"architecture {model.architecture} cannot be trained yet",
            got=f"model.architecture: {model.architecture} with the one objective there is, clm: the next token",
            rule="a model is trained by an objective that its rows can serve, and only a decoder predicts the next "
            "token from them; any architecture can be planned and proven (`solomonov plan`, `solomonov prove`)",
            remedy="set model.architecture to decoder, and model.encoder_layers to null",
        )


def require_decoder(model: ModelConfig, verb: str) -> None:
    """Before a trained model is used.

    Args:
        verb: what is to be done with it.

    Raises:
        ConfigurationError: it is no decoder.
    """
    if model.architecture != "decoder":
        raise ConfigurationError(
            f"{verb} knows decoders only",
            got=f"model.architecture: {model.architecture}",
            rule=f"`solomonov {verb}` reads text from its start on, and has each token predicted from those before it",
            remedy=f"give {verb} a run of a decoder, or use the weights with solomonov.loading.load_model",
        )
