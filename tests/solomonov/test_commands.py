"""The commands on a real run folder: what they print, as JSON and for people, against the files themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from solomonov import doctor, exits
from solomonov.checkpoint.reader import digest
from solomonov.cli import main
from solomonov.evaluate import evaluate
from solomonov.loading import load_model
from solomonov.runfolder import RunFolder, run_lock
from tests.solomonov.checkpoint.common import flip
from tests.support.runs import model_state, write_checkpoint
from tests.support.user import User

Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *words: str, code: int = exits.DONE) -> list[dict[str, Any]]:
    """Run a command with --json; its lines."""
    assert main([*words, "--json"]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: Capture, *words: str, code: int = exits.CONFIGURATION) -> str:
    """The message of a command that is refused."""
    assert main([*words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# --- prepare -------------------------------------------------------------------------------------------------


def test_prepare_says_what_was_made_and_does_nothing_twice(user: User, capsys: Capture) -> None:
    [first] = answer(capsys, "prepare", "own.yaml")
    manifest = json.loads((user.folder / "dataset/MANIFEST.json").read_text())
    assert first["lanes"] == str(manifest["lanes"])
    assert first["dataset"] == str(user.folder / "dataset")
    assert first["tasks run"].startswith("0 in"), "all was there"
    [other] = answer(capsys, "prepare", "own.yaml", "data.folder=another")
    assert other["manifest digest"] == first["manifest digest"], "the same bytes in another folder"
    assert main(["prepare", "own.yaml"]) == exits.DONE
    assert f"manifest digest  {first['manifest digest']}\n" in capsys.readouterr().out


# --- checkpoints ---------------------------------------------------------------------------------------------


def test_list_and_verify_tell_each_checkpoint(run: RunFolder, capsys: Capture) -> None:
    lines = answer(capsys, "checkpoints", "list", "own")
    assert [(line["step"], line["folder"], line["state"]) for line in lines] == [
        (6, "step-00000006", "listed"),
        (3, "step-00000003", "listed"),
    ]
    for line in lines:
        folder = run.checkpoints / line["folder"]
        assert line["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert [line["state"] for line in answer(capsys, "checkpoints", "verify", "own")] == ["verified", "verified"]
    [only] = answer(capsys, "checkpoints", "verify", "own", "--step", "3")
    assert only["step"] == 3


def test_damage_is_named_and_ends_with_74(run: RunFolder, capsys: Capture) -> None:
    flip(run.checkpoints / "step-00000003/rank-00000.safetensors", 8000)
    (run.checkpoints / "step-00000006/MANIFEST.json").write_text("{}")
    lines = answer(capsys, "checkpoints", "verify", "own", code=exits.DAMAGED)
    assert [line["step"] for line in lines] == [6, 3]
    assert all(line["state"].startswith("damaged: ") for line in lines)
    assert main(["checkpoints", "list", "own"]) == exits.DAMAGED, "what listing reads already shows one of them"
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["step", "folder"]
    assert len(table) == 3
    refusal(capsys, "checkpoints", "digest", "own", code=exits.DAMAGED)


def test_digest_is_the_layout_independent_one(run: RunFolder, capsys: Capture) -> None:
    newest = digest(run.checkpoints / "step-00000006")
    assert answer(capsys, "checkpoints", "digest", "own") == [{"step": 6, "digest": newest}]
    [older] = answer(capsys, "checkpoints", "digest", "own", "--step", "3")
    assert older["digest"] != newest
    assert main(["checkpoints", "digest", "own"]) == exits.DONE
    assert capsys.readouterr().out == f"step    6\ndigest  {newest}\n"


def test_diff_has_a_row_for_each_tensor(run: RunFolder, capsys: Capture) -> None:
    state = model_state(run, 3)
    state["final_norm.weight"] = state["final_norm.weight"] * 1.5
    write_checkpoint(run, 9, state)
    rows = answer(capsys, "checkpoints", "diff", "own", "--step", "9", "--other", "3")
    assert {row["name"] for row in rows} == state.keys()
    assert {row["name"]: row["relative"] for row in rows if not row["equal"]} == {
        "final_norm.weight": pytest.approx(0.5)
    }
    assert main(["checkpoints", "diff", "own", "--step", "9", "--other", "3"]) == exits.DONE
    assert capsys.readouterr().out.splitlines()[0].split() == ["kind", "name", "equal", "relative", "note"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("digest", "own", "--step", "4"), "the run has no such checkpoint"),
        (("diff", "own", "--step", "3"), "diff compares two steps"),
        (("diff", "own", "--other", "3"), "diff compares two steps"),
        (("diff", "own", "--step", "3", "--other", "4"), "the run has no such checkpoint"),
        (("list", "owm"), "there is no such run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_refused(words: tuple[str, ...], what: str, run: RunFolder, capsys: Capture) -> None:
    assert what in refusal(capsys, "checkpoints", *words)


def test_prune_keeps_the_newest(run: RunFolder, capsys: Capture) -> None:
    for step in (9, 12):
        write_checkpoint(run, step, model_state(run, step))
    freed = sum(path.stat().st_size for path in (run.checkpoints / "step-00000003").iterdir())
    [report] = answer(capsys, "checkpoints", "prune", "own", "--keep-last", "3")
    assert report == {"kept steps": [12, 9, 6], "deleted steps": [3], "damaged": [], "bytes freed": freed}
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == [
        "step-00000006",
        "step-00000009",
        "step-00000012",
    ]
    [report] = answer(capsys, "checkpoints", "prune", "own")
    assert report["kept steps"] == [12, 9], "as many as the run's own configuration says"


def test_prune_waits_for_nobody_for_long(run: RunFolder, capsys: Capture) -> None:
    with run_lock(run):
        assert "another command is working on this run" in refusal(capsys, "checkpoints", "prune", "own")
    assert len(list(run.checkpoints.glob("step-*"))) == 2


# --- use -----------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_exported_and_continued(run: RunFolder, capsys: Capture) -> None:
    """The export gives the numbers and the text that the run gives."""
    [found] = answer(capsys, "evaluate", "own", "--max-bytes", "600")
    expected = evaluate(load_model("own"), run.data_folder(), load_device(), max_bytes=600)
    assert found["source"] == str(Path("runs/own/checkpoints/step-00000006"))
    assert found["step"] == 6
    assert {name: found[name] for name in vars(expected)} == vars(expected)

    [exported] = answer(capsys, "export", "own")
    assert exported["folder"] == "runs/own/exports/step-00000006"
    assert run.journal.last("exported", "run_created")["step"] == 6  # type: ignore[index]
    assert main(["export", "own", "--step", "3", "--to", "elsewhere", "--dtype", "bfloat16"]) == exits.DONE
    said = capsys.readouterr().out
    assert "bfloat16" in said
    assert "forced by           model.attention.global_position: nope (not in Qwen3ForCausalLM)" in said
    assert (Path("elsewhere") / "config.json").exists()
    assert "LlamaForCausalLM does not hold this model" in refusal(capsys, "export", "own", "--as", "llama")

    [again] = answer(capsys, "evaluate", exported["folder"], "--data", "dataset", "--max-bytes", "600")
    assert again["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
    assert "does not say which data" in refusal(capsys, "evaluate", exported["folder"])
    assert "this is an export already" in refusal(capsys, "export", exported["folder"])

    words = ("--prompt", "the quick", "--max-new-tokens", "6", "--temperature", "0")
    [text] = answer(capsys, "generate", "own", *words)
    assert text["prompt"] == "the quick"
    assert 0 < text["tokens"] <= 6
    assert answer(capsys, "generate", exported["folder"], *words) == [text]
    assert main(["generate", "own", *words]) == exits.DONE
    assert capsys.readouterr().out == f"the quick{text['text']}\n"


def test_the_average_is_exported_beside_the_weights(run: RunFolder, capsys: Capture) -> None:
    average = model_state(run, 10)
    write_checkpoint(run, 9, model_state(run, 9), average)
    [weights], [exported] = answer(capsys, "export", "own"), answer(capsys, "export", "own", "--ema")
    assert (weights["folder"], exported["folder"]) == (
        "runs/own/exports/step-00000009",
        "runs/own/exports/step-00000009-ema",
    )
    assert torch.equal(load_model(exported["folder"]).state["embedding.weight"], average["embedding.weight"])
    assert [event["ema"] for event in run.journal.events("exported")] == [False, True]
    assert "holds no average" in refusal(capsys, "export", "own", "--step", "3", "--ema")


def test_the_average_is_evaluated_and_continues_texts(run: RunFolder, capsys: Capture) -> None:
    write_checkpoint(run, 9, model_state(run, 9), model_state(run, 10))
    averaged = evaluate(load_model("own", ema=True), run.data_folder(), load_device(), max_bytes=600)
    plain = evaluate(load_model("own"), run.data_folder(), load_device(), max_bytes=600)
    assert averaged.loss != plain.loss
    for words, expected in ((("--ema",), averaged), ((), plain)):
        [found] = answer(capsys, "evaluate", "own", "--max-bytes", "600", *words)
        assert (found["loss"], found["ema"], found["step"]) == (expected.loss, bool(words), 9)
    asked = ("--prompt", "the", "--max-new-tokens", "8", "--temperature", "0")
    texts = [answer(capsys, "generate", "own", *asked, *words)[0]["text"] for words in ((), ("--ema",))]
    assert texts[0] != texts[1]
    for words in (("evaluate", "own", "--max-bytes", "600"), ("generate", "own")):
        assert "holds no average" in refusal(capsys, *words, "--step", "3", "--ema")


def load_device() -> Any:
    from solomonov.commands import inference_device

    return inference_device()


def test_numbers_are_shown_for_people(run: RunFolder, capsys: Capture) -> None:
    assert main(["evaluate", "own", "--max-bytes", "600"]) == exits.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: words[-1] for words in lines}
    assert shown["step"] == "6"
    assert shown["loss"] == f"{evaluate(load_model('own'), run.data_folder(), load_device(), max_bytes=600).loss:.6g}"


@pytest.mark.parametrize("words", [("evaluate", "own"), ("generate", "own"), ("export", "own")], ids=lambda w: w[0])
def test_a_run_whose_data_is_gone_is_refused(words: tuple[str, ...], run: RunFolder, capsys: Capture) -> None:
    shutil.rmtree(run.data_folder())
    code = main([*words])
    captured = capsys.readouterr()
    assert code in (exits.CONFIGURATION, exits.DAMAGED)
    assert captured.err.startswith("error: ")
    assert "dataset" in captured.err


# --- doctor --------------------------------------------------------------------------------------------------


def test_doctor_ends_with_what_it_found(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == exits.DONE
    findings = json.loads(capsys.readouterr().out)
    assert {finding["verdict"] for finding in findings} <= {"ok", "note"}
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package-of-ours",))
    assert main(["doctor"]) == exits.CONFIGURATION
    output = capsys.readouterr().out
    assert "missing  no-such-package-of-ours not installed" in output
    assert "-> pip install no-such-package-of-ours" in output
