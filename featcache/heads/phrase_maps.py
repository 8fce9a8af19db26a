"""Similarity maps: where in a radiograph an Adaptor finds what a phrase says."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from featcache.adaptor.model import unit
from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.reader import FeatureSet
from featcache.console import task
from featcache.loader.gather import iterate_rows


@torch.inference_mode()
def phrase_maps(
    trained: TrainedAdaptor,
    tokens: Float[Tensor, "B L D"],
    texts: Float[Tensor, "J dim"],
    grid: tuple[int, int],
) -> Float[Tensor, "B H W"]:
    """How much each place of each image resembles what some phrases look for.

    Args:
        trained: Its objective has places (`why_no_places` is empty).
        tokens: Prefix tokens first, then the grid, row-major.
        texts: What the objective's `encode_texts` gave for each phrase.
        grid: Height, width in tokens.

    Returns:
        Cosines in [-1, 1], the mean over the phrases.
    """
    adapted = trained.adaptor.encode_images(tokens)[:, -grid[0] * grid[1] :]  # B P dim
    asked = trained.objective.looks_for(texts)
    cosines = torch.einsum("bpd,jd->bpj", unit(adapted), unit(asked)).mean(dim=2)
    return cosines.view(len(cosines), *grid)


def map_images(
    adaptors: Sequence[TrainedAdaptor],
    texts: Sequence[Float[Tensor, "_ dim"]],
    images: FeatureSet,
    rows: Int64[np.ndarray, " N"],
    *,
    device: str,
    batch_size: int,
) -> list[Float32[np.ndarray, "N H W"]]:
    """Maps of images by several Adaptors, in one pass over the cache.

    Args:
        adaptors: At least one, all made for the same features; one may stand there twice.
        texts: What each makes of its phrases.
        images: Features of the images, with a grid.
        rows: Their rows.
        device: Where the Adaptors are.
        batch_size: Images at a time.
    """
    grid = images.spec.grid or (1, 1)
    parts: list[list[Float32[np.ndarray, "B H W"]]] = [[] for _ in adaptors]
    done = 0
    with task(f"look through {images.spec.title}", len(rows)) as progress:
        for some, tokens, _ in iterate_rows(images, rows, batch_size, **adaptors[0].reading):
            moved = tokens.to(device, torch.float32)
            for part, adaptor, text in zip(parts, adaptors, texts, strict=True):
                part.append(phrase_maps(adaptor, moved, text, grid).cpu().numpy())
            done += len(some)
            progress.update(done)
    return [np.concatenate(part) for part in parts]


def centre_map(grid: tuple[int, int]) -> Float32[np.ndarray, "H W"]:
    """How near each place is to the middle of the picture: a map that sees no pixel.

    Args:
        grid: Height, width in tokens.

    Returns:
        1 in the middle, falling to 0 in the corners.
    """
    height, width = grid
    rows = (2 * np.arange(height) + 1 - height) / height
    columns = (2 * np.arange(width) + 1 - width) / width
    far = np.hypot(rows[:, None], columns[None, :])
    near: Float32[np.ndarray, "H W"] = (1.0 - far / np.sqrt(2.0)).astype(np.float32)
    return near
