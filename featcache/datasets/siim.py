"""SIIM-ACR pneumothorax challenge of 2019: DICOM images with masks in a gap code.

    dicom-images-train/STUDY/SERIES/IMAGE.dcm      images, at any depth; perhaps further folders
    dicom-images-test/, stage_2_images/            images, looked through as well
    train-rle.csv or stage_2_train.csv             a row for each annotation, `-1` for none

Names and cells of the table may begin with a blank, as in the first release. Rows of one image are
united. Patients are unknown: the patient's id of a header names the image.

Source: layout and tables of the challenge's stage 1; published split: MGCA (Wang et al. 2022).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from featcache.config import Config
from featcache.console import note
from featcache.datasets.challenge import gaps
from featcache.datasets.challenge.siim_table import Annotated, find_table, read_annotations
from featcache.datasets.challenge.splits import (
    cut_twice,
    report_masks,
    sklearn_version,
    split_by_patient_and_class,
)
from featcache.errors import ManifestError
from featcache.manifest import headers as dicom
from featcache.manifest.checks import rows_text
from featcache.manifest.funnel import Funnel
from featcache.manifest.masks import encode_runs
from featcache.manifest.splits import list_hash
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import MISSING_FILE, SYNTHETIC_NOTE, is_synthetic

DESCRIPTION = "SIIM-ACR 2019: pneumothorax or not, with masks, in DICOM."

FOLDERS = ("dicom-images-train", "dicom-images-test", "stage_2_images")
# Rows, images, positive images, to tell a complete table from a part of it.
PUBLISHED = {
    "stage 1": (11_582, 10_675, 2_379),
    "the later release, which adds stage 1's test images": (12_954, 12_047, 2_669),
}
STAGE_1_IDS = "03dd5131a6f9ca79"  # `list_hash` of the 10,675 ids of stage 1
NOTE_UNKNOWN = (
    "Patient ids of SIIM name images: how many patients are in more than one split is unknown."
)
NOTE_SHARED = "Images shared with RSNA, NIH ChestX-ray14 and COVIDx have to be assumed."


class Options(Config):
    """How to read the SIIM-ACR challenge."""

    table: str | None = Field(
        default=None, description="File name of the table; train-rle.csv or stage_2_train.csv."
    )
    only: Path | None = Field(
        default=None,
        description="Text file of image ids, one a line: others are left out, e.g. those of a "
        "later release that stage 1 does not have.",
    )
    split: Literal["ours", "mgca"] = Field(
        default="ours",
        description="`ours`: by image and class; `mgca`: the published recipe, by table row.",
    )
    validate_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the images for validation, in `ours`."
    )
    test_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the images for test, in `ours`."
    )
    seed: int = Field(default=0, description="Seed of `ours`.")

    @model_validator(mode="after")
    def _check(self) -> "Options":
        if self.validate_fraction + self.test_fraction >= 1:
            raise ValueError("`validate_fraction` and `test_fraction` leave nothing to train on")
        return self


class Row(NamedTuple):
    """One image with a readable header."""

    key: str
    path: str
    header: dicom.Header
    mask: str


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Read the SIIM-ACR challenge into a manifest.

    Images whose file is missing or has no readable header are dropped and counted.

    Args:
        folder: Where the table and the image folders lie.
        out: The manifest's folder.
        options: How to read it.

    Raises:
        ManifestError: The table contradicts itself, knows no negative or no positive image, masks
            do not fit their images or look like another code, or there is no image.
    """
    path = find_table(folder, options.table)
    images, num_rows = read_annotations(path)
    funnel = Funnel()
    funnel.start(f"rows of {path.name}", num_rows)
    images, list_policy = _restrict(images, options.only, funnel)
    completeness = _compare_with_published(images)
    _check_labels(images, path)
    splits, split_policy, notes = _split(images, options)
    num_rows = sum(len(image.rows) for image in images.values())
    funnel.step("images", len(images), {"further row of an image": num_rows - len(images)})
    paths = _find_files(folder, images)
    missing = len(images) - len(paths)
    funnel.step("images with a file", len(paths), {MISSING_FILE: missing})
    rows = _read_images(folder, path, images, paths, funnel)
    split_of = [splits[row.key] for row in rows]
    report_masks("siim", split_of, [row.mask != "" for row in rows], "a pneumothorax")
    return write_manifest(
        out,
        _images(rows, split_of),
        dataset="siim",
        image_root=folder,
        funnel=funnel.steps,
        notes=[SYNTHETIC_NOTE if is_synthetic(folder) else NOTE_SHARED, NOTE_UNKNOWN, *notes],
        policies={
            "images": list_policy,
            "masks": "union of an image's rows",
            "patients": "unknown, each image by itself",
            "split": split_policy,
            "table": completeness,
        },
        synthetic=is_synthetic(folder),
    )


