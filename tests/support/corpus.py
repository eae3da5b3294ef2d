"""Small text corpora and the configs to prepare them, the same in every run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig

WORDS = ("the", "quick", "brown", "fox", "over", "lazy", "dog", "42", "été", "漢字", "def", "x=1", "::", "a")
TOKENIZER = TokenizerConfig(vocab_size=320)


def text(seed: int, lines: int = 12) -> str:
    """Lines of words, some indented, some blank."""
    draw = random.Random(seed)
    rows = []
    for _ in range(lines):
        words = [draw.choice(WORDS) + draw.choice(("", "", "s", "ing", str(draw.randrange(99)))) for _ in range(9)]
        rows.append(draw.choice(("", "", "    ", "\t")) + " ".join(words) if draw.random() < 0.9 else "")
    return "\n".join(rows) + "\n"


def write_texts(folder: Path, files: int = 40, *, first_seed: int = 0) -> Path:
    """Writes `files` text files of about 500 bytes into two levels of folders below `folder`."""
    for number in range(files):
        path = folder / f"part{number % 3}" / f"file{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(first_seed + number), encoding="utf-8")
    return folder


def data_config(**changes: Any) -> DataConfig:
    """A data section for `write_texts(BASE / "text")`, prepared in this process; `prepare` is merged."""
    prepare = {"workers": 1, "shard_bytes": 32 << 10, "seed": 3, "held_out_fraction": 0.1}
    prepare |= changes.pop("prepare", {})
    values: dict[str, Any] = {
        "folder": "dataset",
        "sources": [SourceConfig(name="own", path="text/**/*.txt")],
        "sequence_tokens": 32,
        "prepare": PrepareConfig.model_validate(prepare),
    }
    return DataConfig(**{**values, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
