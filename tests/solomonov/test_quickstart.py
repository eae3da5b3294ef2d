"""The quickstart's text, screen and memory gauge; the whole of it on a small corpus, with a training that is short."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from solomonov import exits, quickstart
from solomonov.config import load_config, parse_config
from solomonov.errors import ConfigurationError
from solomonov.quickstart import PeakMemory, configuration, proportional_bytes, show
from solomonov.runfolder import RunFolder
from tests.support.corpus import write_texts
from tests.support.processes import Program, wait_for
from tests.support.runs import model_state, write_checkpoint, write_record
from tests.support.user import CONFIG

MIB = 2**20


# --- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "ranks", "ray"), [(0, 2, True), (1, 1, True), (8, 1, False)])
def test_the_text_is_a_configuration_for_this_machine(
    gpus: int, ranks: int, ray: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "visible_gpus", lambda: gpus)
    text = configuration(tmp_path / "place", ray=ray)
    loaded = parse_config(text, (), where="quickstart")
    assert loaded.launch == {"ranks_per_node": ranks}
    assert loaded.config.run.folder == str(tmp_path / "place/runs")
    assert loaded.config.data.folder == str(tmp_path / "place/dataset")
    [source] = loaded.config.data.sources
    assert source.path == f"{sysconfig.get_path('stdlib')}/**/*.py"
    data = loaded.config.data
    assert (data.prepare.backend, data.workers.backend) == (("ray", "ray") if ray else ("local", "inline"))
    places = {"FOLDER", "STDLIB", "RANKS", "PREPARE", "WORKERS"}
    assert not places & set(re.split(r"[/ ,}]", text)), "a place was not filled in"
    assert configuration(tmp_path / "place", ray=ray) == text


# --- memory --------------------------------------------------------------------------------------------------

# Allocates and touches 300 MiB, and lives until it is killed.
GROW = "data = b'x' * (300 << 20); print('grown', flush=True); import signal; signal.pause()"


def test_the_memory_of_a_child_s_child_is_counted_whole_and_once(tmp_path: Path) -> None:
    argv = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, GROW]
    with PeakMemory() as gauge:
        wait_for(lambda: gauge.bytes, deadline=60, what="the first sample")
        before = gauge.bytes
        with Program(argv, log=tmp_path / "log.txt") as program:
            program.wait_for(lambda: "grown" in program.output(), deadline=60, what="300 MiB")
            wait_for(lambda: gauge.bytes >= before + 290 * MIB, deadline=60, what="a sample with the child")
            [child] = psutil.Process(program.pid).children()
            alone = proportional_bytes(child)
        peak = gauge.bytes
    assert 300 * MIB <= alone <= 400 * MIB
    assert peak <= before + 500 * MIB, "shared memory was counted more than once"
    assert gauge.bytes >= peak, "a peak never falls"
    assert not gauge._thread.is_alive()


# --- screen --------------------------------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "prepared": {"documents": 1234, "text_bytes": 5999999, "tokens": 1765432, "pieces": 4096, "shards": 2},
    "training": {
        "steps": 240,
        "first_loss": 8.25,
        "last_loss": 3.5,
        "tokens": 983040,
        "ranks": 2,
        "parameters": 4191552,
    },
    "evaluation": {
        "bits_per_byte": 1.75,
        "gzip_bits_per_byte": 2.25,
        "xz_bits_per_byte": 2.125,
        "text_bytes": 199999,
    },
    "export": "a/runs/own/exports/step-00000240",
    "sample": "def read_lines(path):\n    return [bold]x[/]\n",
    "seconds": {"prepare": 20.0, "train": 100.4},
    "peak_memory_bytes": 3 * 2**30,
    "proof": {
        "steps": 240,
        "rows": 3840,
        "lost": 0,
        "repeated": 0,
        "digests_equal": 240,
        "replayed": [81, 82],
        "exact": True,
        "differences": [],
        "kills": [{"rank": 1, "step": 130, "resumed": 120, "seconds": 11.7}],
        "columns": [{"step": 82, "data_digest": "a" * 16, "order": "a" * 16, "before": 3.25, "after": 3.25}],
    },
}


def test_the_summary_stands_on_one_screen() -> None:
    screen = io.StringIO()
    show(Console(file=screen, width=120, highlight=False), SUMMARY, Path("a"), RunFolder(Path("a/runs/own")))
    text = screen.getvalue()
    for words in (
        "1,234 documents, 5,999,999 bytes of Python source -> 1,765,432 tokens of 4,096 pieces, in 2 WebDataset shards",
        "4,191,552 parameters, 240 updates, 983,040 predicted tokens on 2 DeepSpeed rank(s)",
        "8.250 -> 3.500 nats a token",
        "3,840 trained, 0 lost, 0 repeated; 240 of 240 data digests equal those of the order function",
        "rank 1 at step 130; went on from the verified checkpoint of step 120, 12 s later",
        "steps 81-82 were trained twice: same rows, and same losses to the bit",
        "82 aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa 3.25 3.25",
        "1.750 bits a byte; gzip -9 2.250, xz -9 2.125 on the same 199,999 bytes",
        "120 s (prepare 20 s, train 100 s)",
        "3.00 GiB",
        "a/runs/own/exports/step-00000240",
        "return [bold]x[/]",
        "train a/config.yaml run.name=longer",
    ):
        assert " ".join(words.split()) in " ".join(text.split()), words
    assert len(text.splitlines()) <= 40


# --- the whole of it -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_ray(cpus: int) -> Iterator[Any]:
    """Where there is none, none is started."""
    raise AssertionError("a Ray was started")
    yield


def small(folder: Path, *, ray: bool) -> str:
    """The configuration of the tests' user, in the quickstart's folder."""
    assert not ray
    text = CONFIG.replace("folder: dataset", f"folder: {folder}/dataset")
    text = text.replace("seed: 5", f"seed: 5, folder: {folder}/runs")
    return text.replace('path: "text/', f'path: "{folder}/text/')


def short_training(config_path: Path, ray: Any = None) -> int:
    """What training leaves: the record, two steps and the checkpoint of the second."""
    from solomonov.start import prepare_run

    assert ray is None
    made = prepare_run(load_config(config_path), ranks_per_node=1, launch={})
    made.write()
    run = RunFolder(made.run.path)
    write_record(run, 2)
    write_checkpoint(run, 2, model_state(run, 2))
    return exits.DONE


HOW: dict[str, Any] = {"start_ray": no_ray, "kill": False}


def test_a_whole_life_and_its_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "configuration", small)
    monkeypatch.setattr(quickstart, "ray_problem", lambda: "pip install 'x[ray]'")
    folder = Path("place")
    write_texts(folder / "text")
    assert quickstart.quickstart(folder, train=lambda path, ray: exits.AGAIN, **HOW) == exits.AGAIN
    assert not (folder / "summary.json").exists(), "an end that is not good is not the end"
    assert quickstart.quickstart(folder, train=short_training, **HOW) == exits.DONE
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["training"]["steps"] == 2
    assert (summary["training"]["first_loss"], summary["training"]["last_loss"]) == (6.0, 3.0)
    assert summary["training"]["tokens"] == 300
    assert (Path(summary["export"]) / "config.json").exists()
    assert summary["sample"].startswith(quickstart.PROMPT)
    assert set(summary["seconds"]) == {"prepare", "train", "prove", "evaluate", "export", "generate"}
    assert summary["proof"]["rows"] == 16
    first = capsys.readouterr().out
    assert "without Ray (pip install 'x[ray]'): prepared by a pool of processes, rows built inline" in first
    assert "all of it is done" not in first

    def never(path: Path, ray: Any = None) -> int:
        raise AssertionError("nothing is to be trained again")

    assert quickstart.quickstart(folder, train=never, **HOW) == exits.DONE
    second = capsys.readouterr().out
    assert "place: all of it is done; remove the folder to begin anew" in second
    assert f"{summary['evaluation']['bits_per_byte']:.3f} bits a byte" in second


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with contextlib.chdir(tmp_path), pytest.raises(ConfigurationError, match="cannot be written"):
        quickstart.quickstart(Path("file/below"), train=short_training, **HOW)
