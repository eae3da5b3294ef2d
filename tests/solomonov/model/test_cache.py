"""What a cache keeps, against all keys that were ever given to it."""

from __future__ import annotations

import pytest
import torch

from solomonov.model.cache import KeyValueCache, LayerCache, WindowCache
from tests.solomonov.model.common import ATTENTION, tiny_config, two_stacks


def test_local_layers_keep_a_window_and_global_ones_everything() -> None:
    config = tiny_config(layers=3, attention=ATTENTION["hybrid"])
    cache = KeyValueCache(config, batch_rows=2, capacity_tokens=20)
    assert [type(layer) for layer in cache.layers] == [WindowCache, LayerCache, WindowCache]
    everything = torch.randn(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    begin = 0
    for tokens in (7, 1, 1, 2, 6, 3):
        new = everything[:, :, begin : begin + tokens]
        end = begin + tokens
        for layer in cache.layers:
            keys, values = layer.extend(new, -new)
            first = max(0, begin - 4) if isinstance(layer, WindowCache) else 0
            assert torch.equal(keys, everything[:, :, first:end])
            assert torch.equal(values, -everything[:, :, first:end])
        begin = end
    local, full = cache.layers[0], cache.layers[1]
    assert local.keys.untyped_storage().nbytes() == local.values.untyped_storage().nbytes() == 2 * 2 * 4 * 4 * 4
    assert full.keys.untyped_storage().nbytes() == 2 * 2 * 20 * 4 * 4


def test_an_encoder_has_nothing_to_cache() -> None:
    with pytest.raises(ValueError, match="nothing to cache"):
        KeyValueCache(tiny_config(architecture="encoder"), batch_rows=1, capacity_tokens=4)
    behind_a_source = KeyValueCache(two_stacks(layers=2), batch_rows=1, capacity_tokens=4)
    assert len(behind_a_source.layers) == 2, "of the decoder"
    assert behind_a_source.source_document_ids is None
