"""Rows for training, built inline against rows from Ray data workers.

    python -m benchmarks.stream [--out FILE] [--quick]

The data: source text of Python's standard library through `data_pipeline.prepare`, rows of 512, in a temporary folder.
The Ray: a PrivateRay with 2 CPUs. The data workers: those of a real data service (`python -m data_pipeline serve`), a
new one for each case and round. The consumer: a Loader of 32 rows a step in micro-batches of 8, `prefetch_steps` 4, in
a process of its own for each measurement (`benchmarks/stream_rank.py`). Cases take turns; figures are medians over the
rounds, with the least and the largest. Each cache holds the blocks of the windows that it serves and no whole dataset,
so that blocks are read and verified once an epoch, as they are where the data is larger than memory.

throughput  Rows a second of a consumer that does nothing else, after a warm-up; CPU time a row, of the consumer's
            process ("rank"), the data workers, and all other processes of Ray, the data service among them ("ray").
            The same interval's CPU time of the idle Ray is reported with inline, and not counted there; "others" is
            the share of the machine that processes took which are none of the benchmark's. The digests of the
            warm-up's rows and of as many after the measurement must be equal in all cases.
hiding      The consumer computes between steps: products of matrices by one thread, a fixed number of them, calibrated
            to S seconds on the machine at rest. Reported are the wait for data a step, its share of all time, and how
            long the computing took: longer than S where rows are built on the same cores. A source hides from the
            smallest S on from which, there and at all larger ones, waits are under 1 % of the time (median of rounds).
            To hand over rows that are ready takes some hundredths of a millisecond, from whatever source.
first row   From just before the start of a process to its first step's rows, cluster and workers being there. The
            laps are the imports, opening the stream, joining Ray, the first rows. Inline a process reads its blocks
            anew; the workers have them in memory from the second start on, as for a rank that is started again.
rank        `solomonov train` of one step of a tiny model, on the running cluster (launch.ray_address). From the time
            of `attempt_started` in the journal (just after the start of the rank) to that of `resumed` (model built; no
            row was asked for yet) to the modification time of metrics.jsonl, whose only line is written when the step
            is done. So the last part is joining the cluster, waiting for the first rows, and one step, whose computing
            is the same for both. Before `attempt_started` lies, with Ray, the look at the cluster.
faults      Two workers; SIGKILL and SIGSTOP in turn, to a consumer that takes rows as fast as it can (nothing hides
            a fault) and to one that computes for 32 ms a step. The longest wait for data of a step until the fault was
            noticed and the worker replaced, and `waited_seconds` of the event. Promised: 1 s and 3 s. The event may
            name more than any step waited: a rank that has its rows does not look at what it has asked for.

Everything is written to FILE as JSON and printed as tables. --quick is for tests: small, one round, figures of no use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from benchmarks.harness import BenchmarkError, program, provenance, run, spread, wait
from benchmarks.stream_rank import PACKING, SEED, SEQUENCE_TOKENS, Case
from benchmarks.stream_report import report
from data_pipeline.build import prepare
from data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data_pipeline.dataset import Dataset
from data_pipeline.journal import Journal
from data_pipeline.manifest import Manifest
from data_pipeline.spec import ServiceSpec
from data_pipeline.stream import Stream
from launcher.ray import PrivateRay

SCHEMA_VERSION: Final = 1
CASES: Final = {"inline": 0, "ray-1": 1, "ray-2": 2}
"""Data workers of each case."""
SHARE_HIDDEN: Final = 0.01
DEADLINE_SECONDS: Final = 600.0
EXPECTED_OF_SERVICE: Final = {"data_service_started", "data_worker_started"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    text_bytes: int = 12_000_000
    vocab_size: int = 4096
    tokenizer_sample_bytes: int = 2 << 20
    rounds: int = 3
    warm_steps: int = 100
    """More rows than a rank's window of requests holds."""
    steps: int = 4000
    step_seconds: tuple[float, ...] = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
    hiding_seconds: float = 2.0
    starts: int = 5
    rank_starts: int = 3
    fault_step_seconds: tuple[float, ...] = (0.0, 0.032)
    faults: int = 5


