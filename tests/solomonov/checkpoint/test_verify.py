"""Damage of every kind is found before a tensor is returned: flipped bits, cut files, links, hostile headers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from solomonov.checkpoint import store, verify
from solomonov.checkpoint.format import MANIFEST, STATE
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.errors import ConfigurationError, DamagedCheckpointError
from tests.solomonov.checkpoint.common import flip, make_state, ordinary_user, write
from tests.support.sampling import FULL, sampler

FLIPS, CUTS = (1000, 200) if FULL else (60, 20)
RANK_FILE = "rank-00000.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoints", 7).folder


def load_all(folder: Path) -> None:
    """What a resuming rank does, without the verification of whole files before."""
    reader = CheckpointReader.open(folder)
    for name, kind in reader.shapes():
        reader.read_tensor(name, kind)
    assert reader.state
    assert reader.scalars


def test_an_undamaged_checkpoint_verifies(checkpoint: Path) -> None:
    manifest, _ = verify.open_manifest(checkpoint)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
    assert verify.verify_files(checkpoint, manifest) == sum(sizes.values())
    assert verify.verify_files(checkpoint, manifest, [STATE]) == sizes[STATE]
    load_all(checkpoint)


def files_and_bits(folder: Path) -> list[tuple[Path, int]]:
    """Every file, chosen in turn, and a bit of it drawn from the tree's seed."""
    draw, paths = sampler("bit flips"), sorted(folder.iterdir())
    return [(path := paths[i % len(paths)], draw.randrange(path.stat().st_size * 8)) for i in range(FLIPS)]


def test_flipped_bits_are_all_found_and_the_older_checkpoint_is_used(checkpoint: Path) -> None:
    older = write(checkpoint.parent, 6)
    for path, bit in files_and_bits(checkpoint):
        flip(path, bit)
        found = store.newest_verified(checkpoint.parent)
        assert found == older, f"bit {bit} of {path.name} passed verification"
        flip(path, bit)
    newest = store.newest_verified(checkpoint.parent)
    assert newest is not None
    assert newest.folder == checkpoint


def test_no_flipped_bit_of_a_tensor_reaches_a_reader(checkpoint: Path) -> None:
    """Without the verification of whole files: either the read fails, or every tensor is right."""
    state = make_state(7)
    caught = 0
    for path, bit in files_and_bits(checkpoint):
        flip(path, bit)
        try:
            reader = CheckpointReader.open(checkpoint)
            for (name, kind), tensor in state.items():
                assert torch.equal(reader.read_tensor(name, kind), tensor)
        except DamagedCheckpointError:
            caught += 1
        flip(path, bit)
    assert caught > FLIPS // 4


def test_cut_files_are_all_found(checkpoint: Path) -> None:
    draw, paths = sampler("cuts"), sorted(checkpoint.iterdir())
    for i in range(CUTS):
        path = paths[i % len(paths)]
        data = path.read_bytes()
        os.truncate(path, draw.randrange(len(data)))
        assert store.newest_verified(checkpoint.parent) is None, path.name
        path.write_bytes(data + b"\0")
        assert store.newest_verified(checkpoint.parent) is None, f"{path.name} is longer than it was"
        path.write_bytes(data)
    assert store.newest_verified(checkpoint.parent) is not None


@pytest.mark.parametrize("name", [MANIFEST, STATE, RANK_FILE])
@pytest.mark.parametrize("fault", ["missing", "link", "folder", "pipe", "empty"])
def test_what_is_no_regular_file_is_damage(checkpoint: Path, name: str, fault: str) -> None:
    path = checkpoint / name
    path.rename(checkpoint.parent / "elsewhere")
    if fault == "link":
        path.symlink_to(checkpoint.parent / "elsewhere")
    elif fault == "folder":
        path.mkdir()
    elif fault == "pipe":
        os.mkfifo(path)
    elif fault == "empty":
        path.touch()
    with pytest.raises(DamagedCheckpointError, match=name):
        load_all(checkpoint)
    assert store.newest_verified(checkpoint.parent) is None


