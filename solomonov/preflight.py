"""Looks at the machines of a run before its first step, where its ranks are on several: one table, one verdict.

Two halves. Before the ranks join their process group, which hangs or fails without saying why where a port is closed,
they tell each other facts through the store by which they meet: devices, versions, code, clock, the run's folder. After
it, the machines measure the network between them. What cannot work ends the run with exit code 78 on all ranks; what is
only odd is said.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store

from solomonov.distributed import COLLECTIVE_TIMEOUT_SECONDS, Control, RankInfo
from solomonov.errors import ConfigurationError, SolomonovError
from solomonov.host import usable_cores, versions
from solomonov.links import measure_all, measure_pair, rounds
from solomonov.reach import Address, Answer, TimeServer, ask_all
from solomonov.runfolder import RunFolder
from solomonov.snapshot import code_digest

MAX_CLOCK_SECONDS = 1.0
"""Journals and logs of machines whose clocks differ by more cannot be read together; nothing that trains needs them."""
SLOW_LINK = 0.25
"""Share of the median bandwidth below which a pair of machines is named."""
ROOMY_CHECKPOINTS = 3
"""A folder with room for fewer is named; the newest one is only deleted after the next one stands."""
NODE_VARIABLE = "SOLOMONOV_NODE"
"""Environment variable with the name that the scheduler has for this machine; without it, the host name."""
BYTES_A_PARAMETER = 12
"""In a checkpoint: the fp32 master and two moments."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank tells."""

    rank: int
    node: int
    device: str
    device_bytes: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """What the first rank of a machine tells of it."""

    node: int
    host: str
    ranks: int
    cores: int
    versions: Mapping[str, str | None]
    code: str
    """Digest of the packages that it runs."""
    free_bytes: int
    """In the run's folder."""
    address: Mapping[str, Any]
    """Where it listens (`reach.Address`)."""


@dataclass(frozen=True)
class Sight:
    """What one machine sees of the others."""

    node: int
    answers: Mapping[int, Answer]
    folder_problem: str | None
    """What is wrong with the run's folder there; None: it is one folder with the others, and can be written."""


@dataclass
class Report:
    """The table and the verdict."""

    nodes: list[NodeFacts]
    ranks: list[RankFacts]
    sights: list[Sight]
    backend: str
    problems: list[str] = field(default_factory=list)
    """Why the run cannot work on these machines."""
    warnings: list[str] = field(default_factory=list)
    links: dict[tuple[int, int], float] = field(default_factory=dict)
    """Bytes a second, each way, between two machines."""
    all_reduce: float | None = None
    """Bus bandwidth over all ranks, bytes a second."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.problems:
            return f"these machines cannot train this run: {self.problems[0]}"
        return "good" if not self.warnings else f"good, but: {'; '.join(self.warnings)}"

    def lines(self) -> list[str]:
        """The table, for people."""
        head = ("node", "host", "ranks", "device", "clock", "free", "slowest link")
        rows = [head, *(self._row(facts) for facts in self.nodes)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.all_reduce is not None:
            lines.append(
                f"all-reduce over {len(self.ranks)} ranks ({self.backend}): {_rate(self.all_reduce)} bus bandwidth"
            )
        lines += [f"problem: {text}" for text in self.problems] + [f"odd: {text}" for text in self.warnings]
        return [*lines, f"preflight: {self.verdict}"]

    def _row(self, facts: NodeFacts) -> tuple[str, ...]:
        mine = [rank for rank in self.ranks if rank.node == facts.node]
        kinds = sorted({rank.device for rank in mine})
        links = {pair: rate for pair, rate in self.links.items() if facts.node in pair}
        slowest = min(links, key=links.__getitem__, default=None)
        numbers = [rank.rank for rank in mine]
        return (
            str(facts.node),
            facts.host,
            f"{min(numbers)}-{max(numbers)}" if len(numbers) > 1 else str(numbers[0]),
            f"{len(mine)} x {' / '.join(kinds)}",
            f"{self._offset(facts.node) * 1e3:+.1f} ms",
            _size(facts.free_bytes),
            "" if slowest is None else f"{_rate(links[slowest])} to {sum(slowest) - facts.node}",
        )

    def _offset(self, node: int) -> float:
        """Seconds that a machine's clock is ahead of machine 0's."""
        answer = self.sights[0].answers.get(node) if self.sights else None
        return answer.offset_seconds if answer is not None else 0.0

    def record(self) -> dict[str, Any]:
        """For the journal."""
        known = {
            f"{first}-{second}": round(rate)
            for (first, second), rate in sorted(self.links.items(), key=lambda item: item[1])[:16]
        }
        return {
            "verdict": self.verdict,
            "problems": self.problems,
            "warnings": self.warnings,
            "backend": self.backend,
            "ranks": len(self.ranks),
            "nodes": [
                {"host": facts.host, "ranks": facts.ranks, "free_bytes": facts.free_bytes,
                 "clock_offset_seconds": round(self._offset(facts.node), 6)}
                for facts in self.nodes
            ],
            "slowest_links_bytes_per_second": known,
            "all_reduce_bytes_per_second": None if self.all_reduce is None else round(self.all_reduce),
        }  # fmt: skip


def judge(report: Report, checkpoint_bytes: int, *, goes_on: bool = False) -> None:
    """Fill in what is wrong and what is odd with the machines, from what is known so far.

    Args:
        checkpoint_bytes: of one checkpoint of this run.
        goes_on: the run has a checkpoint: a disk that is full meanwhile does not end it.
    """
    problems, warnings = report.problems, report.warnings
    first, *others = report.nodes
    for other in others:
        for name in sorted(first.versions.keys() | other.versions.keys()):
            mine, theirs = first.versions.get(name), other.versions.get(name)
            if mine != theirs:
                problems.append(f"{name} is {mine} on {first.host}, {theirs} on {other.host}")
        if other.code != first.code:
            problems.append(f"{first.host} and {other.host} run different code ({first.code}, {other.code})")
    if len({rank.device == "CPU" for rank in report.ranks}) > 1:
        lacking = next(rank for rank in report.ranks if rank.device == "CPU")
        problems.append(f"rank {lacking.rank} has no CUDA device, others have ({report.nodes[lacking.node].host})")
    hosts = {facts.node: facts.host for facts in report.nodes}
    for sight in report.sights:
        host = hosts[sight.node]
        if sight.folder_problem is not None:
            problems.append(f"{host}: {sight.folder_problem}")
        for node, answer in sight.answers.items():
            if answer.problem is not None:
                problems.append(f"{host} does not reach {hosts[node]} ({answer.problem})")
            elif abs(answer.offset_seconds) > MAX_CLOCK_SECONDS and sight.node < node:
                warnings.append(f"the clocks of {host} and {hosts[node]} are {abs(answer.offset_seconds):.1f} s apart")
    _judge_devices(report)
    free = min(facts.free_bytes for facts in report.nodes)
    if free < checkpoint_bytes:
        words = f"{_size(free)} are free in the run's folder, a checkpoint takes {_size(checkpoint_bytes)}"
        (warnings if goes_on else problems).append(words)
    elif free < ROOMY_CHECKPOINTS * checkpoint_bytes:
        count = free // checkpoint_bytes
        warnings.append(f"the run's folder has room for {count} checkpoint{'s' if count > 1 else ''} only")


def _judge_devices(report: Report) -> None:
    """Ranks wait for the slowest of them, and the smallest memory is what a layout must fit."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for rank in report.ranks:
        kinds.setdefault((rank.device, rank.device_bytes >> 30), []).append(rank.rank)
    if len(kinds) > 1 and not report.problems:
        listed = ", ".join(f"{len(ranks)} x {device} ({gib} GiB)" for (device, gib), ranks in kinds.items())
        report.warnings.append(f"the ranks' devices differ: {listed}")