QUICK: Final = Sizes(
    text_bytes=600_000,
    vocab_size=400,
    tokenizer_sample_bytes=32 << 10,
    rounds=1,
    steps=100,
    step_seconds=(0.008,),
    hiding_seconds=0.2,
    starts=1,
    rank_starts=1,
    fault_step_seconds=(0.0,),
    faults=1,
)


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    folder: Path
    manifest: Manifest
    data: DataConfig
    sizes: Sizes
    ray: PrivateRay
    call_seconds: float = 1.0
    """Of one call of the consumer's work."""

    def cache_bytes(self, workers: int) -> int:
        """Room for the windows of the lanes that each of so many workers serves, and a third more.

        Less, and workers that answer for many steps at once read blocks twice; more, and the dataset stays in memory.
        """
        manifest, lanes = self.manifest, -(-self.manifest.lanes // max(1, workers))
        block_bytes = 1.1 * manifest.block_tokens * np.dtype(manifest.token_dtype).itemsize
        return max(1 << 20, int(1.3 * lanes * manifest.window_blocks * block_bytes))

    def run(self, case: Case) -> dict[str, Any]:
        """One task of one case in a new process."""
        stem = self.folder / f"{case.task}-{time.monotonic_ns()}"
        case_file, result_file, log = (stem.with_suffix(suffix) for suffix in (".case", ".json", ".log"))
        replace(case, started_ns=time.monotonic_ns()).write(case_file)
        words = ["-m", "benchmarks.stream_rank", str(case_file), str(result_file)]
        with program(words, log, self.ray.environment if case.workers else {}) as child:
            wait(child, log, seconds=DEADLINE_SECONDS)
        result: dict[str, Any] = json.loads(result_file.read_bytes())
        return result

    @contextmanager
    def source(self, workers: int) -> Iterator[Case]:
        """A case without a task yet, its data service running."""
        case = Case("", self.data.folder, self.cache_bytes(workers), workers, call_seconds=self.call_seconds)
        if not workers:
            yield case
            return
        folder = self.folder / f"service-{time.monotonic_ns()}"
        folder.mkdir()
        case = replace(case, address=self.ray.address, namespace=folder.name, service=str(folder))
        with Dataset.open(case.dataset) as dataset:
            stream = Stream(dataset, sequence_tokens=SEQUENCE_TOKENS, packing=PACKING, seed=SEED)
            ServiceSpec(
                address=case.address,
                namespace=case.namespace,
                workers=workers,
                dataset=case.dataset,
                stream=stream.identity,
                sequence_tokens=SEQUENCE_TOKENS,
                packing=PACKING,
                seed=SEED,
                weights={source.name: source.weight for source in self.data.sources},
                cache_bytes=case.cache_bytes,
            ).write(folder)
        journal, log = Journal(folder / "journal.jsonl"), folder / "log"
        with program(["-m", "data_pipeline", "serve", str(folder)], log, self.ray.environment) as child:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while journal.last("data_service_started") is None:
                if child.exit_code() is not None or time.monotonic() > deadline:
                    raise BenchmarkError(f"the data service does not come up:\n{log.read_text(errors='replace')}")
                time.sleep(0.02)
            yield case
            child.send_signal(signal.SIGTERM)
            wait(child, log, seconds=DEADLINE_SECONDS)

    def service_events(self, case: Case) -> list[dict[str, Any]]:
        """What the data service of a case told that it should not have to tell."""
        if not case.workers:
            return []
        return [
            e for e in Journal(Path(case.service) / "journal.jsonl").events() if e["event"] not in EXPECTED_OF_SERVICE
        ]


# --- measurements ------------------------------------------------------------------------------------------


def measure_streams(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """Throughput and hiding, the cases in turn."""
    sizes = bench.sizes
    through: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    hidden: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for number in range(sizes.rounds):
        for name, workers in CASES.items():
            say(f"throughput and hiding, {name}, round {number + 1} of {sizes.rounds}")
            with bench.source(workers) as case:
                case = replace(case, warm_steps=sizes.warm_steps, steps=sizes.steps)
                through[name].append(bench.run(replace(case, task="throughput")))
                case = replace(case, step_seconds=sizes.step_seconds, seconds=sizes.hiding_seconds)
                hidden[name].append(bench.run(replace(case, task="hiding")))
            through[name][-1]["unexpected"] += bench.service_events(case)
    return (
        {name: _throughput(rounds) for name, rounds in through.items()},
        {name: _hiding(rounds) for name, rounds in hidden.items()},
    )


def _throughput(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    inline = rounds[0]["rows_inline"] is None
    counted = ("rank",) if inline else ("rank", "workers", "ray")
    cpu = {part: spread([each["cpu_seconds"][part] / each["rows"] * 1e3 for each in rounds]) for part in counted}
    cpu["all"] = spread([sum(each["cpu_seconds"][part] for part in counted) / each["rows"] * 1e3 for each in rounds])
    replies = [size / 2**20 for each in rounds for size in each["reply_bytes"]]
    return {
        "rows_per_second": spread([each["rows"] / each["seconds"] for each in rounds]),
        "cpu_ms_per_row": cpu,
        "idle_ray_cpu_ms_per_second": (
            spread([each["cpu_seconds"]["ray"] / each["seconds"] * 1e3 for each in rounds]) if inline else None
        ),
        "reply_mib": {**spread(replies), "values": None, "count": len(replies)} if replies else None,
        "others_cpu_share": spread([each["others_share"] for each in rounds]),
        "blocks_read_per_1000_rows": spread([each["blocks_read"] / each["rows"] * 1e3 for each in rounds]),
        "rows": [each["rows"] for each in rounds],
        "digests": [each["digest"] for each in rounds],
        "rows_inline": None if inline else sum(each["rows_inline"] for each in rounds),
        "unexpected": [event for each in rounds for event in each["unexpected"]],
    }


def _hiding(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = []
    for each in zip(*(each["step_times"] for each in rounds), strict=True):
        entry = {"step_seconds": each[0]["step_seconds"], "steps": sum(one["steps"] for one in each)}
        for key in ("wait_seconds_median", "wait_seconds_p99", "wait_share", "compute_seconds_median"):
            entry[key] = spread([one[key] for one in each])
        times.append(entry)
    hidden_from = None
    for entry in reversed(times):
        if entry["wait_share"]["median"] >= SHARE_HIDDEN:
            break
        hidden_from = entry["step_seconds"]
    return {
        "step_times": times,
        "hides_from_step_seconds": hidden_from,
        "unexpected": [event for each in rounds for event in each["unexpected"]],
    }


def measure_first_row(bench: Bench) -> dict[str, Any]:
    """Starts of processes, inline and on Ray in turn."""
    starts: dict[str, list[dict[str, Any]]] = {"inline": [], "ray-2": []}
    with bench.source(2) as remote, bench.source(0) as inline:
        for number in range(bench.sizes.starts):
            say(f"first row, start {number + 1} of {bench.sizes.starts}")
            for name, case in (("inline", inline), ("ray-2", remote)):
                starts[name].append(bench.run(replace(case, task="first_row")))
    starts["ray-2"][-1]["unexpected"] += bench.service_events(remote)
    return {
        name: {
            "seconds": {lap: spread([each["seconds"][lap] for each in all_of]) for lap in all_of[0]["seconds"]},
            "digests": [each["digest"] for each in all_of],
            "unexpected": [event for each in all_of for event in each["unexpected"]],
        }
        for name, all_of in starts.items()
    }


def measure_rank(bench: Bench) -> dict[str, Any]:
    """Whole runs of one step, inline and on Ray in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"inline": [], "ray": []}
    for number in range(bench.sizes.rank_starts):
        for backend in runs:
            say(f"rank, {backend}, start {number + 1} of {bench.sizes.rank_starts}")
            runs[backend].append(_train_once(bench, backend, f"{backend}-{number}"))
    laps = ("command_to_attempt", "attempt_to_resumed", "resumed_to_first_line", "attempt_to_first_line")
    return {
        backend: {
            "seconds": {lap: spread([each[lap] for each in all_of]) for lap in laps},
            "attempt_to_workers_seconds": spread([each["workers"] for each in all_of]) if backend == "ray" else None,
            "digests": [each["digest"] for each in all_of],
            "unexpected": [event for each in all_of for event in each["unexpected"]],
        }
        for backend, all_of in runs.items()
    }


def _train_once(bench: Bench, backend: str, name: str) -> dict[str, Any]:
    folder = bench.folder / "runs"
    config = {
        "run": {"name": name, "folder": str(folder), "seed": SEED},
        "model": {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 64},
        "tokenizer": {"vocab_size": bench.manifest.vocab_size},
        "data": bench.data.model_dump(mode="json") | {"workers": {"backend": backend, "count": 2}},
        "training": {"total_steps": 1, "global_batch_tokens": 8 * SEQUENCE_TOKENS, "micro_batch_sequences": 8},
        "schedule": {"warmup_steps": 0},
        "evaluation": {"every_steps": 0},
        "metrics": {"tensorboard": False},
        "launch": {"ray_address": bench.ray.address},
    }
    path, log = bench.folder / f"{name}.yaml", bench.folder / f"{name}.log"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    began = time.time()
    with program(["-m", "solomonov.cli", "train", str(path)], log, bench.ray.environment) as child:
        wait(child, log, seconds=DEADLINE_SECONDS)
    journal, metrics = Journal(folder / name / "journal.jsonl"), folder / name / "metrics.jsonl"
    times = {event["event"]: event["time"] for event in journal.events()}
    (line,) = map(json.loads, metrics.read_text().splitlines())
    first_line = metrics.stat().st_mtime
    faults = ("fallback", "fault", "restart", "data_reissued", "data_refused", "data_worker_died", "data_worker_frozen")
    return {
        "command_to_attempt": times["attempt_started"] - began,
        "attempt_to_resumed": times["resumed"] - times["attempt_started"],
        "resumed_to_first_line": first_line - times["resumed"],
        "attempt_to_first_line": first_line - times["attempt_started"],
        "workers": times.get("data_service_started", 0.0) - times["attempt_started"],
        "digest": line["data_digest"],
        "unexpected": list(journal.events(*faults)),
    }


def measure_faults(bench: Bench) -> list[dict[str, Any]]:
    """Faults of data workers, for each step time of the consumer."""
    sizes, results = bench.sizes, []
    for step_seconds in sizes.fault_step_seconds:
        say(f"faults, steps of {1e3 * step_seconds:g} ms")
        with bench.source(2) as case:
            case = replace(case, task="faults", warm_steps=sizes.warm_steps, repeats=sizes.faults)
            result = bench.run(replace(case, step_seconds=[step_seconds]))
        by_signal = {}
        for name in ("SIGKILL", "SIGSTOP"):
            suffered = [fault for fault in result["faults"] if fault["signal"] == name]
            keys = ("longest_wait_seconds", "waited_seconds", "replaced_after_seconds")
            by_signal[name] = {
                **{key: spread([fault[key] for fault in suffered]) for key in keys},
                "causes": sorted({cause for fault in suffered for cause in fault["causes"]}),
            }
        results.append({**result, "faults": by_signal})
    return results


# --- the whole ---------------------------------------------------------------------------------------------


def make_dataset(folder: Path, sizes: Sizes) -> tuple[DataConfig, Manifest]:
    """Prepares the standard library's source text."""
    data = DataConfig(
        folder=str(folder / "dataset"),
        sources=(
            SourceConfig(
                name="stdlib",
                path=f"{sysconfig.get_path('stdlib')}/**/*.py",
                exclude=("*site-packages*", "*/test/*", "*/tests/*", "*/idlelib/*", "test/*"),
            ),
        ),
        sequence_tokens=SEQUENCE_TOKENS,
        packing=PACKING,
        prepare=PrepareConfig(
            workers=2, max_source_bytes=sizes.text_bytes, tokenizer_sample_bytes=sizes.tokenizer_sample_bytes
        ),
    )
    tokenizer = TokenizerConfig(vocab_size=sizes.vocab_size)
    return data, prepare(data, tokenizer, base_folder=folder, show_progress=False).manifest


def describe(manifest: Manifest) -> dict[str, Any]:
    """The dataset in figures."""
    (source,) = manifest.sources
    train = source.train
    (rows,) = train.rows
    return {
        "text_bytes": train.text_bytes,
        "tokens": train.tokens,
        "rows": rows.rows,
        "blocks": train.block_count,
        "lanes": manifest.lanes,
        "window_blocks": manifest.window_blocks,
        "vocab_size": manifest.vocab_size,
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(sizes: Sizes, command: str) -> dict[str, Any]:
    """All measurements."""
    result: dict[str, Any] = {"benchmark": "stream", "schema_version": SCHEMA_VERSION, **provenance(command)}
    result["load_average_before"] = [round(load, 2) for load in os.getloadavg()]
    with tempfile.TemporaryDirectory(prefix="sol-bench-") as name:
        folder = Path(name)
        say("prepare the dataset")
        data, manifest = make_dataset(folder, sizes)
        result["dataset"] = describe(manifest)
        with PrivateRay(2) as ray:
            bench = Bench(folder, manifest, data, sizes, ray)
            with bench.source(0) as case:
                bench = replace(bench, call_seconds=bench.run(replace(case, task="calibrate"))["call_seconds"])
            result["throughput"], result["hiding"] = measure_streams(bench)
            result["first_row"] = measure_first_row(bench)
            result["rank"] = measure_rank(bench)
            result["faults"] = measure_faults(bench)
    result["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    return result


if __name__ == "__main__":
    run("benchmarks.stream", __doc__, lambda quick, command: measure(QUICK if quick else Sizes(), command), report)
