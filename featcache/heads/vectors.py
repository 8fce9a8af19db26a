"""One vector per image or text, made of cached tokens, for heads that read vectors."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from featcache.adaptor.model import masked_mean
from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import FeatureSetSpec, hash_keys
from featcache.cache.reader import FeatureSet
from featcache.console import task
from featcache.encoders.decode import decode_image, to_input
from featcache.encoders.interface import ImageEncoder, locate_encoder, random_encoder
from featcache.errors import EncoderError
from featcache.heads.vector_file import VectorFile, read_vectors
from featcache.loader.gather import iterate_rows
from featcache.manifest.table import Manifest

MEAN = "mean of the patch tokens (prefix tokens left out)"
MEAN_ALL = "mean of all tokens (the set has no patch tokens)"
PREFIX = "first prefix token (the class token)"
BOTH = "mean and class token side by side"

Pooling = Literal["mean", "prefix", "both"]
POOLINGS: tuple[Pooling, ...] = ("mean", "prefix", "both")
"""How a frozen encoder's tokens become one vector; of equals the first is taken."""


@dataclass(frozen=True)
class ImageVectors:
    """Vectors of the same images from two sources.

    Attributes:
        raw: The encoder's tokens, by pooling.
        adaptor: What the Adaptor's objective offers to heads; None without an Adaptor.
    """

    raw: Mapping[Pooling, Float32[np.ndarray, "N _"]]
    adaptor: Float32[np.ndarray, "N F"] | None


def possible_poolings(spec: FeatureSetSpec, asked: Sequence[Pooling]) -> tuple[Pooling, ...]:
    """Those of some poolings that a set's tokens allow; without prefix tokens the mean alone.

    Args:
        spec: Says how many prefix tokens there are.
        asked: In any order.
    """
    has_both = 0 < spec.num_prefix_tokens < (spec.num_tokens or 0)
    return tuple(one for one in POOLINGS if one in asked and has_both) or ("mean",)


def pooling_rule(spec: FeatureSetSpec, pooling: Pooling) -> str:
    """What a pooling makes of a row of this set, in words."""
    return {"mean": mean_rule(spec), "prefix": PREFIX, "both": BOTH}[pooling]


def side_by_side(tokens: Float[Tensor, "B L D"], spec: FeatureSetSpec) -> Float32[Tensor, "B W"]:
    """All poolings of each image in one row: its mean, then its first prefix token if it has one.

    Args:
        tokens: Any float type.
        spec: Says how many prefix tokens there are.
    """
    mean = mean_tokens(tokens, None, spec)
    if possible_poolings(spec, POOLINGS) == ("mean",):
        return mean
    return torch.cat([mean, tokens[:, 0].float()], dim=1)


def by_pooling(
    rows: Float32[np.ndarray, "N W"], spec: FeatureSetSpec, asked: Sequence[Pooling]
) -> dict[Pooling, Float32[np.ndarray, "N _"]]:
    """Views of rows that `side_by_side` made: no pooling is a copy.

    Args:
        rows: Of all images.
        spec: Says how many prefix tokens there are.
        asked: Those that the set allows are given.
    """
    views: dict[Pooling, Float32[np.ndarray, "N _"]] = {
        "mean": rows[:, : spec.dim],
        "prefix": rows[:, -spec.dim :],
        "both": rows,
    }
    return {pooling: views[pooling] for pooling in possible_poolings(spec, asked)}


def mean_rule(spec: FeatureSetSpec) -> str:
    """Which mean `mean_tokens` takes of a row of this set, in words."""
    return MEAN_ALL if spec.num_tokens == spec.num_prefix_tokens else MEAN


def mean_tokens(
    tokens: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"] | None, spec: FeatureSetSpec
) -> Float32[Tensor, "B D"]:
    """Mean of each row's real tokens, in float32; prefix tokens of an image do not enter.

    Args:
        tokens: Any float type.
        valid: True = real; None = all.
        spec: Says how many prefix tokens there are.
    """
    first = 0 if mean_rule(spec) == MEAN_ALL else spec.num_prefix_tokens
    some = None if valid is None else valid[:, first:]
    return masked_mean(tokens[:, first:].float(), some)


@torch.inference_mode()
def image_vectors(
    images: FeatureSet,
    rows: Int64[np.ndarray, " N"],
    trained: TrainedAdaptor | None,
    *,
    poolings: Sequence[Pooling] = ("mean",),
    device: str = "cpu",
    batch_size: int = 64,
    folder: Path | None = None,
) -> ImageVectors:
    """Read each image's tokens once and make all vectors of them.

    An Adaptor that was trained on a token budget reads that; the encoder's vector is of all tokens.

    No image's vector depends on the others in its batch.

    Args:
        images: The encoder's tokens.
        rows: Which rows, in the order of the result.
        trained: Its objective turns tokens into the Adaptor's vector.
        poolings: Of the encoder's own vectors; those that the set allows are made.
        device: Where the Adaptor runs.
        batch_size: Images read at a time.
        folder: Where vectors lie, in files without a name, as long as they are used; None: in
            memory.

    Raises:
        CacheError: The disk is full.
    """
    only_mean = possible_poolings(images.spec, poolings) == ("mean",)
    done = 0
    whole = iterate_rows(images, rows, batch_size)
    reading = {} if trained is None else trained.reading
    is_budgeted = reading.get("tokens", "all") != "all"
    budget = iterate_rows(images, rows, batch_size, **reading) if is_budgeted else None
    with (
        _Vectors(folder, len(rows)) as raw,
        _Vectors(folder, len(rows)) as adapted,
        task(f"read {images.spec.title}", len(rows)) as progress,
    ):
        for some, tokens, _ in whole:
            if only_mean:
                raw.add(mean_tokens(tokens, None, images.spec))
            else:
                raw.add(side_by_side(tokens, images.spec))
            if trained is not None:
                own = tokens if budget is None else next(budget)[1]
                moved = own.to(device, torch.float32)
                vector = trained.objective.image_vector(trained.adaptor, moved)
                adapted.add(vector.float().cpu())
            done += len(some)
            progress.update(done)
        found = by_pooling(raw.finish(), images.spec, poolings)
        return ImageVectors(found, adapted.finish() if trained is not None else None)


