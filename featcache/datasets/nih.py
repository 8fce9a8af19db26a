"""NIH ChestX-ray14: radiographs with text-mined labels, without reports.

    Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv)      a row for each image
    train_val_list.txt, test_list.txt                       the official lists
    images/, or images_001/images/ to images_012/images/    00000001_000.png, ...
    BBox_List_2017.csv                                      boxes of 880 images, read on request

The header names two pairs of columns inside brackets, with a comma that is not quoted, and the file
of 2017 has a comma too many at the end of each line: both are read by name. The patient is the
first eight digits of the image's name. A label is 1 where it is named and 0 elsewhere: the text
miner has no blanks and no doubts.

Source: NIH Clinical Center, ChestX-ray14 (Wang and others 2017).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool
from pydantic import Field

from featcache.config import Config, replace_file
from featcache.console import note
from featcache.datasets.chestxray14.boxes import Boxed, box_masks, read_boxes
from featcache.errors import ManifestError
from featcache.manifest.checks import MASK_COLUMN, conflict_sentence, distinct_rows, rows_text
from featcache.manifest.columns import find_columns
from featcache.manifest.funnel import Funnel
from featcache.manifest.sheet import column_names, read_sheet
from featcache.manifest.splits import split_by_subject
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, file_faults, file_sizes, is_synthetic

DESCRIPTION = "NIH ChestX-ray14: radiographs with 14 text-mined labels and the official lists."
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
NO_FINDING = "No Finding"
PUBLISHED = {"images": 112_120, "patients": 30_805}
MISSING_LIST = "missing_files.txt"
NOTE_LABELS = (
    "The labels were mined from report texts that were never published: some are wrong, and a "
    "label that is not named counts as absent."
)
NOTE_TERMS = "Link to, cite and acknowledge the NIH Clinical Center as the source of the images."
NOTE_OVERLAP = (
    "RSNA and COVIDx took images from this collection, and of SIIM it has to be assumed: never "
    "train on one and test on another of them."
)
NOTE_SPLIT = "The splits are ours, by patient: the official lists were not there."
_NAME = r"^\d{8}_\d{3}\.png$"
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")


class Options(Config):
    """How ChestX-ray14 is read."""

    split: Literal["official", "patient"] = Field(
        default="official",
        description="`official`: test_list.txt is the test split, validation comes from "
        "train_val_list.txt by patient; `patient`: all three by patient.",
    )
    validate_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the patients of train_val_list.txt that go to validation.",
    )
    seed: int = Field(default=0, description="Seed of the split by patient.")
    boxes: Boxed | None = Field(
        default=None,
        description="A finding whose boxes become masks; images without one are not annotated.",
    )


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of ChestX-ray14.

    Listed files that are not there, or empty, are dropped and named in `missing_files.txt` beside
    the tables.

    Args:
        folder: Holds the table, the lists and the folders of images.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: The table or a list is missing or cannot be trusted, or no image is there.
    """
    funnel = Funnel()
    rows = _read_table(folder)
    completeness = _compare_with_published(rows)
    funnel.start("rows in the table", rows.num_rows)
    same = [name for name in rows.column_names if name not in ("key", "row")]
    kept, conflicts = distinct_rows(rows, ["key"], same=same)
    if len(conflicts):
        numbers = rows["row"].to_numpy()
        message = conflict_sentence("the same `Image Index`", conflicts, numbers)
        raise ManifestError(message, where=folder)
    images = rows.take(np.sort(kept))
    funnel.step("images", len(kept), {"identical row": rows.num_rows - len(kept)})
    images, missing = _with_files(folder, images, funnel)
    images, policy, has_lists = _with_split(folder, images, funnel, options)
    policies = {"boxes": "not read"}
    if options.boxes is not None:
        images, policies["boxes"] = _with_boxes(folder, rows, images, options.boxes)
    synthetic = is_synthetic(folder)
    notes = [SYNTHETIC_NOTE] if synthetic else [NOTE_TERMS, NOTE_LABELS, NOTE_OVERLAP]
    notes += [] if has_lists else [NOTE_SPLIT]
    manifest = write_manifest(
        out,
        images,
        dataset="nih",
        image_root=folder,
        funnel=funnel.steps,
        notes=notes,
        policies={
            **policies,
            "table": completeness,
            "split": policy,
            "label_values": "1 named, 0 not named; there are no blanks and no doubts",
        },
        synthetic=synthetic,
    )
    (out / MISSING_LIST).unlink(missing_ok=True)
    if missing:
        note(f"nih: {len(missing):,} listed images are missing or empty; named in {MISSING_LIST}")
        names = "".join(f"{name}\n" for name in sorted(missing))
        replace_file(out / MISSING_LIST, names.encode())
    return manifest


