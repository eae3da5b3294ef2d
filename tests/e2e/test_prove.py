"""`solomonov prove --layouts` by the user's command: the certificate, its file, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.support.processes import ROOT, assert_no_process
from tests.support.user import User

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_user_s_own_configuration_is_proven(optimizer: str, user: User) -> None:
    """The README's command: the matrix of layouts over up to four ranks."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^\$ solomonov (prove .*)$", readme, re.MULTILINE)
    words = ["own.yaml" if word.startswith("configs/") else word for word in shlex.split(shown)]
    code, output = user.solomonov(*words, f"optimizer.kind={optimizer}", "model.layers=6", deadline=550.0)
    assert code == 0, output
    certificate = json.loads((user.folder / words[words.index("--to") + 1]).read_text())
    assert certificate["holds"] is True
    assert certificate["scaled"]["training.total_steps"] == {"from": 60, "to": 4}
    assert certificate["config"]["name"] == "own"
    assert certificate["versions"]["deepspeed"]
    cases = certificate["cases"]
    assert len(cases) > 25
    assert {item["verdict"] for item in cases} <= {"equal", "within bound"}
    assert {(item["case"]["zero_stage"], item["case"]["pipeline"]) for item in cases} == {
        *((stage, 1) for stage in range(4)), *((stage, stages) for stage in (0, 1) for stages in (2, 3, 4))
    }  # fmt: skip
    assert {item["case"]["offload"] for item in cases} == {"none", "optimizer", "parameters"}
    assert {item["case"]["precision"] for item in cases} == {"fp32", "bf16"}
    assert max(certificate["worst_fp32"].values()) <= 1e-5
    assert re.search(r"^verdict     holds: ", output, re.MULTILINE)
    assert len(re.findall(r"(?:within bound|equal)$", output, re.MULTILINE)) >= len(cases)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--ranks", "17"), 78, "there are too many ranks"),
        (("--to", "missing/c.json"), 78, "the certificate cannot be written there"),
        (("model.layer=3",), 78, "did you mean model.layers?"),
        (("--ranks", "0"), 2, "0 is less than 1"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(words: tuple[str, ...], code: int, message: str, user: User) -> None:
    found, output = user.solomonov("prove", "own.yaml", "--layouts", *words)
    assert (found, message in output) == (code, True), output
    assert "layouts\n" not in output


def test_an_interrupt_ends_all_ranks(user: User, tmp_path: Path) -> None:
    with user.command("prove", "own.yaml", "--layouts", "--ranks", "2", TMPDIR=str(tmp_path)) as program:
        ran = "solomonov-prove-*/case-*.json"
        program.wait_for(lambda: list(tmp_path.glob(ran)), deadline=120, what="a layout was run")
        program.send(signal.SIGINT)
        assert program.wait(deadline=60) == 130, program.output()
    assert_no_process(f"{tmp_path}/solomonov-prove-")
    assert not list(tmp_path.glob("solomonov-prove-*")), "what the ranks wrote was left"


def test_what_is_to_be_proven_must_be_said(user: User) -> None:
    code, output = user.solomonov("prove", "own.yaml")
    assert code == 2
    assert "--layouts" in output
