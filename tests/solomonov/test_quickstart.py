"""The quickstart's text, screen and memory gauge; the whole of it on a small corpus, with a training that is short."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from solomonov import exits, quickstart
from solomonov.config import load_config, parse_config
from solomonov.errors import ConfigurationError
from solomonov.proof import Proof
from solomonov.quickstart import HalfwayKill, PeakMemory, configuration, proof_lines, proportional_bytes, show
from solomonov.runfolder import RunFolder
from tests.support.corpus import write_texts
from tests.support.processes import Program, wait_for
from tests.support.runs import model_state, write_checkpoint, write_record
from tests.support.user import CONFIG

MIB = 2**20


class Looks:
    """Stands for the pauses between two looks: something happens in each; after the last one it is over."""

    def __init__(self, *happenings: Callable[[], Any]) -> None:
        self.left = list(happenings)

    def wait(self, seconds: float) -> bool:
        if not self.left:
            return True
        self.left.pop(0)()
        return False


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


# As above, in two processes that share it.
SHARE = "import os; data = b'x' * (300 << 20); os.fork(); print('grown', flush=True); import signal; signal.pause()"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell what is shared")
def test_what_two_processes_share_is_counted_once(tmp_path: Path) -> None:
    with Program([sys.executable, "-c", SHARE], log=tmp_path / "log.txt") as program:
        program.wait_for(lambda: program.output().count("grown") == 2, deadline=60, what="300 MiB in both")
        parent = psutil.Process(program.pid)
        both = sum(proportional_bytes(process) for process in (parent, *parent.children()))
    assert 300 * MIB <= both <= 400 * MIB


def test_the_peak_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge, sizes = PeakMemory(), [0]
    monkeypatch.setattr(
        quickstart, "proportional_bytes", lambda process: sizes[-1] if process.pid == os.getpid() else 0
    )
    gauge._over = Looks(lambda: sizes.append(300), lambda: sizes.append(100))  # type: ignore[assignment]
    gauge._sample()
    assert gauge.bytes == 300


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digests_equal": 239}, "239 of 240 data digests"),
        ({"lost": 16, "repeated": 8}, "3,840 trained, 16 lost, 8 repeated"),
        ({"exact": False}, "same rows, losses within the bound"),
        ({"differences": ["step 81: loss: 1.0 before, 2.0 now"]}, "1 differences: ['step 81: loss: 1.0 before"),
    ],
    ids=["digests", "rows", "another layout", "differences"],
)
def test_what_a_record_does_not_prove_is_told(changes: dict[str, Any], words: str) -> None:
    text = " ".join(sentence for _, sentence in proof_lines({**SUMMARY["proof"], **changes}))
    assert words in text
    assert ("to the bit" in text) == (not changes.keys() & {"exact", "differences"})


# --- kill ----------------------------------------------------------------------------------------------------

PIDS = [2**22 + 1, 2**22 + 2]  # larger than any that Linux gives: nobody's


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Signals are noted, not sent."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    return found


def trains(run: RunFolder, attempt: int) -> Callable[[], None]:
    """Two ranks are started and train."""

    def happens() -> None:
        run.journal.write("attempt_started", attempt=attempt, pids=PIDS)
        run.journal.write("resumed", attempt=attempt, step=0)

    return happens


def done(run: RunFolder, step: int) -> Callable[[], Any]:
    """A step is done."""
    return lambda: run.metrics.write_text(json.dumps({"step": step}) + "\n")


def watch(run: RunFolder, *happenings: Callable[[], Any]) -> None:
    """The kill after step 5, while all this happens."""
    kill = HalfwayKill(run, 5, Console(file=io.StringIO()))
    kill._over = Looks(*happenings)  # type: ignore[assignment]
    kill._watch()


def test_the_last_rank_is_killed_once_when_the_step_is_done(tmp_path: Path, killed: list[tuple[int, int]]) -> None:
    run = RunFolder(tmp_path)
    watch(run, lambda: None, trains(run, 1), done(run, 4))
    assert not killed, "the step is not done"
    watch(run, trains(run, 2), done(run, 5), done(run, 6))
    assert killed == [(PIDS[1], signal.SIGKILL)]
    [event] = run.journal.events("kill_injected")
    assert (event["rank"], event["victim"], event["step"]) == (1, PIDS[1], 5)
    watch(run, trains(run, 3), done(run, 7))
    assert len(killed) == 1, "once in the life of a run"


def test_ranks_of_an_earlier_life_are_not_killed(tmp_path: Path, killed: list[tuple[int, int]]) -> None:
    """Their numbers may be those of strangers now."""
    run = RunFolder(tmp_path)
    trains(run, 1)()
    done(run, 9)()
    watch(run, lambda: None)
    assert not killed
    watch(run, lambda: None, trains(run, 2))
    assert len(killed) == 1


def test_a_kill_is_in_the_journal_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that is interrupted right there is followed by a second one."""
    run, before = RunFolder(tmp_path), []
    monkeypatch.setattr(os, "kill", lambda pid, number: before.append(run.journal.last("kill_injected")))
    watch(run, trains(run, 1), done(run, 5))
    assert [event["victim"] for event in before] == [PIDS[1]]


