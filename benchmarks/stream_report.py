"""The result of `benchmarks.stream` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import table

Figures = Mapping[str, Any]


def report(result: Figures) -> str:
    """All tables."""
    machine, dataset = result["machine"], result["dataset"]
    head = (
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, Ray {machine['ray']}, "
        f"numpy {machine['numpy']}; load {result['load_average_before'][0]} before\n"
        f"{dataset['text_bytes'] / 1e6:.1f} MB of text, {dataset['rows']:,} rows of 512, {dataset['blocks']} blocks in "
        f"{dataset['lanes']} lanes; figures are medians (least - largest)\n"
    )
    parts = [_throughput(result), _hiding(result), _first_row(result), _rank(result), _faults(result)]
    return "\n".join([head, *parts])


def _say(figure: Figures, scale: float = 1.0, digits: int = 2) -> str:
    median, least, largest = (f"{figure[key] * scale:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} - {largest})"


def _throughput(result: Figures) -> str:
    rows = []
    inline = result["throughput"]["inline"]
    for name, each in result["throughput"].items():
        cpu, replies = each["cpu_ms_per_row"], each["reply_mib"]
        rate = each["rows_per_second"]["median"] / inline["rows_per_second"]["median"]
        cost = cpu["all"]["median"] / inline["cpu_ms_per_row"]["all"]["median"]
        split = [f"{cpu[part]['median'] * 1e3:.1f}" if part in cpu else "-" for part in ("rank", "workers", "ray")]
        rows.append(
            [
                name,
                _say(each["rows_per_second"], digits=0),
                f"{rate:.2f}",
                _say(cpu["all"], 1e3, 1),
                f"{cost:.2f}",
                *split,
                f"{each['blocks_read_per_1000_rows']['median']:.1f}",
                f"{each['others_cpu_share']['median'] * 1e2:.0f}",
                "-" if replies is None else _say(replies),
            ]
        )
    header = [
        "",
        "rows/s",
        "to inline",
        "CPU us/row",
        "to inline",
        "rank",
        "workers",
        "ray",
        "blocks/1000",
        "others %",
        "reply MiB",
    ]
    idle = inline["idle_ray_cpu_ms_per_second"]["median"]
    return table(f"throughput (an idle Ray takes {idle:.0f} ms of CPU a second)", header, rows)


def _hiding(result: Figures) -> str:
    rows = []
    for name, each in result["hiding"].items():
        for entry in each["step_times"]:
            rows.append(
                [
                    name,
                    f"{entry['step_seconds'] * 1e3:g}",
                    _say(entry["compute_seconds_median"], 1e3, 1),
                    _say(entry["wait_seconds_median"], 1e3, 3),
                    _say(entry["wait_seconds_p99"], 1e3, 1),
                    _say(entry["wait_share"], 1e2, 1),
                ]
            )
    header = ["", "S ms", "computing took ms", "wait ms, median", "wait ms, p99", "wait %"]
    found = {name: each["hides_from_step_seconds"] for name, each in result["hiding"].items()}
    said = ", ".join(f"{name} {'at none' if s is None else f'{s * 1e3:g} ms'}" for name, s in found.items())
    return table(f"hiding: waits stay under 1 % of the time from S = {said}", header, rows)


def _first_row(result: Figures) -> str:
    laps = ("imports", "stream", "joined", "first_row")
    rows = [
        [name, *(_say(each["seconds"][lap]) if lap in each["seconds"] else "-" for lap in laps)]
        for name, each in result["first_row"].items()
    ]
    return table("first row: seconds from the start of a process", ["", *laps], rows)


def _rank(result: Figures) -> str:
    rows = []
    for name, each in result["rank"].items():
        workers = each["attempt_to_workers_seconds"]
        rows.append([name, *map(_say, each["seconds"].values()), "-" if workers is None else _say(workers)])
    header = ["", "command-attempt", "attempt-resumed", "resumed-line 1", "attempt-line 1", "attempt-workers"]
    return table("rank: seconds of `solomonov train`, one step", header, rows)


def _faults(result: Figures) -> str:
    rows = []
    for each in result["faults"]:
        for name, fault in each["faults"].items():
            rows.append(
                [
                    name,
                    f"{each['step_seconds'] * 1e3:g}",
                    _say(dict.fromkeys(("median", "min", "max"), each["wait_seconds_before"])).partition(" ")[0],
                    *(_say(fault[key]) for key in ("longest_wait_seconds", "waited_seconds", "replaced_after_seconds")),
                    "/".join(fault["causes"]),
                ]
            )
    header = ["", "S ms", "longest before s", "longest wait s", "waited_seconds", "replaced after s", "cause"]
    return table("faults of one of two workers", header, rows)
