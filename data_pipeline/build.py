"""`prepare`: raw text in, a dataset folder out.

Tasks run in phases; between phases this process computes the layout, which follows from the documents' hashes
and lengths. MANIFEST.json is written last: a folder with a manifest is a whole dataset, one without is not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_pipeline.assemble import assemble_manifest, files_of, read_manifest
from data_pipeline.config import DataConfig, TokenizerConfig, resolve_path
from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import explained_os_errors, open_array, write_array, write_bytes, write_json
from data_pipeline.layout import (
    MIN_BLOCKS,
    Entries,
    Integers,
    Selection,
    choose_block_tokens,
    cut_blocks,
    cut_documents,
    cut_shards,
    part_bytes,
    sample_cap,
    select,
)
from data_pipeline.manifest import MANIFEST_FILE, Manifest
from data_pipeline.plan import Plan, SourceInputs, file_slices, make_plan
from data_pipeline.progress import Progress
from data_pipeline.repair import Repair
from data_pipeline.shards import shard_name
from data_pipeline.stages import (
    ENTRY_DTYPE,
    MODEL_FILE,
    REPORT_FILE,
    Documents,
    make_shard,
    paths_file,
    read_table,
    selection_file,
    tokenise,
    train,
)
from data_pipeline.tasks import WORK, Result, Runner, Task, work_lock

_OWN_NAMES: Final = frozenset({MANIFEST_FILE, WORK, "tokenizer", "shards", "blocks", "rows"})
_SPILL_BYTES: Final = 2 << 20
_SPILLS: Final = 512
"""Upper bound on the spills of a source: all are mapped at once."""
_ORIGIN_BYTES: Final = 64
"""What a document's origin takes in a shard beside its path."""
