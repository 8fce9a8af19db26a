"""Labelled images: the rows of a manifest that a classification head may use.

The classes are numbered in the order of their names, and that list travels with every result. What
cannot be used is counted by reason, never dropped in silence.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from featcache.cache.reader import FeatureSet
from featcache.config import replace_file, write_json
from featcache.errors import ManifestError, UsageError, nearest
from featcache.manifest.splits import SPLIT_NAMES, label_fraction, list_hash
from featcache.manifest.table import Manifest

PREFIX = "label:"


@dataclass(frozen=True)
class LabelledImages:
    """Images with a known class, a split, and features; sorted by key.

    Attributes:
        keys: Key of each image.
        rows: Its row in the feature set.
        subject_ids: Its patient.
        splits: `train`, `validate` or `test`.
        sources: Where it came from.
        targets: Its class, an index into `classes`.
        classes: Names, sorted as text.
        left_out: Reason to number of images that could not be used.
    """

    keys: tuple[str, ...]
    rows: Int64[np.ndarray, " N"]
    subject_ids: tuple[str, ...]
    splits: tuple[str, ...]
    sources: tuple[str, ...]
    targets: Int64[np.ndarray, " N"]
    classes: tuple[str, ...]
    left_out: Mapping[str, int]

    def of(self, split: str) -> Int64[np.ndarray, " n"]:
        """Numbers of the images of one split."""
        return np.flatnonzero(np.asarray(self.splits) == split)

    def class_counts(self, numbers: Int64[np.ndarray, " n"]) -> dict[str, int]:
        """Images of each class among some of them."""
        counts = np.bincount(self.targets[numbers], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))


def _label_column(manifest: Manifest, label: str) -> pa.ChunkedArray:
    """The column of a label, by its name without the prefix."""
    names = [n.removeprefix(PREFIX) for n in manifest.images.column_names if n.startswith(PREFIX)]
    name = label.removeprefix(PREFIX)
    if name not in names:
        raise UsageError(
            f"the manifest has no label `{name}`; {nearest(name, names)}",
            where=manifest.folder,
            fix=f"--set label={names[0]}" if names else "make the manifest from a labelled table",
        )
    return manifest.images.column(PREFIX + name)


def _class_names(column: pa.ChunkedArray, label: str) -> list[str | None]:
    """The class of each image, None where it has none.

    Whole numbers are a finding: 1 is there, 0 is not there, -1 (uncertain) and null say nothing.
    """
    if not pa.types.is_integer(column.type):
        names: list[str | None] = column.to_pylist()
        return names
    name = label.removeprefix(PREFIX)
    words = {1: name, 0: f"no {name}"}
    return [words.get(value) for value in column.to_pylist()]


def _refuse_shared_patients(subject_ids: Sequence[str], splits: Sequence[str | None]) -> None:
    """A patient may be in one split only."""
    seen: dict[str, str] = {}
    shared = set()
    for subject, split in zip(subject_ids, splits, strict=True):
        if split is not None and seen.setdefault(subject, split) != split:
            shared.add(subject)
    if shared:
        raise ManifestError(
            f"{len(shared)} patient(s) have images in more than one split, so a head would be "
            "tested on patients it was trained on",
            fix="make the manifest again, split by patient",
        )


def labelled_images(images: FeatureSet, manifest: Manifest, label: str) -> LabelledImages:
    """Join a manifest's labels to the rows of a feature set, by key.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits, patients.
        label: Name of a label column, with or without `label:`.

    Raises:
        UsageError: There is no such label.
        ManifestError: A patient is in two splits, a split is empty, or there is a single class.
    """
    table = manifest.images
    keys, subjects, splits, sources = (
        table.column(name).to_pylist() for name in ("key", "subject_id", "split", "source")
    )
    _refuse_shared_patients(subjects, splits)
    named = _class_names(_label_column(manifest, label), label)
    left_out: Counter[str] = Counter()
    kept: list[int] = []
    for number in np.argsort(np.asarray(keys, dtype=str), kind="stable").tolist():
        reason = _why_not(images, keys[number], named[number], splits[number])
        left_out[reason] += 1
        if not reason:
            kept.append(number)
    del left_out[""]
    classes = sorted({str(named[number]) for number in kept})
    found = LabelledImages(
        keys=tuple(keys[number] for number in kept),
        rows=np.array([images.row_of[keys[number]] for number in kept], dtype=np.int64),
        subject_ids=tuple(subjects[number] for number in kept),
        splits=tuple(splits[number] for number in kept),
        sources=tuple(sources[number] for number in kept),
        targets=np.array([classes.index(str(named[n])) for n in kept], dtype=np.int64),
        classes=tuple(classes),
        left_out=dict(sorted(left_out.items())),
    )
    _refuse_unusable(found, manifest)
    return found


def _why_not(images: FeatureSet, key: str, name: str | None, split: str | None) -> str:
    """Why an image cannot be used; empty when it can."""
    if split is None:
        return "in no split"
    if name is None:
        return "without a (certain) label"
    row = images.row_of.get(key)
    if row is None:
        return "not in the feature set"
    return "" if images.valid[row] else "quarantined (could not be read)"


def _refuse_unusable(found: LabelledImages, manifest: Manifest) -> None:
    """Every split needs an image, and there must be something to tell apart."""
    empty = [split for split in SPLIT_NAMES if len(found.of(split)) == 0]
    if empty:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        raise ManifestError(
            f"no labelled image with features in split {' and '.join(f'`{s}`' for s in empty)}"
            + (f" (left out: {reasons})" if reasons else ""),
            where=manifest.folder,
            fix="make the manifest again with patients in train, validate and test: a head is "
            "chosen on validate and tested on test",
        )
    if len(found.classes) < 2:
        raise ManifestError(
            f"all labelled images are of one class, `{found.classes[0]}`", where=manifest.folder
        )


@dataclass(frozen=True)
class Subset:
    """A share of the training images.

    Attributes:
        percent: Share asked for.
        number: Which of the subsets of this share, from 0.
        members: Numbers of its images among the labelled ones.
        hash: Of its keys.
        parent_hash: Of the keys of all training images.
        missing: Classes without an image in it.
    """

    percent: float
    number: int
    members: Int64[np.ndarray, " n"]
    hash: str
    parent_hash: str
    missing: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Name of its list of keys; `sha256sum` of the file begins with its hash."""
        return f"train-{self.percent:g}-percent-{self.number}.txt"


