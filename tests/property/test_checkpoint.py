"""The checkpoint container under hypothesis: its codecs, any layout against any other, and a run's checkpoints
under saves, crashes, full disks, damage, restarts and retention, against a model of what must be left."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from solomonov.checkpoint import store
from solomonov.checkpoint.format import (
    FileEntry,
    FormatError,
    Manifest,
    TensorRecord,
    TilingError,
    check_tiling,
    decode_manifest,
    encode_manifest,
)
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.reader import CheckpointReader, diff, digest
from solomonov.checkpoint.store import ResumeFact
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.errors import DamagedCheckpointError
from tests.solomonov.checkpoint.common import Run, State, flip, make_state, shapes_of
from tests.support.kill_points import KillPoints

# --- codecs --------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
DIGESTS = st.binary(min_size=16, max_size=16).map(bytes.hex)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def cuts(draw: st.DrawFn, numel: int) -> list[tuple[int, int]]:
    """Ranges that tile [0, numel)."""
    inner = draw(st.sets(st.integers(1, numel - 1), max_size=4)) if numel > 1 else set()
    edges = [0, *sorted(inner), numel]
    return list(itertools.pairwise(edges))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    tensors = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        dtype = draw(st.sampled_from(["F32", "BF16", "I64"]))
        for start, end in draw(cuts(math.prod(shape))):
            file = f"rank-{draw(st.integers(0, 2)):05d}.safetensors"
            fields = {"name": name, "kind": "master", "dtype": dtype, "shape": shape, "start": start, "end": end}
            tensors.append(TensorRecord(**fields, file=file, key=f"master/{name}/{start}", xxh3_128=draw(DIGESTS)))
    names = [f"rank-{rank:05d}.safetensors" for rank in range(3)] + ["state.json"]
    sizes = st.integers(10**6, (1 << 62) - 1)
    return Manifest(
        run_id=draw(st.text()),
        step=draw(st.integers(0, (1 << 62) - 1)),
        parent_step=draw(st.none() | st.integers(0, 1000)),
        attempt=draw(st.integers(0, 1000)),
        created=draw(st.floats(allow_nan=False, allow_infinity=False)),
        topology=draw(st.dictionaries(st.text(), JSON, max_size=3)),
        files={name: FileEntry(size=draw(sizes), xxh3_128=draw(DIGESTS)) for name in names},
        tensors=tuple(tensors),
    )


@given(manifests())
def test_manifests_round_trip(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest)) == manifest


@given(manifests(), st.data())
def test_a_manifest_with_any_other_bytes_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    raw = bytearray(encode_manifest(manifest))
    start = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(st.binary(max_size=8))
    end = data.draw(st.integers(start, min(len(raw), start + 8)))
    changed = bytes(raw[:start] + other + raw[end:])
    if changed != raw:
        with pytest.raises(FormatError):
            decode_manifest(changed)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_manifest(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_manifest(raw)


@given(st.data())
def test_a_tiling_is_accepted_exactly_if_every_element_is_covered_once(data: st.DataObject) -> None:
    """Against counting: the number of ranges over each element."""
    numel = data.draw(st.integers(1, 12))
    bound = st.integers(0, numel)
    ranges = data.draw(
        st.permutations(data.draw(cuts(numel))) | st.lists(st.tuples(bound, bound), min_size=1, max_size=4)
    )
    records = [
        TensorRecord(
            name="w",
            kind="master",
            dtype="F32",
            shape=(numel,),
            start=start,
            end=end,
            file="f",
            key=str(i),
            xxh3_128="0" * 32,
        )
        for i, (start, end) in enumerate(ranges)
    ]
    covered = [sum(start <= element < end for start, end in ranges) for element in range(numel)]
    right = all(count == 1 for count in covered) and all(start < end for start, end in ranges)
    with contextlib.nullcontext() if right else pytest.raises(TilingError):
        check_tiling(records, {("w", "master"): (numel,)})


# --- any layout ----------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, state: State, ranks: int) -> list[list[Fragment]]:
    held: list[list[Fragment]] = [[] for _ in range(ranks)]
    for (name, kind), tensor in state.items():
        for start, end in draw(cuts(tensor.numel())):
            piece = tensor.reshape(-1)[start:end]
            fragment = Fragment(name, kind, tuple(tensor.shape), start, end, piece)
            held[draw(st.integers(0, ranks - 1))].append(fragment)
    return [draw(st.permutations(fragments)) for fragments in held]


def committed(folder: Path, held: list[list[Fragment]], state: State) -> Path:
    tmp = folder / "tmp"
    tmp.mkdir(parents=True)
    entries = [write_rank_file(tmp, rank, fragments) for rank, fragments in enumerate(held)]
    header = Header(run_id="run", step=1, attempt=1)
    final = folder / "step-00000001"
    return commit(tmp, final, entries=entries, expected=shapes_of(state), header=header).folder


@settings(max_examples=25)
@given(st.data())
def test_the_state_does_not_depend_on_the_layout(data: st.DataObject) -> None:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
    state: State = {}
    for i, shape in enumerate(data.draw(st.lists(SHAPES, min_size=1, max_size=4))):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        state[f"w{i}", data.draw(st.sampled_from(["master", "exp_avg"]))] = tensor.to(data.draw(dtypes))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = [
            committed(root / str(ranks), data.draw(layouts(state, ranks)), state)
            for ranks in (1, data.draw(st.integers(2, 4)))
        ]
        assert digest(folders[0]) == digest(folders[1])
        assert all(row.equal for row in diff(*folders))
        reader = CheckpointReader.open(folders[1], cache_bytes=data.draw(st.sampled_from([0, 1 << 20])))
        reader.verify()
        for (name, kind), tensor in state.items():
            start = data.draw(st.integers(0, tensor.numel()))
            end = data.draw(st.integers(start, tensor.numel()))
            assert torch.equal(reader.read(name, kind, start, end), tensor.reshape(-1)[start:end])


# --- a run's checkpoints -------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: raised at a point of a save and at every later one, so that no cleaning up works."""


