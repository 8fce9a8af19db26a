"""RSNA pneumonia challenge of 2018, stage 2: DICOM images with boxes around opacities.

    stage_2_train_images/<patientId>.dcm       labelled images
    stage_2_test_images/<patientId>.dcm        images without labels, read on request
    stage_2_train_labels.csv                   a row for each box, one for an image without
    stage_2_detailed_class_info.csv            three classes; may be missing
    pneumonia-challenge-dataset-mappings_2018.json   whose images they are; may be missing

`patientId` names an image. The images are from NIH ChestX-ray14, with up to 65 of one patient, and
only the mapping says which. Splits by `patientId` therefore share patients; the published ones are
recomputed here for comparison, and a manifest made with one says so.

Source: layout and tables of the challenge's stage 2; published splits: MGCA (Wang et al. 2022) and
BenchX (Zhou et al. 2024).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from featcache.config import Config
from featcache.console import note
from featcache.datasets.challenge import rsna_splits as published
from featcache.datasets.challenge.rsna_tables import (
    CLASS_INFO,
    Labelled,
    read_class_info,
    read_labels,
    read_mapping,
)
from featcache.datasets.challenge.splits import report_masks, split_by_patient_and_class
from featcache.errors import ManifestError
from featcache.manifest import headers as dicom
from featcache.manifest.checks import rows_text
from featcache.manifest.funnel import Funnel
from featcache.manifest.masks import encode_boxes
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import MISSING_FILE, SYNTHETIC_NOTE, files_present, is_synthetic

DESCRIPTION = "RSNA 2018: pneumonia and three classes with boxes around opacities, in DICOM."

TRAIN_FOLDER, TEST_FOLDER = "stage_2_train_images", "stage_2_test_images"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
PUBLISHED_COUNTS = (30_227, 26_684, 6_012)  # rows, images, images with an opacity
NOTE_UNKNOWN = (
    "patientId of RSNA names images, not patients: without the mapping to NIH ChestX-ray14 it is "
    "unknown how many patients are in more than one split."
)


class Options(Config):
    """How to read the RSNA challenge."""

    split: Literal["ours", "mgca-cls", "mgca-seg", "benchx"] = Field(
        default="ours",
        description="`ours`: by patient and class; the others: published, recomputed, by image.",
    )
    validate_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the images for validation, in `ours`."
    )
    test_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the images for test, in `ours`."
    )
    seed: int = Field(default=0, description="Seed of `ours`.")
    nih_mapping: Path | None = Field(
        default=None,
        description=f"The mapping to NIH's images; {MAPPING} in the folder is found by itself.",
    )
    unlabelled: bool = Field(
        default=False, description="Take in the images without labels, in no split."
    )

    @model_validator(mode="after")
    def _check(self) -> "Options":
        if self.validate_fraction + self.test_fraction >= 1:
            raise ValueError("`validate_fraction` and `test_fraction` leave nothing to train on")
        return self


class Patients(NamedTuple):
    """Who is behind the images.

    Attributes:
        of_image: NIH patient by image id; empty when nothing is known.
        policy: How the grouping came about.
    """

    of_image: Mapping[str, str]
    policy: str

    def subject(self, key: str) -> str:
        """The best that is known: the NIH patient, else the image by itself."""
        return self.of_image.get(key, key)


class Row(NamedTuple):
    """One image with a readable header; `labels` is None for an image without labels."""

    key: str
    path: str
    header: dicom.Header
    labels: Labelled | None


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Read the RSNA challenge into a manifest.

    Images whose file is missing or has no readable header are dropped and counted.

    Args:
        folder: Where tables and image folders lie.
        out: The manifest's folder.
        options: How to read it.

    Raises:
        ManifestError: The tables contradict themselves or each other, boxes leave their images, a
            published split comes out otherwise than published, or there is no image.
    """
    labelled, num_rows = read_labels(folder)
    classes = read_class_info(folder, labelled)
    patients = _patients(folder, options.nih_mapping, labelled)
    if classes is None:
        note(f"rsna: without {CLASS_INFO} there are no three classes, only pneumonia or not")
    completeness = _compare_with_published(labelled, num_rows)
    splits, split_policy = _split(labelled, classes, patients, options)
    found, funnel = _find_images(folder, labelled, num_rows, options.unlabelled)
    rows = _read_headers(folder, found, funnel)
    _check_boxes(folder, rows)
    split_of = [splits.get(row.key) for row in rows]
    _report(rows, split_of)
    sharing, notes = _sharing(rows, split_of, patients, options.split, splits)
    if is_synthetic(folder):
        notes = [SYNTHETIC_NOTE, *notes]
    subjects = [row.key if sharing else patients.subject(row.key) for row in rows]
    return write_manifest(
        out,
        _images(rows, subjects, split_of, classes),
        dataset="rsna",
        image_root=folder,
        funnel=funnel.steps,
        notes=notes,
        policies={
            "labels": completeness,
            "patients": "each image by itself" if sharing else patients.policy,
            "split": split_policy,
            "unlabelled": "in no split" if options.unlabelled else "not read",
        },
        synthetic=is_synthetic(folder),
    )


