"""Rank files against the safetensors library; storage that lies, fills up or forgets; commits that must not be."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from solomonov.checkpoint import files, store
from solomonov.checkpoint.format import TilingError
from solomonov.checkpoint.fragments import Fragment, whole
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from tests.solomonov.checkpoint.common import Run, make_state, shapes_of, small_disk, split

HEADER = Header(run_id="run", step=7, attempt=1)
MIXED = [
    whole("a", "buffer", torch.tensor([True, False, True])),
    whole("b", "master", torch.randn(5, 3)),
    whole("c", "master", torch.randn(7).to(torch.bfloat16)),
    Fragment("d", "exp_avg", (100,), 40, 43, torch.randn(3, dtype=torch.float64)),
    Fragment("e", "master", (100,), 100, 100, torch.zeros(0)),
    whole("f", "buffer", torch.zeros(0, 3)),
    whole("g", "frozen", torch.tensor(7)),
]


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path, 3, MIXED)
    assert entry.file == "rank-00003.safetensors"
    stored = load_file(tmp_path / entry.file)
    kept = [fragment for fragment in MIXED if fragment.name != "e"]
    assert stored.keys() == {fragment.key for fragment in kept} == {record.key for record in entry.records}
    for fragment in kept:
        assert stored[fragment.key].dtype == fragment.data.dtype
        assert torch.equal(stored[fragment.key], fragment.data)


def test_a_rank_that_owns_nothing_writes_a_valid_file(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path, 0, [])
    assert load_file(tmp_path / entry.file) == {}
    assert entry.records == ()


def test_tensors_are_aligned_and_bytes_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_rank_file(tmp_path / "a", 0, MIXED)
    second = write_rank_file(tmp_path / "b", 0, MIXED[::-1])
    assert first == second
    raw = (tmp_path / "a" / first.file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    sizes = {fragment.key: fragment.data.element_size() for fragment in MIXED}
    for key, entry in json.loads(raw[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % sizes[key] == 0


def test_the_same_fragment_twice_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="master/b/0 twice"):
        write_rank_file(tmp_path, 0, [MIXED[1], MIXED[1]])


def test_storage_that_loses_a_block_after_success_is_caught_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system's hole: the write and the sync succeed, and a 512-byte block reads as zeros."""
    sync = os.fsync

    def sync_and_lose(descriptor: int) -> None:
        sync(descriptor)
        os.pwrite(descriptor, bytes(512), 1024)

    monkeypatch.setattr(os, "fsync", sync_and_lose)
    with pytest.raises(OSError, match="read back") as caught:
        write_rank_file(tmp_path, 0, [whole("w", "master", torch.ones(1000))])
    assert caught.value.errno == errno.EIO


def test_a_small_file_that_the_disk_altered_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replace_and_lose(source: Path, target: Path) -> None:
        replace(source, target)
        os.truncate(target, 5)

    [held] = split(make_state(1), 1)
    entry = write_rank_file(tmp_path, 0, held)
    monkeypatch.setattr(os, "replace", replace_and_lose)
    with pytest.raises(OSError, match="not those written"):
        commit(tmp_path, tmp_path, entries=[entry], expected=shapes_of(make_state(1)), header=HEADER)


def test_a_really_full_disk_is_enospc(tmp_path: Path) -> None:
    with small_disk("256k") as disk:
        with pytest.raises(OSError) as caught:
            write_rank_file(disk, 0, [whole("w", "master", torch.ones(100_000))])
        assert caught.value.errno == errno.ENOSPC
        os.unlink(disk / "rank-00000.safetensors")
        assert write_rank_file(disk, 0, [whole("w", "master", torch.ones(1000))]).entry.size > 4000


def committed(tmp_path: Path, ranks: int, header: Header = HEADER) -> store.CheckpointInfo:
    state = make_state(1)
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    entries = [write_rank_file(tmp, rank, held) for rank, held in enumerate(split(state, ranks))]
    final = tmp_path / "step-00000007"
    return commit(tmp, final, entries=entries, expected=shapes_of(state), header=header)


