"""A trained model for use: from a run's checkpoint or from an export, on one device, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.manifest import digest_file
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.checkpoint.store import ResumeFact, folder_name, newest_verified
from solomonov.errors import ConfigurationError
from solomonov.hf_folder import EXPORT_MARKER, load_hf
from solomonov.model.config import ModelConfig
from solomonov.model.transformer import Transformer
from solomonov.partition import EMA
from solomonov.runfolder import RunFolder, find_run


@dataclass(frozen=True)
class LoadedModel:
    """Weights with what is needed to use them."""

    config: ModelConfig
    state: Mapping[str, torch.Tensor]
    """Canonical name -> fp32 tensor on the CPU."""
    vocab_size: int
    tokenizer_model: Path
    """The SentencePiece model."""
    sequence_tokens: int
    step: int | None
    """Update after which the weights were saved; None for an export."""
    source: Path
    run: RunFolder | None

    def module(self, device: torch.device) -> Transformer:
        """The model in fp32 on `device`, in evaluation mode."""
        model = Transformer(self.config, self.vocab_size, seed=None)
        missing, strange = model.load_state_dict(dict(self.state), strict=False)
        # A tied head is the embedding's own parameter and has no entry of its own.
        missing = [name for name in missing if not (name == "head.weight" and self.config.tie_embeddings)]
        if missing or strange:
            raise ConfigurationError(
                "the weights do not fit the model",
                got=f"missing {missing}, unknown {strange}",
                rule="every parameter of the configuration's model, and no other",
                remedy=f"check that {self.source} was written by this configuration",
            )
        return model.to(device).eval()


def load_model(target: str, *, step: int | None = None, ema: bool = False) -> LoadedModel:
    """Load a run (its newest checkpoint that verifies, or the one of `step`) or the folder of an export.

    Args:
        ema: the moving average of a run's weights in their place; an export holds one kind of weights only.

    Raises:
        ConfigurationError: there is no such run, export or checkpoint, or the checkpoint holds no average.
        DamagedCheckpointError: the checkpoint's bytes are not those of its manifest.
    """
    if (Path(target) / "config.json").is_file():
        return _load_export(Path(target))
    run = find_run(target)
    config = run.config()
    tokenizer_model = run.data_folder() / "tokenizer" / "tokenizer.model"
    recorded = run.resolved()["data"]["tokenizer"]
    found = digest_file(tokenizer_model) if tokenizer_model.is_file() else "none: no such file"
    if recorded != found:
        raise ConfigurationError(
            "the tokenizer is not the one that the run was trained with",
            got=f"{tokenizer_model} has the digest {found}, the run recorded {recorded}",
            rule="a model is used with the tokenizer of its training data",
            remedy="restore the data folder that the run was trained on",
        )
    if step is None:
        newest = newest_verified(run.checkpoints, [ResumeFact(*fact) for fact in run.journal.resumes()])
        if newest is None:
            raise ConfigurationError(
                "the run has no checkpoint yet",
                got=f"{run.checkpoints} holds none that verifies",
                rule="a model is read from a verified checkpoint",
                remedy="train it first, with its configuration and overrides",
            )
        step = newest.step
    folder = run.checkpoints / folder_name(step)
    if not folder.is_dir():
        raise ConfigurationError(
            "the run has no checkpoint of that step",
            got=f"{folder} does not exist",
            rule="a step at which a checkpoint was written and kept",
            remedy=f"list them: solomonov checkpoints list {run.path}",
        )
    reader = CheckpointReader.open(folder)
    reader.verify()
    if ema and EMA not in reader.kinds():
        raise ConfigurationError(
            "the checkpoint holds no average of the weights",
            got=f"{folder}, which holds {', '.join(reader.kinds())}",
            rule="a run keeps one from when training.ema_decay is set",
            remedy="leave out --ema, or set training.ema_decay and train on",
        )
    kind = EMA if ema else "master"
    state = {name: reader.read_tensor(name, kind) for name in reader.names(kind)}
    return LoadedModel(
        config=config.model,
        state=state,
        vocab_size=state["embedding.weight" if config.model.reads_tokens else "head.weight"].shape[0],
        tokenizer_model=tokenizer_model,
        sequence_tokens=config.data.sequence_tokens,
        step=step,
        source=folder,
        run=run,
    )


def _load_export(folder: Path) -> LoadedModel:
    if not (folder / EXPORT_MARKER).is_file():
        raise ConfigurationError(
            f"{folder} is not an export of ours",
            got=f"no {EXPORT_MARKER} in it",
            rule="text is read with the tokenizer of the model's training, which only an export has beside the weights",
            remedy="name a run, or a folder that `solomonov export` wrote",
        )
    config, state, sequence_tokens = load_hf(folder)
    return LoadedModel(
        config=config,
        state=state,
        vocab_size=state["embedding.weight"].shape[0],
        tokenizer_model=folder / "tokenizer.model",
        sequence_tokens=sequence_tokens,
        step=None,
        source=folder,
        run=None,
    )
