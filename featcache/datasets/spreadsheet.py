"""Any table with a row for each image, or for each image and text, as a manifest.

    column            meaning
    image_path        needed; relative to `image_root`, which is the table's folder by default
    key               identity of the image; without this column it is made from `image_path`: the
                      path relative to `image_root`, or its hash when it is longer than 128 bytes
    subject_id        the patient; without it the study, without that each image is its own patient
    study_id, view_position, source
    mask_path         a picture of the size of the image, not zero where something is; becomes the
                      manifest's `mask`; blank: not annotated
    split             train, validate (or val, valid, validation), test; without it by patient
    report or text    several texts of an image stand in several rows
    label:NAME        a label; columns named by `labels` are labels too

Names are compared without case and surrounding blanks; other columns are ignored. `columns` says
which of the table's columns stands for one of these.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from featcache.console import note
from featcache.datasets.table.columns import resolve_columns
from featcache.errors import ManifestError, UsageError
from featcache.manifest.checks import (
    LABEL_PREFIX,
    MASK_COLUMN,
    MAX_KEY_BYTES,
    ROW_COLUMN,
    conflict_sentence,
    distinct_rows,
    is_blank,
    rows_text,
    take_rows,
)
from featcache.manifest.packed import PackedTexts
from featcache.manifest.sheet import Sheet, column_names, read_sheet
from featcache.manifest.splits import SPLIT_NAMES, split_by_subject
from featcache.manifest.table import FunnelStep, Manifest, text_ids, write_manifest
from featcache.manifest.tree import (
    SYNTHETIC_NOTE,
    file_faults,
    file_sizes,
    files_present,
    is_synthetic,
)
from featcache.manifest.units import TextOptions

DESCRIPTION = "Your own table: CSV, TSV or Parquet with a row for each image (and text)."

SPLIT_SPELLINGS = {"val": "validate", "valid": "validate", "validation": "validate"}
# What programs write for a missing value. `none` can be a class, so labels keep it.
BLANK_WORDS = ("nan", "<na>", "null")
NOTE_NO_PATIENTS = (
    "The table names no patients: whether a patient is in more than one split is unknown."
)
NOTE_STUDIES = (
    "The table names no patients, only studies: whether a patient is in more than one split is "
    "unknown."
)


class Options(TextOptions):
    """How to read the table."""

    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column name to the table's, e.g. image_path: File."
    )
    labels: list[str] = Field(
        default_factory=list, description="Columns that are labels, beside those named label:NAME."
    )
    image_root: Path | None = Field(
        default=None, description="Folder that relative paths start from; else the table's."
    )
    encoding: str = Field(default="utf-8", description="Encoding of a CSV file.")
    fractions: tuple[float, float, float] = Field(
        default=(0.7, 0.1, 0.2),
        description="Shares of patients for train, validate and test where no split is given.",
    )
    seed: int = Field(default=0, description="Seed of the split by patient.")


@dataclass(frozen=True)
class _Rows:
    """Cleaned rows of the table: one for each image and text.

    Attributes:
        images: Image columns and `row`.
        texts: `text_id` of each row, null where it has no text, and its `place` in `packed`; None
            when the table has no column of texts.
        packed: The texts.
    """

    images: pa.Table
    texts: pa.Table | None
    packed: PackedTexts


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Read a table into a manifest.

    Rows without a key, patient or path and images without a file are dropped and counted; an image
    whose texts are all empty is kept without text, and counted. Identical rows are merged; rows
    that contradict each other are an error.

    Args:
        folder: The table itself, a CSV, TSV or Parquet file.
        out: The manifest's folder.
        options: How to read it.

    Raises:
        ManifestError: The table cannot be trusted, or none of its images is there.
        UsageError: It is not a table that can be read.
    """
    if folder.is_dir():
        raise UsageError("a table is needed, this is a folder", where=folder, fix="name the file")
    root = folder.parent if options.image_root is None else options.image_root
    names = column_names(folder, encoding=options.encoding)
    fields, labels = resolve_columns(names, options.columns, options.labels, folder)
    sheet = read_sheet(
        folder,
        sorted({*fields.values(), *labels.values()}),
        encoding=options.encoding,
        whole_numbers=set(labels.values()),
    )
    rows, policies = _clean(sheet, fields, labels, root)
    del sheet  # a million reports are half a gigabyte
    rows, funnel = _drop_blank_ids(rows)
    images = _merge_images(rows, funnel, folder)
    rows = _Rows(rows.images.select(["key"]), rows.texts, rows.packed)
    images = _drop_missing_files(images, funnel, root)
    _tell_missing_masks(images, root)
    images = _with_labels(images, policies, folder)
    images = _with_splits(images, policies, options)
    texts = _join_texts(rows, images, funnel)
    del rows
    synthetic = is_synthetic(folder.parent) or is_synthetic(root)
    notes = [SYNTHETIC_NOTE] if synthetic else []
    if "subject_id" not in fields:
        notes.append(NOTE_STUDIES if "study_id" in fields else NOTE_NO_PATIENTS)
    try:
        return write_manifest(
            out,
            images,
            texts,
            dataset="spreadsheet",
            image_root=root,
            funnel=funnel,
            notes=notes,
            policies=policies,
            synthetic=synthetic,
            text_unit=options.text_unit,
        )
    except ManifestError as error:
        fix = "correct the table; without a `split` column patients are split whole"
        raise ManifestError(error.what, where=folder, fix=fix) from None


