"""The run folder: the record of a run, and the lock that lets one command at a time work on it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.journal import Journal
from solomonov.config import Config, Loaded, flatten
from solomonov.errors import ConfigurationError
from solomonov.host import environment_facts, git_facts, versions

SCHEMA_VERSION = 1

FREE_KEYS = (
    "run.folder",
    "data.",
    "parallel",
    "training.precision",
    "training.micro_batch_sequences",
    "training.activation_checkpointing",
    "training.compile",
    "training.ema_decay",
    "checkpoint.",
    "resilience.",
    "evaluation.",
    "metrics.",
)
"""Keys (or beginnings of keys) that may change when a run goes on: they change where and how fast, not what is
learned. The data is compared by the identity of its stream of rows instead."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def resolved_path(self) -> Path:
        """resolved.json: every value with its origin, versions, host."""
        return self.path / "resolved.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Folder of the exports."""
        return self.path / "exports"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs, one folder an attempt."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one line a step."""
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Journal:
        """journal.jsonl: the events of the run's life."""
        return Journal(self.path / "journal.jsonl")

    def resolved(self) -> dict[str, Any]:
        """resolved.json as written.

        Raises:
            ConfigurationError: this is not a run folder, or its record is damaged.
        """
        try:
            record = json.loads(self.resolved_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                "this is not the folder of a run",
                got=f"{self.path}: {error}",
                rule="a run folder holds resolved.json, which `solomonov train` writes",
                remedy="give the name or folder of a run; `ls` the folder named by run.folder",
            ) from error
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            raise ConfigurationError(
                "the run's record has a schema that this release cannot read",
                got=f"{self.resolved_path} begins {str(record)[:60]}",
                rule=f"schema_version {SCHEMA_VERSION}",
                remedy="use the release that wrote the run",
            )
        return record

    def config(self) -> Config:
        """The run's configuration, as resolved when it was last started."""
        nested: dict[str, Any] = {}
        for dotted, entry in self.resolved()["values"].items():
            *parents, last = dotted.split(".")
            place = nested
            for part in parents:
                place = place.setdefault(part, {})
            place[last] = entry["value"]
        return Config.model_validate(nested)

    def run_id(self) -> str:
        """Random identity of the run, also in each of its checkpoints."""
        return str(self.resolved()["run_id"])

    def data_folder(self) -> Path:
        """The prepared data set of the run."""
        return Path(self.resolved()["working_folder"]) / Path(self.config().data.folder).expanduser()


def run_folder(config: Config) -> RunFolder:
    """Where the run of a configuration is kept."""
    return RunFolder(Path(config.run.folder).expanduser() / config.run.name)


def all_runs(folder: Path) -> list[RunFolder]:
    """The runs of a folder of runs, by name."""
    return [RunFolder(path.parent) for path in sorted(folder.glob("*/resolved.json"))]


def find_run(name: str, folder: str = "runs") -> RunFolder:
    """The run of that name in the folder of runs, or at that path.

    Raises:
        ConfigurationError: there is none.
    """
    for path in (Path(name), Path(folder) / name):
        if (path / "resolved.json").is_file():
            return RunFolder(path)
    raise ConfigurationError(
        "there is no such run",
        got=name,
        rule=f"the name of a run in {folder}/, or the path of its folder",
        remedy="start it with `solomonov train CONFIG`, or give its folder's path",
    )


def open_run(
    loaded: Loaded, *, launch: Mapping[str, Any], data: Mapping[str, Any], derived: Mapping[str, Any]
) -> RunFolder:
    """Create the run's folder, or take up the one that is there, and write config.yaml and resolved.json.

    Args:
        launch: the validated launch section.
        data: identity of the data: digests that must not change over the run's life.
        derived: numbers for the record.

    Raises:
        ConfigurationError: the folder cannot be written, or belongs to a run with another configuration or data.
    """
    config = loaded.config
    run = run_folder(config)
    old = run.resolved() if run.resolved_path.exists() else None
    # A kill during the very first write leaves the lock and a hidden file at most: resolved.json comes first.
    if old is None and run.path.is_dir() and any(p.name != "lock" and p.name[0] != "." for p in run.path.iterdir()):
        raise ConfigurationError(
            "the run's folder exists and holds something else",
            got=f"{run.path} without resolved.json",
            rule="a run starts in a new folder, or in its own",
            remedy="choose another run.name or run.folder, or move the folder away",
        )
    values = {key: {"value": value, "origin": _origin(loaded.origins, key)} for key, value in flatten(config).items()}
    if old is not None:
        _refuse_another_run(run, old, values, data)
    record = {
        "schema_version": SCHEMA_VERSION,
        "run_id": old["run_id"] if old else uuid.uuid4().hex,
        "values": values,
        "launch": {
            key: {"value": value, "origin": _origin(loaded.origins, f"launch.{key}")} for key, value in launch.items()
        },
        "overrides": list(loaded.overrides),
        "data": dict(data),
        "derived": dict(derived),
        "working_folder": str(Path.cwd()),
        "versions": versions(),
        "git": git_facts(),
        "host": environment_facts(),
    }
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.resolved_path, json.dumps(record, indent=1, sort_keys=True) + "\n")
        write_atomically(run.path / "config.yaml", loaded.text)
        for folder in (run.checkpoints, run.exports, run.logs):
            folder.mkdir(exist_ok=True)
        if run.journal.last("run_created") is None:
            run.journal.write("run_created", run_id=record["run_id"], name=config.run.name)
    except OSError as error:
        raise unwritable(run.path, error) from error
    return run