@contextlib.contextmanager
def dying_at(point: int) -> Iterator[None]:
    def end() -> None:
        points.end_at = points.seen
        raise Crash

    points = KillPoints(point, end)
    points.install()
    try:
        yield
    except Crash:
        pass
    finally:
        points.remove()


@contextlib.contextmanager
def refusing_at(point: int) -> Iterator[list[str]]:
    """One call at the given point is refused as on a full disk; how many were, as the list's length."""
    refused: list[str] = []

    def end() -> None:
        refused.append("ENOSPC")
        raise OSError(errno.ENOSPC, "No space left on device")

    points = KillPoints(point, end)
    points.install()
    try:
        yield refused
    finally:
        points.remove()


class CheckpointsOfARun(RuleBasedStateMachine):
    """`declared` is what the last durable event said; `damaged` are the steps with a flipped bit; everything
    else that has a checkpoint's name must be whole."""

    @initialize(keep_last=st.integers(1, 3))
    def begin(self, keep_last: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.folder, self.keep_last, self.attempt = self.root / "checkpoints", keep_last, 0
        self.step, self.seed, self.dead = 0, 0, False
        self.declared: tuple[int, int] | None = None
        self.seeds: dict[int, list[int]] = {}
        self.damaged: set[int] = set()
        self.lost = False
        self.facts: list[ResumeFact] = []
        self._start(fresh=False)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def _present(self) -> list[int]:
        return [store.step_of(folder) for folder in store.candidates(self.folder)]

    def _whole(self) -> list[int]:
        return [step for step in self._present() if step not in self.damaged]

    def _start(self, fresh: bool) -> None:
        """A new attempt finds the newest whole checkpoint: at least the last declared one, if that is whole."""
        self.attempt, self.dead = self.attempt + 1, False
        self.run = Run(self.folder, attempt=self.attempt, keep_last=self.keep_last)
        store.recover(self.folder)
        whole = self._whole()
        if not fresh and not whole and (self.lost or self._present()):
            with pytest.raises(DamagedCheckpointError):
                self.run.checkpointer.find(self.facts)
            fresh = True
        reader = self.run.checkpointer.find(self.facts, fresh=fresh)
        if fresh or not whole:
            assert reader is None
            self.step, self.declared, self.damaged, self.lost = 0, None, set(), False
        else:
            assert reader is not None
            self.lost = self.lost or any(step in self.damaged for step in self._damaged_above(reader.step))
            assert reader.step == whole[0]
            self._check_numbers(reader)
            self.step, self.declared = reader.step, (reader.step, self._seed_of(reader))
            self.damaged = {step for step in self.damaged if step < reader.step}
        self.facts.append(ResumeFact(self.attempt, self.step))

    def _damaged_above(self, step: int) -> set[int]:
        return {other for other in self.damaged if other > step}

    def _seed_of(self, reader: CheckpointReader) -> int:
        for seed in self.seeds[reader.step]:
            if all(torch.equal(reader.read_tensor(*key), tensor) for key, tensor in make_state(seed).items()):
                return seed
        raise AssertionError(f"step {reader.step} holds numbers that nobody saved")

    def _check_numbers(self, reader: CheckpointReader) -> None:
        seed = self._seed_of(reader)
        if self.declared and self.declared[0] not in self.damaged:
            assert reader.step >= self.declared[0]
            if reader.step == self.declared[0]:
                seeds = self.seeds[reader.step]
                assert seeds.index(seed) >= seeds.index(self.declared[1]), "an older save of the same step"

    def _next(self, again: bool) -> tuple[int, int]:
        self.seed += 1
        step = self.step if again and self.step else self.step + 1
        self.seeds.setdefault(step, []).append(self.seed)
        return step, self.seed

    def _durable(self, step: int, before: list[int]) -> None:
        self.step, self.declared = step, (step, self.seeds[step][-1])
        self.damaged.discard(step)
        self.lost = self.lost or bool(self.damaged.intersection(before))
        kept = sorted({*before, step} - self.damaged, reverse=True)[: self.keep_last]
        left = set(self._present())
        assert set(kept) <= left, f"{kept} had to be kept, {sorted(left)} are left"
        assert len(left - self.damaged) <= self.keep_last
        assert not [path for path in self.folder.iterdir() if ".tmp-" in path.name or ".deleted-" in path.name]

    @precondition(lambda self: not self.dead)
    @rule(again=st.booleans())
    def save(self, again: bool) -> None:
        before = self._present()
        step, seed = self._next(again)
        assert self.run.save(step, seed=seed) is not None
        self._durable(step, before)

    @precondition(lambda self: not self.dead)
    @rule(again=st.booleans(), point=st.integers(0, 80))
    def crash(self, again: bool, point: int) -> None:
        step, seed = self._next(again)
        before = self._present()
        told = len(self.run.events)
        with dying_at(point):
            self.run.save(step, seed=seed)
        self.dead = True
        if ("checkpoint_durable", step) in [(name, fields.get("step")) for name, fields in self.run.events[told:]]:
            self.declared = (step, seed)
        if step in self._present() and (step not in before or self.declared == (step, seed)):
            self.damaged.discard(step)
        self.lost = self.lost or bool(store.set_aside_for(self.folder, "damaged"))
        self.damaged &= {*self._present(), *before}
        self._forget_damage_that_was_replaced(step)

    def _forget_damage_that_was_replaced(self, step: int) -> None:
        """A damaged folder was set aside, and the new one of its step stands: seen by its numbers."""
        folder = self.folder / store.folder_name(step)
        if step in self.damaged and folder.is_dir() and not isinstance(store.check(folder), store.DamagedFolder):
            self.damaged.discard(step)

    @precondition(lambda self: not self.dead)
    @rule(again=st.booleans(), point=st.integers(0, 40))
    def full_disk(self, again: bool, point: int) -> None:
        """The run goes on with what it had, whatever call was refused."""
        before = self._present()
        step, seed = self._next(again)
        with refusing_at(point) as refused:
            info = self.run.save(step, seed=seed)
        if info is not None:
            self.step, self.declared = step, (step, seed)
            self.damaged.discard(step)
            self.lost = self.lost or bool(store.set_aside_for(self.folder, "damaged"))
            return
        assert refused
        self.step = step  # the run goes on; the next save is not of an earlier step
        self.lost = self.lost or bool(store.set_aside_for(self.folder, "damaged"))
        self._forget_damage_that_was_replaced(step)
        assert set(before) - self.damaged <= set(self._present())
        assert self.run.named("checkpoint_failed")[-1]["cause"] == "ENOSPC"

    @precondition(lambda self: bool(self._present()))
    @rule(data=st.data())
    def damage(self, data: Any) -> None:
        step = data.draw(st.sampled_from(self._present()))
        if step in self.damaged:
            return
        files = sorted((self.folder / store.folder_name(step)).iterdir())
        path = data.draw(st.sampled_from(files))
        flip(path, data.draw(st.integers(0, 10**6)) % (path.stat().st_size * 8))
        self.damaged.add(step)
        # A running attempt trusts what it verified; a new one reads it again.
        self.dead = True

    @rule()
    def restart(self) -> None:
        self._start(fresh=False)

    @precondition(lambda self: self.attempt > 3)
    @rule()
    def start_afresh(self) -> None:
        self._start(fresh=True)

    @invariant()
    def names_are_whole(self) -> None:
        """Whatever has a checkpoint's name verifies, but for the flipped bits."""
        if hasattr(self, "folder"):
            for step in self._whole():
                found = store.check(self.folder / store.folder_name(step))
                assert isinstance(found, store.CheckpointInfo), f"step {step}: {found}"


CheckpointsOfARun.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestCheckpointsOfARun = CheckpointsOfARun.TestCase
