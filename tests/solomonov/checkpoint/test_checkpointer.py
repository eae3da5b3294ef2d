"""The life of a run's checkpoints, alone and on real gloo ranks, with disks that are full, read-only or forbidden."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from solomonov.checkpoint import store
from solomonov.checkpoint.agreement import SingleProcess
from solomonov.checkpoint.checkpointer import Checkpointer
from solomonov.checkpoint.format import MANIFEST, TilingError, canonical
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.reader import CheckpointReader, digest
from solomonov.checkpoint.store import ResumeFact
from solomonov.distributed import Control
from solomonov.errors import ConfigurationError, DamagedCheckpointError
from tests.solomonov.checkpoint.common import (
    RUN,
    Run,
    flip,
    make_state,
    ordinary_user,
    shapes_of,
    small_disk,
    split,
    write,
)
from tests.solomonov.checkpoint.test_format import sealed
from tests.support.kill_points import KillPoints
from tests.support.ranks import run_ranks

RANK_FILE = "rank-00000.safetensors"


def steps(checkpoints: Path) -> list[int]:
    return [info.step for info in store.scan(checkpoints)]


def names(checkpoints: Path) -> set[str]:
    """Folder entries, without what differs from run to run and the claim."""
    entries = (path.name for path in checkpoints.iterdir() if path.name != store.CLAIM)
    return {name.rsplit("-", 1)[0] if "." in name else name for name in entries}


def holds(reader: CheckpointReader | None, step: int, *, seed: int | None = None) -> bool:
    assert reader is not None, "nothing was found"
    state = make_state(step if seed is None else seed)
    same = all(torch.equal(reader.read_tensor(name, kind), tensor) for (name, kind), tensor in state.items())
    return same and reader.step == step and reader.scalars == {"step": step}


# --- the usual life ------------------------------------------------------------------------------------------


def test_save_find_and_their_events(tmp_path: Path) -> None:
    run = Run(tmp_path / "run" / "checkpoints")
    assert run.checkpointer.find() is None
    first, second = run.save(100), run.save(200)
    assert first is not None
    assert second is not None
    assert [name for name, _ in run.events] == ["checkpoint_durable"] * 2
    event = run.events[1][1]
    assert {key: event[key] for key in ("step", "folder", "bytes", "digest")} == {
        "step": 200,
        "folder": "step-00000200",
        "bytes": second.nbytes,
        "digest": second.digest,
    }
    assert event["seconds"] >= 0
    canonical(event)
    again = Run(run.folder, attempt=2)
    assert holds(again.checkpointer.find([ResumeFact(1, 0)]), 200)
    third = again.save(300)
    assert third is not None
    assert [info.parent_step for info in (first, second, third)] == [None, 100, 200]
    assert [info.attempt for info in (first, second, third)] == [1, 1, 2]
    assert (run.folder / "latest").read_text() == "step-00000300\n"


def test_retention(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        run.save(step)
    assert names(tmp_path) == {"step-00000003", "step-00000004", "latest"}
    assert [event["steps"] for event in run.named("checkpoint_pruned")] == [[1], [2]]
    assert run.named("checkpoint_pruned")[0]["bytes_freed"] > 0


def test_retention_tells_of_damage_and_does_not_count_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    flip(tmp_path / "step-00000003" / RANK_FILE, 5000)
    run = Run(tmp_path, attempt=2, keep_last=2)
    run.save(4)
    assert steps(tmp_path) == [4, 2]
    [damage] = run.named("checkpoint_damaged")
    assert (damage["step"], RANK_FILE in damage["what"], "xxh3-128" in damage["got"]) == (3, True, True)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(100, seed=1)
    run.save(100, seed=2)
    assert names(tmp_path) == {"step-00000100", "latest"}
    assert holds(run.checkpointer.find(), 100, seed=2)


def test_saving_over_a_damaged_step_sets_it_aside(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(100, seed=1)
    flip(tmp_path / "step-00000100" / RANK_FILE, 5000)
    run.save(100, seed=2)
    assert names(tmp_path) == {"step-00000100", "step-00000100.set-aside-damaged", "latest"}
    assert holds(run.checkpointer.find(), 100, seed=2)


def test_fragments_may_be_views_and_are_read_before_save_returns(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = make_state(1)
    [held] = split(state, 1)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    info = run.checkpointer.save(1, iter(held), expected=shapes_of(state), scalars={}, state={}, topology={})
    for tensor in state.values():
        tensor.zero_()
    assert info is not None
    reader = CheckpointReader.open(info.folder)
    assert all(torch.equal(reader.read_tensor(*key), tensor) for key, tensor in kept.items())


def test_a_hole_is_a_programming_error_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = make_state(1)
    held = split(state, 2)[0]
    with pytest.raises(TilingError, match="were not written"):
        run.checkpointer.save(1, held, expected=shapes_of(state), scalars={}, state={}, topology={})
    assert steps(tmp_path) == []
    assert run.save(1) is not None
    assert names(tmp_path) == {"step-00000001", "latest"}


# --- disks ---------------------------------------------------------------------------------------------------


class Ballast:
    """Fills a real file system to its last block when the next save writes, and gives the space back."""

    def __init__(self, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._write, self._patch = disk / "ballast", os.write, monkeypatch

    def arm(self) -> None:
        self._patch.setattr(os, "write", self._fill_and_write)

    def _fill_and_write(self, descriptor: int, data: Any) -> int:
        self._patch.setattr(os, "write", self._write)
        with pytest.raises(OSError, match="No space"):
            self._fill()
        return self._write(descriptor, data)

    def _fill(self) -> None:
        with self.path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def lift(self) -> None:
        self.path.unlink()


def big_save(run: Run, step: int, elements: int) -> store.CheckpointInfo | None:
    data = torch.full((elements,), float(step))
    return run.checkpointer.save(
        step,
        [Fragment("w", "master", (elements,), 0, elements, data)],
        expected={("w", "master"): (elements,)},
        scalars={"step": step},
        state={},
        topology={},
    )


def test_a_disk_that_fills_up_during_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk("2m") as disk:
        run = Run(disk / "checkpoints", keep_last=2)
        assert big_save(run, 1, 100_000) is not None
        ballast = Ballast(disk, monkeypatch)
        for failures in (1, 2):
            ballast.arm()
            assert big_save(run, 2, 100_000) is None
            [*_, failed] = run.named("checkpoint_failed")
            assert (failed["cause"], failed["step"], failed["ranks"]) == ("ENOSPC", 2, [0])
            assert failed["bytes_needed"] == 400_000
            assert failed["bytes_free"] < 400_000
            assert failed["consecutive_failures"] == failures
            assert failed["not_removed"] is None
            canonical(failed)
            assert names(run.folder) == {"step-00000001", "latest"}
            reader = run.checkpointer.find()
            assert reader is not None
            assert reader.step == 1
            ballast.lift()
        assert big_save(run, 2, 100_000) is not None
        assert run.checkpointer.consecutive_failures == 0
        assert steps(run.folder) == [2, 1]


def test_whatever_call_is_refused_the_checkpoint_that_was_to_be_replaced_is_not_lost(tmp_path: Path) -> None:
    """Every call in turn fails once with ENOSPC while a step is saved again."""
    refused = 0

    def refuse() -> None:
        nonlocal refused
        refused += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(tmp_path, keep_last=1)
    assert run.save(1, seed=1) is not None
    for end_at in range(60):
        points = KillPoints(end_at, refuse)
        points.install()
        try:
            saved = run.save(1, seed=2)
        finally:
            points.remove()
        assert steps(tmp_path) == [1], points.names[-1]
        reader = Run(tmp_path, attempt=1).checkpointer.find()
        assert holds(reader, 1, seed=2) or (saved is None and holds(reader, 1, seed=1)), points.names[-1]
        assert run.save(1, seed=1) is not None
        assert names(tmp_path) == {"step-00000001", "latest"}
    assert 20 < refused < 60


def test_a_disk_that_cannot_hold_it_is_not_filled() -> None:
    with small_disk("1m") as disk:
        run = Run(disk / "checkpoints")
        assert big_save(run, 1, 100_000) is not None
        assert big_save(run, 2, 200_000) is None
        [failed] = run.named("checkpoint_failed")
        assert failed["cause"] == "ENOSPC"
        assert failed["bytes_needed"] == 800_000 > failed["bytes_free"] > 400_000
        assert steps(run.folder) == [1]


def test_a_disk_that_turns_read_only() -> None:
    with small_disk("1m") as disk:
        run = Run(disk / "checkpoints")
        assert run.save(1) is not None
        (disk / "checkpoints" / "step-00000002").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert run.save(3) is None
        assert run.named("checkpoint_failed")[0]["cause"] == "EROFS"
        assert holds(run.checkpointer.find(), 1)
        assert "not renamed" in run.named("checkpoint_set_aside")[0]["renamed_to"]
        with pytest.raises(ConfigurationError, match="no checkpoint can be written"):
            run.checkpointer.check_writable()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        run.checkpointer.check_writable()
        assert run.save(3) is not None


def test_a_folder_without_permission() -> None:
    with ordinary_user() as folder:
        run = Run(folder / "checkpoints")
        run.checkpointer.check_writable()
        assert names(run.folder) == set()
        assert run.save(1) is not None
        run.folder.chmod(0o555)
        assert run.save(2) is None
        assert run.named("checkpoint_failed")[0]["cause"] == "EACCES"
        with pytest.raises(ConfigurationError, match="no checkpoint can be written") as caught:
            run.checkpointer.check_writable()
        assert caught.value.exit_code == 78
        assert holds(run.checkpointer.find(), 1)
        run.folder.chmod(0o755)
        assert run.save(2) is not None


def test_retention_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    (tmp_path / "latest").mkdir()
    assert run.save(1) is not None
    [event] = run.named("checkpoint_retention_failed")
    assert event["step"] == 1


def test_a_missing_folder_is_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints")
    run.save(1)
    shutil.rmtree(tmp_path / "checkpoints")
    assert run.save(2) is not None


# --- what to go on from --------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_told_set_aside_and_the_older_one_used(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    flip(tmp_path / "step-00000300" / RANK_FILE, 5000)
    (tmp_path / "step-00000200" / "state.json").unlink()
    run = Run(tmp_path, attempt=2)
    assert holds(run.checkpointer.find(), 100)
    assert [event["step"] for event in run.named("checkpoint_damaged")] == [300, 200]
    assert RANK_FILE in run.named("checkpoint_damaged")[0]["what"]
    assert "xxh3-128" in run.named("checkpoint_damaged")[0]["rule"]
    assert [event["step"] for event in run.named("checkpoint_set_aside")] == [300, 200]
    aside = {"step-00000300.set-aside-damaged", "step-00000200.set-aside-damaged"}
    assert names(tmp_path) == {"step-00000100"} | aside
    info = run.save(200)
    assert info is not None
    assert info.parent_step == 100


def test_with_every_checkpoint_damaged_it_never_starts_from_the_beginning(tmp_path: Path) -> None:
    for step in (100, 200):
        flip(write(tmp_path, step).folder / RANK_FILE, 5000)
    for _ in range(2):
        with pytest.raises(DamagedCheckpointError, match=r"step-00000100.*|step-00000200") as caught:
            Run(tmp_path, attempt=2).checkpointer.find()
        assert caught.value.exit_code == 74
        assert names(tmp_path) == {"step-00000100", "step-00000200"}
    assert Run(tmp_path, attempt=2).checkpointer.find(fresh=True) is None
    assert names(tmp_path) == {"step-00000100.set-aside-fresh", "step-00000200.set-aside-fresh"}
    assert Run(tmp_path, attempt=3).checkpointer.find([ResumeFact(2, 0)]) is None


def test_a_damaged_one_that_was_set_aside_still_counts_as_a_checkpoint(tmp_path: Path) -> None:
    store.set_aside(write(tmp_path, 100).folder, "damaged")
    with pytest.raises(DamagedCheckpointError, match="set-aside-damaged"):
        Run(tmp_path, attempt=2).checkpointer.find()
    assert Run(tmp_path, attempt=2).checkpointer.find(fresh=True) is None
    assert Run(tmp_path, attempt=3).checkpointer.find() is None


def test_what_a_killed_first_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.tmp-a1-00c0ffee").mkdir()
    run = Run(tmp_path, attempt=2)
    assert run.checkpointer.find() is None
    run.save(100)
    assert names(tmp_path) == {"step-00000100", "latest"}


def test_a_fresh_start_sets_good_checkpoints_aside(tmp_path: Path) -> None:
    write(tmp_path, 100)
    run = Run(tmp_path, attempt=2)
    assert run.checkpointer.find(fresh=True) is None
    info = run.save(50)
    assert info is not None
    assert info.parent_step is None
    assert names(tmp_path) == {"step-00000050", "step-00000100.set-aside-fresh", "latest"}


def test_what_an_earlier_attempt_wrote_above_the_resumed_step_is_fenced_off(tmp_path: Path) -> None:
    write(tmp_path, 100, attempt=1)
    write(tmp_path, 200, attempt=1)
    facts = [ResumeFact(2, 100)]
    run = Run(tmp_path, attempt=3)
    assert holds(run.checkpointer.find(facts), 100)
    assert run.named("checkpoint_damaged") == []
    [event] = run.named("checkpoint_set_aside")
    assert (event["step"], event["reason"]) == (200, "attempt 2 went on from step 100")
    write(tmp_path, 300, attempt=1)  # a process that would not die
    run.save(150)
    again = Run(tmp_path, attempt=4)
    assert holds(again.checkpointer.find([*facts, ResumeFact(3, 100)]), 150)
    assert names(tmp_path) >= {"step-00000200.set-aside-fenced", "step-00000300.set-aside-fenced"}


def test_a_writer_that_would_not_die_leaves_when_its_successor_has_started(tmp_path: Path) -> None:
    zombie = Run(tmp_path, attempt=1, keep_last=1)
    zombie.checkpointer.find()
    zombie.save(100)
    run = Run(tmp_path, attempt=2, keep_last=1)
    assert holds(run.checkpointer.find([ResumeFact(1, 0)]), 100)
    with pytest.raises(ConfigurationError, match="attempt 2 there, attempt 1 here") as caught:
        zombie.save(200)
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigurationError, match="a later attempt"):
        zombie.checkpointer.find()
    assert steps(tmp_path) == [100]
    assert run.save(200) is not None


@pytest.mark.parametrize("claim", [None, "", "x", "9" * 100])
def test_a_writer_that_missed_it_spoils_nothing_either(tmp_path: Path, claim: str | None) -> None:
    zombie = Run(tmp_path, attempt=1, keep_last=1)
    zombie.checkpointer.find()
    zombie.save(100)
    run = Run(tmp_path, attempt=2, keep_last=2)
    assert holds(run.checkpointer.find([ResumeFact(1, 0)]), 100)
    run.save(150)
    run.save(200)
    (tmp_path / "attempt").unlink()
    if claim is not None:
        (tmp_path / "attempt").write_text(claim)
    with pytest.raises(ConfigurationError, match="a later attempt"):
        zombie.save(200, seed=1)
    assert zombie.save(210, seed=1) is not None
    assert steps(tmp_path) == [210, 200, 150]
    run.save(220)
    assert steps(tmp_path) == [220, 200]
    assert run.named("checkpoint_set_aside")[0]["reason"] == "attempt 2 went on from step 100"
    again = Run(tmp_path, attempt=3)
    assert holds(again.checkpointer.find([ResumeFact(1, 0), ResumeFact(2, 100)]), 220)


def test_a_successor_that_starts_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published in that moment is fenced off later; nothing is deleted."""
    zombie = Run(tmp_path, attempt=1, keep_last=1)
    zombie.save(100)
    publish = store.publish

    def publish_and_start(tmp: Path, final: Path) -> None:
        publish(tmp, final)
        store.claim(tmp_path, 2)

    monkeypatch.setattr(store, "publish", publish_and_start)
    assert zombie.save(200) is not None
    assert steps(tmp_path) == [200, 100]


