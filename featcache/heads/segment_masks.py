"""True masks of a manifest's images: joined to features by key, resized as the encoder saw them.

A pixel of the resized mask is inside when at least half of it is covered. A mask too thin for that
anywhere keeps its best covered pixels, so that no image with a finding becomes one without.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import JsonValue

from featcache.cache.format import FeatureSetSpec, hash_keys
from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError, ManifestError
from featcache.heads.labels import LabelledImages, images_with_classes
from featcache.manifest.checks import MASK_COLUMN
from featcache.manifest.masks import decode_mask, resize_mask
from featcache.manifest.table import Manifest

EMPTY, FOUND, FILE = "empty", "mask", "file:"
HALF = 0.5
Fit = Literal["pad", "squash"]


@dataclass(frozen=True)
class Masks:
    """True masks of some labelled images at one size, eight pixels to a byte.

    Attributes:
        size: Height, width.
        bits: Number of an image to its mask; an image that has none is missing.
        thin: How many kept their best covered pixels, as no pixel was covered by half.
    """

    size: tuple[int, int]
    bits: Mapping[int, UInt8[np.ndarray, " bytes"]]
    thin: int

    def of(self, numbers: Iterable[int]) -> Bool[np.ndarray, "B H W"]:
        """Masks of some images, in that order.

        Args:
            numbers: Of labelled images.
        """
        height, width = self.size
        nothing = np.zeros(height * width, np.uint8)
        rows = [
            np.unpackbits(self.bits[number], count=height * width)
            if number in self.bits
            else nothing
            for number in numbers
        ]
        return np.stack(rows).reshape(-1, height, width).astype(np.bool_)


@dataclass(frozen=True)
class MaskedImages:
    """Images with an annotation, a split, and features.

    Attributes:
        labelled: The images, by class `empty` or `mask`.
        texts: What the manifest's column `mask` says of each.
        root: Folder that mask files start from.
        fit: How pictures were fitted into the encoder's input.
        files: Hash of the content of all masks that lie in files, None without any. A manifest
            names such files; what is in them may change without it.
    """

    labelled: LabelledImages
    texts: tuple[str, ...]
    root: Path
    fit: Fit
    files: str | None = None

    def facts(self) -> dict[str, JsonValue]:
        """What decides a result beside the manifest's own content."""
        return {"mask_files": self.files} if self.files is not None else {}

    @property
    def positive(self) -> Bool[np.ndarray, " N"]:
        """Which images have a mask."""
        found = [name == FOUND for name in self.labelled.classes]
        positive: Bool[np.ndarray, " N"] = np.asarray(found)[self.labelled.targets]
        return positive

    def masks(self, numbers: Int64[np.ndarray, " n"], size: tuple[int, int]) -> Masks:
        """Decode and resize the masks of some images.

        Args:
            numbers: Of labelled images.
            size: Height, width.

        Raises:
            ManifestError: A mask's file cannot be read.
        """
        wanted = numbers[self.positive[numbers]].tolist()
        with ThreadPoolExecutor(max_workers=4) as pool:
            shares = pool.map(lambda number: self._resized(number, size), wanted)
            bits, thin = {}, 0
            for number, share in zip(wanted, shares, strict=True):
                thin += int(share.max() < HALF)
                bits[number] = np.packbits(share >= min(HALF, float(share.max())))
        return Masks(size, bits, thin)

    def _resized(self, number: int, size: tuple[int, int]) -> Float32[np.ndarray, "H W"]:
        """Share of each pixel inside one image's mask."""
        mask = decode_mask(self.texts[number], self.root, where=_place(number))
        if mask is None:
            return np.zeros(size, np.float32)
        return resize_mask(mask, *size, fit=self.fit)


def _place(number: int) -> str:
    """How errors call an image: its place among the annotated ones, no identifier."""
    return f"annotated image {number} (in the order of keys)"


