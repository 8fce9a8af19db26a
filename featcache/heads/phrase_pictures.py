"""Pictures of similarity maps: each radiograph with its map and the outline of its true mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from scipy.ndimage import binary_erosion

from featcache.config import explained_refusals
from featcache.console import note
from featcache.encoders.decode import decode_image
from featcache.encoders.preprocessing import Preprocessing
from featcache.errors import ImageError
from featcache.heads.segment_decoder import upsample
from featcache.heads.segment_masks import MaskedImages
from featcache.manifest.table import Manifest

OUTLINE = (0, 255, 0)
STRENGTH = 0.6
"""Share of the map's colour where it is highest."""


@dataclass(frozen=True)
class Pictures:
    """What is drawn, and of which images.

    Attributes:
        manifest: Where the picture files are.
        masked: The annotated images.
        size: Height, width of a picture.
    """

    manifest: Manifest
    masked: MaskedImages
    size: tuple[int, int]

    def choose(self, count: int) -> list[int]:
        """The first test images by key, those with a mask before those without.

        Args:
            count: How many at most.
        """
        test = self.masked.labelled.of("test")
        positive = self.masked.positive[test]
        return [*test[positive].tolist(), *test[~positive].tolist()][:count]

    def save(
        self, folder: Path, numbers: Sequence[int], maps: Float32[np.ndarray, "n H W"]
    ) -> None:
        """Write a PNG for each image, named by its row in the feature set.

        Left the radiograph as the encoder saw it, right the same under its map, dark red to yellow
        from the lowest to the highest value of all maps; the true mask is outlined in green. A file
        that cannot be read gives a black picture. Earlier pictures of the folder are removed.

        Args:
            folder: Made when missing.
            numbers: Of the annotated images.
            maps: Of these images, on the grid.
        """
        masks = self.masked.masks(np.array(numbers, dtype=np.int64), self.size).of(numbers)
        heat = upsample(torch.from_numpy(maps), self.size).numpy()
        heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-6)
        row_of = {key: row for row, key in enumerate(self.manifest.keys)}
        unread = 0
        with explained_refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("row-*.png"):
                old.unlink()
            for number, one, mask in zip(numbers, heat, masks, strict=True):
                try:
                    grey = self._grey(row_of[self.masked.labelled.keys[number]])
                except ImageError:
                    grey, unread = np.zeros(self.size, np.uint8), unread + 1
                row = int(self.masked.labelled.rows[number])
                Image.fromarray(draw(grey, one, mask)).save(folder / f"row-{row:06d}.png")
        lost = f"; {unread} radiographs could not be read and are black" if unread else ""
        note(f"ground: {len(numbers)} pictures of patients in {folder}{lost}")

    def _grey(self, row: int) -> UInt8[np.ndarray, "H W"]:
        """A radiograph fitted like the masks."""
        plain = Preprocessing(image_size=self.size, fit=self.masked.fit, mean=(0.0,), std=(1.0,))
        return decode_image(self.manifest.image_file(row), plain)


def draw(
    grey: UInt8[np.ndarray, "H W"], heat: Float32[np.ndarray, "H W"], mask: Bool[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W2 3"]:
    """A radiograph beside itself under its map, both with the outline of the true mask.

    Args:
        grey: 0 black to 255 white.
        heat: In [0, 1].
        mask: True inside.
    """
    plain = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    colour = np.stack([np.minimum(1, 2 * heat), np.maximum(0, 2 * heat - 1), 0 * heat], axis=2)
    share = STRENGTH * heat[..., None]
    covered = (1 - share) * plain + share * 255 * colour
    edge = mask & ~binary_erosion(mask)
    for picture in (plain, covered):
        picture[edge] = OUTLINE
    both: UInt8[np.ndarray, "H W2 3"] = np.rint(np.concatenate([plain, covered], axis=1)).astype(
        np.uint8
    )
    return both
