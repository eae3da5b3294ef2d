"""What the data service of a run needs to know: one JSON file in the run's folder, written at each start of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError

from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import write_json
from data_pipeline.section import Section

SPEC_FILE: Final = "data-service.json"


class ServiceSpec(Section):
    """The rows to serve, and where."""

    schema_version: Literal[1] = 1
    """Format of this file."""
    address: Annotated[str, Field(min_length=1)]
    """host:port of the head of a Ray that runs."""
    namespace: Annotated[str, Field(min_length=1)]
    """Where the data workers' names live: of the run and the command, so that no two runs meet."""
    workers: Annotated[int, Field(ge=1)]
    """Data workers."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that each asks the cluster for."""
    dataset: Annotated[str, Field(min_length=1)]
    """Absolute path of the dataset folder, the same on every node."""
    stream: str
    """Identity of the stream of rows."""
    sequence_tokens: Annotated[int, Field(ge=1)]
    """Positions in a row (T)."""
    packing: str
    """How documents are placed into rows."""
    seed: int
    """Seed of the order."""
    weights: dict[str, float]
    """Weight of every source."""
    cache_bytes: Annotated[int, Field(ge=1)]
    """Memory that a worker keeps for blocks that it will need again."""

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """From JSON values.

        Raises:
            DataConfigurationError: a value is missing or wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataConfigurationError(
                "The specification of the data service cannot be used.",
                got="; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()),
                rule=f"{SPEC_FILE} of schema_version 1, as `solomonov train` writes it",
                remedy="start the run again with `solomonov train`",
            ) from error

    @classmethod
    def load(cls, run_folder: Path) -> Self:
        """The specification of a run.

        Raises:
            DataConfigurationError: there is none, or it cannot be used.
        """
        path = run_folder / SPEC_FILE
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataConfigurationError(
                "The run has no specification of a data service.",
                got=f"{path}: {error}",
                rule="`solomonov train` with data.workers.backend: ray writes it",
                remedy="give the folder of such a run",
            ) from error
        return cls.from_json(values)

    def write(self, run_folder: Path) -> None:
        """Writes the file in one step."""
        write_json(run_folder / SPEC_FILE, run_folder, self.model_dump(mode="json"))
