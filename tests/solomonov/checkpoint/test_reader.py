"""Reading any range from any layout against the tensors that were saved; digests that know no layout; differences."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import xxhash

from solomonov.checkpoint.fragments import Fragment, whole
from solomonov.checkpoint.reader import CheckpointReader, diff, digest
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.errors import DamagedCheckpointError
from tests.solomonov.checkpoint.common import State, flip, make_state, write


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_range_of_every_tensor(tmp_path: Path, ranks: int) -> None:
    state = make_state(7)
    reader = CheckpointReader.open(write(tmp_path, 7, ranks=ranks).folder)
    assert reader.shapes() == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert reader.kinds() == ["buffer", "exp_avg", "master"]
    for (name, kind), tensor in state.items():
        assert name in reader.names(kind)
        assert reader.shape(name, kind) == tuple(tensor.shape)
        assert reader.dtype(name, kind) == tensor.dtype
        assert torch.equal(reader.read_tensor(name, kind), tensor)
        for start, end in itertools.combinations_with_replacement(range(tensor.numel() + 1), 2):
            got = reader.read(name, kind, start, end)
            assert torch.equal(got, tensor.reshape(-1)[start:end])
            assert got.dtype == tensor.dtype


def test_state_and_scalars(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 7).folder)
    assert (reader.step, reader.state, reader.scalars) == (7, {"rows": 56}, {"step": 7})


def test_what_it_does_not_hold(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 7).folder)
    for name, kind in (("scale", "ema"), ("nothing", "master")):
        with pytest.raises(KeyError, match=f"no {kind} of {name}"):
            reader.read(name, kind)
    for start, end in ((-1, 2), (3, 2), (0, 53)):
        with pytest.raises(ValueError, match="does not lie within"):
            reader.read("embed.weight", "master", start, end)


def test_what_was_read_can_be_written_to(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 7).folder)
    before = reader.read("embed.weight", "master").clone()
    reader.read("embed.weight", "master").zero_()
    assert torch.equal(reader.read("embed.weight", "master"), before)


def test_small_reads_of_a_fragment_verify_it_once(tmp_path: Path) -> None:
    """Seen by damaging it after the first read: what was verified is what is returned, until it is dropped."""
    info = write(tmp_path, 7, ranks=1)
    reader = CheckpointReader.open(info.folder, cache_bytes=0)
    reader.read("embed.weight", "master", 0, 1)
    path = info.folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-2000] + bytes(2000))
    expected = make_state(7)["embed.weight", "master"].reshape(-1)
    for start in range(52):
        assert torch.equal(reader.read("embed.weight", "master", start, start + 1), expected[start : start + 1])
    with pytest.raises(DamagedCheckpointError):
        reader.read("layers.0.norm", "master")


def test_the_cache_is_bounded_and_a_dropped_fragment_is_verified_again(tmp_path: Path) -> None:
    info = write(tmp_path, 7, ranks=1)
    reader = CheckpointReader.open(info.folder, cache_bytes=52 * 4 + 16)
    reader.read("embed.weight", "master")
    reader.read("layers.0.norm", "master")
    for path in info.folder.glob("rank*"):
        path.write_bytes(bytes(path.stat().st_size))
    reader.read("embed.weight", "master")
    reader.read("layers.0.norm", "master")
    other = CheckpointReader.open(write(tmp_path, 8, ranks=1).folder, cache_bytes=52 * 4)
    other.read("embed.weight", "master")
    other.read("layers.0.norm", "master")
    flip_all = other.folder / "rank-00000.safetensors"
    flip_all.write_bytes(bytes(flip_all.stat().st_size))
    with pytest.raises(DamagedCheckpointError):
        other.read("embed.weight", "master")


def test_only_the_fragments_of_the_range_are_read(tmp_path: Path) -> None:
    info = write(tmp_path, 7, ranks=4)
    for rank in (0, 1, 3):
        (info.folder / f"rank-{rank:05d}.safetensors").unlink()
    got = CheckpointReader.open(info.folder).read("embed.weight", "master", 26, 39)
    assert torch.equal(got, make_state(7)["embed.weight", "master"].reshape(-1)[26:39])


def test_shares_cover_every_file_once(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 7, ranks=3).folder)
    for size in (1, 2, 3, 9):
        shares = [reader.share(rank, size) for rank in range(size)]
        assert sorted(itertools.chain.from_iterable(shares)) == sorted(reader.manifest.files)
    assert reader.verify(reader.share(0, 2)) + reader.verify(reader.share(1, 2)) == reader.verify()


def test_digest_is_what_its_documentation_says(tmp_path: Path) -> None:
    state = make_state(7)
    hasher = xxhash.xxh3_128()
    for (name, kind), tensor in sorted(state.items(), key=lambda item: (item[0][1], item[0][0])):
        code = "I64" if kind == "buffer" else "F32"
        shape = ",".join(map(str, tensor.shape))
        hasher.update(f"{kind}\0{name}\0{code}\0{shape}\0".encode() + tensor.numpy().tobytes())
    for ranks in (1, 2, 5):
        assert digest(write(tmp_path / str(ranks), 7, ranks=ranks).folder) == hasher.hexdigest()


def test_digest_sees_every_part_of_the_state(tmp_path: Path) -> None:
    base = make_state(7)
    renamed: State = {(name.replace("norm", "form"), kind): tensor for (name, kind), tensor in base.items()}
    reshaped = base | {("embed.weight", "master"): base["embed.weight", "master"].reshape(4, 13)}
    nudged = base | {("scale", "exp_avg"): torch.nextafter(base["scale", "exp_avg"], torch.tensor(math.inf))}
    retyped = base | {("steps", "buffer"): base["steps", "buffer"].view(torch.float64)}
    states = [base, renamed, reshaped, nudged, retyped]
    digests = [digest(write(tmp_path / str(i), 7, state=state).folder) for i, state in enumerate(states)]
    assert len(set(digests)) == len(states)
    folders = [tmp_path / str(i) / "step-00000007" for i in (0, 3)]
    assert digest(folders[0], ["master"]) == digest(folders[1], ["master"])
    assert digest(folders[0], ["exp_avg"]) != digest(folders[1], ["exp_avg"])


def test_digest_verifies_on_the_way(tmp_path: Path) -> None:
    info = write(tmp_path, 7, ranks=1)
    path = info.folder / "rank-00000.safetensors"
    flip(path, path.stat().st_size * 8 - 1)
    with pytest.raises(DamagedCheckpointError):
        digest(info.folder)


def test_diff_across_layouts(tmp_path: Path) -> None:
    base = make_state(7)
    other = dict(base)
    other["embed.weight", "master"] = base["embed.weight", "master"] * 1.5
    other["layers.0.norm", "master"] = torch.full((4,), math.nan)
    other["scale", "master"] = torch.zeros(())
    other["scale", "exp_avg"] = torch.zeros(2)
    other["new", "ema"] = torch.zeros(2)
    del other["steps", "buffer"]
    a = write(tmp_path / "a", 7, state=base, ranks=3).folder
    b = write(tmp_path / "b", 7, state=other, ranks=2).folder
    rows = {(row.name, row.kind): row for row in diff(a, b)}
    assert rows.keys() == base.keys() | other.keys()
    equal = {key for key, row in rows.items() if row.equal}
    attention = {("layers.0.attn.q", "master"), ("layers.0.attn.q", "exp_avg")}
    assert equal == attention | {("embed.weight", "exp_avg"), ("layers.0.norm", "exp_avg")}
    relative = rows["embed.weight", "master"].relative
    assert relative == pytest.approx(1 / 3, rel=1e-6)
    assert rows["layers.0.norm", "master"].relative is None
    assert rows["scale", "master"].relative is None
    assert "shapes" in rows["scale", "exp_avg"].note
    assert rows["new", "ema"].note == "only in the second"
    assert rows["steps", "buffer"].note == "only in the first"
    assert all(row.equal and row.relative == 0.0 for row in diff(a, a))
    assert [row.kind for row in diff(a, b, ["ema"])] == ["ema"]


def test_diff_tells_equal_bytes_from_equal_numbers(tmp_path: Path) -> None:
    a: State = {("w", "master"): torch.tensor([0.0, 1.0])}
    b: State = {("w", "master"): torch.tensor([-0.0, 1.0])}
    c: State = {("w", "master"): torch.tensor([0.0, 1.0], dtype=torch.float64)}
    folders = [write(tmp_path / str(i), 1, state=state).folder for i, state in enumerate((a, b, c))]
    [signs] = diff(folders[0], folders[1])
    assert (signs.equal, signs.relative) == (False, 0.0)
    [types] = diff(folders[0], folders[2])
    assert (types.equal, types.relative) == (False, 0.0)
    assert "dtypes" in types.note


def test_nan_is_equal_to_the_same_nan(tmp_path: Path) -> None:
    state: State = {("w", "master"): torch.tensor([math.nan, 1.0])}
    folders = [write(tmp_path / str(ranks), 1, state=state, ranks=ranks).folder for ranks in (1, 2)]
    assert [row.equal for row in diff(folders[0], folders[1])] == [True]


def test_tensors_without_elements(tmp_path: Path) -> None:
    fragments = [whole("none", "buffer", torch.zeros(0, 3)), Fragment("w", "master", (2,), 0, 2, torch.ones(2))]
    (tmp_path / "tmp").mkdir()
    entry = write_rank_file(tmp_path / "tmp", 0, fragments)
    expected = {("none", "buffer"): (0, 3), ("w", "master"): (2,)}
    header = Header(run_id="run", step=1, attempt=1)
    info = commit(tmp_path / "tmp", tmp_path / "step-00000001", entries=[entry], expected=expected, header=header)
    reader = CheckpointReader.open(info.folder)
    assert reader.read_tensor("none", "buffer").shape == (0, 3)
    assert reader.verify() > 0
    assert digest(info.folder)
