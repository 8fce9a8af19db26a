"""The published tables of MIMIC-CXR-JPG: text until every column is checked."""

import csv
import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from featcache.errors import ManifestError, nearest
from featcache.manifest.checks import conflict_sentence, distinct_rows, rows_text

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
_PATTERNS = {
    "dicom_id": "^[0-9a-f]{8}(-[0-9a-f]{8}){4}$",
    "subject_id": "^1[0-9]{7}$",
    "study_id": "^5[0-9]{7}$",
}
_LABEL_CELLS = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


# What `labels` may be, and the table of each.
LABEL_TABLES = {
    "chexpert": "chexpert",
    "negbio": "negbio",
    "radiologist": "test-set-labeled",
}


def find_table(folder: Path, kind: str) -> Path:
    """A published table, packed or unpacked; the newest version where several lie there."""
    for ending in (".csv.gz", ".csv"):
        found = sorted(folder.glob(f"mimic-cxr-*-{kind}{ending}"))
        if found:
            return found[-1]
    fix = "pass the folder of MIMIC-CXR-JPG that holds its tables"
    if kind in LABEL_TABLES.values():
        fix += ", or --set labels=none"
    raise ManifestError(
        f"the table mimic-cxr-*-{kind}.csv.gz (or .csv) is missing", where=folder, fix=fix
    )


def find_list(folder: Path, name: str) -> Path | None:
    """A list of MIMIC-CXR (`cxr-record-list`), packed or unpacked; None where it is missing.

    Args:
        folder: The project's folder, or the one above an unpacked `mimic-cxr-reports`.
        name: Of the file, without its ending.
    """
    for place in (folder, folder / "mimic-cxr-reports"):
        for ending in (".csv.gz", ".csv"):
            if (place / f"{name}{ending}").is_file():
                return place / f"{name}{ending}"
    return None


def read_table(path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> pa.Table:
    """Columns of a table as text without blanks around it; the rest is not even parsed.

    Args:
        path: CSV, perhaps gzipped.
        columns: Must be there, by whatever case.
        optional: May be there.

    Raises:
        ManifestError: It is damaged, or a column is missing.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    damaged = ManifestError("the table cannot be read: it is cut off or damaged", where=path)
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error):
        raise damaged from None
    actual = {name.strip().casefold(): name.removeprefix("\ufeff") for name in header}
    missing = [name for name in columns if name.casefold() not in actual]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        seen = nearest(missing[0], [name.strip() for name in header])
        raise ManifestError(f"the table has no column {names}; {seen}", where=path)
    columns = [*columns, *(name for name in optional if name.casefold() in actual)]
    wanted = [actual[name.casefold()] for name in columns]
    try:
        table = pacsv.read_csv(
            path,
            # One thread: only then does an error name its row.
            read_options=pacsv.ReadOptions(use_threads=False),
            convert_options=pacsv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
            ),
        )
    except (pa.ArrowException, OSError) as error:
        row = re.search(r"Row #(\d+)", str(error))  # the rest of the message quotes the row
        if row is None:
            raise damaged from None
        raise ManifestError(
            f"line {row[1]} has another number of fields than the header", where=path
        ) from None
    stripped = [pc.utf8_trim_whitespace(table[name]) for name in wanted]
    return pa.table(dict(zip(columns, stripped, strict=True)))


def check_ids(table: pa.Table, path: Path) -> None:
    """See that identifiers have the published form, and none went through a number.

    Raises:
        ManifestError: Some do not; rows are named, identifiers are not.
    """
    problems, looks_like_float = [], False
    for name, pattern in _PATTERNS.items():
        if name in table.column_names:
            is_wrong = pc.invert(pc.match_substring_regex(table[name], pattern))
            rows = np.flatnonzero(is_wrong.to_numpy())
            if len(rows):
                problems.append(f"`{name}` has not the published form: {rows_text(rows + 1)}")
                wrong = table[name].filter(is_wrong)
                numeric = pc.match_substring_regex(wrong, r"^[0-9.]+(\.0|[eE]\+?[0-9]+)$")
                looks_like_float |= bool(pc.any(numeric).as_py())
    if problems:
        fix = "use the table as published"
        if looks_like_float:
            fix += ": some program has read these identifiers as numbers and written them back"
        raise ManifestError("\n  ".join(problems), where=path, fix=fix)


def distinct(table: pa.Table, by: str, same: Sequence[str], path: Path) -> pa.Table:
    """Merge rows that repeat.

    Raises:
        ManifestError: Rows of the same identity contradict each other.
    """
    kept, conflicts = distinct_rows(table, [by], same=same)
    if len(conflicts):
        numbers = np.arange(1, table.num_rows + 1, dtype=np.int64)
        raise ManifestError(conflict_sentence(f"the same `{by}`", conflicts, numbers), where=path)
    return table.take(np.sort(kept))


def read_labels(folder: Path, kind: str) -> pa.Table | None:
    """A labeller's table: `study_id` and an int8 column for each label.

    Args:
        folder: Holds the table.
        kind: A key of `LABEL_TABLES`, or `none`.

    Returns:
        None for `none`. The table of the radiologist knows studies of the test split alone.
    """
    if kind == "none":
        return None
    path = find_table(folder, LABEL_TABLES[kind])
    # The radiologist's table calls one of them otherwise.
    other = {"Lung Opacity": "Airspace Opacity"} if kind == "radiologist" else {}
    table = read_table(path, ["study_id", *(other.get(name, name) for name in LABELS)])
    table = table.rename_columns(["study_id", *LABELS])
    check_ids(table, path)
    columns, problems = {"study_id": table["study_id"]}, []
    cells = pa.array([*_LABEL_CELLS, ""])
    values = pa.array([*_LABEL_CELLS.values(), None], pa.int8())
    for name in LABELS:
        place = pc.index_in(table[name], cells)
        rows = np.flatnonzero(pc.is_null(place).to_numpy())
        if len(rows):
            problems.append(f"`{name}` is none of 1.0, 0.0, -1.0, blank: {rows_text(rows + 1)}")
        columns[name] = pa.chunked_array([values.take(chunk) for chunk in place.chunks], pa.int8())
    if problems:
        raise ManifestError("\n  ".join(problems), where=path)
    return distinct(pa.table(columns), "study_id", LABELS, path)
