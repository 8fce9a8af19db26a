"""The published tables of MIMIC-CXR-JPG: text until every column is checked."""

import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from jaxtyping import Int64

from featcache.errors import ManifestError
from featcache.manifest.checks import ROW_COLUMN, conflict_sentence, distinct_rows, rows_text
from featcache.manifest.columns import find_columns

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

    Returns:
        The columns, and `row` (int64): its number as a spreadsheet program counts, where the header
        is row 1.

    Raises:
        ManifestError: It is damaged, a column is missing, or two columns have one name.
    """
    damaged = ManifestError(
        "the table cannot be read: it is cut off or damaged, or not UTF-8",
        where=path,
        fix="use the table as published",
    )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        with _lines(content) as lines:
            header = next(filter(None, csv.reader(lines)), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error):
        raise damaged from None
    names = {name.strip().casefold() for name in header}
    there = [name for name in optional if name.casefold() in names]
    wanted = find_columns(header, [*columns, *there], path)
    _refuse_open_quotes(content, path)
    try:
        table = pacsv.read_csv(
            pa.BufferReader(content),
            # One thread: only then does an error name its row.
            read_options=pacsv.ReadOptions(use_threads=False),
            convert_options=pacsv.ConvertOptions(
                include_columns=list(wanted.values()),
                column_types=dict.fromkeys(wanted.values(), pa.string()),
            ),
        )
    except (pa.ArrowException, OSError) as error:
        at = re.search(r"Row #(\d+): Expected", str(error))  # the rest of it quotes the row
        if at is None:
            raise damaged from None
        row = _row_numbers(content, int(at[1]))[-1]
        raise ManifestError(
            f"row {row} has another number of fields than the header", where=path
        ) from None
    found = {name: pc.utf8_trim_whitespace(table[there]) for name, there in wanted.items()}
    numbers = _row_numbers(content, table.num_rows + 1)[1:]
    return pa.table({**found, ROW_COLUMN: pa.array(numbers)})


def _lines(content: bytes, *, errors: str = "strict") -> io.TextIOWrapper:
    """A table's bytes as text."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors, newline="")


def _refuse_open_quotes(content: bytes, path: Path) -> None:
    """See that each double quote that opens a cell is closed: Arrow's reader takes the rows below.

    Raises:
        ManifestError: One is not; its row is named.
    """
    if b'"' not in content:
        return
    number = 0
    with _lines(content, errors="replace") as lines:
        try:
            for _ in csv.reader(lines, strict=True):
                number += 1
        except csv.Error:
            raise ManifestError(
                f"a double quote is not closed, or stands inside a cell: row {number + 1}",
                where=path,
                fix='write a quote inside a cell as ""',
            ) from None


def _row_numbers(content: bytes, count: int) -> Int64[np.ndarray, " N"]:
    """Number of each row that is not blank, the header included, as a spreadsheet program counts.

    Args:
        content: The table's bytes; read a second time only if there are blank lines among them.
        count: How many rows to number.
    """
    if re.search(rb"^\s|\n\r?\n", content) is None:
        return np.arange(1, count + 1, dtype=np.int64)
    with _lines(content, errors="replace") as lines:
        filled = (number for number, row in enumerate(csv.reader(lines), 1) if row)
        return np.fromiter(itertools.islice(filled, count), np.int64, count)


def check_ids(table: pa.Table, path: Path) -> None:
    """See that identifiers have the published form, and none went through a number.

    Args:
        table: Of `read_table`.
        path: For the message.

    Raises:
        ManifestError: Some do not; rows are named, identifiers are not.
    """
    problems, looks_like_float = [], False
    for name, pattern in _PATTERNS.items():
        if name in table.column_names:
            is_wrong = pc.invert(pc.match_substring_regex(table[name], pattern))
            rows = table[ROW_COLUMN].filter(is_wrong).to_numpy()
            if len(rows):
                problems.append(f"`{name}` has not the published form: {rows_text(rows)}")
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

    Args:
        table: With `row`.
        by: Column that identifies a row.
        same: Columns that must be equal in rows of the same identity.
        path: For the message.

    Raises:
        ManifestError: Rows of the same identity contradict each other.
    """
    kept, conflicts = distinct_rows(table, [by], same=same)
    if len(conflicts):
        numbers = table[ROW_COLUMN].to_numpy()
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
    table = table.rename_columns(["study_id", *LABELS, ROW_COLUMN])
    check_ids(table, path)
    columns, problems = {name: table[name] for name in ("study_id", ROW_COLUMN)}, []
    cells = pa.array([*_LABEL_CELLS, ""])
    values = pa.array([*_LABEL_CELLS.values(), None], pa.int8())
    for name in LABELS:
        place = pc.index_in(table[name], cells)
        rows = table[ROW_COLUMN].filter(pc.is_null(place)).to_numpy()
        if len(rows):
            problems.append(f"`{name}` is none of 1.0, 0.0, -1.0, blank: {rows_text(rows)}")
        columns[name] = pa.chunked_array([values.take(chunk) for chunk in place.chunks], pa.int8())
    if problems:
        raise ManifestError("\n  ".join(problems), where=path)
    return distinct(pa.table(columns), "study_id", LABELS, path).drop_columns(ROW_COLUMN)
