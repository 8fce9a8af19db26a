"""The pictures of both MIMIC-CXR projects: identity, split, view, and the manifest made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from featcache.console import note
from featcache.datasets.mimic.reports import (
    NO_FILE,
    ReportOptions,
    read_reports,
    text_columns,
    text_policies,
)
from featcache.datasets.mimic.tables import (
    LABELS,
    check_ids,
    distinct,
    find_table,
    read_table,
)
from featcache.errors import ManifestError
from featcache.manifest.checks import rows_text
from featcache.manifest.decoded import write_stated_sizes
from featcache.manifest.files import glance
from featcache.manifest.funnel import Funnel
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, each_file, file_faults, is_synthetic

FRONTAL_VIEWS = ("AP", "PA")
_SIZE = ("Rows", "Columns")
LABEL_VALUES = "1 present, 0 denied, -1 uncertain, null not mentioned"
PUBLISHED = {"images": 377_110, "studies": 227_835, "patients": 65_379}
PUBLISHED_SPLITS = {"train": 368_960, "validate": 2_991, "test": 5_159}
NOTES = (
    "Made from credentialed data: features, manifests, trained weights and tables of retrieved "
    "items count as the data and stay under its terms.",
    "The official test split is no random draw: more of its studies have a finding than of those "
    "in train, so base rates must not be compared across splits.",
)


def compare_with_published(images: pa.Table) -> str:
    """Say whether as many images, studies and patients are listed as were published.

    Args:
        images: With `study_id`, `subject_id`, and `split` where there is one.
    """
    have = {
        "images": images.num_rows,
        "studies": int(pc.count_distinct(images["study_id"]).as_py()),
        "patients": int(pc.count_distinct(images["subject_id"]).as_py()),
    }
    is_whole = have == PUBLISHED
    if "split" in images.column_names:
        counted = {
            row["values"]: row["counts"] for row in pc.value_counts(images["split"]).to_pylist()
        }
        is_whole &= {k: v for k, v in counted.items() if k} == PUBLISHED_SPLITS
    if is_whole:
        return "complete, as published"
    parts = [f"{have[what]:,} of {number:,} {what}" for what, number in PUBLISHED.items()]
    return "a part, or an unknown version: " + ", ".join(parts)


def blank_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Empty cells as nulls."""
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def distinct_images(
    table: pa.Table, same: Sequence[str], path: Path, funnel: Funnel, name: str
) -> pa.Table:
    """Each `dicom_id` once, and each study with one patient; opens the funnel.

    Raises:
        ManifestError: Rows of one picture or one study contradict each other.
    """
    total = table.num_rows
    images = distinct(table, "dicom_id", ["subject_id", "study_id", *same], path)
    distinct(images, "study_id", ["subject_id"], path)
    funnel.start(f"rows in the {name}", total)
    merged = {"identical row": total - images.num_rows}
    funnel.step("distinct images", images.num_rows, merged)
    return images


def read_metadata(folder: Path, funnel: Funnel | None) -> pa.Table:
    """Identity, view and size of each picture: the identifiers, `view_position Rows Columns row`.

    Args:
        folder: Holds the metadata table of MIMIC-CXR-JPG.
        funnel: Is opened; None where the pictures are listed elsewhere.
    """
    path = find_table(folder, "metadata")
    wanted = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    table = read_table(path, wanted, optional=_SIZE)
    check_ids(table, path)
    view = blank_to_null(table["ViewPosition"])
    table = table.drop_columns("ViewPosition").append_column("view_position", view)
    opened = Funnel() if funnel is None else funnel
    return distinct_images(table, ["view_position"], path, opened, "metadata table")


