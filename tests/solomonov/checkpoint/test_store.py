"""Which folder is a checkpoint, which is used, which ones go: by names, manifests and digests, never by a pointer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from solomonov.checkpoint import store
from solomonov.checkpoint.format import MANIFEST
from solomonov.checkpoint.store import CheckpointInfo, DamagedFolder, ResumeFact, superseded_by
from solomonov.errors import DamagedCheckpointError
from tests.solomonov.checkpoint.common import flip, write
from tests.support.kill_points import KillPoints

RANK_FILE = "rank-00000.safetensors"


def steps(checkpoints: Path) -> list[int]:
    return [info.step for info in store.scan(checkpoints)]


def test_scan_is_by_step_newest_first_whatever_the_times_say(tmp_path: Path) -> None:
    for step in (100, 300, 200):
        info = write(tmp_path, step)
        os.utime(info.folder, (step, 10**9 - step))
    assert steps(tmp_path) == [300, 200, 100]
    assert store.scan(tmp_path)[0].nbytes == sum(f.stat().st_size for f in (tmp_path / "step-00000300").iterdir())


def test_scan_takes_nothing_else_for_a_checkpoint(tmp_path: Path) -> None:
    good = write(tmp_path, 100).folder
    for name in (
        "step-00000200.tmp-a1-00c0ffee",
        "step-00000200.replaced-00c0ffee",
        "step-00000200.deleted-00c0ffee",
        "step-00000200.set-aside-damaged-00c0ffee",
        "step-200",
        "step-00000200 ",
        "step-00000200\n",
        "xstep-00000200",
        "step-0000020x",
    ):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "step-00000300").symlink_to(good)
    (tmp_path / "step-00000400").write_bytes(b"")
    (tmp_path / "latest").write_text("step-00000400\n")
    assert [folder.name for folder in store.candidates(tmp_path)] == ["step-00000100"]
    assert steps(tmp_path) == [100]
    assert steps(tmp_path / "not-there") == []


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, 100).folder.rename(tmp_path / "step-00000200")
    [found] = store.survey(tmp_path)
    assert isinstance(found, DamagedFolder)
    assert found.step == 200
    assert "step 100" in found.error.got
    assert steps(tmp_path) == []


def test_survey_says_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2).folder / MANIFEST).unlink()
    (tmp_path / "step-00000003").mkdir()
    found = store.survey(tmp_path)
    assert [(type(item), item.step) for item in found] == [(DamagedFolder, 3), (DamagedFolder, 2), (CheckpointInfo, 1)]


@pytest.mark.parametrize("pointer", [None, b"", b"\xff\xfe", b"step-00000100\n", b"step-99999999\n"])
def test_the_pointer_is_only_a_hint(tmp_path: Path, pointer: bytes | None) -> None:
    for step in (100, 200):
        write(tmp_path, step)
    store.write_latest(tmp_path, tmp_path / "step-00000200")
    assert (tmp_path / "latest").read_text() == "step-00000200\n"
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(pointer)
    newest = store.newest_verified(tmp_path)
    assert newest is not None
    assert newest.step == 200


def test_newest_verified_passes_over_damage_and_fences(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step, attempt=1)
    flip(tmp_path / "step-00000300" / RANK_FILE, 5000)
    newest = store.newest_verified(tmp_path)
    assert newest is not None
    assert newest.step == 200
    newest = store.newest_verified(tmp_path, [ResumeFact(2, 100)])
    assert newest is not None
    assert newest.step == 100
    assert store.newest_verified(tmp_path, [ResumeFact(2, 50)]) is None


@pytest.mark.parametrize(
    ("attempt", "step", "facts", "expected"),
    [
        (1, 200, [], None),
        (1, 200, [(1, 100)], None),  # its own resume is behind it
        (1, 200, [(2, 200)], None),  # the one that was resumed from
        (1, 200, [(2, 300)], None),
        (1, 200, [(2, 100)], (2, 100)),
        (2, 200, [(2, 100)], None),  # of the new line
        (1, 200, [(2, 200), (3, 100)], (3, 100)),
        (2, 200, [(3, 100), (4, 150)], (4, 150)),
        (3, 200, [(2, 100)], None),
        (1, 1, [(2, 0)], (2, 0)),  # a fresh start fences everything
        (1, 0, [(2, 0)], None),
    ],
)
def test_superseded_by(attempt: int, step: int, facts: list[tuple[int, int]], expected: tuple[int, int] | None) -> None:
    assert superseded_by(attempt, step, [ResumeFact(*fact) for fact in facts]) == expected


def test_prune_keeps_the_newest_that_verify(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    flip(tmp_path / "step-00000004" / RANK_FILE, 5000)
    (tmp_path / "step-00000005" / MANIFEST).unlink()
    size = store.scan(tmp_path)[-1].nbytes
    planned = store.prune(tmp_path, 2, dry_run=True)
    assert steps(tmp_path) == [4, 3, 2, 1]
    report = store.prune(tmp_path, 2)
    assert (planned.kept, planned.deleted) == (report.kept, report.deleted)
    assert [info.step for info in report.kept] == [3, 2]
    assert ([info.step for info in report.deleted], report.bytes_freed) == ([1], size)
    assert [broken.step for broken in report.damaged] == [5, 4]
    assert steps(tmp_path) == [3, 2]
    assert len(store.set_aside_for(tmp_path, "damaged")) == 2


def test_prune_never_deletes_the_last_that_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for step in (2, 3, 4):
        flip(tmp_path / f"step-{step:08d}" / RANK_FILE, 5000)
    assert [info.step for info in store.prune(tmp_path, 1).kept] == [1]
    assert steps(tmp_path) == [1]


def test_prune_deletes_nothing_while_nothing_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(write(tmp_path, step).folder / RANK_FILE, 5000)
    report = store.prune(tmp_path, 1)
    assert (report.kept, report.deleted) == ([], [])
    assert steps(tmp_path) == [3, 2, 1]
    with pytest.raises(AssertionError):
        store.prune(tmp_path, 0)


def test_prune_verifies_each_checkpoint_once(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    verified: set[str] = set()
    store.prune(tmp_path, 2, verified=verified)
    assert verified == {info.digest for info in store.scan(tmp_path)}
    flip(tmp_path / "step-00000002" / RANK_FILE, 5000)
    assert [info.step for info in store.prune(tmp_path, 2, verified=verified).kept] == [2, 1]
    assert [info.step for info in store.prune(tmp_path, 2).kept] == [1]


def test_prune_deletes_nothing_of_a_later_attempt(tmp_path: Path) -> None:
    for step, attempt in ((1, 1), (2, 2), (3, 2), (4, 1), (5, 1)):
        write(tmp_path, step, attempt=attempt)
    assert [info.step for info in store.prune(tmp_path, 1, attempt=1).deleted] == [4, 1]
    assert steps(tmp_path) == [5, 3, 2]


def test_prune_does_not_count_what_is_fenced_off(tmp_path: Path) -> None:
    for step, attempt in ((1, 1), (2, 2), (3, 1), (4, 2), (5, 1)):
        write(tmp_path, step, attempt=attempt)
    report = store.prune(tmp_path, 2, attempt=2, facts=[ResumeFact(2, 1)])
    assert [[info.step for info in part] for part in (report.kept, report.fenced, report.deleted)] == [
        [4, 2],
        [5, 3],
        [1],
    ]
    assert steps(tmp_path) == [4, 2]
    assert len(store.set_aside_for(tmp_path, "fenced")) == 2


def test_prune_clears_leftovers_of_the_dead_only(tmp_path: Path) -> None:
    write(tmp_path, 1)
    leftovers = ("tmp-a1-00000001", "tmp-a2-00000002", "tmp-a3-00000003", "deleted-00000004", "replaced-00000005")
    for leftover in leftovers:
        (tmp_path / f"step-00000001.{leftover}").mkdir()
    (tmp_path / "step-00000007.replaced-00000006").mkdir()
    (tmp_path / "step-00000007.set-aside-damaged-00000007").mkdir()
    (tmp_path / "other").mkdir()
    store.prune(tmp_path, 1, attempt=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001",
        "step-00000001.tmp-a3-00000003",
        "step-00000007.replaced-00000006",
        "step-00000007.set-aside-damaged-00000007",
        "other",
    }
    store.prune(tmp_path, 1)
    assert (tmp_path / "step-00000001.tmp-a3-00000003").exists()


def test_recover_gives_back_the_name_only_where_it_is_free(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = write(tmp_path, step).folder
        shutil.copytree(folder, tmp_path / f"{folder.name}.replaced-00000001")
    shutil.rmtree(tmp_path / "step-00000002")
    assert store.recover(tmp_path) == [tmp_path / "step-00000002"]
    assert steps(tmp_path) == [2, 1]
    assert store.recover(tmp_path) == []


def test_publish_replaces(tmp_path: Path) -> None:
    first = write(tmp_path, 1, seed=1)
    second = write(tmp_path, 1, seed=2)
    assert first.digest != second.digest
    assert store.scan(tmp_path) == [second]
    assert store.prune(tmp_path, 1).leftovers
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_set_aside_and_again_for_another_reason(tmp_path: Path) -> None:
    aside = store.set_aside(write(tmp_path, 1).folder, "damaged")
    assert store.set_aside_for(tmp_path, "damaged") == [aside]
    again = store.set_aside(aside, "fresh")
    assert (store.set_aside_for(tmp_path, "damaged"), store.set_aside_for(tmp_path, "fresh")) == ([], [again])
    assert steps(tmp_path) == []


def test_check_reads_every_byte(tmp_path: Path) -> None:
    info = write(tmp_path, 1)
    assert store.check(info.folder) == info
    assert store.verify_checkpoint(info) == info.nbytes
    flip(info.folder / RANK_FILE, 5000)
    assert isinstance(store.check(info.folder), DamagedFolder)
    (tmp_path / "step-00000002").symlink_to(info.folder)
    assert isinstance(store.check(tmp_path / "step-00000002"), DamagedFolder)


def test_a_checkpoint_that_changed_since_it_was_listed(tmp_path: Path) -> None:
    info = write(tmp_path, 1, seed=1)
    write(tmp_path, 1, seed=2)
    with pytest.raises(DamagedCheckpointError, match="as when it was listed"):
        store.verify_checkpoint(info)


def test_a_deletion_that_is_interrupted_anywhere_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    template = write(tmp_path / "template", 1).folder
    interrupted = 0
    for end_at in range(20):
        folder = Path(shutil.copytree(template, tmp_path / str(end_at) / template.name))
        points = KillPoints(end_at, interrupt)
        points.install()
        try:
            store.delete(folder)
        except Interrupted:
            interrupted += 1
        finally:
            points.remove()
        found = store.survey(folder.parent)
        assert not any(isinstance(item, DamagedFolder) for item in found), points.names
        assert len(found) == (end_at == 0)
        store.prune(folder.parent, 1)
        assert len(list(folder.parent.iterdir())) == (end_at == 0)
    assert 4 < interrupted < 20