def _text_or_null(column: pa.ChunkedArray, words: Sequence[str]) -> pa.ChunkedArray:
    """Trimmed text; null where it is blank, or one of the words that stand for a missing value."""
    trimmed = pc.utf8_trim_whitespace(column)
    is_short = pc.less_equal(pc.binary_length(trimmed), max(map(len, words)))
    word = pc.utf8_lower(pc.if_else(is_short, trimmed, pa.scalar("", trimmed.type)))
    nothing = pc.is_in(word, pa.array(words, trimmed.type))
    return pc.if_else(pc.or_(nothing, is_blank(trimmed)), pa.scalar(None, trimmed.type), trimmed)


def _path_or_null(column: pa.ChunkedArray, root: Path) -> pa.ChunkedArray:
    """Paths with forward slashes, relative to the root where they lie below it."""
    paths = pc.replace_substring(_text_or_null(column, BLANK_WORDS), "\\", "/")
    paths = pc.replace_substring_regex(paths, r"/(\./|/)+", "/")
    paths = pc.replace_substring_regex(paths, r"^(\./)+", "")
    for folder in (root.absolute(), root.resolve()):
        prefix = folder.as_posix().rstrip("/") + "/"
        below = pc.starts_with(paths, prefix)
        paths = pc.if_else(below, pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    return paths


def _key_from_path(path: str | None) -> str | None:
    """The key of an image that was given none: its path, or the hash of a path that is too long."""
    if path is None or len(path.encode()) <= MAX_KEY_BYTES:
        return path
    return "sha256:" + hashlib.sha256(path.encode()).hexdigest()


def _clean(
    sheet: Sheet, fields: dict[str, str], labels: dict[str, str], root: Path
) -> tuple[_Rows, dict[str, str]]:
    """Bring the table's cells into a manifest's columns, still with a row for each text."""
    words = (*BLANK_WORDS, "none")
    columns: dict[str, pa.ChunkedArray] = {}
    for field, name in fields.items():
        if field == "mask_path":
            paths = _path_or_null(sheet.columns[name], root)
            parts = (pa.scalar("file:", paths.type), paths, pa.scalar("", paths.type))
            columns[MASK_COLUMN] = pc.binary_join_element_wise(*parts)
        elif field == "image_path":
            columns[field] = _path_or_null(sheet.columns[name], root)
        elif field != "text":
            columns[field] = _text_or_null(sheet.columns[name], words)
    nothing = pa.chunked_array([pa.nulls(len(sheet.numbers), pa.large_string())])
    policies = {"key": "the table's column"}
    if "key" not in fields:
        policies["key"] = "image_path, or its SHA-256 when longer than 128 bytes"
        paths = columns["image_path"].to_pylist()
        columns["key"] = pa.chunked_array([pa.array(map(_key_from_path, paths), pa.string())])
    if "subject_id" not in fields:
        study = columns.get("study_id", nothing)
        columns["subject_id"] = pc.coalesce(study, columns["key"].cast(pa.large_string()))
    source = columns.get("source", nothing)
    columns["source"] = pc.fill_null(source, "spreadsheet")
    for field in ("study_id", "view_position", "split"):
        columns.setdefault(field, nothing)
    columns["split"] = _spelled_splits(columns["split"], sheet, fields.get("split", "split"))
    for label, name in labels.items():
        columns[LABEL_PREFIX + label] = _text_or_null(sheet.columns[name], BLANK_WORDS)
    columns[ROW_COLUMN] = pa.chunked_array([pa.array(sheet.numbers)])
    texts, packed = None, PackedTexts()
    if "text" in fields:
        policies["text"] = "line ends as \\n, white space around the text removed"
        ids = _pack_texts(sheet.columns.pop(fields["text"]).chunks, packed)
        texts = pa.table({"text_id": ids, "place": pa.array(np.arange(len(ids), dtype=np.int64))})
    return _Rows(pa.table(columns), texts, packed), policies


def _pack_texts(chunks: list[pa.Array], packed: PackedTexts) -> pa.ChunkedArray:
    """Take white space off texts, and put them away.

    Args:
        chunks: Emptied on the way, so that reports are not held twice.
        packed: Gets them.

    Returns:
        The `text_id` of each, null where there is no text.
    """
    ids = []
    while chunks:
        text = pc.replace_substring(pa.chunked_array([chunks.pop(0)]), "\r\n", "\n")
        text = _text_or_null(text, (*BLANK_WORDS, "none"))
        for chunk in text.chunks:
            packed.append(chunk)
        ids += text_ids(text).chunks
    return pa.chunked_array(ids, pa.string())


def _spelled_splits(column: pa.ChunkedArray, sheet: Sheet, name: str) -> pa.ChunkedArray:
    """Splits by their one name.

    Args:
        column: Trimmed cells, null where blank.
        sheet: The table that they are from.
        name: What the table calls the column.

    Raises:
        ManifestError: A value is none of the known spellings. It is not quoted: a column that was
            taken for the split may hold anything.
    """
    lower = pc.utf8_lower(column)
    spelled = {**{name: name for name in SPLIT_NAMES}, **SPLIT_SPELLINGS}
    index = pc.index_in(lower, pa.array(list(spelled), lower.type))
    unknown = pc.and_(pc.is_null(index), pc.is_valid(column)).to_numpy()
    if unknown.any():
        raise ManifestError(
            f"the column `{name}` is none of {', '.join(spelled)} or blank: "
            f"{rows_text(sheet.numbers[unknown])}",
            where=sheet.path,
            fix="correct these cells; without a column of splits patients are split whole",
        )
    return pa.chunked_array([pa.array(list(spelled.values()))]).take(index)


def _drop_blank_ids(rows: _Rows) -> tuple[_Rows, list[FunnelStep]]:
    """Drop rows that name no image, key or patient, and open the funnel."""
    left = np.ones(rows.images.num_rows, dtype=np.bool_)
    dropped: dict[str, int] = {}
    for field in ("image_path", "key", "subject_id"):
        blank = left & rows.images[field].is_null().to_numpy()
        if blank.any():
            dropped[f"blank {field}"] = int(blank.sum())
            numbers = rows.images[ROW_COLUMN].to_numpy()[blank]
            note(f"dropped for a blank `{field}`: {rows_text(numbers)}")
            left &= ~blank
    blank = left & rows.images["study_id"].is_null().to_numpy()
    if blank.any() and not blank.all():
        numbers = rows.images[ROW_COLUMN].to_numpy()[blank]
        note(f"kept with a blank `study_id`, {blank.sum():,} in all: {rows_text(numbers)}")
    steps = [FunnelStep(name="rows in the table", count=len(left))]
    if dropped:
        count = int(left.sum())
        steps.append(FunnelStep(name="rows with their ids", count=count, dropped=dropped))
        texts = None if rows.texts is None else rows.texts.filter(left)
        rows = _Rows(rows.images.filter(left), texts, rows.packed)
    return rows, steps


def _merge_images(rows: _Rows, funnel: list[FunnelStep], where: Path) -> pa.Table:
    """One row for each image; appends to the funnel.

    Raises:
        ManifestError: Rows of one key differ in more than their text.
    """
    same = [name for name in rows.images.column_names if name not in ("key", ROW_COLUMN)]
    kept, conflicts = distinct_rows(rows.images, ["key"], same=same)
    if len(conflicts):
        numbers = rows.images[ROW_COLUMN].to_numpy()
        raise ManifestError(
            conflict_sentence("the same `key`", conflicts, numbers),
            where=where,
            fix="give each image a key of its own; rows of one image may differ in their text only",
        )
    pairs = len(kept)
    if rows.texts is not None:
        ids = pc.fill_null(rows.texts["text_id"], "")
        table = pa.table({"key": rows.images["key"], "text_id": ids})
        pairs = table.group_by(["key", "text_id"]).aggregate([]).num_rows
    dropped = {
        "identical row": rows.images.num_rows - pairs,
        "another text of the same image": pairs - len(kept),
    }
    dropped = {reason: number for reason, number in dropped.items() if number}
    funnel.append(FunnelStep(name="images", count=len(kept), dropped=dropped))
    return take_rows(rows.images, kept)


def _drop_missing_files(images: pa.Table, funnel: list[FunnelStep], root: Path) -> pa.Table:
    """Images whose file is there and not empty; appends to the funnel.

    Raises:
        ManifestError: None is there.
    """
    sizes = file_sizes(root, images["image_path"].to_pylist())
    count = int((sizes > 0).sum())
    if count == 0 and len(sizes):
        raise ManifestError(
            f"none of the {len(sizes):,} image files is there",
            where=root,
            fix="name the folder that the paths start from: --set image_root=FOLDER",
        )
    faults = {reason: int(fault.sum()) for reason, fault in file_faults(sizes).items()}
    dropped = {reason: number for reason, number in faults.items() if number}
    funnel.append(FunnelStep(name="images with a file", count=count, dropped=dropped))
    return images.filter(sizes > 0)


def _tell_missing_masks(images: pa.Table, root: Path) -> None:
    """Name the rows whose mask is not there."""
    if MASK_COLUMN not in images.column_names:
        return
    named = images.filter(pc.is_valid(images[MASK_COLUMN]))
    paths = [one.removeprefix("file:") for one in named[MASK_COLUMN].to_pylist()]
    missing = named[ROW_COLUMN].to_numpy()[~files_present(root, paths)]
    if len(missing):
        note(f"the mask's file is missing: {rows_text(missing)}")


def _with_labels(images: pa.Table, policies: dict[str, str], where: Path) -> pa.Table:
    """Labels as findings or as classes; what was decided goes into the policies.

    A column whose values are all 1, 0 or -1 holds findings, any other holds classes, and so does
    the column `label:class` whatever its values.

    Raises:
        ManifestError: A column mixes -1 with other values than 1 and 0.
    """
    findings = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
    for index, name in enumerate(images.column_names):
        if not name.startswith(LABEL_PREFIX):
            continue
        values = {value for value in pc.unique(images[name]).to_pylist() if value is not None}
        policies[name] = "classes; blank is unlabelled"
        if values and values <= set(findings) and name != f"{LABEL_PREFIX}class":
            policies[name] = "1 present, 0 absent, -1 uncertain, blank not mentioned"
            codes = pa.array(list(findings.values()), pa.int8())
            at = pc.index_in(images[name], pa.array(list(findings), images[name].type))
            images = images.set_column(index, name, pa.chunked_array([codes]).take(at))
        elif values & {"-1", "-1.0"} and name != f"{LABEL_PREFIX}class":
            strange = pc.invert(pc.is_in(images[name], pa.array([*findings, None])))
            numbers = images[ROW_COLUMN].filter(strange).to_numpy()
            raise ManifestError(
                f"`{name}` holds -1, so it should hold 1, 0 and -1 only: {rows_text(numbers)}",
                where=where,
            )
    return images


def _with_splits(images: pa.Table, policies: dict[str, str], options: Options) -> pa.Table:
    """The table's splits, or splits by patient where it has none."""
    index = images.column_names.index("split")
    unassigned = images["split"].null_count
    if unassigned < images.num_rows:
        policies["split"] = "the table's column"
        if unassigned:
            note(f"{unassigned:,} images are in no split")
        return images
    shares = "/".join(f"{share:g}" for share in options.fractions)
    policies["split"] = f"by patient, {shares} of them, seed {options.seed}"
    splits = split_by_subject(
        images["subject_id"].to_pylist(), fractions=options.fractions, seed=options.seed
    )
    return images.set_column(index, "split", pa.array(splits, pa.string()))


def _join_texts(rows: _Rows, images: pa.Table, funnel: list[FunnelStep]) -> pa.Table | None:
    """Texts of the images that are left, once each; appends to the funnel."""
    if rows.texts is None:
        return None
    table = pa.table({"key": rows.images["key"], "text_id": rows.texts["text_id"]})
    wanted = pc.and_(pc.is_in(table["key"], images["key"]), pc.is_valid(table["text_id"]))
    positions = np.flatnonzero(wanted.to_numpy())
    kept, _ = distinct_rows(table.take(positions), ["key", "text_id"], same=[])
    kept = positions[kept]
    places = rows.texts["place"].to_numpy()[kept]
    texts = take_rows(table, kept).append_column("text", rows.packed.take(places))
    count = int(pc.count_distinct(texts["key"]).as_py())
    silent = images.num_rows - count
    dropped = {"no report (kept without text)": silent} if silent else {}
    funnel.append(FunnelStep(name="images with a report", count=count, dropped=dropped))
    return texts.append_column("unit", pa.array(["report"] * texts.num_rows, pa.string()))