def with_split(folder: Path, images: pa.Table, funnel: Funnel) -> pa.Table:
    """Add the official split; rows without one are dropped.

    Raises:
        ManifestError: The split table gives a picture another study or patient.
    """
    path = find_table(folder, "split")
    table = read_table(path, ["dicom_id", "study_id", "subject_id", "split"])
    check_ids(table, path)
    table = distinct(table, "dicom_id", ["study_id", "subject_id", "split"], path)
    row = pc.index_in(images["dicom_id"], table["dicom_id"].combine_chunks())
    same_identity(images, table.take(row), path, "metadata and split table")
    images = images.append_column("split", table["split"].take(row))
    without = {"not in the split table": pc.is_null(images["split"]).to_numpy()}
    return funnel.keep(images, "images with a split", without)


def same_identity(images: pa.Table, other: pa.Table, path: Path, tables: str) -> None:
    """See that two tables give each picture the same study and patient.

    Args:
        images: With `row`.
        other: A row for each picture, null where the other table has none.
        path: The other table.
        tables: What the two are called in a message.
    """
    for name in ("study_id", "subject_id"):
        differs = pc.fill_null(pc.not_equal(other[name], images[name]), False)
        rows = np.flatnonzero(differs.to_numpy())
        if len(rows):
            numbers = images["row"].to_numpy()[rows]
            raise ManifestError(
                f"{tables} give a picture another `{name}`: {rows_text(numbers)}",
                where=path,
            )


def with_file(
    folder: Path, images: pa.Table, funnel: Funnel, *, suffix: str, project: str
) -> pa.Table:
    """Add `image_path`, relative to the folder; pictures without a file are dropped.

    Args:
        folder: Holds `files/p10` to `files/p19`, or these folders themselves.
        images: With the three identifiers.
        funnel: Counts what is dropped.
        suffix: `.jpg` or `.dcm`.
        project: Name of the project, for messages.

    Raises:
        ManifestError: No picture has a file.
    """
    prefix = "files/p" if (folder / "files").is_dir() else "p"
    subject = images["subject_id"]
    parts = [pc.utf8_slice_codeunits(subject, 0, 2), "/p", subject, "/s", images["study_id"]]
    paths = pc.binary_join_element_wise(prefix, *parts, "/", images["dicom_id"], suffix, "")
    full = pc.binary_join_element_wise(f"{folder}/", paths, "")
    size = np.empty(len(full), dtype=np.int64)
    shape = np.empty((len(full), 2), dtype=np.int64)
    found = each_file(glance, full.to_pylist(), title="look for images", unit="images")
    for number, one in enumerate(found):
        size[number], shape[number] = one.size_bytes, (one.height, one.width)
    _compare_sizes(images, shape)
    images = images.append_column("image_path", paths)
    faults = file_faults(size)
    kept = funnel.keep(images, "images with a file", faults)
    if not kept.num_rows:
        raise ManifestError(
            f"0 of {images.num_rows:,} listed images have a file",
            where=folder / prefix.rpartition("/")[0],
            fix=f"pass the folder of {project} that holds `files/p10` to `files/p19`",
        )
    return kept


def _compare_sizes(images: pa.Table, shape: Int64[np.ndarray, "N 2"]) -> None:
    """Tell how many files have another size than the metadata table says."""
    if not set(_SIZE) <= set(images.column_names):
        return
    said = np.stack([_whole_numbers(images[name]) for name in _SIZE], axis=1)
    known = (shape[:, 0] > 0) & (said > 0).all(axis=1)
    differing = int(np.count_nonzero((shape[known] != said[known]).any(axis=1)))
    note(f"{differing:,} of {int(known.sum()):,} files have another size than `Rows` and `Columns`")


def _whole_numbers(column: pa.ChunkedArray) -> Int64[np.ndarray, " N"]:
    """Numbers of pixels; 0 where a cell holds none."""
    bare = pc.replace_substring_regex(column, r"\.0$", "")
    is_number = pc.match_substring_regex(bare, r"^\d{1,9}$")
    numbers: Int64[np.ndarray, " N"] = pc.if_else(is_number, bare, "0").cast(pa.int64()).to_numpy()
    return numbers