def judge_links(report: Report) -> None:
    """Name the pairs of machines whose link is far slower than the others."""
    if len(report.links) < 3:  # nothing says which of two is the odd one
        return
    median = statistics.median(report.links.values())
    hosts = {facts.node: facts.host for facts in report.nodes}
    for (first, second), rate in sorted(report.links.items(), key=lambda item: item[1]):
        if rate < SLOW_LINK * median:
            pair = f"{hosts[first]} and {hosts[second]}"
            report.warnings.append(f"the link between {pair} carries {_rate(rate)}, the median {_rate(median)}")


class Preflight:
    """One rank's part. All ranks call `exchange` before they join their process group, and `measure` in it."""

    def __init__(self, run: RunFolder, info: RankInfo, device: torch.device, store: Store) -> None:
        self._run, self._info, self._device = run, info, device
        self._store = PrefixStore("preflight", store)
        self._leads = info.local_rank == 0
        self._folder = run.path / "preflight"
        self.report: Report | None = None
        """On rank 0."""

    def exchange(self) -> None:
        """The first half: tell facts, look at the others, obey rank 0's verdict.

        Raises:
            ConfigurationError: these machines cannot work; the same on all ranks.
            SolomonovError: ranks did not come.
        """
        info, store = self._info, self._store
        if info.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            store.set("nonce", os.urandom(16).hex())
        self._put(f"rank/{info.rank}", asdict(_rank_facts(info, self._device)))
        if self._leads:
            with TimeServer(os.environ["MASTER_ADDR"]) as server:
                self._look(store.get("nonce").decode(), server.address)
                problems = self._get("verdict")
        else:
            problems = self._get("verdict")
        if problems:
            raise _unfit(problems)

    def _look(self, nonce: str, address: Address) -> None:
        """The part of a machine's first rank; on rank 0 the verdict as well."""
        info = self._info
        problem = self._leave_token(nonce)
        self._put(f"node/{info.node}", asdict(_node_facts(info, self._run, address)))
        if info.rank == 0:
            ranks = [RankFacts(**facts) for facts in self._collect("rank", info.world)]
            self._put("nodes", self._collect("node", max(rank.node for rank in ranks) + 1))
        nodes = [NodeFacts(**facts) for facts in self._get("nodes")]
        others = {facts.node: Address(**facts.address) for facts in nodes if facts.node != info.node}
        problem = problem or self._look_for_tokens(nonce, nodes)
        self._put(f"sight/{info.node}", asdict(Sight(info.node, ask_all(others), problem)))
        if info.rank == 0:
            sights = [_sight(facts) for facts in self._collect("sight", len(nodes))]
            shutil.rmtree(self._folder, ignore_errors=True)
            backend = "nccl" if self._device.type == "cuda" else "gloo"
            self.report = Report(nodes, ranks, sights, backend)
            goes_on = self._run.journal.last("checkpoint_durable") is not None
            judge(self.report, self._checkpoint_bytes(), goes_on=goes_on)
            if self.report.problems:
                self.publish()
            self._put("verdict", self.report.problems)

    def measure(self, control: Control) -> None:
        """The second half, in the process group: the network. Rank 0 then says how it stands."""
        info = self._info
        leaders = control.all_gather_object((info.node, self._leads))
        rank_of = {node: rank for rank, (node, leads) in enumerate(leaders) if leads}
        rates: dict[tuple[int, int], float] = {}
        all_reduce = measure_all(self._device)
        for pairs in rounds(len(rank_of)):
            mine = next((pair for pair in pairs if self._leads and info.node in pair), None)
            if mine is not None:
                [other] = set(mine) - {info.node}
                rates[mine] = measure_pair(rank_of[other], self._device)
            control.barrier()  # rounds that overlap would share a machine's link
        found = control.all_gather_object(rates)
        if self.report is not None:
            self.report.links = {pair: rate for part in found for pair, rate in part.items()}
            self.report.all_reduce = all_reduce
            judge_links(self.report)
            self.publish()

    def publish(self) -> None:
        """The table in rank 0's log, and the record in the journal."""
        assert self.report is not None, "rank 0's"
        print("\n".join(self.report.lines()), flush=True)
        self._run.journal.try_write("preflight", **self.report.record())

    def _checkpoint_bytes(self) -> int:
        parameters = int(self._run.resolved()["derived"]["parameters"])
        return BYTES_A_PARAMETER * parameters

    def _leave_token(self, nonce: str) -> str | None:
        """A file in the run's folder for the other machines; what went wrong, or None."""
        try:
            self._folder.mkdir(exist_ok=True)
            (self._folder / f"{nonce}-{self._info.node}").write_text(nonce, encoding="ascii")
        except OSError as error:
            return f"the run's folder cannot be written: {error.strerror} ({error.filename})"
        return None

    def _look_for_tokens(self, nonce: str, nodes: Sequence[NodeFacts]) -> str | None:
        """The other machines' files: names that nobody has looked for before, so that no cache denies them."""
        for facts in nodes:
            path = self._folder / f"{nonce}-{facts.node}"
            if not path.exists():
                return f"the run's folder is not shared: what {facts.host} wrote is not seen there ({path})"
        return None

    def _put(self, key: str, value: object) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _collect(self, kind: str, count: int) -> list[Any]:
        keys = [f"{kind}/{number}" for number in range(count)]
        try:
            self._store.wait(keys, datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS))
        except DistStoreError as error:
            missing = [key for key in keys if not self._store.check([key])]
            raise SolomonovError(
                "not all ranks of the run came",
                got=f"nothing from {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}",
                rule=f"all {self._info.world} ranks are there within {COLLECTIVE_TIMEOUT_SECONDS} s",
                remedy=f"see their logs in {self._run.logs}",
            ) from error
        return [self._get(key) for key in keys]


