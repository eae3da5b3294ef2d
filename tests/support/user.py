"""A user's folder: text files, one configuration, and the `solomonov` command run in it as a real program."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.corpus import write_texts
from tests.support.processes import Program, program_environment, run_program

CONFIG = """\
run: {name: own, seed: 5}
model: {layers: 2, d_model: 32, heads: 4, kv_heads: 2, d_ff: 64}
tokenizer: {vocab_size: 320}
data:
  folder: dataset
  sources: [{name: own, path: "text/**/*.txt"}]
  sequence_tokens: 32
  prepare: {workers: 1, held_out_fraction: 0.1}
training: {total_steps: 60, global_batch_tokens: 256, micro_batch_sequences: 4}
optimizer: {lr: 0.003}
schedule: {warmup_steps: 2}
checkpoint: {every_steps: 5, keep_last: 2}
evaluation: {every_steps: 30, rows: 8}
launch: {ranks_per_node: 2, restart_backoff_seconds: 0.1}
"""


@dataclass
class User:
    """Works in one folder."""

    folder: Path
    commands: int = 0

    @staticmethod
    def begin(folder: Path, *, files: int = 40) -> User:
        """A new folder with text and a configuration; nothing is prepared."""
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(folder / "text", files)
        (folder / "own.yaml").write_text(CONFIG, encoding="utf-8")
        return User(folder)

    def copy(self, folder: Path) -> User:
        """The same state of affairs in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return User(folder)

    def command(self, *words: str, **environment: str) -> Program:
        """Start `solomonov WORDS`; the caller waits for it or kills it."""
        self.commands += 1
        return Program(
            [sys.executable, "-m", "solomonov.cli", *words],
            log=self.folder / f"command-{self.commands}.log",
            cwd=self.folder,
            env=program_environment(**environment),
        )

    def solomonov(self, *words: str, deadline: float = 180.0, **environment: str) -> tuple[int, str]:
        """Run `solomonov WORDS` to its end; exit code and output."""
        self.commands += 1
        return run_program(
            [sys.executable, "-m", "solomonov.cli", *words],
            log=self.folder / f"command-{self.commands}.log",
            deadline=deadline,
            cwd=self.folder,
            env=program_environment(**environment),
        )

    def must(self, *words: str, **environment: str) -> str:
        """Run a command that is expected to succeed; its output."""
        code, output = self.solomonov(*words, **environment)
        assert code == 0, f"solomonov {' '.join(words)} ended with {code}:\n{output}\n{self.rank_logs()}"
        return output

    def run(self, name: str = "own") -> Path:
        """A run's folder."""
        return self.folder / "runs" / name

    def metrics(self, name: str = "own") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl less what is free to differ."""
        path = self.run(name) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def steps_done(self, name: str = "own") -> int:
        """Number of the last step that has its line; 0 before the first."""
        path = self.run(name) / "metrics.jsonl"
        if not path.exists():
            return 0
        whole = path.read_bytes().splitlines(keepends=True)
        steps = [json.loads(line)["step"] for line in whole if line.endswith(b"\n")]
        return max(steps, default=0)

    def journal(self, *kinds: str, name: str = "own") -> list[dict[str, Any]]:
        """Events of the run, all or those of some kinds."""
        path = self.run(name) / "journal.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return [event for event in events if not kinds or event["event"] in kinds]

    def rank_logs(self) -> str:
        """The ends of all ranks' logs, for messages."""
        logs = sorted(self.folder.glob("runs/*/logs/attempt-*/rank-*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs[-4:])


def unexpected(events: list[dict[str, Any]], *injected: str) -> list[dict[str, Any]]:
    """Fall-backs and faults that a test did not cause: they must be none."""
    kinds = {"fallback", "fault", "replay_mismatch", "checkpoint_failed", "checkpoint_damaged", "metrics_failed"}
    kinds |= {"data_reissued", "data_refused", "data_worker_died", "data_worker_frozen", "data_worker_refused"}
    kinds |= {"sidecar_restart", "data_workers_back", "hang", "superseded"}
    kinds |= {"tensorboard_failed", "left_without_checkpoint", "update_skipped", "checkpoint_retention_failed"}
    return [event for event in events if event["event"] in kinds - set(injected)]