def _find_table(folder: Path) -> Path:
    """The table, the newer version first."""
    for name in _TABLES:
        if (folder / name).is_file():
            return folder / name
    raise ManifestError(
        f"the table {_TABLES[0]} (or {_TABLES[1]}) is missing",
        where=folder,
        fix="pass the folder of ChestX-ray14 that holds it",
    )


def _read_table(folder: Path) -> pa.Table:
    """The table as columns of the manifest.

    Raises:
        ManifestError: It lacks a column, or holds what it should not.
    """
    path = _find_table(folder)
    wanted = ("Image Index", "Finding Labels", "Patient ID", "View Position")
    names = find_columns(column_names(path), wanted, path)
    sheet = read_sheet(path, list(names.values()))
    cells = [
        pc.utf8_trim_whitespace(sheet.columns[there]).cast(pa.string()) for there in names.values()
    ]
    index, labels, patient, view = cells
    said = [[part.strip() for part in cell.split("|")] for cell in labels.to_pylist()]
    subject = pc.utf8_slice_codeunits(index, 0, 8)
    number = pc.utf8_lpad(patient, 8, "0")
    faults = {
        "`Image Index` is not `00000001_000.png`": pc.invert(
            pc.match_substring_regex(index, _NAME)
        ).to_numpy(),
        "`Patient ID` is not the number in `Image Index`": pc.not_equal(subject, number).to_numpy(),
        **_label_faults(said),
    }
    problems = [
        f"{what}: {rows_text(sheet.numbers[at])}" for what, at in faults.items() if at.any()
    ]
    if problems:
        raise ManifestError("\n  ".join(problems), where=path)
    blank = pa.scalar(None, pa.string())
    columns = {
        "key": index,
        "subject_id": subject,
        "study_id": pa.nulls(len(index), pa.string()),
        "view_position": pc.if_else(pc.equal(view, ""), blank, view),
        "source": pa.array(["nih"] * len(index), pa.string()),
        "row": pa.array(sheet.numbers),
    }
    for label in (*LABELS, NO_FINDING):
        columns[f"label:{label}"] = pa.array([int(label in parts) for parts in said], pa.int8())
    return pa.table(columns)


def _label_faults(said: Sequence[Sequence[str]]) -> dict[str, Bool[np.ndarray, " N"]]:
    """Labels that nobody knows, and `No Finding` beside a finding."""
    known = {*LABELS, NO_FINDING}
    unknown = np.array([not set(parts) <= known for parts in said], dtype=np.bool_)
    both = np.array([NO_FINDING in parts and len(parts) > 1 for parts in said], dtype=np.bool_)
    return {
        f"`Finding Labels` names none of {', '.join(sorted(known))}": unknown,
        f"`Finding Labels` names {NO_FINDING} beside a finding": both,
    }