def keep_frontal(images: pa.Table, folder: Path, funnel: Funnel) -> pa.Table:
    """Keep ViewPosition AP and PA, nothing else.

    Raises:
        ManifestError: Nothing is left.
    """
    view = images["view_position"]
    other = ~pc.is_in(view, pa.array([*FRONTAL_VIEWS, None], pa.string())).to_numpy()
    faults = {"blank view": pc.is_null(view).to_numpy(), "another view": other}
    images = funnel.keep(images, "frontal images", faults)
    if not images.num_rows:
        raise ManifestError("no picture is frontal", where=folder, fix="--set views=all")
    return images


@dataclass(frozen=True)
class Release:
    """What the two projects differ in once their pictures are known.

    Attributes:
        dataset: Name of the reader.
        labels: `study_id` and a column for each label; None for none.
        policies: Choices of the reader beside those of the texts.
        notes: Sentences beside those that all data of MIMIC-CXR carries.
    """

    dataset: str
    labels: pa.Table | None
    policies: Mapping[str, str]
    notes: tuple[str, ...] = ()


def finish(
    folder: Path,
    out: Path,
    images: pa.Table,
    release: Release,
    *,
    options: ReportOptions,
    funnel: Funnel,
) -> Manifest:
    """Choose views, read the reports, and write the manifest.

    Args:
        folder: Where the pictures lie, and by default the reports.
        out: The manifest's folder.
        images: Pictures with a file: identifiers, `view_position`, `split`, `image_path`, `row`.
        release: What the reader knows beside them.
        options: How reports become texts.
        funnel: So far.

    Raises:
        ManifestError: No report is there, or the tables cannot be trusted.
    """
    if options.views == "frontal":
        images = keep_frontal(images, folder, funnel)
    reports = read_reports(folder, images, options)
    origins = np.array([text.origin if not text.text else "" for text in reports.texts])
    images = images.append_column("study", pa.array(reports.study_of_image))
    is_missing = origins[reports.study_of_image] == NO_FILE
    images = funnel.keep(images, "images with a report", {NO_FILE: is_missing})
    reason = origins[images["study"].to_numpy()]
    faults = {str(name): reason == name for name in np.unique(reason) if name}
    images = funnel.keep(images, "images with a text", faults)
    synthetic = is_synthetic(folder)
    manifest = write_manifest(
        out,
        _image_columns(images, release),
        text_columns(images, reports.texts),
        dataset=release.dataset,
        image_root=folder,
        funnel=funnel.steps,
        notes=[*([SYNTHETIC_NOTE] if synthetic else NOTES), *release.notes],
        policies={**text_policies(options, reports), **release.policies},
        synthetic=synthetic,
        text_unit=options.text_unit,
    )
    _keep_sizes(manifest, images)
    return manifest


def _keep_sizes(manifest: Manifest, images: pa.Table) -> None:
    """Keep what the metadata table says of each picture's size, for the checks."""
    if set(_SIZE) <= set(images.column_names):
        said = [pa.array(_whole_numbers(images[name])) for name in _SIZE]
        sizes = {"key": images["dicom_id"], "height": said[0], "width": said[1]}
        write_stated_sizes(manifest, pa.table(sizes))


def _image_columns(images: pa.Table, release: Release) -> pa.Table:
    """Columns of `images.parquet`, with each study's labels copied to its pictures."""
    columns = {"key": images["dicom_id"]}
    copied = ("subject_id", "study_id", "view_position", "split", "image_path", "row")
    columns |= {name: images[name] for name in copied}
    columns["source"] = pa.array([release.dataset] * images.num_rows, pa.string())
    labels = release.labels
    if labels is not None:
        row = pc.index_in(images["study_id"], labels["study_id"].combine_chunks())
        columns |= {f"label:{name}": labels[name].take(row) for name in LABELS}
        without = pc.count_distinct(images["study_id"].filter(pc.is_null(row))).as_py()
        if without:
            note(f"studies without a row in the label table: {without:,}; their labels are null")
    return pa.table(columns)