def test_with_the_resumed_checkpoint_gone_a_fenced_one_does_not_mean_step_0(tmp_path: Path) -> None:
    write(tmp_path, 200, attempt=1)
    with pytest.raises(DamagedCheckpointError, match="attempt 2 went on from step 100"):
        Run(tmp_path, attempt=3).checkpointer.find([ResumeFact(2, 100)])
    assert steps(tmp_path) == [200]
    assert Run(tmp_path, attempt=3).checkpointer.find([ResumeFact(2, 0)]) is None
    assert names(tmp_path) == {"step-00000200.set-aside-fenced"}


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 100, run_id="other")
    with pytest.raises(ConfigurationError, match="another run") as caught:
        Run(tmp_path).checkpointer.find()
    assert (caught.value.exit_code, steps(tmp_path)) == (78, [100])


def test_a_checkpoint_of_a_later_release_is_refused_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 100)
    newer = write(tmp_path, 200).folder
    reader = CheckpointReader.open(newer)
    (newer / MANIFEST).write_bytes(sealed(reader.manifest.model_dump(mode="json") | {"schema_version": 2}))
    with pytest.raises(ConfigurationError, match="later release"):
        Run(tmp_path).checkpointer.find()
    assert steps_or_refusal(tmp_path) == "refused"


def steps_or_refusal(checkpoints: Path) -> str:
    try:
        return str(steps(checkpoints))
    except ConfigurationError:
        return "refused"