def _compare_with_published(rows: pa.Table) -> str:
    """Say whether the table is as long as the published one."""
    have = {
        "images": rows.num_rows,
        "patients": int(pc.count_distinct(rows["subject_id"]).as_py()),
    }
    if have == PUBLISHED:
        return "complete, as published"
    parts = [f"{have[what]:,} of {number:,} {what}" for what, number in PUBLISHED.items()]
    verdict = "a part, or an unknown version: " + ", ".join(parts)
    note(f"nih: the table is {verdict}")
    return verdict


def _with_files(folder: Path, images: pa.Table, funnel: Funnel) -> tuple[pa.Table, list[str]]:
    """Add `image_path`; drop and return what is missing or empty.

    Raises:
        ManifestError: None is there.
    """
    names = images["key"].to_pylist()
    numbered = sorted(f"{one.name}/images" for one in folder.glob("images_*"))
    paths: list[str | None] = [None] * len(names)
    sizes = np.full(len(names), -1, dtype=np.int64)
    for place in ("images", *numbered, "."):
        prefix = "" if place == "." else f"{place}/"
        found = file_sizes(folder, [prefix + name for name in names])
        for number in np.flatnonzero((sizes <= 0) & (found > sizes)).tolist():
            paths[number], sizes[number] = prefix + names[number], found[number]
    images = images.append_column("image_path", pa.array(paths, pa.string()))
    kept = funnel.keep(images, "images with a file", file_faults(sizes))
    if not kept.num_rows:
        raise ManifestError(
            f"none of the {len(names):,} listed images is there",
            where=folder,
            fix="the images belong into images/, or images_001/images/ to images_012/images/",
        )
    return kept, [name for name, size in zip(names, sizes.tolist(), strict=True) if size <= 0]


def _with_boxes(
    folder: Path, rows: pa.Table, images: pa.Table, finding: Boxed
) -> tuple[pa.Table, str]:
    """Add `mask`, the boxes of one finding; null for an image without one."""
    said = zip(rows["key"].to_pylist(), rows[f"label:{finding}"].to_pylist(), strict=True)
    names = images["key"].to_pylist()
    paths = dict(zip(names, images["image_path"].to_pylist(), strict=True))
    labelled = {name: bool(value) for name, value in said}
    masks, policy = box_masks(folder, read_boxes(folder), finding, labelled, paths)
    column = pa.array([masks.get(name) for name in names], pa.string())
    return images.append_column(MASK_COLUMN, column), policy


def _read_list(path: Path) -> set[str]:
    """The names of an official list.

    Raises:
        ManifestError: It is no text.
    """
    try:
        return set(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        raise ManifestError("the official list cannot be read as text", where=path) from None


def _with_split(
    folder: Path, images: pa.Table, funnel: Funnel, options: Options
) -> tuple[pa.Table, str, bool]:
    """Add the split; say how it came about, and whether it rests on the official lists."""
    subjects = images["subject_id"].to_pylist()
    lists = [folder / name for name in ("train_val_list.txt", "test_list.txt")]
    if options.split == "patient" or not all(path.is_file() for path in lists):
        splits = split_by_subject(subjects, seed=options.seed)
        policy = f"by patient, 0.7/0.1/0.2 of them, seed {options.seed}"
        images = images.append_column("split", pa.array(splits, pa.string()))
        return images, policy, options.split == "patient"
    train, test = (_read_list(path) for path in lists)
    if train & test:
        raise ManifestError(
            f"{len(train & test):,} images are in both official lists", where=folder
        )
    share = options.validate_fraction
    drawn = split_by_subject(subjects, fractions=(1 - share, share, 0.0), seed=options.seed)
    splits = [
        "test" if name in test else ours if name in train else ""
        for name, ours in zip(images["key"].to_pylist(), drawn, strict=True)
    ]
    images = images.append_column("split", pa.array(splits, pa.string()))
    without = {"in no official list": np.array([split == "" for split in splits])}
    images = funnel.keep(images, "images in an official list", without)
    policy = f"test as published; {share:g} of the patients of train_val_list.txt to validation, "
    return images, f"{policy}seed {options.seed}", True
