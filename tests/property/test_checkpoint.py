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
from hypothesis import Phase, given, settings
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
from solomonov.checkpoint.store import ResumeFact, superseded_by
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.errors import ConfigurationError, DamagedCheckpointError
from tests.solomonov.checkpoint.common import Run, State, flip, make_state, shapes_of, write
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
            record = TensorRecord(
                name=name,
                kind="master",
                dtype=dtype,
                shape=shape,
                start=start,
                end=end,
                file=file,
                key=f"master/{name}/{start}",
                xxh3_128=draw(DIGESTS),
            )
            tensors.append(record)
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
        assert all(row.equal for row in diff(folders[0], folders[1]))
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
    """`declared` is what the last durable event said; `damaged` are the steps with a flipped bit; whatever else
    has a checkpoint's name must be whole. Each new attempt must find the newest that is whole and not fenced off."""

    @initialize(keep_last=st.integers(1, 3))
    def begin(self, keep_last: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.folder, self.keep_last, self.attempt = self.root / "checkpoints", keep_last, 0
        self.step, self.seed = 0, 0
        self.declared: tuple[int, int] | None = None
        self.seeds: dict[int, list[int]] = {}
        self.damaged: set[int] = set()
        self.facts: list[ResumeFact] = []
        self.zombie: Run | None = None
        self._start(fresh=False)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def _present(self) -> list[int]:
        return [store.step_of(folder) for folder in store.candidates(self.folder)]

    def _usable(self) -> list[int]:
        """Steps of this line of history that are whole, newest first."""
        infos = [info for info in store.scan(self.folder) if info.step not in self.damaged]
        return [info.step for info in infos if not self._fenced(info)]

    def _fenced(self, info: store.CheckpointInfo) -> bool:
        return superseded_by(info.attempt, info.step, self.facts) is not None

    def _start(self, fresh: bool) -> None:
        """A new attempt: finds at least what was declared last, if that is whole, and refuses to forget."""
        self.zombie = getattr(self, "run", None)
        self.attempt += 1
        self.run = Run(self.folder, attempt=self.attempt, keep_last=self.keep_last)
        usable, present = self._usable(), self._present()
        least = self.declared[0] if self.declared and self.declared[0] not in self.damaged else 0
        fenced = {info.step for info in store.scan(self.folder) if self._fenced(info)}
        held = bool(self.damaged.intersection(present) - fenced or store.set_aside_for(self.folder, "damaged"))
        try:
            reader = self.run.checkpointer.find(self.facts, fresh=fresh)
        except DamagedCheckpointError:
            assert not fresh
            assert (least, usable) == (0, []), "what was durable and whole was not found"
            fresh = True
            reader = self.run.checkpointer.find(self.facts, fresh=True)
        if fresh:
            assert reader is None
            assert not self._present()
        elif reader is None:
            assert (held, least, usable) == (False, 0, []), "it started from step 0 again"
        else:
            assert reader.step == max([least, *usable])
            self._check_numbers(reader)
        self.step = reader.step if reader else 0
        self.declared = (reader.step, self._seed_of(reader)) if reader else None
        self.damaged &= set(self._present())
        self.facts.append(ResumeFact(self.attempt, self.step))

    def _seed_of(self, reader: CheckpointReader) -> int:
        for seed in self.seeds[reader.step]:
            if all(torch.equal(reader.read_tensor(*key), tensor) for key, tensor in make_state(seed).items()):
                return seed
        raise AssertionError(f"step {reader.step} holds numbers that nobody saved")

    def _check_numbers(self, reader: CheckpointReader) -> None:
        """Of a step that was saved several times, none older than the last durable one."""
        seed = self._seed_of(reader)
        if self.declared and reader.step == self.declared[0]:
            seeds = self.seeds[reader.step]
            assert seeds.index(seed) >= seeds.index(self.declared[1]), "an older save of the same step"

    def _next(self, again: bool) -> tuple[int, int]:
        self.seed += 1
        step = self.step if again and self.step else self.step + 1
        self.seeds.setdefault(step, []).append(self.seed)
        return step, self.seed

    def _stands(self, step: int) -> bool:
        """Whether a save went through that was interrupted or refused: seen by a folder that is whole."""
        folder = self.folder / store.folder_name(step)
        return folder.is_dir() and isinstance(store.check(folder), store.CheckpointInfo)

    @rule(again=st.booleans(), count=st.integers(1, 3))
    def save(self, again: bool, count: int) -> None:
        for _ in range(count):
            before = self._usable()
            step, seed = self._next(again)
            assert self.run.save(step, seed=seed) is not None
            self.step, self.declared = step, (step, seed)
            self.damaged.discard(step)
            kept = sorted({*before, step}, reverse=True)[: self.keep_last]
            assert self._usable() == kept
            names = [path.name for path in self.folder.iterdir()]
            assert not [name for name in names if ".tmp-" in name or ".deleted-" in name or ".replaced-" in name]

    @rule(again=st.booleans(), point=st.integers(0, 45), hurt=st.booleans(), data=st.data())
    def crash_and_restart(self, again: bool, point: int, hurt: bool, data: Any) -> None:
        step, seed = self._next(again)
        told = len(self.run.named("checkpoint_durable"))
        with dying_at(point):
            self.run.save(step, seed=seed)
        if len(self.run.named("checkpoint_durable")) > told:
            self.declared = (step, seed)
        if self._stands(step):
            self.damaged.discard(step)
        if hurt and self._present():
            self.damage_and_restart(1, data)
        else:
            self._start(fresh=False)

    @rule(again=st.booleans(), point=st.integers(0, 45))
    def full_disk(self, again: bool, point: int) -> None:
        """The run goes on with what it had, whatever call was refused."""
        before = self._usable()
        step, seed = self._next(again)
        with refusing_at(point) as refused:
            info = self.run.save(step, seed=seed)
        self.step = step  # the next save is not of an earlier step
        if self._stands(step):
            self.damaged.discard(step)
        if info is not None:
            self.declared = (step, seed)
        else:
            assert refused
            assert set(before) <= set(self._usable())
            assert self.run.named("checkpoint_failed")[-1]["cause"] == "ENOSPC"

    @precondition(lambda self: bool(self._present()))
    @rule(count=st.integers(1, 3), data=st.data())
    def damage_and_restart(self, count: int, data: Any) -> None:
        """A running attempt trusts what it verified; a new one reads it again."""
        for _ in range(count):
            step = data.draw(st.sampled_from(self._present()))
            if step not in self.damaged:
                path = data.draw(st.sampled_from(sorted((self.folder / store.folder_name(step)).iterdir())))
                flip(path, data.draw(st.integers(0, 10**6)) % (path.stat().st_size * 8))
                self.damaged.add(step)
        self._start(fresh=False)

    @precondition(lambda self: self.zombie is not None)
    @rule(above=st.integers(1, 3), missed=st.booleans())
    def zombie_saves(self, above: int, missed: bool) -> None:
        """The attempt before this one is not dead: it leaves, or publishes where it looked a moment too early;
        it takes nothing from this one's line of history."""
        assert self.zombie is not None
        before, step = self._usable(), self.step + above
        if missed:
            self.seed += 1
            write(self.folder, step, attempt=self.attempt - 1, seed=self.seed)
            self.damaged.discard(step)
        else:
            with pytest.raises(ConfigurationError, match="a later attempt"):
                self.zombie.save(step)
        assert self._usable() == before

    @rule(fresh=st.sampled_from([False, False, False, True]))
    def restart(self, fresh: bool) -> None:
        self._start(fresh)

    @invariant()
    def names_are_whole(self) -> None:
        """Whatever has a checkpoint's name verifies, but for the flipped bits."""
        if hasattr(self, "folder"):
            for step in set(self._present()) - self.damaged:
                found = store.check(self.folder / store.folder_name(step))
                assert isinstance(found, store.CheckpointInfo), f"step {step}: {found}"


CheckpointsOfARun.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=10,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining a failure takes minutes
)
TestCheckpointsOfARun = CheckpointsOfARun.TestCase
