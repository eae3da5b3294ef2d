"""What `solomonov plan` prints: the same numbers for people and for scripts, and all of them of one configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solomonov.cli import main
from solomonov.exits import CONFIGURATION, DONE

TEXT = """\
run: {name: big}
model: {layers: 32, d_model: 4096, heads: 32, kv_heads: 8, d_ff: 14336, attention: {preset: rope}}
tokenizer: {vocab_size: 128256}
data: {folder: nowhere, sources: [{name: one, path: x}], sequence_tokens: 8192}
training: {total_tokens: 1000000000000, global_batch_tokens: 4194304, micro_batch_sequences: 2}
parallel: auto
launch: {nodes: 8, ranks_per_node: 8}
"""
FULL = "training.activation_checkpointing=full"


def test_operations_are_those_that_stochastic_depth_leaves(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks that drop in 20 % of the updates on average, of a model in which they are all but the head."""
    found = {}
    for rate in ("0.0", "0.4"):
        _, out, _ = plan(capsys, config, FULL, f"model.stochastic_depth={rate}", "--gpu", "h100", "--json")
        found[rate] = json.loads(out)
    whole, expected = found["0.0"]["flops_per_token"], found["0.4"]["flops_per_token"]
    head = 6 * 128256 * 4096
    assert expected - head == pytest.approx(0.8 * (whole - head), rel=1e-6)
    assert found["0.4"]["flops_per_token_undropped"] == found["0.0"]["flops_per_token_undropped"] == whole
    assert found["0.4"]["seconds_an_update"] < 0.9 * found["0.0"]["seconds_an_update"]
    _, out, _ = plan(capsys, config, FULL, "model.stochastic_depth=0.4", "--gpu", "h100")
    saved = 1 - expected / whole
    assert f"GFLOP a token expected (stochastic depth saves {saved:.1%} of {whole / 1e9:.4g})" in out
    _, out, _ = plan(capsys, config, FULL, "--gpu", "h100")
    assert "stochastic" not in out


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "big.yaml"
    path.write_text(TEXT)
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_numbers_of_a_known_model(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 8B: 8,030,261,248 parameters published; ours has 2 x 128 gains more in each of 32 blocks (QK norm)."""
    code, out, _ = plan(capsys, config, FULL, "--gpu", "h100", "--json")
    found = json.loads(out)
    assert code == DONE
    assert found["parameters"] == 8_030_261_248 + 32 * 2 * 128
    assert found["world"] == 64, "launch.nodes x launch.ranks_per_node"
    assert found["precision"] == "bf16"
    batch = found["batch"]
    assert batch["micro_rows"] * batch["accumulation"] * batch["data_parallel"] == 512 == batch["batch_rows"]
    assert batch["total_steps"] == -(-(10**12) // 4194304)
    assert found["tokens"] == batch["total_steps"] * 4194304
    assert found["checkpoint_bytes"] == 12 * found["parameters"]
    memory = found["memory"]
    parts = ("weights", "gradients", "optimizer", "buffers", "activations")
    assert memory["total"] == sum(memory[part] for part in parts) <= memory["usable"]
    assert memory["optimizer"] == 12 * -(-found["parameters"] // 64)
    code, out, _ = plan(capsys, config, FULL, "training.ema_decay=0.9999", "--gpu", "h100", "--json")
    averaged = json.loads(out)
    assert averaged["checkpoint_bytes"] == 16 * found["parameters"]
    assert averaged["memory"]["optimizer"] == 16 * -(-found["parameters"] // 64)
    code, out, _ = plan(capsys, config, FULL, "optimizer.kind=muon", "--gpu", "h100", "--json")
    muon = json.loads(out)
    # Query and out 4096 x 4096, key and value 4096 x 1024, three of 4096 x 14336: one moment each instead of two.
    matrices = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert muon["checkpoint_bytes"] == 12 * found["parameters"] - 4 * matrices
    assert found["seconds"] == pytest.approx(found["seconds_an_update"] * batch["total_steps"])
    assert found["device_hours"] == pytest.approx(found["seconds"] * 64 / 3600)
    assert found["tokens_per_second"] == pytest.approx(4194304 / found["seconds_an_update"])
    # In bf16 stage 1 reduces after the backward pass, stage 2 beside it: the faster one is taken.
    layout = {"zero_stage": 2, "pipeline": 1, "sequence": 1, "offload": "none"}
    taken = layout | {"bytes": memory["total"], "relative_seconds": 1.0, "fits": True}
    assert taken in found["layouts"]
    shape = {"zero_stage": 2, "pipeline": 4, "sequence": 1, "offload": "none"}
    refused = {**shape, "refused": "a pipeline needs ZeRO stage 1 or 0"}
    assert refused in found["layouts"]
    assert (found["offload"]["host_bytes"], found["offload"]["bus_bytes_an_update"]) == (0, 0.0)


def test_people_read_the_same(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, config, FULL, "--gpu", "h100", "--gpus", "16", "parallel.pipeline=2")
    assert code == DONE
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "8,030,269,440 parameters" in rows["model"]
    assert "2 rows x 32 accumulated x 8 data-parallel ranks = 512 rows of 8192" in rows["batch"]
    assert rows["devices"].startswith("devices     16 x h100: 79 GiB, 989 TFLOP/s in bf16")
    assert "ZeRO 1 with 2 pipeline stages (as configured)" in rows["layout"]
    assert "embedding to layers." in rows["stages"]
    assert rows["stages"].endswith(" to head")
    assert "refused: ZeRO 0 and 4 more: bf16 parameters need ZeRO stage 1 or higher" in out
    assert rows["verdict"] == "verdict     fits"
    assert out.count(" taken\n") == 1


def test_what_does_not_fit_is_said_with_what_would(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    configured = (config, "--gpu", "h100", "parallel.zero_stage=3")
    code, out, _ = plan(capsys, *configured)
    assert code == CONFIGURATION
    change = out.splitlines()[-1].removeprefix("verdict     does not fit; the smallest change that does: ")
    assert change == "training.activation_checkpointing=selective"
    assert plan(capsys, *configured, *change.split())[0] == DONE


def test_where_nothing_else_fits_ranks_share_rows(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each then has a part of a row's activations."""
    code, out, _ = plan(capsys, config, "--gpu", "h100", "--json")
    found = json.loads(out)
    assert code == DONE
    ranks = found["layout"]["sequence"]
    assert ranks > 1
    assert all(row["sequence"] > 1 for row in found["layouts"] if row.get("fits"))
    assert found["batch"]["data_parallel"] * ranks == found["world"]
    assert f"rows on {ranks} ranks (chosen: " in plan(capsys, config, "--gpu", "h100")[1]


def test_what_fits_in_no_other_way_is_offloaded_and_says_what_that_takes(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (config, FULL, "training.micro_batch_sequences=1", "--gpu", "h100", "--gpus", "1")
    code, out, _ = plan(capsys, *words, "--json")
    found = json.loads(out)
    assert code == DONE
    assert found["layout"]["offload"] == "optimizer"
    assert "nothing fits without offload" in found["layout"]["why"]
    offload, parameters = found["offload"], found["parameters"]
    assert offload["host_bytes"] == found["memory"]["host"] >= 16 * parameters
    assert offload["bus_bytes_an_update"] == (4 + 2) * parameters, "fp32 gradients down, bf16 weights up"
    by_hand = 6 * parameters / offload["bus_bytes_per_second"] + 28 * parameters / 4e10
    assert offload["seconds_an_update"] == pytest.approx(by_hand)
    code, out, _ = plan(capsys, *words)
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == DONE
    assert "ZeRO 1, optimizer offloaded (chosen: nothing fits without offload" in rows["layout"]
    assert f"{offload['host_bytes'] / 2**30:.3g} GiB a rank (the size of its machine's memory is not" in rows["host"]
    assert f"over a bus of 50 GB/s and the update by the machine's cores: {by_hand:.3g} s" in rows["host"]
    assert out.count("  taken, optimizer offloaded\n") == 1
    # A configured layout that does not fit is told the same, in words that can be typed behind.
    code, out, _ = plan(capsys, *words, "parallel.zero_stage=3")
    change = out.splitlines()[-1].rpartition("does: ")[2]
    assert code == CONFIGURATION
    assert change == "parallel.zero_stage=1 parallel.pipeline=1 parallel.offload=optimizer"
    assert plan(capsys, *words, *change.split())[0] == DONE


def test_an_illegal_layout_gets_the_nearest_legal_one(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, config, "--gpu", "h100", "parallel.pipeline=2", "parallel.zero_stage=3")
    assert (code, out) == (CONFIGURATION, "")
    assert "a pipeline needs ZeRO stage 1 or 0" in err
    code, _, err = plan(capsys, config, "--gpu", "h900")
    assert code == CONFIGURATION
    assert "one of a100, h100, h200, b200, l40s" in err


def test_without_a_name_it_is_what_is_here(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("solomonov.devices.visible_gpus", lambda: 0)
    code, out, _ = plan(capsys, config, "--gpus", "1", "--json")
    found = json.loads(out)
    assert code == CONFIGURATION, "no machine of ours trains 8 billion parameters on one CPU"
    assert (found["device"]["name"], found["precision"]) == ("cpu", "fp32")
    assert found["device"]["source"] == "speed measured now"


DEEP = ("model.layers=110", "model.d_model=64", "model.heads=4", "model.kv_heads=4", "model.d_ff=128", FULL)


def test_the_signal_through_deep_models_is_looked_at_unasked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, config, *DEEP, "model.residual=postnorm", "--gpu", "h100")
    assert code == DONE, "it is not for the plan to forbid"
    assert "signal      broken: the gradient of the first eighth is " in out
    assert "change model.residual: scaled" in out
    assert "gradient, a column a factor of 2" not in out
    _, out, _ = plan(capsys, config, *DEEP, "--gpu", "h100", "--json")
    found = json.loads(out)["signal"]
    assert (found["verdict"], found["advice"], len(found["gradient_norms"])) == ("even", None, 110)
    _, out, _ = plan(capsys, config, FULL, "--gpu", "h100")
    assert "signal" not in out, "32 layers, and nobody asked"


def test_the_signal_is_shown_eighth_by_eighth(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, config, FULL, "--gpu", "h100", "--signal")
    assert "signal      even: " in out
    assert [line.split()[0] for line in out.splitlines()[-8:]] == [f"{4 * part}-{4 * part + 3}" for part in range(8)]


def test_the_signal_is_drawn_on_request(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asked for the picture alone it looks at the signal too; a file that cannot be is refused before."""
    picture = tmp_path / "signal.png"
    code, out, _ = plan(capsys, config, FULL, "--gpu", "h100", "--signal", "--picture", str(picture))
    assert code == DONE
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "signal      even: " in out
    picture.unlink()
    _, out, _ = plan(capsys, config, FULL, "--gpu", "h100", "--json", "--picture", str(picture))
    assert picture.is_file()
    assert json.loads(out)["signal"]["verdict"] == "even"
    code, out, problem = plan(capsys, config, FULL, "--gpu", "h100", "--picture", str(tmp_path / "signal.doc"))
    assert (code, out) == (CONFIGURATION, "")
    assert "signal.png" in problem
