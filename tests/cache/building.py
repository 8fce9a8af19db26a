"""Small feature sets with known content; test folders load this file as the fixture `build`."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.cache.format import FeatureSetSpec, make_channel_scale, plan_shards
from featcache.cache.writer import FeatureSetWriter, ShardWriter


def make_spec(modality="image", **changes):
    values = {
        "modality": modality,
        "encoder": "tiny",
        "source": "timm:tiny",
        "library": "timm",
        "library_version": "1.0",
        "weights_sha256": "ab" * 32,
        "preprocessing": {"size": [224, 224], "mean": 0.5},
        "num_tokens": None if modality == "text" else 3,
        "max_tokens": 9 if modality == "text" else None,
        "dim": 4,
        "batch_size": 2,
    }
    return FeatureSetSpec(**{**values, **changes})


@dataclass
class Content:
    """Rows before they are written: what a test compares with."""

    keys: list
    tokens: list  # one array per row
    pooled: np.ndarray | None
    failed: set = field(default_factory=set)

    @property
    def lengths(self):
        return np.array([len(one) for one in self.tokens], dtype=np.int64)


def make_content(spec, num_rows, *, seed=0, failed=(), prefix="key"):
    rng = np.random.default_rng(seed)
    lengths = np.full(num_rows, spec.num_tokens or 0)
    if spec.is_ragged:
        lengths = rng.integers(0, spec.max_tokens + 1, num_rows)
    tokens = [rng.normal(size=(length, spec.dim)).astype(np.float32) for length in lengths]
    pooled = None
    if spec.pooled_dim is not None:
        pooled = rng.normal(size=(num_rows, spec.pooled_dim)).astype(np.float32)
    keys = [f"{prefix}-{number}" for number in range(num_rows)]
    return Content(keys, tokens, pooled, set(failed))


def expected_tokens(spec, content, rows):
    """Tokens as a float set gives them back, rows end to end."""
    stored = [
        np.zeros_like(content.tokens[row]) if row in content.failed else content.tokens[row]
        for row in rows
    ]
    return np.concatenate([np.zeros((0, spec.dim)), *stored]).astype(spec.dtype)


def channel_scale(spec, content):
    if spec.dtype != "int8":
        return None
    return make_channel_scale(np.concatenate(content.tokens))


def fill(writer, content, rows, *, first=0):
    """Write rows of one shard, one call for each list in `rows`; `first` is its row in the set."""
    for batch in rows:
        good = np.array([row for row in batch if first + row not in content.failed], dtype=np.int64)
        for row in set(batch) - set(good.tolist()):
            writer.quarantine(int(row))
        if good.size == 0:
            continue
        tokens = [content.tokens[first + row] for row in good]
        stacked = np.concatenate(tokens) if writer.spec.is_ragged else np.stack(tokens)
        pooled = None if content.pooled is None else content.pooled[first + good]
        writer.write(good, stacked, pooled)


def write_shard(folder, spec, content, plan, *, batches=None):
    first = content.keys.index(plan.keys[0])
    lengths = None
    if spec.is_ragged:
        lengths = content.lengths[first : first + plan.num_rows]
    with ShardWriter(folder, spec, plan, lengths, channel_scale(spec, content)) as writer:
        fill(writer, content, batches or [list(range(plan.num_rows))], first=first)
        return writer.finish()


def start_set(folder, spec, content, *, rows_per_shard=4, manifest_name="m"):
    plan = plan_shards(
        spec,
        content.keys,
        content.keys,
        shard_bytes=rows_per_shard * (spec.row_bytes or 1),
        ragged_rows=rows_per_shard,
    )
    return FeatureSetWriter.create(Path(folder), spec, plan, manifest_name)


def write_set(folder, spec, content, *, rows_per_shard=4, manifest_name="m"):
    writer = start_set(
        folder, spec, content, rows_per_shard=rows_per_shard, manifest_name=manifest_name
    )
    for plan in writer.shards:
        write_shard(writer.folder, spec, content, plan)
    return writer