def test_commit_gives_the_folder_its_name_and_files(tmp_path: Path) -> None:
    header = Header(
        run_id="run",
        step=7,
        attempt=2,
        parent_step=5,
        topology={"pipeline": 2},
        scalars={"step": 6},
        state={"rows": 10, "schedule": {"lr": 1e-3}},
    )
    info = committed(tmp_path, 3, header)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    names = ["MANIFEST.json", *(f"rank-0000{rank}.safetensors" for rank in range(3)), "state.json"]
    assert sorted(path.name for path in info.folder.iterdir()) == names
    assert info.nbytes == sum(path.stat().st_size for path in info.folder.iterdir())
    reader = CheckpointReader.open(info.folder)
    assert (reader.state, reader.scalars) == (header.state, header.scalars)
    assert (reader.manifest.parent_step, reader.manifest.attempt) == (5, 2)
    assert reader.manifest.topology == {"pipeline": 2}
    assert (reader.manifest.ledger, reader.manifest.statistics) == (None, None)
    assert reader.digest == info.digest


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"loss": float("inf")}, {"x": b"bytes"}], ids=str)
def test_state_that_json_cannot_hold_is_a_mistake(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        committed(tmp_path, 1, Header(run_id="run", step=7, attempt=1, state=state))
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_a_hole_is_not_committed(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in make_state(1).items() if key[0] == "embed.weight"}
    entries = [write_rank_file(tmp_path, rank, held) for rank, held in enumerate(split(state, 2))]
    final = tmp_path / "step-00000007"
    with pytest.raises(TilingError, match=r"exp_avg/embed\.weight: hole \[26, 52\) of \[0, 52\)"):
        commit(tmp_path, final, entries=entries[:1], expected=shapes_of(state), header=HEADER)
    with pytest.raises(ValueError, match="two entries of one rank"):
        commit(tmp_path, final, entries=[*entries, entries[0]], expected=shapes_of(state), header=HEADER)
    assert not final.exists()
    assert not (tmp_path / "MANIFEST.json").exists()


def test_a_rank_file_that_is_short_where_it_is_committed_is_refused(tmp_path: Path) -> None:
    """Another machine wrote it; this one does not see all of it."""
    [held] = split(make_state(1), 1)
    entry = write_rank_file(tmp_path, 0, held)
    os.truncate(tmp_path / entry.file, entry.entry.size - 1)
    with pytest.raises(OSError, match="where it was written"):
        commit(tmp_path, tmp_path / "x", entries=[entry], expected=shapes_of(make_state(1)), header=HEADER)


def test_large_tensors_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    tensor = torch.randn(1000)
    entry = write_rank_file(tmp_path, 0, [whole("w", "master", tensor)])
    assert torch.equal(load_file(tmp_path / entry.file)["master/w/0"], tensor)


class Durability:
    """What a loss of power could take: file contents since their last sync, folder entries since theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: set[tuple[int, int]] = set()
        real = {name: getattr(os, name) for name in ("write", "fsync", "open", "rename", "replace", "mkdir", "unlink")}

        def mark(status: os.stat_result) -> None:
            self.unsynced.add((status.st_dev, status.st_ino))

        def write(descriptor: int, data: Any) -> int:
            mark(os.fstat(descriptor))
            return int(real["write"](descriptor, data))

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            status = os.fstat(descriptor)
            self.unsynced.discard((status.st_dev, status.st_ino))

        def entry(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = real[name](*args, **kwargs)
                paths = args[:2] if name in ("rename", "replace") else args[:1]
                if name != "open" or args[1] & os.O_CREAT:
                    for path in paths:
                        mark(os.stat(Path(path).parent))
                return result

            return call

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("open", "rename", "replace", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, entry(name))

    def at_risk(self, folder: Path) -> list[str]:
        """Files and folders, from `folder` up to the last one that the test made, that are not all on disk."""
        paths = [folder, *folder.iterdir(), folder.parent, folder.parent.parent]
        return [p.name for p in paths if (p.stat().st_dev, p.stat().st_ino) in self.unsynced]


def test_what_is_called_durable_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL loses no page of the cache, so the order of syncs is checked by itself, at each durable event."""
    tracker = Durability(monkeypatch)
    folder, told = tmp_path / "run" / "checkpoints", []
    run = Run(folder, keep_last=1)

    def on_event(name: str, fields: dict[str, Any]) -> None:
        told.append((name, tracker.at_risk(folder / fields["folder"])))

    run.checkpointer._on_event = on_event
    (tmp_path / "x").write_bytes(b"")
    os.rename(tmp_path / "x", tmp_path / "y")
    assert tracker.unsynced, "the tracker sees nothing"
    for step, seed in ((1, 1), (1, 2)):
        run.save(step, seed=seed)
    assert told == [("checkpoint_durable", [])] * 2
