"""The README's commands do what it says: every console line is run, in order, as it stands there.

`make quickstart` installs and runs `solomonov quickstart`; the installation is what made this very environment, so the
command is run here. `make test` is this suite. Training on one's own data is cut to two updates.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.processes import ROOT, assert_no_process, program_environment, run_program

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = {"train": ["training.total_steps=2", "schedule.warmup_steps=1"], "evaluate": ["--max-bytes", "20000"]}


def console_lines(after: str) -> list[list[str]]:
    """The commands of the first console block behind a heading or sentence."""
    block = re.search(r"```console\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert block, f"no console block behind {after!r}"
    return [shlex.split(line[2:], comments=True) for line in block[1].splitlines() if line.startswith("$ ")]


def run(words: list[str], folder: Path, deadline: float = 900) -> str:
    code, output = run_program(
        [sys.executable, "-m", "solomonov.cli", *words],
        log=folder / f"{words[0]}.log",
        deadline=deadline,
        cwd=folder,
        env=program_environment(),
    )
    assert code == 0, f"{words} ended with {code}:\n{output}"
    return output


def test_the_two_commands(tmp_path: Path) -> None:
    assert console_lines("# Solomonov") == [["make", "quickstart"], ["make", "test"]]
    assert "solomonov quickstart" in (ROOT / "Makefile").read_text()
    output = run(["quickstart"], tmp_path)
    shown = README[README.index("make test ") :]
    labels = re.findall(r"^(data|model|training loss|held-out text|cost|peak memory|run|export)  ", shown, re.MULTILINE)
    assert len(set(labels)) == 8, "the README shows the whole summary"
    for label in set(labels):
        assert re.search(rf"^{label}  ", output, re.MULTILINE), f"the summary has no line {label!r}:\n{output}"
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    evaluation = summary["evaluation"]
    assert evaluation["bits_per_byte"] < evaluation["xz_bits_per_byte"] < evaluation["gzip_bits_per_byte"]
    assert summary["peak_memory_bytes"] < 6 * 2**30
    assert summary["training"]["ranks"] in (1, 2)
    assert_no_process(str(tmp_path))
    again = run(["quickstart"], tmp_path, deadline=60)
    assert "all of it is done" in again
    export = next((tmp_path / "quickstart").glob("runs/stdlib/exports/step-*"))
    assert_loads_in_transformers(export)


def assert_loads_in_transformers(export: Path) -> None:
    """The exported folder is what a user of transformers expects."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer("import os\n", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[:2] == ids.shape
    assert bool(torch.isfinite(logits).all())


def test_ones_own_data_in_five_lines(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "text").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        shutil.copyfile(path, tmp_path / "text" / f"{path.stem}.txt")
    commands = console_lines("## Your own data")
    assert [words[1] for words in commands] == ["prepare", "train", "evaluate", "export", "generate"]
    for program, verb, *words in commands:
        assert program == "solomonov"
        output = run([verb, *words, *SHORTER.get(verb, [])], tmp_path)
        if verb == "generate":
            assert output.startswith("It was")
    export = next((tmp_path / "runs" / "own-text" / "exports").glob("step-*"))
    assert_loads_in_transformers(export)
