"""Committed numbers: 20 steps of a tiny run on one and on two ranks, and the digests of the initial parameters.

Data digests and initial parameters are equal to the bit everywhere. Losses and gradient norms are equal to the bit
with the versions and the processor that the file names, and within 1e-5 elsewhere. `pytest --update-golden` writes the
files anew; a change of theirs is a change of the product and stands in the changelog.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash

from solomonov.host import cpu_model, versions
from solomonov.model.transformer import Transformer
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny_run import lines_of, make_run, train_run

pytestmark = pytest.mark.golden
FOLDER = Path(__file__).parent


def header() -> str:
    found = versions()
    return f"# torch {found['torch']}, deepspeed {found['deepspeed']}, {cpu_model()}"


def compare(name: str, lines: list[str], update: bool) -> list[str]:
    """The committed lines after the header; with --update-golden, the given ones after they were written."""
    path = FOLDER / name
    if update:
        path.write_text("\n".join([header(), *lines]) + "\n")
    return path.read_text().splitlines()


@pytest.mark.parametrize("world", [1, 2])
def test_losses(world: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = make_run(tmp_path, ranks=world, overrides=("model.attention.preset=rope",))
    assert set(run_ranks(train_run, world, run.path, timeout=180)) == {0}
    lines = [
        f"{line['step']} {line['loss']!r} {line['grad_norm']!r} {line['tokens']} {line['data_digest']}"
        for line in lines_of(run)
    ]
    first, *committed = compare(f"tiny_cpu_{world}.txt", lines, request.config.getoption("--update-golden"))
    assert len(lines) == len(committed) == 20
    exact = first == header()
    for new, old in zip(lines, committed, strict=True):
        step, loss, norm, tokens, digest = new.split()
        old_step, old_loss, old_norm, old_tokens, old_digest = old.split()
        assert (step, tokens, digest) == (old_step, old_tokens, old_digest)
        bound = 0.0 if exact else 1e-5
        assert float(loss) == pytest.approx(float(old_loss), rel=bound, abs=0), f"loss of step {step}"
        assert float(norm) == pytest.approx(float(old_norm), rel=bound, abs=0), f"gradient norm of step {step}"


def test_initial_parameters(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(99)  # the global generator must not matter
    model = Transformer(tiny.tiny_model(), tiny.VOCAB, seed=tiny.SEED)
    lines = [
        f"{name} {xxhash.xxh3_128_hexdigest(parameter.detach().numpy().tobytes())}"
        for name, parameter in sorted(model.named_parameters())
    ]
    committed = compare("initial_parameters.txt", lines, request.config.getoption("--update-golden"))
    assert lines == committed[1:]