def _rank_facts(info: RankInfo, device: torch.device) -> RankFacts:
    if device.type != "cuda":
        return RankFacts(info.rank, info.node, "CPU")
    properties = torch.cuda.get_device_properties(device)
    return RankFacts(info.rank, info.node, properties.name, properties.total_memory)


def _node_facts(info: RankInfo, run: RunFolder, address: Address) -> NodeFacts:
    found = {**versions(), "CUDA of torch": torch.version.cuda}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    return NodeFacts(
        node=info.node,
        host=os.environ.get(NODE_VARIABLE) or platform.node(),
        ranks=info.local_world,
        cores=usable_cores(),
        versions=found,
        code=code_digest(Path(__file__).resolve().parent.parent),
        free_bytes=shutil.disk_usage(run.path).free,
        address=asdict(address),
    )


def _sight(facts: Mapping[str, Any]) -> Sight:
    answers = {int(node): Answer(**answer) for node, answer in facts["answers"].items()}
    return Sight(facts["node"], answers, facts["folder_problem"])


def _unfit(problems: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        "these machines cannot train this run",
        got="; ".join(problems),
        rule="the machines of a run have equal versions and code, one run folder that all write and that has room "
        "for a checkpoint, and reach each other",
        remedy="mend that, or leave the machine out (launch.slurm.exclude), and submit the run again",
    )


def _rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
