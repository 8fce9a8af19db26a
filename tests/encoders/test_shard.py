"""What stage one does with what an encoder gives."""

import numpy as np
import pytest
import torch

from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.encoders.interface import Encoded
from featcache.encoders.shard import _store
from featcache.errors import CacheError


@pytest.fixture
def shard(tmp_path):
    spec = FeatureSetSpec(
        modality="image",
        encoder="toy",
        source="toy",
        library="timm",
        library_version="0",
        weights_sha256="0" * 64,
        preprocessing={},
        num_prefix_tokens=0,
        grid=(1, 2),
        num_tokens=2,
        dim=3,
        pooled_dim=3,
        batch_size=2,
    )
    plan = plan_shards(spec, ["a", "b"], ["1", "2"])
    folder = FeatureSetWriter.create(tmp_path / "toy", spec, plan, "m").folder
    with ShardWriter(folder, spec, plan[0]) as writer:
        yield writer


def test_tokens_are_stored_in_half_width():
    tokens, pooled = _store(Encoded(torch.ones(2, 2, 3), torch.ones(2, 3)), "float16").arrays()
    assert tokens.dtype == np.float16
    assert pooled.dtype == np.float32
    for dtype in ("float32", "int8"):  # an int8 set's writer rounds by itself
        assert _store(Encoded(torch.ones(2, 2, 3), None), dtype).arrays()[0].dtype == np.float32


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_a_value_beyond_float16_is_refused_with_its_row_and_size(shard, value):
    tokens = torch.ones(2, 2, 3)
    tokens[1, 0, 2] = value
    stored, pooled = _store(Encoded(tokens, torch.ones(2, 3)), "float16").arrays()
    with pytest.raises(CacheError, match=r"toy.*`b`") as caught:
        shard.write(np.arange(2), stored, pooled)
    if value == 7e4:
        assert "70000" in str(caught.value).replace(",", "")
    assert "float32" in str(caught.value)
