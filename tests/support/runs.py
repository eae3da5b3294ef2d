"""Runs for tests in one process: a prepared data set, and a run folder with checkpoints that no training wrote."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.build import prepare
from data_pipeline.dataset import Dataset
from solomonov.checkpoint import store
from solomonov.checkpoint.fragments import whole
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.config import Loaded, load_config
from solomonov.model.transformer import Transformer
from solomonov.runfolder import RunFolder
from solomonov.start import make_stream, prepare_run
from tests.support.user import User

State = dict[str, torch.Tensor]


def prepared_user(folder: Path, *overrides: str) -> User:
    """A user's folder with text, a configuration and the prepared data set."""
    user = User.begin(folder)
    config = load(user, *overrides).config
    prepare(config.data, config.tokenizer, base_folder=user.folder, show_progress=False)
    return user


def load(user: User, *overrides: str) -> Loaded:
    """The user's configuration."""
    return load_config(user.folder / "own.yaml", overrides)


def begin_run(user: User, *overrides: str, ranks: int = 1) -> RunFolder:
    """The run folder as `solomonov train` makes it before it starts the ranks; its path is absolute."""
    with contextlib.chdir(user.folder):
        made = prepare_run(load(user, *overrides), ranks_per_node=ranks, launch={"ranks_per_node": ranks})
        made.write()
        return RunFolder(made.run.path.resolve())


def model_state(run: RunFolder, seed: int) -> State:
    """Weights far from their initial values, drawn from the seed."""
    config = run.config()
    model = Transformer(config.model, config.tokenizer.vocab_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.detach() + torch.randn(value.shape, generator=generator) * 0.1
        for name, value in model.named_parameters()
    }


def write_record(run: RunFolder, steps: int) -> list[dict[str, Any]]:
    """metrics.jsonl as a run of so many steps leaves it: true digests, falling losses."""
    config = run.config()
    batch = config.training.global_batch_tokens // config.data.sequence_tokens
    lines = []
    with Dataset.open(run.data_folder()) as dataset:
        stream = make_stream(config, dataset)
        for step in range(1, steps + 1):
            digest = stream.rows(list(range((step - 1) * batch, step * batch))).digest()
            numbers = {"loss": 6.0 / step, "grad_norm": 1.0 / step, "lr": 0.001, "tokens": 100 * step}
            lines.append({"step": step, **numbers, "skipped": False, "data_digest": f"{digest:016x}", "seconds": 0.1})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_checkpoint(run: RunFolder, step: int, state: State, average: State | None = None) -> Path:
    """A checkpoint of these masters, and of their average if there is one, as one rank writes it."""
    kinds = {"master": state} | ({"ema": average} if average else {})
    tensors = {(name, kind): tensor for kind, of_kind in kinds.items() for name, tensor in of_kind.items()}
    tmp = run.checkpoints / store.temporary_name(step, 1)
    tmp.mkdir()
    entry = write_rank_file(tmp, 0, [whole(name, kind, tensor) for (name, kind), tensor in tensors.items()])
    expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    header = Header(run_id=run.run_id(), step=step, attempt=1, scalars={"optimizer_step": step}, state={"step": step})
    return commit(
        tmp, run.checkpoints / store.folder_name(step), entries=[entry], expected=expected, header=header
    ).folder


def begun_user(prepared: User, folder: Path) -> tuple[User, RunFolder]:
    """A copy of the prepared folder with a run that has checkpoints of steps 3 and 6."""
    user = prepared.copy(folder)
    run = begin_run(user)
    for step in (3, 6):
        write_checkpoint(run, step, model_state(run, step))
    return user, run
