"""What a person sees while training runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from solomonov import exits
from solomonov.output import Unfailing
from solomonov.runfolder import RunFolder

PLAIN_LINE_SECONDS = 15.0
"""Between two plain lines, where there is no terminal."""


class TrainingDisplay:
    """Follows metrics.jsonl and the journal of one run."""

    def __init__(self, run: RunFolder, total_steps: int, plan: str) -> None:
        self._run, self._total, self._plan = run, total_steps, plan
        # Who watches may leave; the training stays.
        self._console = Console(file=cast(TextIO, Unfailing(sys.stdout)), highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=total_steps, numbers="starting")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="display", daemon=True)
        self._printed = 0.0
        self._journal_offset = 0

    def __enter__(self) -> TrainingDisplay:
        self._say(f"run     {self._run.path}")
        self._say(f"batch   {self._plan}")
        self._say(f"watch   solomonov tensorboard {self._run.path}")
        journal = self._run.journal.path
        self._journal_offset = journal.stat().st_size if journal.exists() else 0
        if self._console.is_terminal:
            self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._progress.stop()

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """An event of the launcher."""
        if kind == "rank_exited" and fields.get("exit_code") != 0 and not fields.get("killed_by_launcher"):
            how = fields.get("signal") or f"exit code {fields.get('exit_code')}"
            if fields.get("exit_code") != exits.AGAIN:
                self._say(f"rank {fields.get('rank')} ended: {how}, {_place(fields.get('step'))}")
        elif kind == "restart":
            self._say(f"starting again (attempt {fields.get('attempt')}): {fields.get('cause')}")
        elif kind == "sidecar_restart":
            self._say(f"{fields.get('name')} ended ({fields.get('cause')}): starting it again, training goes on")
        elif kind == "resize":
            self._say(f"saving, to go on with another number of ranks: {fields.get('reason')}")
        elif kind == "world":
            self._say(f"ranks   {fields.get('ranks')} in attempt {fields.get('attempt')}")
        elif kind == "stopping":
            self._say(f"stopping ({fields.get('signal')}): saving")

    def incident(self, fields: Mapping[str, Any]) -> None:
        """The report of a fault, two lines."""
        where = [f"on {fields['host']}"] if fields["host"] else []
        where += [f"in {fields['section']}"] if fields["section"] else []
        where += [fields["call"]] if fields["call"] else []
        where.append(_place(fields["step"]))
        lost = "" if fields["steps_lost"] is None else f", {fields['steps_lost']} updates to train again"
        self._say(f"incident {fields['what']}: {', '.join(where)}")
        self._say(f"         step {fields['durable_step']} is kept{lost}; {fields['done']}")

    def verdict(self, code: int, tail: Sequence[str]) -> None:
        """The last words, on stdout where all is well, else on stderr."""
        last = last_line(self._run)
        loss = f"{last['loss']:.4f}" if last and last["loss"] is not None else "not finite"
        where = f"step {last['step']}/{self._total}, loss {loss}" if last else "before the first step"
        if code == exits.DONE:
            self._say(f"done    {where}")
        elif code == exits.AGAIN:
            durable = self._run.journal.last("checkpoint_durable")
            step = durable["step"] if durable else 0
            self._say(f"stopped at {where}; step {step} is saved, and the same command goes on from there")
        else:
            for line in tail:
                print(f"  | {line}", file=sys.stderr)
            logs = self._run.logs
            print(f"ended with exit code {code}, {where}; logs of all ranks: {logs}", file=sys.stderr)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _follow(self) -> None:
        while not self._over.wait(0.5):
            self._refresh()
        self._refresh()

    def _refresh(self) -> None:
        self._journal_lines()
        last = last_line(self._run)
        if last is None:
            return
        numbers = f"loss {last['loss']:.3f}" if last["loss"] is not None else "loss not finite"
        self._progress.update(self._task, completed=last["step"], numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._printed > PLAIN_LINE_SECONDS):
            self._printed = now
            self._console.print(f"step    {last['step']}/{self._total} {numbers}")

    def _journal_lines(self) -> None:
        """Say what the ranks wrote in the journal since the last look."""
        try:
            with self._run.journal.path.open("rb") as file:
                file.seek(self._journal_offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._journal_offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            text = _sentence(record)
            if text:
                self._say(text)


def _sentence(record: Mapping[str, Any]) -> str | None:
    """One line for people on an event of a rank, or None where it is not news."""
    kind = str(record.get("event"))
    if kind == "resumed" and record["step"]:
        return f"resumed from the checkpoint of step {record['step']}"
    if kind == "branched":
        return f"branched from step {record['step']} of {record['parent']}"
    if kind == "fallback":
        return f"{record['what']}: {record['to']} instead ({record['reason']})"
    if kind == "evaluated":
        bits = f"{record['bits_per_byte']:.3f} bits a byte"
        average = f", {record['ema_loss']:.4f} of the averaged weights" if "ema_loss" in record else ""
        return f"held-out loss {record['loss']:.4f} ({bits}){average} at step {record['step']}"
    if kind in ("ema_begun", "ema_dropped"):
        done = "begins anew, as the weights" if kind == "ema_begun" else "is dropped"
        return f"average of the weights {done} at step {record['step']}: {record['reason']}"
    if kind == "diagnostics_left_out":
        return f"diagnostics without {record['what']}: {record['reason']}"
    if kind.startswith("data_"):
        return _data_sentence(kind, record)
    if kind == "signal" and record["advice"]:
        return f"signal  {record['verdict']}: {record['reading']}; {record['advice']}"
    if kind == "preflight":
        return f"hosts   {', '.join(node['host'] for node in record['nodes'])}: {record['verdict']}"
    if kind == "checkpoint_failed":
        return f"no checkpoint at step {record['step']}, training goes on: {record['message']} ({record['path']})"
    if kind in ("checkpoint_damaged", "replay_mismatch", "tensorboard_failed", "metrics_failed"):
        details = {k: v for k, v in record.items() if k not in ("schema_version", "time", "event", "pid", "attempt")}
        return f"{kind.replace('_', ' ')}: {json.dumps(details)}"
    return None


def _data_sentence(kind: str, record: Mapping[str, Any]) -> str | None:
    """One line for people on an event of the data workers, or None where it is not news."""
    worker = f"data worker {record.get('worker')}"
    if kind == "data_service_started":
        nodes = len({worker["worker_node"] for worker in record["workers"]})
        return f"rows    from {_count(len(record['workers']), 'data worker')} on {_count(nodes, 'Ray node')}"
    if kind == "data_worker_died":
        return f"{worker} died: starting it again; its requests go to others"
    if kind == "data_worker_frozen":
        return f"{worker} holds still (process {record.get('worker_pid')} on {record.get('worker_host')}): ending it"
    if kind == "data_worker_refused":
        return f"{worker} cannot serve: {record['message']}"
    if kind == "data_workers_waiting":
        return f"{worker} has not begun yet; {record['cpus_free']:g} of the cluster's {record['cpus']:g} CPUs are free"
    if kind == "data_workers_back":
        return f"data workers answer again ({record['workers']}): rows come from them"
    return None


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _place(step: int | None) -> str:
    """Where a rank was that ended, in words."""
    return "before its first step" if step is None else f"at step {step}"


def last_line(run: RunFolder) -> dict[str, Any] | None:
    """The newest whole line of metrics.jsonl."""
    try:
        with run.metrics.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 4096))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            return record
    return None
