"""Property: any blocks, written as a shard, come back from webdataset and from the block array's offsets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Block, block_records, shard_name, write_shard

LENGTHS = st.lists(st.lists(st.integers(2, 400), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, dtype=st.sampled_from(["uint16", "uint32"]), seed=st.integers(0, 1 << 30))
def test_shards_round_trip(lengths: list[list[int]], dtype: str, seed: int) -> None:
    import webdataset

    draw = np.random.default_rng(seed)
    blocks = [
        Block(
            tokens=draw.integers(0, 1 << 16, size=sum(each)).astype(dtype),
            lengths=np.array(each, dtype=np.int64),
            documents=[{"source": "s", "path": "p", "index": number} for number in range(len(each))],
            text_bytes=sum(each),
        )
        for each in lengths
    ]
    shard = shard_name("s", "train", 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert write_shard(folder, folder / "aside", shard, blocks) == len(blocks)
        samples = list(webdataset.WebDataset(str(folder / shard), shardshuffle=False))
        records, raw = block_records(folder, [shard]), (folder / shard).read_bytes()
    assert len(samples) == len(records) == len(blocks)
    for sample, record, block in zip(samples, records, blocks, strict=True):
        assert sample["tokens.bin"] == block.tokens.tobytes()
        assert sample["lengths.bin"] == block.lengths.astype("<u4").tobytes()
        offset = int(record["tokens_offset"])
        assert raw[offset : offset + int(record["tokens_size"])] == block.tokens.tobytes()
        assert record["tokens"] == len(block.tokens)
