"""What single tasks refuse: inputs that change while they are read, shards that change before rows are counted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.files import open_array
from data_pipeline.readers import find_inputs
from data_pipeline.shards import Block, shard_name, write_shard
from data_pipeline.stages import Documents, make_blocks, make_rows, read_table


def test_a_file_that_changes_after_it_was_found_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    source = SourceConfig(name="own", path="*.txt")
    files = find_inputs(source, tmp_path, tmp_path / "dataset")
    result = read_table(tmp_path / "dataset", source, list(enumerate(files)), 0, "table.npy")
    documents = Documents.of(source, files, open_array(tmp_path / "dataset" / "table.npy"))
    assert result["documents"] == 2
    assert list(documents.texts()) == ["text of a.txt\n", "text of b.txt\n"]
    os.utime(tmp_path / "b.txt", ns=(0, files[1].mtime_ns + 1))
    with pytest.raises(DataConfigurationError, match=r"b\.txt was changed"):
        list(documents.texts())


def test_rows_are_counted_only_from_lengths_that_the_block_array_vouches_for(tmp_path: Path) -> None:
    shards = [shard_name("own", "train", number) for number in range(2)]
    for shard in shards:
        lengths = np.array([5, 9], dtype=np.int64)
        origins: list[dict[str, str | int]] = [{"source": "own", "path": "a", "index": n} for n in range(2)]
        block = Block(np.arange(14, dtype=np.uint16), lengths, origins, 20)
        write_shard(tmp_path, tmp_path / "aside", shard, [block, block])
    counted = make_blocks(tmp_path, shards, "blocks.npy")
    assert (counted["blocks"], counted["tokens"], counted["text_bytes"]) == (4, 56, 80)
    # 4 and 8 positions: two rows of 8.
    assert make_rows(tmp_path, shards, "blocks.npy", (8, "concat"), "rows.npy")["rows"] == 8
    assert open_array(tmp_path / "rows.npy").tolist() == [2, 2, 2, 2]
    record = open_array(tmp_path / "blocks.npy")[3]
    content = bytearray((tmp_path / shards[1]).read_bytes())
    content[int(record["lengths_offset"])] ^= 1
    (tmp_path / shards[1]).write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"own-train-000001\.tar was changed") as caught:
        make_rows(tmp_path, shards, "blocks.npy", (8, "concat"), "rows.npy")
    assert "block 3" in caught.value.got
