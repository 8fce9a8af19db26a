"""One table file, CSV or Parquet, as columns of text that were never numbers.

CSV goes through Python's strict reader, in batches into Arrow columns: a lenient one lets a quote
that is not closed swallow the rows below it without a word.
"""

import codecs
import csv
import gzip
import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from featcache.errors import ManifestError, UsageError
from featcache.manifest.checks import rows_text

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
PARQUET_SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 20_000
_DELIMITERS = (",", ";", "\t", "|")
_MAX_FIELD_CHARS = 2**31 - 1


@dataclass(frozen=True)
class Sheet:
    """Some columns of a table file.

    Attributes:
        path: The file.
        columns: Text columns (`large_string`) by the file's own names; a caller who is short of
            memory may take them out one by one.
        numbers: Row number of each row as a spreadsheet program counts: in CSV the header is row 1
            and blank lines count; in Parquet the first row is row 1.
    """

    path: Path
    columns: dict[str, pa.ChunkedArray]
    numbers: Int64[np.ndarray, " N"]


def column_names(path: Path, *, encoding: str = "utf-8") -> list[str]:
    """Names of a table file's columns, as they stand there; columns without a name may repeat.

    Args:
        path: CSV (comma, semicolon, tab or bar; perhaps gzipped) or Parquet.
        encoding: Of a CSV file; a byte-order mark is skipped, and says so when it is UTF-16.

    Raises:
        ManifestError: The file is no such table, or two columns have one name.
        UsageError: It is of a kind that is not read.
    """
    if _is_parquet(path):
        names = list(_open_parquet(path).schema_arrow.names)
    else:
        names = _header(path, encoding)[0]
    twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
    if twice:
        listed = ", ".join(f"`{name}`" for name in twice)
        raise ManifestError(f"two columns have the same name: {listed}", where=path)
    return names


def read_sheet(
    path: Path,
    names: Sequence[str],
    *,
    encoding: str = "utf-8",
    whole_numbers: Collection[str] = (),
) -> Sheet:
    """Read columns of a table file as text, byte for byte as it stands there.

    Rows whose cells are all blank are no rows.

    Args:
        path: See `column_names`.
        names: Columns to read, among those that `column_names` gave.
        encoding: Of a CSV file.
        whole_numbers: Columns that may be floats in a Parquet file, if every value is whole or
            missing. Elsewhere a float column is refused: an id that became a float is damaged.

    Raises:
        ManifestError: A row has another number of cells than the header, a quote is not closed,
            bytes are not in the encoding, or a Parquet column is not text or whole numbers.
    """
    if _is_parquet(path):
        return _read_parquet(path, names, whole_numbers)
    with _explained(path, encoding):
        return _read_csv(path, names, encoding)


def _is_parquet(path: Path) -> bool:
    """Tell the two kinds apart by the file's name; refuse a third."""
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return True
    bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if bare.suffix.lower() in CSV_SUFFIXES:
        return False
    known = ", ".join((*CSV_SUFFIXES, *PARQUET_SUFFIXES))
    raise UsageError(
        f"a table ending in `{path.suffix}` cannot be read; known endings: {known}, and .gz",
        where=path,
        fix="save the table as CSV (UTF-8)",
    )


@contextmanager
def _explained(path: Path, encoding: str) -> Iterator[None]:
    """Allow long cells, and turn what can go wrong with bytes into sentences without content."""
    limit = csv.field_size_limit(_MAX_FIELD_CHARS)
    try:
        yield
    except UnicodeError:
        raise ManifestError(
            f"the table is not {encoding}", where=path, fix="--set encoding=cp1252, or latin-1"
        ) from None
    except (gzip.BadGzipFile, EOFError):
        raise ManifestError("the gzip file is damaged or cut short", where=path) from None
    except OSError as error:
        raise ManifestError(f"the table cannot be read: {error.strerror}", where=path) from None
    finally:
        csv.field_size_limit(limit)


def _open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """Open a CSV file, perhaps gzipped, in the encoding that its first bytes or the user name."""

    def opened() -> io.BufferedReader | gzip.GzipFile:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")

    try:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
    except LookupError:
        raise UsageError(f"unknown encoding `{encoding}`", where="encoding") from None
    with opened() as file:
        mark = file.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif is_utf8:
        encoding = "utf-8-sig"
    return io.TextIOWrapper(opened(), encoding=encoding, newline="")


