"""MIMIC-CXR: the DICOM files and reports, with the tables of MIMIC-CXR-JPG where they are at hand.

The project lists its pictures in `cxr-record-list.csv.gz` and its reports in
`cxr-study-list.csv.gz`. Official splits, views in a table and labels belong to MIMIC-CXR-JPG;
`tables` names its folder. Without it views come from the DICOM headers, patients are split by
ours, and there are no labels.

Source: file layout of MIMIC-CXR, versions 2.0.0 and 2.1.0, on PhysioNet.
"""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from featcache.console import note
from featcache.datasets.mimic.pictures import (
    LABEL_VALUES,
    Release,
    blank_to_null,
    compare_with_published,
    distinct_images,
    finish,
    read_metadata,
    same_identity,
    with_file,
    with_split,
)
from featcache.datasets.mimic.reports import ReportOptions
from featcache.datasets.mimic.tables import check_ids, find_list, read_labels, read_table
from featcache.errors import ManifestError
from featcache.manifest.funnel import Funnel
from featcache.manifest.headers import Header, read_headers
from featcache.manifest.splits import split_by_subject
from featcache.manifest.table import Manifest

DESCRIPTION = "MIMIC-CXR: DICOM radiographs and reports; splits and labels from MIMIC-CXR-JPG."
NOTE_SPLIT = (
    "The splits are ours, by patient: the official ones are in the tables of MIMIC-CXR-JPG, which "
    "were not given."
)


class Options(ReportOptions):
    """How MIMIC-CXR is read."""

    tables: Path | None = Field(
        default=None,
        description="Folder with the tables of MIMIC-CXR-JPG (metadata, split, labels); by default "
        "the folder itself, if they lie there.",
    )
    labels: Literal["chexpert", "negbio", "radiologist", "none"] = Field(
        default="chexpert",
        description="Whose table becomes the label columns, where there is one; `radiologist` read "
        "studies of the test split alone.",
    )
    seed: int = Field(default=0, description="Seed of the split by patient, where it is ours.")


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of MIMIC-CXR.

    Pictures without a usable text are left out. Files that are there but cannot be decoded stay:
    stage one quarantines them.

    Args:
        folder: The project: its lists, and `files/` with DICOM files and reports.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: A list, all pictures or all reports are missing, tables contradict each
            other, or a patient is in two splits.
    """
    funnel = Funnel()
    images, policies = _read_records(folder, funnel)
    tables = _tables_folder(folder, options)
    labels = None
    if tables is not None:
        images = with_split(tables, _with_views(tables, images), funnel)
        labels = read_labels(tables, options.labels)
        policies |= {"split": "official", "labels": options.labels, "label_values": LABEL_VALUES}
    policies["tables"] = compare_with_published(images)
    note(f"the lists are {policies['tables']}")
    images = with_file(folder, images, funnel, suffix=".dcm", project="MIMIC-CXR")
    notes: tuple[str, ...] = ()
    if tables is None:
        images = _without_tables(folder, images, policies, options)
        notes = (NOTE_SPLIT,)
    release = Release("mimic-cxr", labels, policies, notes)
    return finish(folder, out, images, release, options=options, funnel=funnel)


def _tables_folder(folder: Path, options: Options) -> Path | None:
    """Where the tables of MIMIC-CXR-JPG lie."""
    if options.tables is not None:
        return options.tables.expanduser()
    return folder if any(folder.glob("mimic-cxr-*-split.csv*")) else None


def _read_records(folder: Path, funnel: Funnel) -> tuple[pa.Table, dict[str, str]]:
    """Identity of each listed picture, and what the list of studies says about them."""
    path = find_list(folder, "cxr-record-list")
    if path is None:
        raise ManifestError(
            "the list cxr-record-list.csv.gz (or .csv) is missing",
            where=folder,
            fix="pass the folder of MIMIC-CXR that holds its lists",
        )
    table = read_table(path, ["subject_id", "study_id", "dicom_id"])
    check_ids(table, path)
    images = distinct_images(table, [], path, funnel, "record list")
    studies = find_list(folder, "cxr-study-list")
    if studies is None:
        return images, {"study_list": "missing"}
    try:
        listed = read_table(studies, ["study_id"])
    except ManifestError as error:  # only to compare with, so no reason to stop
        note(f"{studies.name} was not compared with the images: {error.what}")
        return images, {"study_list": "not readable"}
    without = pc.count_distinct(
        images["study_id"].filter(pc.invert(pc.is_in(images["study_id"], listed["study_id"])))
    ).as_py()
    return images, {"study_list": f"{without:,} studies with images are not in it"}


def _with_views(tables: Path, images: pa.Table) -> pa.Table:
    """Add `view_position` from the metadata table; null where it has no row."""
    metadata = read_metadata(tables, None)
    row = pc.index_in(images["dicom_id"], metadata["dicom_id"].combine_chunks())
    same_identity(images, metadata.take(row), tables, "record list and metadata table")
    return images.append_column("view_position", metadata["view_position"].take(row))


def _without_tables(
    folder: Path, images: pa.Table, policies: dict[str, str], options: Options
) -> pa.Table:
    """Views from the headers and splits by patient."""
    found = read_headers(folder, images["image_path"].to_pylist(), title="read DICOM headers")
    headers = [header if isinstance(header, Header) else None for header in found]
    unread = headers.count(None)
    if unread:
        note(f"files without a readable DICOM header: {unread:,}; their view is blank")
    views = pa.chunked_array([[header.view if header else "" for header in headers]], pa.string())
    images = images.append_column("view_position", blank_to_null(views))
    splits = split_by_subject(images["subject_id"].to_pylist(), seed=options.seed)
    policies["split"] = f"by patient, 0.7/0.1/0.2 of them, seed {options.seed}"
    policies["view_position"] = f"from the DICOM headers ({unread:,} unreadable)"
    return images.append_column("split", pa.array(splits, pa.string()))
