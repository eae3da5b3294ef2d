"""The README's commands do what it says: every console line is run, in order, as it stands there.

`make quickstart` installs and runs `solomonov quickstart`; the installation is what made this very environment, so the
command is run here. `make test` is this suite. Training on one's own data is cut to two updates.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

from solomonov import exits
from solomonov.runfolder import RunFolder
from tests.support.processes import ROOT, Program, assert_no_process, program_environment, run_program

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


def interrupt(folder: Path, moment: str, code: int) -> None:
    """Ctrl-C, once `moment` is on the quickstart's screen: nothing that it started is left, of Ray neither."""
    command = [sys.executable, "-m", "solomonov.cli", "quickstart"]
    log = folder / f"{code}-{moment.split()[0]}.log"
    with Program(command, log=log, cwd=folder, env=program_environment()) as program:
        program.wait_for(lambda: moment in program.output(), deadline=200, what=moment)
        of_it = psutil.Process(program.pid)
        started = program.wait_for(lambda: of_it.children(recursive=True), deadline=60, what="a child")
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        assert program.wait(deadline=120) == code, program.output()
    left = [process for process in started if process.is_running()]
    assert not left, f"after Ctrl-C at {moment!r}: {left}"
    assert_no_process("sol-ray-", folder)


@pytest.mark.ray
def test_the_two_commands(tmp_path: Path) -> None:
    assert console_lines("# Solomonov") == [["make", "quickstart"], ["make", "test"]]
    assert "solomonov quickstart" in (ROOT / "Makefile").read_text()
    interrupt(tmp_path, "ray  $", exits.INTERRUPTED)
    interrupt(tmp_path, "prepare  $", exits.INTERRUPTED)
    interrupt(tmp_path, "step    1", exits.AGAIN)
    output = run(["quickstart"], tmp_path)
    shown = README[README.index("make test ") :]
    names = "data|model|training loss|rows|kill -9|replay|held-out text|cost|peak memory|run|export"
    labels = re.findall(rf"^({names})  ", shown, re.MULTILINE)
    assert len(set(labels)) == 11, "the README shows the whole summary"
    for label in set(labels):
        assert re.search(rf"^{label}  ", output, re.MULTILINE), f"the summary has no line {label!r}:\n{output}"
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    evaluation = summary["evaluation"]
    assert evaluation["bits_per_byte"] < evaluation["xz_bits_per_byte"] < evaluation["gzip_bits_per_byte"]
    assert summary["peak_memory_bytes"] < 8 * 2**30
    proof = summary["proof"]
    assert (proof["lost"], proof["repeated"], proof["differences"]) == (0, 0, [])
    assert (proof["steps"], proof["digests_equal"]) == (96, 96)
    assert len(proof["kills"]) == 1, "half-way, and once, however often it was interrupted before"
    assert 0 < proof["kills"][0]["resumed"] < proof["kills"][0]["step"]
    assert proof["replayed"]
    run_folder = RunFolder(tmp_path / "quickstart/runs/stdlib")
    assert {event["rank"] for event in run_folder.journal.events("data_served")} == {0, 1}
    assert not list(run_folder.journal.events("fallback"))
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
