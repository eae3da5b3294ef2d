"""Which checkpoints a run may begin from: refusals before a rank is started, and what the ranks verify together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from solomonov.branch import Branch, branch_of, check_branch, open_branch
from solomonov.checkpoint.agreement import SingleProcess
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.config import parse_config
from solomonov.distributed import Control
from solomonov.errors import ConfigurationError, DamagedCheckpointError
from solomonov.runfolder import RunFolder
from solomonov.start import PreparedRun, prepare_run
from tests.support.ranks import RankFailure, run_ranks
from tests.support.tiny_run import CONFIG, make_run, train_run

pytestmark = pytest.mark.dist(world=2)
SHORT = ("training.total_steps=6", "checkpoint.every_steps=3", "evaluation.every_steps=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of six steps and checkpoints of 3 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("parent")
    run = make_run(folder, ranks=2, overrides=SHORT)
    assert run_ranks(train_run, 2, run.path, timeout=180) == [0, 0]
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def branched(folder: Path, *overrides: str, of: str = "tiny@3") -> PreparedRun:
    """What `solomonov train` makes of a branch before it starts ranks."""
    words = (*SHORT, "run.name=other", f"run.branch_of={of}", f"run.folder={folder}/runs", *overrides)
    return prepare_run(parse_config(CONFIG.format(folder=folder), words, where="tiny"), ranks_per_node=2, launch={})


def refusal(folder: Path, *overrides: str, of: str = "tiny@3") -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        branched(folder, *overrides, of=of)
    return caught.value


@pytest.mark.spare
def test_schedule_length_optimizer_and_layout_may_differ(folder: Path) -> None:
    free = ("schedule.decay_steps=2", "optimizer.lr=0.001", "training.total_steps=9", "training.z_loss=0.0001")
    made = branched(folder, *free, "parallel.zero_stage=3", "training.micro_batch_sequences=4")
    assert branch_of(made.loaded.config) == Branch(RunFolder(folder / "runs/tiny"), 3)
    made = branched(folder, "training.total_steps=7", of=f"{folder}/runs/tiny@6")
    assert made.plan.total_steps == 7


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (("run.seed=12",), "run.seed: 11 there, 12 here"),
        (("model.layers=3",), "model.layers: 2 there, 3 here"),
        (("model.attention.rope_theta=500.0",), "model.attention.rope_theta: 10000.0 there, 500.0 here"),
        (("data.sources.1.weight=0.25",), "rows: stream"),
        (("training.global_batch_tokens=512",), "next row: 24 there, 48 after 3 updates here"),
    ],
)
def test_another_model_seed_data_or_batch_is_refused(overrides: tuple[str, ...], got: str, folder: Path) -> None:
    error = refusal(folder, *overrides)
    assert got in error.got
    assert error.what == "tiny@3 cannot go on with this configuration"
    assert error.remedy.startswith("take these from the other run")


def test_an_average_that_the_parent_did_not_keep_begins_as_its_weights(folder: Path) -> None:
    """avg_n = 0.5 avg_{n-1} + 0.5 w_n from there on, by the weights of each checkpoint."""
    made = branched(folder, "training.ema_decay=0.5", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    made.write()
    assert run_ranks(train_run, 2, made.run.path, timeout=180) == [0, 0]
    parent = CheckpointReader.open(folder / "runs/tiny/checkpoints/step-00000003")
    assert "ema" not in parent.kinds()
    readers = [CheckpointReader.open(made.run.checkpoints / f"step-{step:08d}") for step in (3, 4, 5, 6)]
    for name in parent.names("master"):
        average = parent.read_tensor(name, "master").double()
        for reader in readers:
            if reader.step > 3:
                average = 0.5 * average + 0.5 * reader.read_tensor(name, "master").double()
            kept = reader.read_tensor(name, "ema").double()
            assert float((kept - average).norm() / average.norm()) < 1e-6, (name, reader.step)
            assert reader.step == 3 or not kept.equal(reader.read_tensor(name, "master").double()), name


def test_a_run_or_step_that_is_not_there_is_refused(folder: Path) -> None:
    assert refusal(folder, of="tinny@3").what == "there is no such run"
    error = refusal(folder, of="tiny@4")
    assert error.got == f"step 4 of {folder}/runs/tiny, which has kept: 3, 6"
    assert refusal(folder, "run.name=tiny").what == "a run cannot branch from itself"
    assert "string should match" in refusal(folder, of="tiny").got.lower()


def test_a_branch_has_something_left_to_train(folder: Path) -> None:
    error = refusal(folder, of="tiny@6")
    assert error.what == "the branch ends before it begins"
    assert error.remedy == "set training.total_steps to more than 6"


def test_a_folder_that_is_another_checkpoint_is_refused(folder: Path) -> None:
    kept = folder / "runs/tiny/checkpoints"
    shutil.copytree(kept / "step-00000003", kept / "step-00000004")
    assert refusal(folder, of="tiny@4").got.startswith("step 3 of run id")


def test_a_damaged_state_is_found_before_a_rank_starts(folder: Path) -> None:
    path = folder / "runs/tiny/checkpoints/step-00000003/state.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DamagedCheckpointError, match=r"state\.json"):
        branched(folder)


def test_a_run_that_has_its_own_checkpoint_needs_its_parent_no_more(folder: Path) -> None:
    made = branched(folder)
    made.write()
    (made.run.checkpoints / "step-00000003").mkdir()
    made.run.journal.write("branched", step=3)
    shutil.rmtree(folder / "runs/tiny")
    check_branch(made.loaded.config, made.plan, str(made.data["stream"]))


@pytest.mark.spare
def test_the_ranks_verify_every_file_together(folder: Path) -> None:
    """Two ranks share the files: damage in any one of them is told to both."""
    branch = Branch(RunFolder(folder / "runs/tiny"), 3)
    digests = run_ranks(opened, 2, branch)
    assert digests == [open_branch(branch, SingleProcess()).digest] * 2
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = branch.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(RankFailure) as caught:
            run_ranks(opened, 2, branch)
        assert {failure.kind for failure in caught.value.failures.values()} == {"DamagedCheckpointError"}
        path.write_bytes(whole)
    shutil.rmtree(branch.folder)
    with pytest.raises(RankFailure, match="no checkpoint to branch from"):
        run_ranks(opened, 2, branch)


def opened(branch: Branch) -> str:
    """Inside a rank: the digest of the checkpoint."""
    return open_branch(branch, Control()).digest
