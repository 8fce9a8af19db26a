"""Feature sets of random numbers, as large as a bench needs them."""

from pathlib import Path

import numpy as np

from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.writer import FeatureSetWriter, ShardWriter


def write_random_set(
    folder: Path, *, rows: int, num_tokens: int, dim: int, shard_rows: int
) -> FeatureSetWriter:
    """A complete float16 image set; all shards of a size hold the same numbers.

    Args:
        folder: The set's folder.
        rows: Rows in all.
        num_tokens: Tokens per row.
        dim: Width of a token.
        shard_rows: Rows of a shard, a power of two.
    """
    spec = FeatureSetSpec(
        modality="image",
        encoder="random-numbers",
        source="bench",
        library="numpy",
        library_version=np.__version__,
        weights_sha256="0" * 64,
        num_tokens=num_tokens,
        dim=dim,
        batch_size=32,
    )
    keys = [f"row-{number:07d}" for number in range(rows)]
    plan = plan_shards(spec, keys, keys, shard_bytes=shard_rows * num_tokens * dim * 2)
    writer = FeatureSetWriter.create(folder, spec, plan, "bench")
    numbers = np.random.default_rng(0).normal(size=(shard_rows, num_tokens, dim))
    tokens = numbers.astype(np.float16)
    for one in writer.shards:
        with ShardWriter(folder, spec, one) as shard:
            shard.write(np.arange(one.num_rows), tokens[: one.num_rows])
            shard.finish()
    return writer