def test_the_message_names_the_file_and_both_digests(checkpoint: Path) -> None:
    info = store.scan(checkpoint.parent)[0]
    manifest, _ = verify.open_manifest(checkpoint)
    flip(checkpoint / RANK_FILE, 4321)
    with pytest.raises(DamagedCheckpointError) as caught:
        store.verify_checkpoint(info)
    assert RANK_FILE in caught.value.what
    assert manifest.files[RANK_FILE].xxh3_128 in caught.value.rule
    assert "xxh3-128" in caught.value.got
    assert caught.value.exit_code == 74


def with_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(table) or table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


KEY = "master/embed.weight/0"


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop(KEY) and table,
        lambda table: table | {"__metadata__": {}},
        lambda table: table[KEY].update(data_offsets=[-104, 0]),
        lambda table: table[KEY].update(data_offsets=[10**12, 10**12 + 104]),
        lambda table: table[KEY].update(data_offsets=[0, 10**12]),
        lambda table: table[KEY].update(data_offsets=[False, 104]),
        lambda table: table[KEY].update(data_offsets="ab"),
        lambda table: table[KEY].update(dtype="I32"),
        lambda table: table[KEY].update(shape=[2, 13]),
        lambda table: table | {KEY: 5},
        lambda table: [table],
    ],
)
def test_hostile_headers_are_refused(
    checkpoint: Path, change: Callable[[dict[str, dict[str, object]]], object]
) -> None:
    with_header(checkpoint / RANK_FILE, change)
    with pytest.raises(DamagedCheckpointError, match="header"):
        CheckpointReader.open(checkpoint).read("embed.weight", "master")


@pytest.mark.parametrize("head", [b"\xff" * 8, (10**7).to_bytes(8, "little"), b"\x02\0\0\0\0\0\0\0[]", b"\x01"])
def test_hostile_header_lengths_are_refused(checkpoint: Path, head: bytes) -> None:
    (checkpoint / RANK_FILE).write_bytes(head)
    with pytest.raises(DamagedCheckpointError, match="header"):
        CheckpointReader.open(checkpoint).read("embed.weight", "master")


def test_deeply_nested_headers_are_refused(checkpoint: Path) -> None:
    (checkpoint / RANK_FILE).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
    with pytest.raises(DamagedCheckpointError, match="header"):
        CheckpointReader.open(checkpoint).read("embed.weight", "master")


def test_swapped_offsets_of_two_tensors_do_not_deceive_the_reader(checkpoint: Path) -> None:
    def swap(table: dict[str, dict[str, object]]) -> None:
        one, two = table["master/layers.0.attn.q/0"], table["exp_avg/layers.0.attn.q/0"]
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]

    with_header(checkpoint / RANK_FILE, swap)
    with pytest.raises(DamagedCheckpointError, match="xxh3-128"):
        CheckpointReader.open(checkpoint).read("layers.0.attn.q", "master")


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_a_pickle_under_any_name_is_never_opened(checkpoint: Path, suffix: str) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (os.mkdir, (str(checkpoint.parent / "executed"),))

    torch.save(Attack(), checkpoint / f"rank-00000{suffix}")
    load_all(checkpoint)
    shutil.copy(checkpoint / f"rank-00000{suffix}", checkpoint / RANK_FILE)
    with pytest.raises(DamagedCheckpointError):
        load_all(checkpoint)
    assert not (checkpoint.parent / "executed").exists()


def test_no_permission_is_not_damage() -> None:
    with ordinary_user() as folder:
        checkpoint = write(folder, 7).folder
        (checkpoint / MANIFEST).chmod(0)
        with pytest.raises(ConfigurationError, match="permission"):
            CheckpointReader.open(checkpoint)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        verify.open_manifest(tmp_path / "step-00000001")
