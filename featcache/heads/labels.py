"""Labelled images: the rows of a manifest that a classification head may use.

The classes are numbered in the order of their names, and that list travels with every result. What
cannot be used is counted by reason, never dropped in silence.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from featcache.cache.reader import FeatureSet
from featcache.config import replace_file, write_json
from featcache.errors import ManifestError, UsageError, nearest
from featcache.manifest.splits import SPLIT_NAMES, label_fraction, label_shots, list_hash
from featcache.manifest.table import Manifest

PREFIX = "label:"
UNKNOWN = -1
"""Of a finding that is neither there nor absent, as far as the labels and their policy say."""


@dataclass(frozen=True)
class LabelPolicy:
    """What a finding's label is taken for when it says neither yes (1) nor no (0).

    Attributes:
        uncertain: Of -1, "uncertain": left out, or counted as one of the two.
        blank: Of an empty label, "not mentioned": left out, or counted as absent.
    """

    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    blank: Literal["ignore", "negative"] = "ignore"

    def settle(self, column: pa.ChunkedArray) -> Int64[np.ndarray, " N"]:
        """1 where the finding is there, 0 where it is not, `UNKNOWN` where nothing is known.

        Args:
            column: Whole numbers 1, 0, -1 and null.
        """
        blank = {"ignore": UNKNOWN, "negative": 0}[self.blank]
        doubt = {"ignore": UNKNOWN, "positive": 1, "negative": 0}[self.uncertain]
        is_blank = column.is_null().to_numpy()
        values = pc.fill_null(column, 0).to_numpy().astype(np.int64)
        settled = np.where(np.isin(values, (0, 1)), values, doubt)
        return np.where(is_blank, blank, settled)

    def note(self, uncertain: int, blank: int) -> str:
        """A sentence for the table.

        Args:
            uncertain: Labels of the manifest that are -1.
            blank: Labels that are empty.
        """
        words = {"ignore": "left out", "positive": "taken as present", "negative": "as absent"}
        return (
            f"Labels that say neither yes nor no: {uncertain:,} uncertain ones are "
            f"{words[self.uncertain]} (uncertain={self.uncertain}), {blank:,} blank ones "
            f"{words[self.blank]} (blank={self.blank})."
        )


@dataclass(frozen=True)
class LabelledImages:
    """Images with a known class, a split, and features; sorted by key.

    Attributes:
        keys: Key of each image.
        rows: Its row in the feature set.
        subject_ids: Its patient.
        splits: `train`, `validate` or `test`.
        sources: Where it came from.
        targets: Its class, an index into `classes`; or, where an image may have several findings,
            1, 0 or `UNKNOWN` for each of `classes`.
        classes: Names, sorted as text; of findings in the order in which they were asked for.
        left_out: Reason to number of images that could not be used.
    """

    keys: tuple[str, ...]
    rows: Int64[np.ndarray, " N"]
    subject_ids: tuple[str, ...]
    splits: tuple[str, ...]
    sources: tuple[str, ...]
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"]
    classes: tuple[str, ...]
    left_out: Mapping[str, int]

    @property
    def of_findings(self) -> bool:
        """Whether an image may have several of the classes."""
        return self.targets.ndim == 2

    def of(self, split: str) -> Int64[np.ndarray, " n"]:
        """Numbers of the images of one split."""
        return np.flatnonzero(np.asarray(self.splits) == split)

    def class_counts(self, numbers: Int64[np.ndarray, " n"]) -> dict[str, int]:
        """Images of each class (that have each finding) among some of them."""
        if self.of_findings:
            counts = (self.targets[numbers] == 1).sum(axis=0)
        else:
            counts = np.bincount(self.targets[numbers], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def strata(self, numbers: Int64[np.ndarray, " n"]) -> list[str]:
        """What subsets are drawn by: an image's class; of its findings the rarest among these.

        Args:
            numbers: Of the images.
        """
        if not self.of_findings:
            return [self.classes[target] for target in self.targets[numbers]]
        has = self.targets[numbers] == 1
        rarest = np.argsort(has.sum(axis=0), kind="stable")
        first = rarest[has[:, rarest].argmax(axis=1)]
        return [self.classes[i] if any_ else "" for i, any_ in zip(first, has.any(1), strict=True)]


def label_column(manifest: Manifest, label: str) -> pa.ChunkedArray:
    """The column of a label, by its name with or without the prefix.

    Raises:
        UsageError: There is no such label.
    """
    names = manifest.label_names
    name = label.removeprefix(PREFIX)
    if name not in names:
        raise UsageError(
            f"the manifest has no label `{name}`; {nearest(name, names)}",
            where=manifest.folder,
            fix=f"--set label={names[0]}" if names else "make the manifest from a labelled table",
        )
    return manifest.images.column(PREFIX + name)


def _class_names(column: pa.ChunkedArray, label: str, policy: LabelPolicy) -> list[str | None]:
    """The class of each image, None where it has none; whole numbers are a finding."""
    if not pa.types.is_integer(column.type):
        names: list[str | None] = column.to_pylist()
        return names
    name = label.removeprefix(PREFIX)
    words = {1: name, 0: f"no {name}"}
    return [words.get(value) for value in policy.settle(column).tolist()]


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


def labelled_images(
    images: FeatureSet,
    manifest: Manifest,
    label: str,
    policy: LabelPolicy | None = None,
    *,
    needs: Sequence[str] = SPLIT_NAMES,
) -> LabelledImages:
    """Join a manifest's labels to the rows of a feature set, by key.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits, patients.
        label: Name of a label column, with or without `label:`.
        policy: What labels mean that say neither yes nor no; None leaves them out.
        needs: Splits that must have images.

    Raises:
        UsageError: There is no such label.
        ManifestError: A patient is in two splits, a split is empty, or there is a single class.
    """
    named = _class_names(label_column(manifest, label), label, policy or LabelPolicy())
    return images_with_classes(images, manifest, named, needs=needs)


def images_with_classes(
    images: FeatureSet,
    manifest: Manifest,
    named: Sequence[str | None],
    *,
    unnamed: str = "without a (certain) label",
    fewest_classes: int = 2,
    needs: Sequence[str] = SPLIT_NAMES,
) -> LabelledImages:
    """Join classes to the rows of a feature set, by key.

    Args:
        images: Features of the manifest's images.
        manifest: Splits, patients.
        named: Class of each image of the manifest, None where it has none.
        unnamed: Reason under which those are counted.
        fewest_classes: How many there must be.
        needs: Splits that must have images.

    Raises:
        ManifestError: A patient is in two splits, a split is empty, or there are too few classes.
    """
    classes = sorted({name for name in named if name is not None})
    number_of: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    targets = np.array([number_of.get(name, UNKNOWN) for name in named], dtype=np.int64)
    found = join_targets(images, manifest, targets, classes, unnamed=unnamed, needs=needs)
    counts = np.bincount(found.targets, minlength=len(classes))
    if not counts.all():  # a class none of whose images can be used is none
        kept = np.flatnonzero(counts)
        renumbered = np.searchsorted(kept, found.targets).astype(np.int64)
        found = replace(found, targets=renumbered, classes=tuple(classes[i] for i in kept))
    if len(found.classes) < fewest_classes:
        raise ManifestError(
            f"all labelled images are of one class, `{found.classes[0]}`", where=manifest.folder
        )
    return found


def join_targets(
    images: FeatureSet,
    manifest: Manifest,
    targets: Int64[np.ndarray, " M"] | Int64[np.ndarray, "M T"],
    classes: Sequence[str],
    *,
    unnamed: str,
    needs: Sequence[str] = SPLIT_NAMES,
) -> LabelledImages:
    """Join answers to the rows of a feature set, by key; what cannot be used is counted.

    Args:
        images: Features of the manifest's images.
        manifest: Splits, patients.
        targets: Of each image of the manifest, `UNKNOWN` where (or in all places where) there is
            no answer.
        classes: Their names.
        unnamed: Reason under which images without any answer are counted.
        needs: Splits that must have images.

    Raises:
        ManifestError: A patient is in two splits, or a split is empty.
    """
    table = manifest.images
    keys, subjects, splits, sources = (
        table.column(name).to_pylist() for name in ("key", "subject_id", "split", "source")
    )
    _refuse_shared_patients(subjects, splits)
    known = (targets.reshape(len(targets), -1) != UNKNOWN).any(axis=1)
    left_out: Counter[str] = Counter()
    kept: list[int] = []
    for number in np.argsort(np.asarray(keys, dtype=str), kind="stable").tolist():
        reason = _why_not(images, keys[number], splits[number], "" if known[number] else unnamed)
        left_out[reason] += 1
        if not reason:
            kept.append(number)
    del left_out[""]
    found = LabelledImages(
        keys=tuple(keys[number] for number in kept),
        rows=np.array([images.row_of[keys[number]] for number in kept], dtype=np.int64),
        subject_ids=tuple(subjects[number] for number in kept),
        splits=tuple(splits[number] for number in kept),
        sources=tuple(sources[number] for number in kept),
        targets=targets[kept],
        classes=tuple(classes),
        left_out=dict(sorted(left_out.items())),
    )
    _refuse_empty_splits(found, manifest, needs)
    return found


def _why_not(images: FeatureSet, key: str, split: str | None, unnamed: str) -> str:
    """Why an image cannot be used; empty when it can."""
    if split is None:
        return "in no split"
    if unnamed:
        return unnamed
    row = images.row_of.get(key)
    if row is None:
        return "not in the feature set"
    return "" if images.valid[row] else "quarantined (could not be read)"


def _refuse_empty_splits(found: LabelledImages, manifest: Manifest, needs: Sequence[str]) -> None:
    """Every split that is needed needs an image."""
    empty = [split for split in needs if len(found.of(split)) == 0]
    if empty:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        raise ManifestError(
            f"no labelled image with features in split {' and '.join(f'`{s}`' for s in empty)}"
            + (f" (left out: {reasons})" if reasons else ""),
            where=manifest.folder,
            fix=f"make the manifest again with patients in {', '.join(needs)}"
            + (": a head is chosen on validate and tested on test" if len(needs) > 1 else ""),
        )


@dataclass(frozen=True)
class Subset:
    """Some of the training images: a share of them, or a few of each class.

    Attributes:
        percent: Share asked for; of shots the share that they came to.
        number: Which of the subsets of this share, from 0.
        members: Numbers of its images among the labelled ones.
        hash: Of its keys.
        parent_hash: Of the keys of all training images.
        missing: Classes without an image in it (findings that none of them has).
        shots: Images asked for of each class; None: a share was asked for.
    """

    percent: float
    number: int
    members: Int64[np.ndarray, " n"]
    hash: str
    parent_hash: str
    missing: tuple[str, ...]
    shots: int | None = None

    @property
    def title(self) -> str:
        """What was asked for, as tables say it."""
        return f"{self.percent:g} %" if self.shots is None else f"{self.shots} shots"

    @property
    def file_name(self) -> str:
        """Name of its list of keys; `sha256sum` of the file begins with its hash."""
        share = f"{self.percent:g}-percent" if self.shots is None else f"{self.shots}-shots"
        return f"train-{share}-{self.number}.txt"


def training_subsets(
    labelled: LabelledImages,
    percent: float,
    *,
    count: int,
    seed: int,
    shots: int | None = None,
) -> list[Subset]:
    """Draw shares of the training images: by class, whole patients.

    Args:
        labelled: Images of all splits.
        percent: In (0, 100]; 100 gives the one subset there is.
        count: How many to draw; subset i has seed `seed + i`, so 1 % lies inside 10 %.
        seed: Of the first subset.
        shots: Images of each class, from different patients, in place of a share.
    """
    train = labelled.of("train")
    keys = [labelled.keys[number] for number in train]
    subjects = [labelled.subject_ids[number] for number in train]
    number_of = dict(zip(keys, train.tolist(), strict=True))
    parent, strata = list_hash(keys), labelled.strata(train)
    subsets = []
    for number in range(1 if shots is None and percent >= 100 else count):
        own = seed + number
        if shots is None:
            chosen = label_fraction(keys, subjects, strata, fraction=percent / 100, seed=own)
        else:
            chosen = label_shots(keys, subjects, strata, shots=shots, seed=own)
        members = np.array([number_of[key] for key in chosen], dtype=np.int64)
        counts = labelled.class_counts(members)
        missing = tuple(name for name, images in counts.items() if images == 0)
        share = percent if shots is None else round(100 * len(chosen) / len(keys), 4)
        subsets.append(Subset(share, number, members, list_hash(chosen), parent, missing, shots))
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
                "shots": subset.shots,
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
