"""The certificate of layouts: made by real ranks with and without a planted fault, as a table and as a file."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from solomonov import commands, exits
from solomonov.certificate import AXES, RANK_MODULE, VERDICTS, check_target, config_digest, lines, prove_layouts
from solomonov.cli import run_module
from solomonov.config import Config, flatten, parse_config
from solomonov.errors import ConfigurationError, SolomonovError
from tests.solomonov.test_equivalence_rank import CONFIG
from tests.support.faulty_rank import FAULTY
from tests.support.processes import ROOT

pytestmark = pytest.mark.timeout(600)


def config(*overrides: str) -> Config:
    return parse_config(CONFIG, overrides, where="here").config


def faulty(module: Sequence[str], ranks: int, logs: Path) -> str:
    """`run_module` with ranks that have faults."""
    assert module[0] == RANK_MODULE
    return run_module(("tests.support.faulty_rank", *module[1:]), ranks, logs)


@pytest.fixture
def ranks_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.spare
def test_a_fault_and_a_death_are_told_and_the_rest_is_proven(
    ranks_find_the_tests: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the body of the command: it leaves with 1, says what differs, and writes the file all the same."""
    path, told = tmp_path / "certificate.json", tmp_path / "certificate.md"
    options = Namespace(ranks=1, all=False, keep=None, to=[str(path), str(told)], json=True)
    assert commands.prove(options, config(), faulty) == exits.DIFFERS == 1
    certificate = json.loads(path.read_text())
    shown = capsys.readouterr()
    assert json.loads(shown.out) == certificate
    said = [line for line in shown.err.splitlines() if line.startswith("1 rank: ")]
    assert not certificate["holds"]
    dead = 0
    for item in certificate["cases"]:
        case = item["case"]
        if case["zero_stage"] == 2 and case["precision"] == "fp32":
            assert item["verdict"] == "differs"
            assert item["parts"].startswith(f"layers.1, by the gradient of {FAULTY} in step 1: 1.0e-03")
        elif case["zero_stage"] == 3 and case["accumulation"] == 1:
            assert item["verdict"] == "did not run"
            assert "rank 0" in item["problem"]
            assert "out of luck" in item["problem"]
            dead += 1
        else:
            assert item["verdict"] in ("equal", "within bound"), item
    assert dead
    assert len(said) == 1 + dead, "after each death the rest ran in new processes"
    text = "\n".join(lines(certificate))
    assert "parts first in layers.1" in text
    assert text.splitlines()[-1].startswith("verdict     does not hold: ")
    check_page(told.read_text(), certificate)


def check_page(text: str, certificate: dict[str, Any]) -> None:
    """A row for all that differ in accumulation and recomputation alone, with what is worst among them."""
    assert text.startswith("# Layouts of `proven`: does not hold: ")
    assert str(certificate["source"].get("commit", "no checkout")) in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, rows = rows[0], rows[1:]
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert sum(int(row["layouts"]) for row in found) == len(certificate["cases"])
    for row in found:
        items = [
            item
            for item in certificate["cases"]
            if [str(item["case"][axis]) for axis in AXES] == [row[name] for name in head[: len(AXES)]]
        ]
        assert int(row["layouts"]) == len(items)
        losses = [item["loss"] for item in items if item["loss"] is not None]
        if losses:
            assert float(row["loss"]) == pytest.approx(max(losses), rel=0.05)
        else:
            assert row["loss"] == "-"
        verdicts = {item["verdict"] for item in items}
        assert row["verdict"] == next(name for name in reversed(VERDICTS) if name in verdicts)
    assert {row["verdict"] for row in found} >= {"differs", "did not run", "within bound"}
    assert "parts first in layers.1" in text
    assert "out of luck" in text


@pytest.mark.spare
def test_an_interrupted_proof_goes_on(tmp_path: Path) -> None:
    """The first command is interrupted behind some layouts; the second one runs the others, and the third none."""
    folder = tmp_path / "proofs" / "kept"
    ran: list[list[int]] = []

    def interrupted(module: Sequence[str], ranks: int, logs: Path) -> str:
        path = Path(module[1]) / module[2]
        listed = json.loads(path.read_text())
        ran.append([number for number, _ in listed])
        if len(ran) > 1:
            return run_module(module, ranks, logs)
        path.write_text(json.dumps(listed[:3]))
        run_module(module, ranks, logs)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove_layouts(config(), 1, interrupted, lambda line: None, keep=folder)
    first = prove_layouts(config(), 1, interrupted, lambda line: None, keep=folder)
    again = prove_layouts(config(), 1, interrupted, lambda line: None, keep=folder)
    every = list(range(len(first["cases"]) + 1))
    assert ran == [every, every[3:]]
    assert first == again
    assert first["holds"]
    with pytest.raises(ConfigurationError, match="holds something else") as caught:
        prove_layouts(config("optimizer.lr=0.004"), 1, interrupted, lambda line: None, keep=folder)
    assert "of another trial" in caught.value.got
    with pytest.raises(ConfigurationError, match="holds something else") as caught:
        prove_layouts(config(), 1, interrupted, lambda line: None, keep=tmp_path)
    assert "without a proof" in caught.value.got


def test_without_its_reference_nothing_is_proven() -> None:
    def broken(module: Sequence[str], ranks: int, logs: Path) -> str:
        return run_module((*module[:2], "no-such-list.json"), ranks, logs)

    with pytest.raises(SolomonovError, match="the reference did not run") as caught:
        prove_layouts(config(), 1, only_once(broken), lambda line: None)
    assert "no-such-list.json" in caught.value.got


def only_once(start: Any) -> Any:
    """The reference fails as it does; the rest is not waited for."""
    ended: list[str] = []

    def started(module: Sequence[str], ranks: int, logs: Path) -> str:
        if not ended:
            ended.append(start(module, ranks, logs))
        return ended[0]

    return started


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        prove_layouts(config(), 17, run_module, lambda line: None)
    assert caught.value.got == "--ranks 17"


def test_the_digest_is_of_all_values() -> None:
    first = config_digest(flatten(config()))
    assert first == config_digest(flatten(config()))
    assert first != config_digest(flatten(config("optimizer.lr=0.004")))


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_target(tmp_path / "new.json")
    (tmp_path / "old.json").write_text("{}")
    check_target(tmp_path / "old.json")
    for wrong in (tmp_path, tmp_path / "missing" / "a.json"):
        with pytest.raises(ConfigurationError, match="cannot be written") as caught:
            check_target(wrong)
        assert str(wrong) in caught.value.got