def _header(path: Path, encoding: str) -> tuple[list[str], str]:
    """The first record of a CSV file, and the delimiter that makes the most columns of it.

    A delimiter that leaves a double quote inside a name splits a quoted name: any other is better.
    """
    best: tuple[list[str], str] = ([], _DELIMITERS[0])
    most = (False, 0)
    with _explained(path, encoding):
        for delimiter in _DELIMITERS:
            with _open_text(path, encoding) as file:
                try:
                    names = next(csv.reader(file, delimiter=delimiter, strict=True), [])
                except csv.Error:
                    continue
            fit = (not any('"' in name for name in names), len(names))
            if names and fit > most:
                best, most = (names, delimiter), fit
    if not best[0]:
        raise ManifestError("the table has no header row", where=path)
    return best


def _read_csv(path: Path, names: Sequence[str], encoding: str) -> Sheet:
    """Read a CSV file in batches."""
    header, delimiter = _header(path, encoding)
    picks = [header.index(name) for name in names]
    batches: list[list[pa.Array]] = []
    records: list[list[str]] = []
    numbers: list[int] = []
    ragged: list[int] = []

    def flush() -> None:
        cells = list(zip(*records, strict=True)) or [()] * len(header)
        batches.append([pa.array(cells[pick], pa.large_string()) for pick in picks])
        records.clear()

    with _open_text(path, encoding) as file:
        for number, record in _records(path, csv.reader(file, delimiter=delimiter, strict=True)):
            if len(record) > len(header) and not any(record[len(header) :]):
                record = record[: len(header)]  # delimiters that trail a line
            if len(record) != len(header):
                ragged.append(number)
                continue
            numbers.append(number)
            records.append(record)
            if len(records) == BATCH_ROWS:
                flush()
    flush()
    if ragged:
        raise ManifestError(
            f"{len(ragged):,} rows have another number of cells than the header's {len(header)}: "
            + rows_text(ragged),
            where=path,
            fix="put text that holds the delimiter in double quotes",
        )
    columns = {
        name: pa.chunked_array([batch[index] for batch in batches])
        for index, name in enumerate(names)
    }
    return Sheet(path, columns, np.array(numbers, dtype=np.int64))


def _records(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Records below the header that are not blank, with their row numbers."""
    number = 1
    try:
        next(reader)
        for record in reader:
            number += 1
            if any(map(str.strip, record)):
                yield number, record
    except csv.Error as error:
        unclosed = "unexpected end" in str(error)
        raise ManifestError(
            "a double quote is opened and never closed"
            if unclosed
            else "text follows a closing double quote, or a quote inside a cell is not doubled",
            where=f"{path}, row {number + 1} (the header is row 1)",
            fix='write a quote inside a cell as ""',
        ) from None


def _open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError):
        raise ManifestError("the file is no readable Parquet table", where=path) from None


def _read_parquet(path: Path, names: Sequence[str], whole_numbers: Collection[str]) -> Sheet:
    """Read columns of a Parquet file."""
    try:
        table = _open_parquet(path).read(columns=list(names))
    except (pa.ArrowException, OSError):
        raise ManifestError("the Parquet table is damaged", where=path) from None
    problems: list[str] = []
    columns: dict[str, pa.ChunkedArray] = {}
    for name in names:
        text = _as_text(table[name], whole=name in whole_numbers)
        if text is None:
            problems.append(f"the column `{name}` holds {table[name].type}, text is needed")
        else:
            columns[name] = text
    if problems:
        raise ManifestError(
            "\n  ".join(problems),
            where=path,
            fix="save ids as text: as floating-point numbers they have lost their leading zeros",
        )
    rows = np.arange(1, table.num_rows + 1, dtype=np.int64)
    return Sheet(path, columns, rows)


def _as_text(column: pa.ChunkedArray, *, whole: bool) -> pa.ChunkedArray | None:
    """A column as text, or None when that would not give back what was meant."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _as_text(column.cast(kind.value_type), whole=whole)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        rounded = pc.all(pc.equal(pc.round(column), column)).as_py()
        if not whole or rounded is False:
            return None
        column = column.cast(pa.int64())
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    ):
        return None
    return column.cast(pa.large_string())
