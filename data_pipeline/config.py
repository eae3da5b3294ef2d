"""The `data` and `tokenizer` sections of the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_pipeline.packing import Packing
from data_pipeline.section import Section

Documents = Literal["file", "line", "blank_line"]


class SourceConfig(Section):
    """One source of the mixture: files of one kind, with a weight."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    """Name of the source; it begins the names of its shards, so letters, digits, `-` and `_` only."""
    path: Annotated[str, Field(min_length=1)]
    """A file, a folder (its .txt and .jsonl files at any depth) or a glob (`**` for any depth). Relative
    paths count from the working directory. Names that end in .jsonl or .ndjson are read as one JSON object
    a line, others as text."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training rows, relative to the other sources' weights."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """jsonl: the key that holds the text."""
    documents: Documents = "file"
    """txt: what a document is. `file`: the whole file; `line`: each line that is not blank; `blank_line`:
    each run of lines between blank lines."""
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    """Shell patterns of files to leave out, matched against the path below the source's root; `*` matches
    `/` too, so `*/tests/*` leaves out every folder of that name but one at the root."""


class PrepareConfig(Section):
    """How `prepare` works; all but `workers` and `backend` decides the bytes of the dataset."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes that run the tasks; `local`: 1 runs them in this process. The output does not depend on it."""
    shard_bytes: Annotated[int, Field(ge=1 << 10)] = 64 << 20
    """Largest size of a shard, unless a single block is larger."""
    backend: Literal["local", "ray"] = "local"
    """Where the tasks run. `local`: processes on this machine. `ray`: a Ray cluster, each of whose nodes sees the
    inputs and the dataset folder under the same paths; each task takes one CPU. The output does not depend on it."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of the shuffle over shards, of the held-out split and of samples; not of the training order."""
    held_out_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Share of the documents that evaluation gets and training never sees; above 0 it is at least one."""
    max_source_bytes: Annotated[int, Field(ge=1)] | None = None
    """Upper bound on the text taken from each source: a seeded choice of its documents. null takes all."""
    tokenizer_sample_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)] = 2 << 20
    """Upper bound on the text that the tokenizer is trained on: a seeded choice of training documents. 2 MiB
    take about 6 s of one core (unigram); 4 MiB take 14 s and give 3 % fewer tokens."""


class WorkersConfig(Section):
    """Who builds the rows while training runs."""

    backend: Literal["inline", "ray"] = "inline"
    """`inline`: a thread of each rank. `ray`: actors on a Ray cluster, for rows that cost more to build than the
    ranks' machines can spare; the rows are the same."""
    count: Annotated[int, Field(ge=1, le=4096)] = 2
    """Data workers, where the backend has any; the dataset's lanes are shared out among them."""
    cpus: Annotated[float, Field(ge=0, le=64)] = 1.0
    """ray: CPUs that each worker asks the cluster for; it builds rows in one thread."""
    window_bytes: Annotated[int, Field(ge=1)] = 16 << 20
    """ray: rows that a rank has asked for and not yet used; more only where a single step is larger. Half of it is
    the largest chunk of steps that is asked for at once; replies are aimed at 2 MiB."""
    patience_seconds: Annotated[float, Field(ge=0)] = 60.0
    """ray: how long a step waits while no worker lives, before its rank builds the rows by itself."""


class DataConfig(Section):
    """Where the text comes from and how it becomes rows."""

    folder: Annotated[str, Field(min_length=1)]
    """The dataset folder: `prepare` writes it, training reads it."""
    sources: tuple[SourceConfig, ...] = Field(strict=False, min_length=1)
    """What the dataset is made of."""
    sequence_tokens: Annotated[int, Field(ge=8, le=1 << 20)] = 512
    """Positions in a row (T)."""
    packing: Packing = "best_fit"
    """How documents are placed into rows: `best_fit` cuts only documents longer than a row, `concat` pads
    only at the end of a block."""
    prepare: PrepareConfig = PrepareConfig()
    """Settings of `prepare`."""
    workers: WorkersConfig = WorkersConfig()
    """Settings of the data workers."""
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 512 << 20
    """Memory that a rank keeps for blocks that it will need again."""
    prefetch_steps: Annotated[int, Field(ge=0, le=1024)] = 4
    """Steps whose rows are built ahead of training."""

    @field_validator("sources")
    @classmethod
    def _unique_names(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each source needs a name of its own; repeated: {', '.join(repeated)}")
        return sources


class TokenizerConfig(Section):
    """The SentencePiece model that `prepare` trains."""

    kind: Literal["unigram", "bpe"] = "unigram"
    """Model type."""
    vocab_size: Annotated[int, Field(ge=262, le=1 << 20)] = 8192
    """Number of ids: 4 special ones, the newline, 256 bytes, and pieces. Up to 65,536 take 2 bytes each."""


def resolve_path(path: str, base_folder: Path) -> Path:
    """A path of the config as an absolute one: `~` expanded, relative ones counted from `base_folder`."""
    return (base_folder / Path(path).expanduser()).absolute()