def test_a_kill_is_told_over_the_progress_bar(tmp_path: Path, killed: list[tuple[int, int]]) -> None:
    """And without signs for terminals where there is none."""
    for terminal, before in ((True, "\r\x1b[2K"), (False, "")):
        run, shown = RunFolder(tmp_path / str(terminal)), io.StringIO()
        run.path.mkdir()
        trains(run, 1)()
        HalfwayKill(run, 5, Console(file=shown, force_terminal=terminal, highlight=False))._strike(5)
        assert shown.getvalue() == f"{before}kill    SIGKILL to rank 1 (process {PIDS[1]}) at step 5, on purpose\n"
    assert len(killed) == 2


def test_a_rank_that_has_just_ended_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError(pid)

    monkeypatch.setattr(os, "kill", gone)
    run = RunFolder(tmp_path)
    watch(run, trains(run, 1), done(run, 5))
    assert run.journal.last("kill_injected")


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


@pytest.fixture
def sketched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Preparation, training's facts and the use of the model are given; what preparation was told."""
    told: list[Any] = []

    def prepared(config_path: Path, ray_address: str | None) -> dict[str, int]:
        told.append(ray_address)
        return dict(SUMMARY["prepared"])

    used = {name: SUMMARY[name] for name in ("evaluation", "export", "sample")}
    monkeypatch.setattr(quickstart, "_prepare", prepared)
    monkeypatch.setattr(quickstart, "_use", lambda console, run, seconds: used)
    monkeypatch.setattr(quickstart, "_training_facts", lambda run: SUMMARY["training"])
    monkeypatch.setattr(quickstart, "configuration", lambda folder, ray: small(folder, ray=False))
    monkeypatch.chdir(tmp_path)
    return told


@pytest.mark.parametrize(("proof", "code"), [(Proof(lost=8), exits.DAMAGED), (Proof(), exits.DONE)])
def test_a_record_that_proves_nothing_is_no_good_end(
    proof: Proof, code: int, sketched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "ray_problem", lambda: "none here")
    monkeypatch.setattr(quickstart, "prove_record", lambda run: proof)
    for _ in range(2):
        assert quickstart.quickstart(Path("place"), train=lambda path, ray: exits.DONE, **HOW) == code
        assert f"{proof.lost} lost" in capsys.readouterr().out
    assert sketched == [None], "the second time it is only shown"


def test_a_ray_is_for_preparation_and_training(sketched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "ray_problem", lambda: None)
    monkeypatch.setattr(quickstart, "prove_record", lambda run: Proof())
    cluster = SimpleNamespace(address="127.0.0.2:1", dashboard_url=None)
    begun: list[Any] = []

    @contextlib.contextmanager
    def start(cpus: int) -> Iterator[Any]:
        begun.append(cpus)
        yield cluster
        begun.append("ended")

    def train(path: Path, ray: Any = None) -> int:
        begun.append(ray)
        return exits.DONE

    assert quickstart.quickstart(Path("place"), train=train, start_ray=start, kill=False) == exits.DONE
    assert begun == [2, cluster, "ended"], "a CPU for each of two data workers"
    assert sketched == ["127.0.0.2:1"]


@pytest.mark.parametrize("kill", [False, True])
def test_a_rank_is_killed_where_that_is_wanted(
    kill: bool, sketched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[int] = []

    def arm(run: RunFolder, step: int, console: Console) -> Any:
        armed.append(step)
        return contextlib.nullcontext()

    monkeypatch.setattr(quickstart, "HalfwayKill", arm)
    monkeypatch.setattr(quickstart, "ray_problem", lambda: "none here")
    monkeypatch.setattr(quickstart, "prove_record", lambda run: Proof())
    how: dict[str, Any] = {**HOW, "kill": kill}
    assert quickstart.quickstart(Path("place"), train=lambda path, ray: exits.DONE, **how) == exits.DONE
    assert armed == ([31] if kill else []), "after the middle of 60 steps, and some steps after a checkpoint"


def test_where_there_is_no_ray_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in str(quickstart.ray_problem())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "platform", "linux")
    assert quickstart.ray_problem() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in str(quickstart.ray_problem())


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with contextlib.chdir(tmp_path), pytest.raises(ConfigurationError, match="cannot be written"):
        quickstart.quickstart(Path("file/below"), train=short_training, **HOW)
