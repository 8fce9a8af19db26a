"""One vector per image or text, made of cached tokens, for heads that read vectors."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from featcache.adaptor.model import masked_mean
from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import FeatureSetSpec, hash_keys
from featcache.cache.reader import FeatureSet
from featcache.config import replace_file
from featcache.console import task
from featcache.encoders.decode import decode_image, to_input
from featcache.encoders.interface import ImageEncoder, locate_encoder, random_encoder
from featcache.errors import EncoderError
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


def pool_tokens(
    tokens: Float[Tensor, "B L D"], spec: FeatureSetSpec, pooling: Pooling
) -> Float32[Tensor, "B F"]:
    """One vector of each image's tokens, in float32; F is D, or 2 D for `both`.

    Args:
        tokens: Any float type.
        spec: Says how many prefix tokens there are.
        pooling: One that `possible_poolings` gave.
    """
    if pooling == "mean":
        return mean_tokens(tokens, None, spec)
    first = tokens[:, 0].float()
    return first if pooling == "prefix" else torch.cat([mean_tokens(tokens, None, spec), first], 1)


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
    """
    raw: dict[Pooling, list[np.ndarray]] = {
        one: [] for one in possible_poolings(images.spec, poolings)
    }
    adapted, done = [], 0
    whole = iterate_rows(images, rows, batch_size)
    reading = {} if trained is None else trained.reading
    is_budgeted = reading.get("tokens", "all") != "all"
    budget = iterate_rows(images, rows, batch_size, **reading) if is_budgeted else None
    with task(f"read {images.spec.title}", len(rows)) as progress:
        for some, tokens, _ in whole:
            for pooling, made in raw.items():
                made.append(pool_tokens(tokens, images.spec, pooling).numpy())
            if trained is not None:
                own = tokens if budget is None else next(budget)[1]
                moved = own.to(device, torch.float32)
                vector = trained.objective.image_vector(trained.adaptor, moved)
                adapted.append(vector.float().cpu().numpy())
            done += len(some)
            progress.update(done)
    joined = {pooling: np.concatenate(made) for pooling, made in raw.items()}
    return ImageVectors(joined, np.concatenate(adapted) if adapted else None)


def mean_vectors(
    features: FeatureSet, rows: Int64[np.ndarray, " N"], *, batch_size: int = 64
) -> Float32[np.ndarray, "N D"]:
    """The mean token of each row; see `mean_tokens`."""
    means = [
        mean_tokens(tokens, valid, features.spec).numpy()
        for _, tokens, valid in iterate_rows(features, rows, batch_size)
    ]
    return np.concatenate(means)


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

    Kept in `random/` beside the folder of image sets, so that it is computed once.

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
    asked = possible_poolings(images.spec, poolings)
    mark = hash_keys([images.fingerprint, str(seed), *keys])
    name = f"{images.spec.encoder.replace('/', '-')}-seed{seed}-{mark[:12]}.safetensors"
    path = images.folder.parent.parent / "random" / name
    kept = _read_kept(path, len(keys))
    if not set(asked) <= kept.keys():
        made: dict[str, list[np.ndarray]] = {pooling: [] for pooling in asked}
        for tokens in random_tokens(images.spec, manifest, keys, seed=seed, device=device):
            for pooling in asked:
                made[pooling].append(pool_tokens(tokens, images.spec, pooling).cpu().numpy())
        kept = {pooling: np.concatenate(some) for pooling, some in made.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(kept))
    return {pooling: kept[pooling] for pooling in asked}


def _read_kept(path: Path, num_rows: int) -> dict[str, Float32[np.ndarray, "N _"]]:
    """Vectors of an earlier call by pooling; nothing when there are none, or they are damaged."""
    if not path.is_file():
        return {}
    try:
        kept = load_file(path)
    except (SafetensorError, OSError):
        return {}
    return {name: one for name, one in kept.items() if one.ndim == 2 and len(one) == num_rows}


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
