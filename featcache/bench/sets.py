"""Feature sets of random numbers, as large as a bench needs them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Float16, Int64, Num, UInt64

from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.reader import Cache, FeatureSet
from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.errors import CacheError

TAG_BASE = 2_048
"""Whole numbers up to here are exact in float16."""
VIT_B = (197, 768)
"""Tokens and width of a ViT-B at 224 pixels: 302,592 bytes a row in float16."""
BERT_BASE = (32, 768)
"""Tokens and width of a text of BERT-base under a budget of 32 tokens."""
TINY_TEXT = 8
"""Width of texts that only have to be there."""


def write_random_set(
    folder: Path,
    *,
    rows: int,
    num_tokens: int,
    dim: int,
    shard_rows: int,
    grid: tuple[int, int] | None = None,
) -> FeatureSetWriter:
    """A complete float16 image set; rows at the same place of a shard differ by their tag alone.

    The first two numbers of a row are its tag: they say which row it is, see `row_numbers`.

    Args:
        folder: The set's folder.
        rows: Rows in all, at most 2,048 x 2,048.
        num_tokens: Tokens per row.
        dim: Width of a token, at least 2.
        shard_rows: Rows of a shard, a power of two.
        grid: Height and width of the patch tokens; the tokens before them are prefix tokens.
    """
    spec = FeatureSetSpec(
        modality="image",
        encoder="random-numbers",
        source="bench",
        library="numpy",
        library_version=np.__version__,
        weights_sha256="0" * 64,
        num_prefix_tokens=0 if grid is None else num_tokens - grid[0] * grid[1],
        grid=grid,
        num_tokens=num_tokens,
        dim=dim,
        batch_size=32,
    )
    keys = [f"row-{number:07d}" for number in range(rows)]
    plan = plan_shards(spec, keys, keys, shard_bytes=shard_rows * num_tokens * dim * 2)
    writer = FeatureSetWriter.create(folder, spec, plan, "bench")
    tokens = _numbers((min(rows, shard_rows), num_tokens, dim))
    first = 0
    for one in writer.shards:
        here = np.arange(first, first + one.num_rows)
        tokens[: one.num_rows, 0, 0], tokens[: one.num_rows, 0, 1] = np.divmod(here, TAG_BASE)
        with ShardWriter(folder, spec, one) as shard:
            shard.write(np.arange(one.num_rows), tokens[: one.num_rows])
            shard.finish()
        first += one.num_rows
    return writer


def _numbers(shape: tuple[int, ...]) -> Float16[np.ndarray, "*shape"]:
    """Random numbers, a row at a time: whole shards in float64 would need gigabytes."""
    generator = np.random.default_rng(0)
    tokens = np.empty(shape, dtype=np.float16)
    for row in tokens:
        row[...] = generator.standard_normal(shape[1:], dtype=np.float32)
    return tokens


def write_random_texts(folder: Path, *, lengths: Sequence[int], dim: int) -> FeatureSetWriter:
    """A complete float16 text set of random numbers, one text for each length.

    Args:
        folder: The set's folder.
        lengths: Tokens of each text.
        dim: Width of a token.
    """
    spec = FeatureSetSpec(
        modality="text",
        encoder="random-numbers",
        source="bench",
        library="numpy",
        library_version=np.__version__,
        weights_sha256="0" * 64,
        max_tokens=max(lengths),
        dim=dim,
        batch_size=32,
    )
    keys = [f"text-{number:07d}" for number in range(len(lengths))]
    writer = FeatureSetWriter.create(folder, spec, plan_shards(spec, keys, keys), "bench")
    counts = np.asarray(lengths, dtype=np.int64)
    for one in writer.shards:
        here, counts = counts[: one.num_rows], counts[one.num_rows :]
        with ShardWriter(folder, spec, one, lengths=here) as shard:
            shard.write(np.arange(one.num_rows), _numbers((int(here.sum()), dim)))
            shard.finish()
    return writer


def join_rows(images: Path, texts: Path, rows: int | None = None) -> Cache:
    """A cache of two sets without a manifest: one pair for each image, texts go round.

    Args:
        images: Folder of the image set.
        texts: Folder of the text set.
        rows: Only the first so many images; None: all.
    """
    image_set, text_set = FeatureSet.open(images), FeatureSet.open(texts)
    image_rows = np.arange(image_set.num_rows if rows is None else rows)
    return Cache(image_set, text_set, image_rows, image_rows % text_set.num_rows, {}, "bench")


def make_cache(folder: Path, rows: int, *, shape: tuple[int, int] = VIT_B) -> Cache:
    """Write a set of random rows, with texts that only have to be there, and open both.

    A text is one token of width 8, so what a batch holds is the image rows.

    Args:
        folder: Where both go.
        rows: Image rows.
        shape: Tokens and width of a row.
    """
    num_tokens, dim = shape
    shard_rows = max(1, 2**29 // (num_tokens * dim * 2))
    write_random_set(
        folder / "images", rows=rows, num_tokens=num_tokens, dim=dim, shard_rows=shard_rows
    )
    write_random_texts(folder / "texts", lengths=[1] * min(rows, 1024), dim=TINY_TEXT)
    return join_rows(folder / "images", folder / "texts")


def row_numbers(tokens: Num[np.ndarray, "B L D"]) -> Int64[np.ndarray, " B"]:
    """Which rows these are, as their first two numbers say."""
    tags = tokens[:, 0, :2].astype(np.int64)
    numbers: Int64[np.ndarray, " B"] = tags[:, 0] * TAG_BASE + tags[:, 1]
    return numbers


def row_checksums(features: FeatureSet) -> UInt64[np.ndarray, " N"]:
    """XXH3 of each row's bytes, as written with the set."""
    return np.concatenate([shard.read("checksums") for shard in features.shards])


def check_pass(
    name: str, features: FeatureSet, batches: Iterable[Num[np.ndarray, "_ _ _"]]
) -> None:
    """Refuse a contestant whose pass is not every row of a set once, byte for byte.

    Args:
        name: The contestant's.
        features: What it was made from.
        batches: What it delivers in one pass; each is looked at before the next is asked for.

    Raises:
        CacheError: A row is missing, comes twice, or has other bytes.
    """
    sums = row_checksums(features)
    seen = np.zeros(features.num_rows, dtype=np.int64)
    for tokens in batches:
        rows = row_numbers(tokens)
        for row, one in zip(rows.tolist(), tokens, strict=True):
            known = 0 <= row < len(sums)
            if not known or xxhash.xxh3_64_intdigest(np.ascontiguousarray(one).data) != sums[row]:
                raise CacheError(f"`{name}` delivers a row that is none of the set's", where=name)
        np.add.at(seen, rows, 1)  # a row may come twice
    if not (seen == 1).all():
        raise CacheError(
            f"`{name}` leaves out {(seen == 0).sum()} rows of {len(seen)} and repeats "
            f"{(seen > 1).sum()}",
            where=name,
        )