def _restrict(
    images: dict[str, Annotated], only: Path | None, funnel: Funnel
) -> tuple[dict[str, Annotated], str]:
    """Leave out what is not listed; a step of the funnel is appended."""
    if only is None:
        return images, "all of the table"
    try:
        listed = set(only.expanduser().read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        raise ManifestError("the list of image ids cannot be read", where=only) from None
    kept = {key: image for key, image in images.items() if key in listed}
    if not kept:
        raise ManifestError("none of the table's images is in the list", where=only)
    count = sum(len(image.rows) for image in kept.values())
    left_out = funnel.steps[-1].count - count
    funnel.step("rows of listed images", count, {"image not in the list": left_out})
    digest = list_hash(sorted(kept))
    what = "those of stage 1" if digest == STAGE_1_IDS else "of a list"
    return kept, f"{len(kept):,}, {what} ({digest})"


def _compare_with_published(images: Mapping[str, Annotated]) -> str:
    """Say whether the table is as long as a published one."""
    positive = sum(bool(image.pairs) for image in images.values())
    have = sum(len(image.rows) for image in images.values()), len(images), positive
    counts = "{:,} rows, {:,} images, {:,} positive".format(*have)
    for name, want in PUBLISHED.items():
        if have == want:
            return f"{counts}, as in {name}"
    note(f"siim: {counts}: neither complete stage 1 nor the complete later release")
    return f"{counts}; of unknown completeness"


def _check_labels(images: Mapping[str, Annotated], path: Path) -> None:
    """See that there are images with and without a mask.

    Raises:
        ManifestError: One of the two is missing.
    """
    for is_positive, what in ((False, "without"), (True, "with")):
        if not any(bool(image.pairs) == is_positive for image in images.values()):
            raise ManifestError(
                f"the table has no image {what} a mask",
                where=path,
                fix="use the complete table of the challenge",
            )


def _split(
    images: Mapping[str, Annotated], options: Options
) -> tuple[dict[str, str], str, list[str]]:
    """Split of each image, how it came about, and what tables must say of it."""
    if options.split == "mgca":
        return _split_rows(images)
    keys = sorted(images)
    splits = split_by_patient_and_class(
        keys,
        keys,
        ["positive" if images[key].pairs else "negative" for key in keys],
        validate=options.validate_fraction,
        test=options.test_fraction,
        seed=options.seed,
    )
    return (
        splits,
        f"ours, by image, for patients are unknown, and class: {options.validate_fraction:g} to "
        f"validation, {options.test_fraction:g} to test, seed {options.seed}",
        [],
    )


def _split_rows(
    images: Mapping[str, Annotated],
) -> tuple[dict[str, str], str, list[str]]:
    """The published recipe, which cuts rows.

    An image whose rows are in several splits goes to test, else to validation.
    """
    key_of = {str(row): key for key, image in images.items() for row in image.rows}
    rows = sorted(key_of, key=int)
    train, test, validate = cut_twice(rows, size=0.15 * 2, seed=0)
    splits: dict[str, str] = {}
    for name, members in (("test", test), ("validate", validate), ("train", train)):
        for row in members:
            splits.setdefault(key_of[row], name)
    in_train = {key_of[row] for row in train}
    tests = {key for key, name in splits.items() if name == "test" and images[key].pairs}
    seen = len(tests & in_train)
    moved = sum(splits[key] != "train" for key in in_train)
    return (
        splits,
        f"mgca, recomputed over the table's rows with scikit-learn {sklearn_version()}; there is "
        "no published list to compare with; images of several splits go to test, then validation",
        [
            f"The split mgca cuts rows: as published, {seen:,} of {len(tests):,} positive test "
            f"images ({seen / max(len(tests), 1):.1%}) are in train as well. Here {moved:,} images "
            "were taken out of train for that reason, so that results are not those of the paper."
        ],
    )


def _find_files(folder: Path, images: Mapping[str, Annotated]) -> dict[str, str]:
    """Path below the folder of each image that has a file.

    Raises:
        ManifestError: There is none, or an image has two.
    """
    places = [folder / name for name in FOLDERS if (folder / name).is_dir()] or [folder]
    found: dict[str, str] = {}
    twice = strangers = 0
    for path in sorted(file for place in places for file in place.rglob("*.dcm")):
        if path.stem not in images:
            strangers += 1
        elif path.stem in found:
            twice += 1
        else:
            found[path.stem] = path.relative_to(folder).as_posix()
    if strangers:
        note(f"siim: {strangers:,} DICOM files have no row in the table and are not read")
    if twice:
        raise ManifestError(
            f"{twice:,} images have more than one file", where=folder, fix="keep one copy of each"
        )
    if not found:
        raise ManifestError(
            f"none of the {len(images):,} images of the table is there",
            where=" and ".join(place.name for place in places),
            fix="the images belong below this folder, as <ImageId>.dcm",
        )
    return found


def _read_images(
    folder: Path,
    table: Path,
    images: Mapping[str, Annotated],
    paths: Mapping[str, str],
    funnel: Funnel,
) -> list[Row]:
    """The images whose header can be read, with their masks; the funnel counts the others.

    Raises:
        ManifestError: A mask is larger than its image.
    """
    found = dicom.read_headers(folder, list(paths.values()), title="siim headers")
    rows, outside = [], []
    for (key, path), header in zip(paths.items(), found, strict=True):
        if isinstance(header, str):
            continue
        pairs = images[key].pairs
        mask = gaps.unite(pairs, header.rows, header.columns) if pairs else None
        if pairs and mask is None:
            outside.append(images[key].rows[0])
        else:
            rows.append(Row(key, path, header, "" if mask is None else encode_runs(mask)))
    if outside:
        raise ManifestError(
            f"{len(outside):,} images have a mask that leaves the image: {rows_text(outside)}",
            where=table,
            fix="use the table and the images of one release, in their original size",
        )
    lost = Counter(header for header in found if isinstance(header, str))
    funnel.step("images with a DICOM header", len(rows), dict(sorted(lost.items())))
    return rows


def _images(rows: Sequence[Row], splits: Sequence[str]) -> pa.Table:
    """The image table."""
    keys = [row.key for row in rows]
    columns = {
        "key": keys,
        "subject_id": keys,
        "view_position": [row.header.view or row.header.described_view or None for row in rows],
        "split": splits,
        "source": ["siim"] * len(rows),
        "image_path": [row.path for row in rows],
        "mask": [row.mask for row in rows],
    }
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    table["study_id"] = pa.nulls(len(rows), pa.string())
    table["label:pneumothorax"] = pa.array([int(row.mask != "") for row in rows], pa.int8())
    return pa.table(table)