def _patients(folder: Path, given: Path | None, labelled: Mapping[str, Labelled]) -> Patients:
    """Find out whose images they are."""
    path = given and given.expanduser()
    if path is None and (folder / MAPPING).is_file():
        path = folder / MAPPING
    if path is None:
        return Patients({}, "unknown, each image by itself")
    mapping = read_mapping(path)
    known = sum(key in mapping for key in labelled)
    if not known:
        raise ManifestError("the mapping knows none of the images", where=path)
    alone = len(labelled) - known
    patients = len({mapping[key] for key in labelled if key in mapping})
    note(
        f"rsna: {patients:,} NIH patients behind {known:,} images; {alone:,} images are not in "
        "the mapping and count as a patient each"
    )
    return Patients(mapping, f"of the NIH mapping; {alone:,} images not in it by themselves")


def _compare_with_published(labelled: Mapping[str, Labelled], num_rows: int) -> str:
    """Say whether the label table is as long as the published one."""
    positive = sum(image.target for image in labelled.values())
    have = num_rows, len(labelled), positive
    counts = "{:,} rows, {:,} images, {:,} with an opacity".format(*have)
    if have == PUBLISHED_COUNTS:
        return f"{counts}, as published"
    verdict = f"{counts}; published are {{:,}}, {{:,}}, {{:,}}".format(*PUBLISHED_COUNTS)
    note(f"rsna: not the complete set: {verdict}")
    return verdict


def _split(
    labelled: Mapping[str, Labelled],
    classes: Mapping[str, str] | None,
    patients: Patients,
    options: Options,
) -> tuple[dict[str, str], str]:
    """Split of each labelled image, files or not, and how it came about."""
    keys = sorted(labelled)
    if options.split != "ours":
        targets = {key: str(labelled[key].target) for key in keys}
        return published.recompute(options.split, keys, targets)
    strata = classes or {key: str(labelled[key].target) for key in keys}
    splits = split_by_patient_and_class(
        keys,
        [patients.subject(key) for key in keys],
        [strata[key] for key in keys],
        validate=options.validate_fraction,
        test=options.test_fraction,
        seed=options.seed,
    )
    what = "patient" if patients.of_image else "image, for patients are unknown,"
    return splits, (
        f"ours, by {what} and class: {options.validate_fraction:g} to validation, "
        f"{options.test_fraction:g} to test, seed {options.seed}"
    )


def _find_images(
    folder: Path, labelled: Mapping[str, Labelled], num_rows: int, unlabelled: bool
) -> tuple[list[tuple[str, str, Labelled | None]], Funnel]:
    """Id, path and labels of each image that has a file, and the funnel so far.

    Raises:
        ManifestError: There is no file at all.
    """
    wanted = [(key, f"{TRAIN_FOLDER}/{key}.dcm", image) for key, image in labelled.items()]
    is_there = files_present(folder, [path for _, path, _ in wanted])
    missing = int((~is_there).sum())
    if missing == len(wanted):
        raise ManifestError(
            f"none of the {missing:,} labelled images is there",
            where=folder / TRAIN_FOLDER,
            fix="the images belong into this folder, as <patientId>.dcm",
        )
    rows: list[tuple[str, str, Labelled | None]]
    rows = [row for row, there in zip(wanted, is_there, strict=True) if there]
    without_row = [key for key in _stems(folder / TRAIN_FOLDER) if key not in labelled]
    if without_row:
        note(f"rsna: {len(without_row):,} files of {TRAIN_FOLDER} are in no table and not read")
    tests = _stems(folder / TEST_FOLDER)
    extra = [(key, f"{TEST_FOLDER}/{key}.dcm", None) for key in tests if unlabelled]
    if tests and not unlabelled:
        note(f"rsna: {len(tests):,} images without labels are not read (--set unlabelled=true)")
    total, funnel = len(extra) + len(labelled), Funnel()
    start = "rows of labels" + (" and images without" if unlabelled else "")
    funnel.start(start, num_rows + len(extra))
    funnel.step("images", total, {"further box of an image": num_rows - len(labelled)})
    funnel.step("images with a file", total - missing, {MISSING_FILE: missing})
    return [*rows, *extra], funnel


