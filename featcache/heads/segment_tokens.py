"""Grids of tokens that decoders read: the encoder's from the cache, others written down once.

Tokens of an Adaptor or of a random encoder are computed in one pass and kept as float16 in a file
of the output folder while a head is trained, so that many epochs cost one pass, and memory does
not grow with the number of images.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import FLOAT16_MAX, hash_keys
from featcache.cache.reader import FeatureSet
from featcache.config import explained_refusals
from featcache.console import note, size, task
from featcache.errors import TrainingError
from featcache.heads.vectors import random_tokens
from featcache.loader.gather import iterate_rows
from featcache.manifest.table import Manifest


@runtime_checkable
class GridTokens(Protocol):
    """Tokens of labelled images, place by place.

    Attributes:
        grid: Height, width in tokens.
        dim: Width of a token.
    """

    grid: tuple[int, int]
    dim: int

    def batches(
        self, numbers: Int64[np.ndarray, " n"], batch_size: int
    ) -> Iterator[Float[Tensor, "B H W D"]]:
        """Grids of some images in the order given; each is valid until the next is asked for.

        Args:
            numbers: Of labelled images, any order, repeats allowed.
            batch_size: Images of a batch; the last one may be short.
        """
        ...


class CachedGrid:
    """The encoder's own patch tokens, read from the cache; prefix tokens are not read.

    Args:
        images: The set, with a grid.
        rows: Row of each labelled image.
    """

    def __init__(self, images: FeatureSet, rows: Int64[np.ndarray, " N"]):
        if images.spec.grid is None:
            raise ValueError("the set has no grid")
        self.images, self.rows = images, rows
        self.grid, self.dim = images.spec.grid, images.spec.dim

    def batches(
        self, numbers: Int64[np.ndarray, " n"], batch_size: int
    ) -> Iterator[Float[Tensor, "B H W D"]]:
        """See `GridTokens`."""
        for _, tokens, _ in iterate_rows(
            self.images, self.rows[numbers], batch_size, tokens="grid"
        ):
            yield tokens.view(len(tokens), *self.grid, self.dim)


class HeldGrid:
    """Tokens that were written to a file.

    Args:
        tokens: The file's array, a memory map.
        grid: Height, width in tokens.
    """

    def __init__(self, tokens: Float16[np.ndarray, "N L D"], grid: tuple[int, int]):
        self.tokens, self.grid, self.dim = tokens, grid, int(tokens.shape[2])

    def batches(
        self, numbers: Int64[np.ndarray, " n"], batch_size: int
    ) -> Iterator[Float[Tensor, "B H W D"]]:
        """See `GridTokens`."""
        for start in range(0, len(numbers), batch_size):
            tokens = torch.from_numpy(np.asarray(self.tokens[numbers[start : start + batch_size]]))
            yield tokens.view(len(tokens), *self.grid, self.dim)


def _hold(
    path: Path, batches: Iterable[Float[Tensor, "_ P D"]], count: int, grid: tuple[int, int]
) -> HeldGrid:
    """Write tokens of `count` images, or find them written.

    Raises:
        TrainingError: A token is beyond float16.
        CacheError: The disk is full, or the file cannot be written.
    """
    if path.is_file():
        return HeldGrid(np.load(path, mmap_mode="r"), grid)
    partial = path.with_suffix(".partial")
    with explained_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("wb")
    try:
        for tokens in batches:
            if not bool((tokens.abs() <= FLOAT16_MAX).all()):
                raise TrainingError(f"a token is not finite or beyond {FLOAT16_MAX:.0f} (float16)")
            content = tokens.to(torch.float16).contiguous().cpu().numpy()
            with explained_refusals(path):  # a map would die of a full disk without a word
                if file.tell() == 0:
                    shape = (count, grid[0] * grid[1], tokens.shape[2])
                    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    note(f"{path.stem}: {size(2.0 * math.prod(shape))} in {path.parent}")
                file.write(content.tobytes())
                file.flush()
    finally:
        with suppress(OSError):  # what does not fit the disk any more has been told
            file.close()
    partial.rename(path)
    return HeldGrid(np.load(path, mmap_mode="r"), grid)


def why_no_places(trained: TrainedAdaptor) -> str:
    """Why an Adaptor gives no token for each place of a picture; empty when it does."""
    budget = trained.facts.image.tokens
    if budget in ("prefix", "pooled"):
        return f"no places: the Adaptor was trained on the budget `{budget}`"
    if trained.config.objective == "paper":
        return "no places: the objective `paper` knows one vector per image"
    return ""


def adapted_grid(
    images: FeatureSet,
    rows: Int64[np.ndarray, " N"],
    trained: TrainedAdaptor,
    folder: Path,
    *,
    device: str,
    batch_size: int = 32,
) -> HeldGrid | str:
    """The Adaptor's tokens at the places of the grid, or why it has none.

    Args:
        images: The encoder's tokens.
        rows: Row of each labelled image.
        trained: The Adaptor.
        folder: Where the file goes.
        device: Where the Adaptor runs.
        batch_size: Images at a time.
    """
    reason = why_no_places(trained)
    if reason:
        return reason
    if images.spec.grid is None:
        raise ValueError("the set has no grid")
    places = images.spec.grid[0] * images.spec.grid[1]

    @torch.inference_mode()
    def adapt() -> Iterator[Float[Tensor, "B P D"]]:
        done = 0
        with task(f"adapt {images.spec.title}", len(rows)) as progress:
            for some, tokens, _ in iterate_rows(images, rows, batch_size, **trained.reading):
                moved = tokens.to(device, torch.float32)
                yield trained.adaptor.encode_images(moved)[:, -places:]
                done += len(some)
                progress.update(done)

    keys = [images.keys[row] for row in rows]  # rows of a set made anew may hold other images
    mark = hash_keys([images.fingerprint, trained.facts.weights_sha256, *keys])
    return _hold(folder / f"adaptor-{mark[:12]}.npy", adapt(), len(rows), images.spec.grid)


def random_grid(
    images: FeatureSet,
    manifest: Manifest,
    keys: tuple[str, ...],
    folder: Path,
    *,
    seed: int,
    device: str,
) -> HeldGrid:
    """Patch tokens of the same architecture with random weights.

    Args:
        images: The set whose encoder is rebuilt.
        manifest: Where the pictures are.
        keys: Of the labelled images.
        folder: Where the file goes.
        seed: Of the random weights.
        device: Where the encoder runs.

    Raises:
        FeatcacheError: The encoder cannot be rebuilt here, or a picture cannot be read any more.
    """
    spec = images.spec
    if spec.grid is None:
        raise ValueError("the set has no grid")
    batches = (
        tokens[:, spec.num_prefix_tokens :]
        for tokens in random_tokens(spec, manifest, keys, seed=seed, device=device)
    )
    mark = hash_keys([images.fingerprint, str(seed), *keys])
    return _hold(folder / f"random-{mark[:12]}.npy", batches, len(keys), spec.grid)
