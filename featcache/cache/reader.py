"""A cache opened for training: an image set and a text set, joined into pairs of rows."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from featcache.cache.feature_set import FeatureSet, TokenPlace
from featcache.errors import CacheError, nearest
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

# A feature set alone has a module of its own; what reads the cache imports only this one.
__all__ = ["Cache", "FeatureSet", "TokenPlace", "open_cache"]


@dataclass(frozen=True)
class Cache:
    """An image set and a text set, joined.

    Attributes:
        images: The image set.
        texts: The text set.
        image_rows: Row of each pair in `images`, in the order of `texts.parquet`.
        text_rows: Row of each pair in `texts`.
        dropped: Pairs of the manifest that are left out, by reason.
        fingerprint: 32 hex digits over both sets' fingerprints and all pairs.
    """

    images: FeatureSet
    texts: FeatureSet
    image_rows: Int64[np.ndarray, " M"]
    text_rows: Int64[np.ndarray, " M"]
    dropped: Mapping[str, int]
    fingerprint: str

    @property
    def num_pairs(self) -> int:
        """Pairs whose image and text are both valid."""
        return len(self.image_rows)


def open_cache(
    images: FeatureSet | Path | str,
    texts: FeatureSet | Path | str,
    manifest: Manifest | Path | str,
    *,
    split: str | None = None,
    root: Path | str | None = None,
) -> Cache:
    """Join an image set and a text set by `key` and `text_id`. Copies no features.

        open_cache("features/image/vit-b", "features/text/bert", "manifests/mimic")
        open_cache("vit-b", "bert", "mimic", root="featcache-data")

    Args:
        images: Image set, or its folder.
        texts: Text set, or its folder.
        manifest: Says which text belongs to which image; or its folder.
        split: Keep the pairs of this split alone; None keeps all.
        root: A workspace; `images`, `texts` and `manifest` may then be names in it.

    Raises:
        CacheError: A set has the wrong modality, or no pair is left.
        ManifestError: The manifest is missing or damaged.
        WorkspaceError: The workspace has nothing of that name.
    """
    folders = None if root is None else Workspace.open(Path(root))
    images, texts = _open_set(images, folders, "image"), _open_set(texts, folders, "text")
    if not isinstance(manifest, Manifest):
        manifest = open_manifest(manifest if folders is None else folders.manifest(str(manifest)))
    for features, modality in ((images, "image"), (texts, "text")):
        if features.spec.modality != modality:
            raise CacheError(
                f"a set of {modality} features is needed, this one is {features.spec.title}",
                where=features.folder,
            )
    keys, ids = manifest.texts["key"], manifest.texts["text_id"]
    image_rows, text_rows = _rows_of(keys, images), _rows_of(ids, texts)
    reasons = {
        "in another split": ~_in_split(manifest, keys, split),
        "image has no features": image_rows < 0,
        "image could not be read": (image_rows >= 0) & ~_valid_at(images, image_rows),
        "text has no features": text_rows < 0,
        "text could not be read": (text_rows >= 0) & ~_valid_at(texts, text_rows),
    }
    kept = np.ones(len(image_rows), dtype=bool)
    dropped = {}
    for reason, hit in reasons.items():
        if (count := int((hit & kept).sum())) > 0:
            dropped[reason] = count
        kept &= ~hit
    if not kept.any():
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise CacheError(
            f"no pair is left of the {len(kept)} in manifest `{manifest.name}`: {counts or 'none'}",
            where=f"{images.folder} and {texts.folder}",
            fix="extract both sets from this manifest, or name the manifest they were made from",
        )
    image_rows, text_rows = image_rows[kept], text_rows[kept]
    digest = hashlib.sha256(f"{images.fingerprint} {texts.fingerprint} ".encode())
    digest.update(image_rows.data)
    digest.update(text_rows.data)
    return Cache(images, texts, image_rows, text_rows, dropped, digest.hexdigest()[:32])


def _open_set(
    features: FeatureSet | Path | str,
    workspace: Workspace | None,
    modality: Literal["image", "text"],
) -> FeatureSet:
    """A set that is open, lies in a folder, or has a name in a workspace."""
    if isinstance(features, FeatureSet):
        return features
    if workspace is not None:
        return FeatureSet.open(workspace.feature_set(modality, str(features)))
    return FeatureSet.open(features)


def _rows_of(wanted: pa.ChunkedArray, features: FeatureSet) -> Int64[np.ndarray, " M"]:
    """Row of each key in a set, -1 where it has none."""
    found = pc.index_in(wanted.cast(pa.string()), value_set=features.key_column())
    rows: Int64[np.ndarray, " M"] = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return rows


def _valid_at(features: FeatureSet, rows: Int64[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Whether rows are valid; rows of -1 are not."""
    known = np.append(features.valid, False)
    valid: Bool[np.ndarray, " M"] = known[rows]
    return valid


def _in_split(
    manifest: Manifest, keys: pa.ChunkedArray, split: str | None
) -> Bool[np.ndarray, " M"]:
    """Whether the image of each pair is in a split.

    Raises:
        CacheError: The manifest has no such split.
    """
    if split is None:
        return np.ones(len(keys), dtype=bool)
    splits = manifest.images["split"]
    known = sorted(name for name in pc.unique(splits).to_pylist() if name is not None)
    if split not in known:
        raise CacheError(
            f"the manifest has no split `{split}`; {nearest(split, known)}",
            where=manifest.folder,
            fix="make the manifest again from a table whose `split` column has it",
        )
    chosen = manifest.images["key"].filter(pc.fill_null(pc.equal(splits, split), False))
    inside: Bool[np.ndarray, " M"] = pc.is_in(keys, value_set=chosen).to_numpy()
    return inside