def _stems(folder: Path) -> list[str]:
    """Names of a folder's DICOM files without their ending, sorted."""
    return sorted(path.stem for path in folder.glob("*.dcm")) if folder.is_dir() else []


def _read_headers(
    folder: Path, wanted: Sequence[tuple[str, str, Labelled | None]], funnel: Funnel
) -> list[Row]:
    """The images whose header can be read; the funnel counts the others."""
    found = dicom.read_headers(folder, [path for _, path, _ in wanted], title="rsna headers")
    rows = [
        Row(key, path, header, labels)
        for (key, path, labels), header in zip(wanted, found, strict=True)
        if isinstance(header, dicom.Header)
    ]
    lost = Counter(header for header in found if isinstance(header, str))
    funnel.step("images with a DICOM header", len(rows), dict(sorted(lost.items())))
    return rows


def _check_boxes(folder: Path, rows: Sequence[Row]) -> None:
    """See that no box leaves its image.

    Raises:
        ManifestError: Some do; their rows are named.
    """
    outside = [
        row.labels.row
        for row in rows
        if row.labels is not None
        and any(
            left < 0 or top < 0 or left + w > row.header.columns or top + h > row.header.rows
            for left, top, w, h in row.labels.boxes
        )
    ]
    if outside:
        raise ManifestError(
            f"{len(outside):,} images have a box that leaves the image: {rows_text(outside)}",
            where=folder,
            fix="use tables and images of one version, in their original size",
        )


def _report(rows: Sequence[Row], splits: Sequence[str | None]) -> None:
    """Tell what is odd about headers and boxes, and what the splits hold."""
    if other := sum(not row.header.names_file for row in rows):
        note(f"rsna: {other:,} headers have another patient's id than the file's name")
    boxes = [row.labels.boxes for row in rows if row.labels is not None]
    if repeated := sum(len(set(one)) < len(one) for one in boxes):
        note(f"rsna: {repeated:,} images have the same box twice")
    labelled = [(row, split) for row, split in zip(rows, splits, strict=True) if row.labels]
    positive = [bool(row.labels and row.labels.boxes) for row, _ in labelled]
    report_masks("rsna", [split for _, split in labelled], positive, "an opacity")


def _sharing(
    rows: Sequence[Row],
    split_of: Sequence[str | None],
    patients: Patients,
    split: str,
    splits: Mapping[str, str],
) -> tuple[bool, list[str]]:
    """Whether the split puts patients apart from themselves, and what tables must say of it."""
    is_published = split != "ours"
    if not patients.of_image:
        known = published.known_sharing(split, splits) if is_published else []
        return is_published, [NOTE_UNKNOWN, *known]
    where: dict[str, set[str | None]] = {}
    for row, name in zip(rows, split_of, strict=True):
        where.setdefault(patients.subject(row.key), set()).add(name)
    tests = [row for row, name in zip(rows, split_of, strict=True) if name == "test"]
    shared = [row for row in tests if "train" in where[patients.subject(row.key)]]
    notes = []
    if is_published:
        people = len({patients.subject(row.key) for row in shared})
        notes.append(
            f"The split {split} is by image: {len(shared):,} of {len(tests):,} test images "
            f"({len(shared) / max(len(tests), 1):.1%}), of {people:,} patients, show a patient who "
            "is also in train. Intervals and label fractions take each image by itself."
        )
    no_labels = [row for row in rows if row.labels is None]
    if seen := sum("test" in where[patients.subject(row.key)] for row in no_labels):
        notes.append(f"{seen:,} of the images without labels show a patient of the test split.")
    return is_published, notes


def _images(
    rows: Sequence[Row],
    subjects: Sequence[str],
    splits: Sequence[str | None],
    classes: Mapping[str, str] | None,
) -> pa.Table:
    """The image table."""
    masks = [
        None
        if row.labels is None
        else encode_boxes(row.header.rows, row.header.columns, sorted(row.labels.boxes))
        for row in rows
    ]
    columns = {
        "key": [row.key for row in rows],
        "subject_id": subjects,
        "view_position": [row.header.view or row.header.described_view or None for row in rows],
        "split": splits,
        "source": ["rsna"] * len(rows),
        "image_path": [row.path for row in rows],
        "mask": masks,
    }
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    table["study_id"] = pa.nulls(len(rows), pa.string())
    table["label:pneumonia"] = pa.array(
        [None if row.labels is None else row.labels.target for row in rows], pa.int8()
    )
    if classes is not None:
        names = [classes[row.key] if row.labels is not None else None for row in rows]
        table["label:class"] = pa.array(names, pa.string())
    return pa.table(table)