def test_what_was_moved_aside_for_a_successor_that_never_came_is_used(tmp_path: Path) -> None:
    folder = write(tmp_path, 100).folder
    folder.rename(tmp_path / "step-00000100.replaced-00c0ffee")
    assert holds(Run(tmp_path, attempt=2).checkpointer.find(), 100)


# --- several ranks -------------------------------------------------------------------------------------------


def on_ranks(folder: Path, **options: Any) -> Checkpointer:
    settings: dict[str, Any] = {"run_id": RUN, "attempt": 1, "keep_last": 3} | options
    events: list[tuple[str, dict[str, Any]]] = []
    checkpointer = Checkpointer(
        folder, Control(), on_event=lambda name, fields: events.append((name, fields)), **settings
    )
    checkpointer.seen = events  # type: ignore[attr-defined]
    return checkpointer


def save_on(checkpointer: Checkpointer, step: int, **changes: Any) -> store.CheckpointInfo | None:
    state = make_state(step)
    held = split(state, checkpointer.collective.size)[checkpointer.collective.rank]
    given: dict[str, Any] = {
        "fragments": held,
        "expected": shapes_of(state),
        "scalars": {"step": step},
        "state": {"rows": step * 8},
        "topology": {},
    }
    return checkpointer.save(step, **(given | changes))