class _Vectors(ExitStack):
    """Vectors that come in batches, kept in memory or in a file without a name."""

    def __init__(self, folder: Path | None, count: int):
        super().__init__()
        self.parts: list[Float32[np.ndarray, "_ W"]] = []
        self.file = None if folder is None else self.enter_context(VectorFile(folder, count))

    def add(self, vectors: Float32[Tensor, "_ W"]) -> None:
        if self.file is None:
            self.parts.append(vectors.numpy())
        else:
            self.file.add(vectors.numpy())

    def finish(self) -> Float32[np.ndarray, "N W"]:
        return np.concatenate(self.parts) if self.file is None else self.file.finish()


def mean_vectors(
    features: FeatureSet, rows: Int64[np.ndarray, " N"], *, batch_size: int = 64
) -> Float32[np.ndarray, "N D"]:
    """The mean token of each row; see `mean_tokens`."""
    means, done = np.empty((len(rows), features.spec.dim), np.float32), 0
    for some, tokens, valid in iterate_rows(features, rows, batch_size):
        means[done : done + len(some)] = mean_tokens(tokens, valid, features.spec).numpy()
        done += len(some)
    return means


def random_vectors(
    images: FeatureSet,
    manifest: Manifest,
    keys: tuple[str, ...],
    *,
    seed: int,
    poolings: Sequence[Pooling] = ("mean",),
    device: str = "cpu",
) -> dict[Pooling, Float32[np.ndarray, "N _"]]:
    """What the same architecture with random weights makes of the same pictures, by pooling.

    Kept in `random/` beside the folder of image sets, so that it is computed once, and mapped, so
    that it needs no memory of its own.

    Args:
        images: The set whose encoder is rebuilt.
        manifest: Where the pictures are.
        keys: Which pictures, in the order of the result.
        seed: Of the random weights.
        poolings: Those that the set allows are made.
        device: Where the encoder runs.

    Raises:
        FeatcacheError: The encoder cannot be rebuilt here, or a picture cannot be read any more.
    """
    mark = hash_keys([images.fingerprint, str(seed), *keys])
    name = f"{images.spec.encoder.replace('/', '-')}-seed{seed}-{mark[:12]}.npy"
    folder = images.folder.parent.parent / "random"
    kept = read_vectors(folder / name, len(keys))
    if kept is None:
        with VectorFile(folder, len(keys), name) as file:
            for tokens in random_tokens(images.spec, manifest, keys, seed=seed, device=device):
                file.add(side_by_side(tokens, images.spec).cpu().numpy())
            kept = file.finish()
    return by_pooling(kept, images.spec, poolings)


def _rebuild(spec: FeatureSetSpec, seed: int, device: str) -> ImageEncoder:
    """The set's encoder with random weights, checked against the set's layout."""
    size = spec.preprocessing.get("image_size")
    sides = [side for side in size if isinstance(side, int)] if isinstance(size, list) else []
    image_size = (sides[0], sides[1]) if len(sides) == 2 else None
    located = locate_encoder(spec.encoder, "image", image_size=image_size)
    encoder = random_encoder(located, seed=seed, device=device)
    own = encoder.spec(batch_size=spec.batch_size)
    for name in ("preprocessing", "grid", "num_prefix_tokens", "dim"):
        if getattr(own, name) != getattr(spec, name):
            raise EncoderError(
                f"the encoder `{spec.encoder}` found here differs in `{name}` from the one the "
                "features were made with"
            )
    return encoder  # type: ignore[return-value]


@torch.inference_mode()
def random_tokens(
    spec: FeatureSetSpec,
    manifest: Manifest,
    keys: tuple[str, ...],
    *,
    seed: int,
    device: str = "cpu",
) -> Iterator[Float[Tensor, "B L D"]]:
    """Tokens that the set's encoder gives with random weights, in batches of pictures.

    The next batch is decoded while one is encoded.

    Args:
        spec: Of the set whose encoder is rebuilt.
        manifest: Where the pictures are.
        keys: Which pictures, in the order of the result.
        seed: Of the random weights.
        device: Where the encoder runs.

    Raises:
        FeatcacheError: The encoder cannot be rebuilt here, or a picture cannot be read any more.
    """
    encoder = _rebuild(spec, seed, device)
    row_of = {key: row for row, key in enumerate(manifest.keys)}
    paths = [manifest.image_file(row_of[key]) for key in keys]
    size = min(spec.batch_size, 32)
    read = partial(decode_image, preprocessing=encoder.preprocessing)
    with (
        ThreadPoolExecutor(max_workers=4) as pool,
        task(f"random {spec.encoder}", len(paths)) as progress,
    ):
        ahead = pool.map(read, paths[:size])
        for start in range(0, len(paths), size):
            greys = torch.from_numpy(np.stack(list(ahead)))
            ahead = pool.map(read, paths[start + size : start + 2 * size])
            yield encoder(to_input(greys.to(device), encoder.preprocessing)).tokens
            progress.update(start + len(greys))