def masked_images(images: FeatureSet, manifest: Manifest) -> MaskedImages:
    """Join a manifest's masks to the rows of a feature set, by key.

    Args:
        images: Features of the manifest's images, with a grid.
        manifest: Masks, splits, patients.

    Raises:
        CacheError: The set has no grid, or its pictures were cropped or mirrored.
        ManifestError: There are no masks, a patient is in two splits, or a split is empty.
    """
    refuse_without_grid(images.spec, images.folder)
    if MASK_COLUMN not in manifest.images.column_names:
        raise ManifestError(
            f"manifest `{manifest.name}` has no column `{MASK_COLUMN}`: nothing to segment",
            where=manifest.folder,
            fix="a data set with masks, e.g. featcache manifest rsna FOLDER or siim FOLDER",
        )
    texts: list[str | None] = manifest.images.column(MASK_COLUMN).to_pylist()
    root = Path(manifest.meta.image_root)
    with ThreadPoolExecutor(max_workers=4) as pool:
        named = list(pool.map(lambda text: _class_of(text, root), texts))
    labelled = images_with_classes(
        images, manifest, named, unnamed="without a mask annotation", fewest_classes=1
    )
    text_of = dict(zip(manifest.keys, texts, strict=True))
    own = tuple(text_of[key] or "" for key in labelled.keys)
    fit: Fit = "squash" if images.spec.preprocessing.get("fit") == "squash" else "pad"
    found = MaskedImages(labelled, own, root, fit, _files_hash(labelled.keys, own, root))
    for split in ("train", "validate", "test"):
        if not found.positive[labelled.of(split)].any():
            raise ManifestError(
                f"no image of split `{split}` has a mask: nothing can be learnt or measured there",
                where=manifest.folder,
                fix="make the manifest again, with positives in every split",
            )
    return found


def _files_hash(keys: Sequence[str], texts: Sequence[str], root: Path) -> str | None:
    """Hash of the bytes of all masks in files, by key; None without any."""
    named = [(key, text) for key, text in zip(keys, texts, strict=True) if text.startswith(FILE)]
    if not named:
        return None

    def digest(text: str) -> str:
        return hashlib.sha256((root / text.removeprefix(FILE)).read_bytes()).hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(digest, (text for _, text in named)))
    return hash_keys([f"{key} {one}" for (key, _), one in zip(named, digests, strict=True)])


def _class_of(text: str | None, root: Path) -> str | None:
    """Whether an image has a mask; only a file has to be looked at for that."""
    if text is None:
        return None
    if text.startswith(FILE):
        mask = decode_mask(text, root, where="a mask's file")
        return FOUND if mask is not None and mask.any() else EMPTY
    return FOUND if text else EMPTY


def refuse_without_grid(spec: FeatureSetSpec, folder: Path) -> None:
    """Segmentation needs a token for each place of the whole, upright picture.

    Args:
        spec: Of an image set.
        folder: Where it lies, for the message.

    Raises:
        CacheError: The set has no grid, or shows a window or a mirror image.
    """
    fix = "featcache extract --backbone vit-b, or another encoder with patch tokens"
    if spec.modality != "image" or spec.grid is None:
        raise CacheError(
            f"{spec.title} has no grid of patch tokens, so there are no places to segment",
            where=folder,
            fix=fix,
        )
    shown = [
        spec.preprocessing.get(name, usual)
        for name, usual in (("fit", "pad"), ("view", "identity"))
    ]
    if shown[0] not in ("pad", "squash") or shown[1] != "identity":
        raise CacheError(
            f"{spec.title} does not show the whole picture as it stands (fit `{shown[0]}`, view "
            f"`{shown[1]}`): masks would not lie where its tokens do",
            where=folder,
            fix="segment on a set with fit `pad` or `squash` and view `identity`",
        )


def pixel_size(grid: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height, width of a mask: whole pixels per token, the longer side next to a number.

    Args:
        grid: Height, width in tokens.
        longest: Pixels wanted along the longer side.
    """
    each = max(1, round(longest / max(grid)))
    return grid[0] * each, grid[1] * each