def training_subsets(
    labelled: LabelledImages, percent: float, *, count: int, seed: int
) -> list[Subset]:
    """Draw shares of the training images: by class, whole patients.

    Args:
        labelled: Images of all splits.
        percent: In (0, 100]; 100 gives the one subset there is.
        count: How many to draw; subset i has seed `seed + i`, so 1 % lies inside 10 %.
        seed: Of the first subset.
    """
    train = labelled.of("train")
    keys = [labelled.keys[number] for number in train]
    number_of = dict(zip(keys, train.tolist(), strict=True))
    parent = list_hash(keys)
    subsets = []
    for number in range(1 if percent >= 100 else count):
        chosen = label_fraction(
            keys,
            [labelled.subject_ids[i] for i in train],
            [labelled.classes[labelled.targets[i]] for i in train],
            fraction=percent / 100,
            seed=seed + number,
        )
        members = np.array([number_of[key] for key in chosen], dtype=np.int64)
        counts = labelled.class_counts(members)
        missing = tuple(name for name, images in counts.items() if images == 0)
        subsets.append(Subset(percent, number, members, list_hash(chosen), parent, missing))
    return subsets


def write_subsets(
    folder: Path, labelled: LabelledImages, subsets: Sequence[Subset]
) -> list[dict[str, object]]:
    """Write each subset's sorted keys, and `subsets.json` with their hashes.

    Returns:
        What `subsets.json` lists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, object]] = []
    for subset in subsets:
        keys = sorted(labelled.keys[number] for number in subset.members)
        replace_file(folder / subset.file_name, "".join(f"{key}\n" for key in keys).encode())
        listed.append(
            {
                "percent": subset.percent,
                "number": subset.number,
                "file": subset.file_name,
                "hash": subset.hash,
                "parent_hash": subset.parent_hash,
                "images": len(keys),
                "patients": len({labelled.subject_ids[i] for i in subset.members}),
                "classes": labelled.class_counts(subset.members),
                "missing_classes": list(subset.missing),
            }
        )
    write_json(folder / "subsets.json", {"schema": 1, "subsets": listed})
    return listed