def outcome(work: Callable[[], Any]) -> str:
    """What came of it on this rank, as text."""
    try:
        return f"returned {work()!r}"
    except (ConfigurationError, DamagedCheckpointError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def save_and_find(folder: Path) -> tuple[int, str, list[str], bool]:
    checkpointer = on_ranks(folder)
    for step in (1, 2):
        assert save_on(checkpointer, step) is not None
    reader = on_ranks(folder, attempt=2).find(
        [ResumeFact(2, 1)] if checkpointer.collective.rank else []
    )  # rank 0's facts count
    assert reader is not None
    return reader.step, reader.digest, [name for name, _ in checkpointer.seen], holds(reader, 2)  # type: ignore[attr-defined]


@pytest.mark.dist(world=2)
def test_ranks_save_and_find_together(tmp_path: Path) -> None:
    first, second = run_ranks(save_and_find, 2, tmp_path / "two")
    assert first[:2] == second[:2]
    assert (first[0], first[3], second[3]) == (2, True, True)
    assert (first[2], second[2]) == (["checkpoint_durable"] * 2, [])
    alone = Run(tmp_path / "one")
    alone.save(2)
    assert digest(tmp_path / "one" / "step-00000002") == digest(tmp_path / "two" / "step-00000002")
    assert holds(Run(tmp_path / "two", attempt=3).checkpointer.find(), 2)


def save_with_a_limit_on_rank_1(folder: Path) -> tuple[list[bool], list[tuple[str, dict[str, Any]]]]:
    """A file size limit is a real refusal of the system (EFBIG), and of one process only."""
    checkpointer = on_ranks(folder)
    saved = [save_on(checkpointer, 1) is not None]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if checkpointer.collective.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        saved.append(save_on(checkpointer, 2) is not None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    saved.append(save_on(checkpointer, 3) is not None)
    return saved, checkpointer.seen  # type: ignore[attr-defined]


@pytest.mark.dist(world=2)
def test_one_ranks_refused_write_fails_the_save_on_all_and_the_run_goes_on(tmp_path: Path) -> None:
    (first, events), (second, _) = run_ranks(save_with_a_limit_on_rank_1, 2, tmp_path)
    assert first == second == [True, False, True]
    [failed] = [fields for name, fields in events if name == "checkpoint_failed"]
    assert (failed["ranks"], failed["cause"]) == ([1], "EFBIG")
    assert "rank-00001" in failed["path"]
    assert names(tmp_path) == {"step-00000001", "step-00000003", "latest"}


def broken(held: list[Fragment]) -> Iterator[Fragment]:
    yield from held[:1]
    raise LookupError("a mistake of rank 1")


def mistakes_of_rank_1(folder: Path) -> dict[str, str]:
    checkpointer = on_ranks(folder)
    rank = checkpointer.collective.rank
    held = split(make_state(9), 2)[rank]
    other = on_ranks(folder.with_name("elsewhere") if rank else folder)
    mine = {key: shape for key, shape in shapes_of(make_state(9)).items() if (key[0] == "scale") == (rank == 1)}
    clashing = {("embed.weight", "master"): (52,)} if rank else shapes_of(make_state(9))
    found: dict[str, str] = {}
    try:
        found["fragments"] = outcome(lambda: save_on(checkpointer, 9, fragments=broken(held) if rank else held))
    except LookupError as error:
        found["fragments"] = f"LookupError: {error}"
    found["step"] = outcome(lambda: save_on(checkpointer, 9 + rank, fragments=held))
    found["folder"] = outcome(lambda: save_on(other, 9))
    found["hole"] = outcome(lambda: save_on(checkpointer, 9, fragments=held[rank:]))
    found["scalars"] = outcome(lambda: save_on(checkpointer, 9, scalars={"step": rank}))
    found["shapes"] = outcome(lambda: save_on(checkpointer, 9, expected=clashing))
    found["state"] = outcome(lambda: save_on(checkpointer, 9, state={"x": float("nan")}))
    found["union"] = outcome(lambda: save_on(checkpointer, 9, expected=mine) is not None)
    return found


@pytest.mark.dist(world=2)
def test_mistakes_are_raised_on_every_rank_and_none_waits(tmp_path: Path) -> None:
    first, second = run_ranks(mistakes_of_rank_1, 2, tmp_path / "checkpoints")
    assert first["fragments"].startswith("RuntimeError: rank 1 stopped")
    assert "LookupError: a mistake of rank 1" in first["fragments"]
    assert second["fragments"] == "LookupError: a mistake of rank 1"
    for case in ("step", "folder"):
        assert first[case] == second[case]
        assert first[case].startswith("ConfigurationError")
    assert "rank 1: run run-1, attempt 1, step 10" in first["step"]
    assert "ranks [1] do not see" in first["folder"]
    assert not (tmp_path / "elsewhere").exists()
    assert first["hole"].startswith("TilingError: master/embed.weight: hole [26, 52)")
    assert second["hole"].startswith("RuntimeError: rank 0 stopped")
    for case in ("scalars", "shapes"):
        assert first[case] == second[case]
        assert first[case].startswith("ValueError")
    assert first["state"].startswith("ValueError")
    assert second["state"].startswith("RuntimeError: rank 0 stopped")
    assert first["union"] == second["union"] == "returned True"
    assert steps(tmp_path / "checkpoints") == [9]
    assert names(tmp_path / "checkpoints") == {"step-00000009", "latest"}


def find_on(folder: Path) -> str:
    def work() -> int:
        reader = on_ranks(folder, attempt=2).find()
        assert reader is not None
        return reader.step

    return outcome(work)


@pytest.mark.dist(world=2)
def test_damage_that_only_one_rank_reads_sends_all_to_the_older_checkpoint(tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = tmp_path / f"damage-{rank}"
        for step in (1, 2):
            info = write(folder, step)
        reader = CheckpointReader.open(info.folder)
        flip(info.folder / reader.share(rank, 2)[0], 5000 if rank else 4000)
        assert run_ranks(find_on, 2, folder) == ["returned 1"] * 2
        assert names(folder) == {"step-00000001", "step-00000002.set-aside-damaged"}


def find_apart(folder: Path) -> str:
    return find_on(folder / str(Control().rank))


@pytest.mark.dist(world=2)
def test_ranks_that_see_different_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0", 1, seed=1)
    first, second = run_ranks(find_apart, 2, tmp_path)
    assert first == second
    assert "ranks [1] do not see" in first
    write(tmp_path / "1", 1, seed=2)
    first, second = run_ranks(find_apart, 2, tmp_path)
    assert first == second
    assert first.startswith("ConfigurationError: the ranks see different checkpoints")
    assert steps(tmp_path / "0") == [1]


def test_a_single_process_is_a_collective() -> None:
    alone = SingleProcess()
    alone.barrier()
    assert (alone.broadcast_object(5), alone.all_gather_object(5)) == (5, [5])