def _origin(origins: Mapping[str, str], key: str) -> str:
    """Where a value came from; an override of one item of a list makes the list an overridden one."""
    if any(name.startswith(f"{key}.") for name in origins):
        return "override"
    return origins.get(key, "default")


def unwritable(path: Path, error: OSError) -> ConfigurationError:
    """The message for a folder that cannot be written."""
    return ConfigurationError(
        "the run's folder cannot be written",
        got=f"{path}: {error.strerror or error}",
        rule="the folder named by run.folder must be writable and have free space",
        remedy="change its permissions, free space, or set run.folder to another place",
    )


def _refuse_another_run(
    run: RunFolder, old: Mapping[str, Any], values: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Raise where what is learned would change half-way."""
    changed = []
    before = {key: entry["value"] for key, entry in old["values"].items()}
    now = {key: entry["value"] for key, entry in values.items()}
    for key in sorted({*before, *now}):
        if key not in before and values[key]["origin"] == "default":
            continue  # the release that began the run did not know the key yet, and did what its default says
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS):
            changed.append(f"{key}: was {before.get(key)!r}, now {now.get(key)!r}")
    for key in sorted({*old["data"], *data}):
        if old["data"].get(key) != data.get(key):
            changed.append(f"data {key}: was {old['data'].get(key)}, now {data.get(key)}")
    if changed:
        raise ConfigurationError(
            f"{run.path} belongs to a run with another configuration",
            got="\n          ".join(changed),
            rule="a run goes on with the model, data, objective, optimizer, schedule and batch that it began with",
            remedy="set run.name to a new name, or restore these values",
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: write aside, sync, rename."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


@dataclass(frozen=True)
class LockOwner:
    """On whose behalf a command holds the lock: one start of a job of a cluster."""

    job: str
    """Cluster and job, for instance `slurm 123`."""
    start: int
    """Which start of that job; the cluster has ended the ones before, even where one of them does not know it yet."""


@contextmanager
def run_lock(run: RunFolder, *, wait_seconds: float = 10.0, owner: LockOwner | None = None) -> Iterator[int]:
    """Hold the run's lock; yields its descriptor, which the ranks inherit.

    The lock is released when the last process that holds the descriptor has ended, so a command that follows a kill
    waits (up to `wait_seconds`) until no rank of the killed one is left. A later start of the same job does not wait:
    it takes the lock from an earlier start, which may live on where a cluster lost sight of its machine.

    Args:
        owner: whose behalf, where a cluster started this command.

    Raises:
        ConfigurationError: another live command works on the run.
    """
    path = run.path / "lock"
    try:
        fd = _lock(run, path, wait_seconds, owner)
    except OSError as error:
        raise unwritable(run.path, error) from error
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time())}
        if owner is not None:
            holder |= {"job": owner.job, "start": owner.start}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder).encode(), 0)
        os.set_inheritable(fd, True)
        yield fd
    finally:
        os.close(fd)


def _lock(run: RunFolder, path: Path, wait_seconds: float, owner: LockOwner | None) -> int:
    """The descriptor of the lock file, locked."""
    deadline = time.monotonic() + wait_seconds
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    locked = False
    try:
        while not locked:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                holder = lock_holder(run)
                if owner is not None and holder.get("job") == owner.job and holder.get("start", 0) < owner.start:
                    path.rename(path.with_name(f"lock.start-{holder['start']}"))
                elif time.monotonic() > deadline:
                    raise _held(run, path) from None
                else:
                    time.sleep(0.05)  # flock has no time-out of its own
            if not (path.exists() and os.path.samestat(os.fstat(fd), path.stat())):  # it was taken from its holder
                os.close(fd)
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                locked = False
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def submission_lock(run: RunFolder) -> Iterator[None]:
    """One command at a time submits a run; others wait for it, which takes seconds."""
    try:
        fd = os.open(run.path / ".submitting", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(run.path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_locked(run: RunFolder) -> bool:
    """Whether some live process holds the run's lock now."""
    try:
        fd = os.open(run.path / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def lock_holder(run: RunFolder) -> dict[str, Any]:
    """Who last took the lock: pid, host, since; empty if nobody did."""
    try:
        holder = json.loads((run.path / "lock").read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(run: RunFolder, path: Path) -> ConfigurationError:
    holder = lock_holder(run)
    age = round(time.time() - holder["since"]) if "since" in holder else 0
    return ConfigurationError(
        "another command is working on this run",
        got=f"{path} is held by process {holder.get('pid')} on {holder.get('host')}, for {age} s",
        rule="one command at a time works on a run",
        remedy="wait for it, stop it (Ctrl-C there, or kill the process), or use another run.name",
    )
