"""What the columns of a manifest are, and what makes a table of them trustworthy."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped

from featcache.errors import ManifestError, nearest
from featcache.manifest.masks import mask_problem
from featcache.manifest.splits import SPLIT_NAMES

MAX_KEY_BYTES = 128
LABEL_PREFIX = "label:"
TextUnit = Literal["report", "sentence"]
TEXT_UNITS: tuple[TextUnit, ...] = get_args(TextUnit)
_VISIBLE = r"[^\s\p{Z}\p{Cc}]"
_PIECE_ROWS = 20_000

# Column: whether a value is needed in every row.
IMAGE_COLUMNS = {
    "key": True,
    "subject_id": True,
    "study_id": False,
    "view_position": False,
    "split": False,
    "source": True,
    "image_path": True,
}
MASK_COLUMN = "mask"  # see `masks.py`
MASK_PATH_COLUMN = "mask_path"  # of older manifests; nothing reads it
MASK_COLUMNS = (MASK_PATH_COLUMN, MASK_COLUMN)
ROW_COLUMN = "row"
# Text is 64-bit addressed: a million reports can pass the 2 GiB that a 32-bit column holds.
TEXT_COLUMNS = {
    "key": pa.string(),
    "text_id": pa.string(),
    "text": pa.large_string(),
    "unit": pa.string(),
}


def text_id(text: str) -> str:
    """The identity of a text: the first 32 hex digits of SHA-256 of its UTF-8 bytes.

    It identifies a report, so it is treated like report text in logs.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def text_ids(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """`text_id` of each value; null for null."""
    chunks = []
    for start in range(0, len(texts), _PIECE_ROWS):  # never a million reports as Python objects
        piece = texts[start : start + _PIECE_ROWS].cast(pa.large_binary()).to_pylist()
        ids = [None if one is None else hashlib.sha256(one).hexdigest()[:32] for one in piece]
        chunks.append(pa.array(ids, pa.string()))
    return pa.chunked_array(chunks, pa.string())


def rows_text(rows: Sequence[int] | Shaped[np.ndarray, " N"], limit: int = 5) -> str:
    """Row numbers in words, e.g. `rows 3, 9, 14, 15, 20 and 7 more`."""
    shown = ", ".join(str(int(row)) for row in rows[:limit])
    more = f" and {len(rows) - limit:,} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def distinct_rows(
    table: pa.Table, by: Sequence[str], *, same: Sequence[str]
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, "X 2"]]:
    """Find rows that repeat, and tell the harmless from the contradictory.

    Args:
        table: Any table.
        by: Columns that identify a row; a null identifies nothing.
        same: Columns that must be equal in rows of the same identity; nulls equal each other.

    Returns:
        Positions of the first row of each identity, sorted by `by`; and pairs of positions whose
        identity is equal while a column of `same` differs.
    """
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in by]).to_numpy()
    order = order.astype(np.int64)
    repeats = np.ones(max(len(order) - 1, 0), dtype=np.bool_)
    for name in by:
        column = table[name].take(order)
        repeats &= pc.fill_null(pc.equal(column[1:], column[:-1]), False).to_numpy()
    after = np.flatnonzero(repeats) + 1  # arrow sorts stably: equal rows keep their order
    pairs = np.stack([order[after - 1], order[after]], axis=1)
    differ = np.zeros(len(pairs), dtype=np.bool_)
    for name in same:
        left, right = table[name].take(pairs[:, 0]), table[name].take(pairs[:, 1])
        equal = pc.fill_null(pc.equal(left, right), False)
        both_null = pc.and_(pc.is_null(left), pc.is_null(right))
        differ |= ~pc.or_(equal, both_null).to_numpy()
    return np.delete(order, after), pairs[differ]


def take_rows(table: pa.Table, rows: Int64[np.ndarray, " K"]) -> pa.Table:
    """Rows of a table; the table itself, not a copy, when it is all of them in their order."""
    is_same = len(rows) == table.num_rows and bool((np.diff(rows) == 1).all())
    return table if is_same else table.take(rows)


def conflict_sentence(
    what: str, pairs: Int64[np.ndarray, "X 2"], numbers: Int64[np.ndarray, " N"]
) -> str:
    """Say which rows contradict each other.

    Args:
        what: What they have in common, e.g. `the same key`.
        pairs: Positions, at least one pair.
        numbers: Row number of each position, as a person counts them.
    """
    shown = ", ".join(f"{numbers[a]} and {numbers[b]}" for a, b in pairs[:3].tolist())
    more = f" and {len(pairs) - 3:,} more pairs" if len(pairs) > 3 else ""
    return f"rows {shown}{more} have {what} and contradict each other"


def _column_problems(table: pa.Table, known: Sequence[str], needed: Sequence[str]) -> list[str]:
    """Columns that are missing, and columns that a manifest does not know."""
    names = table.column_names
    problems = [
        f"the column `{name}` is missing; {nearest(name, names)}"
        for name in needed
        if name not in names
    ]
    problems += [
        f"unknown column `{name}`; {nearest(name, list(known))}"
        for name in names
        if name not in known and not name.startswith(LABEL_PREFIX)
    ]
    problems += [f"the column `{n}` stands twice" for n in sorted(set(names)) if names.count(n) > 1]
    return problems


def _cast(table: pa.Table, types: Mapping[str, pa.DataType], where: Path) -> pa.Table:
    """Bring columns into their order and types, without numbers ever passing for text."""
    columns, problems = {}, []
    for name, kind in types.items():
        column = table[name]
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if textual and not _is_text(column.type):
            problems.append(f"the column `{name}` holds {column.type}, text is needed")
            continue
        try:
            columns[name] = column.cast(kind)
        except pa.ArrowInvalid:
            problems.append(f"the column `{name}` holds values that are no {kind}")
    if problems:
        raise ManifestError("\n  ".join(problems), where=where)
    return pa.table(columns).replace_schema_metadata(None)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text (a column of nulls may become one)."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def conform_images(images: pa.Table, where: Path) -> pa.Table:
    """Image columns in their order: the fixed ones, masks, then labels by name."""
    labels = sorted(name for name in images.column_names if name.startswith(LABEL_PREFIX))
    known = [*IMAGE_COLUMNS, *MASK_COLUMNS, ROW_COLUMN]
    problems = _column_problems(images, known, list(IMAGE_COLUMNS))
    if LABEL_PREFIX in labels:
        problems.append(f"a label column needs a name after `{LABEL_PREFIX}`")
    if problems:
        raise ManifestError("\n  ".join(problems), where=where)
    types = dict.fromkeys(IMAGE_COLUMNS, pa.string())
    types |= {name: pa.string() for name in MASK_COLUMNS if name in images.column_names}
    for name in labels:
        types[name] = pa.string() if _is_text(images[name].type) else pa.int8()
    return _cast(images, types, where)


def conform_texts(texts: pa.Table | None, where: Path) -> pa.Table:
    """Text columns in their order; `text_id` is made when the reader left it out."""
    if texts is None:
        return pa.table({name: pa.array([], kind) for name, kind in TEXT_COLUMNS.items()})
    problems = _column_problems(texts, list(TEXT_COLUMNS), ["key", "text", "unit"])
    if problems:
        raise ManifestError("\n  ".join(problems), where=where)
    if "text_id" not in texts.column_names:
        texts = texts.append_column("text_id", text_ids(texts["text"]))
    return _cast(texts, TEXT_COLUMNS, where)


def _where(mask: pa.ChunkedArray) -> Int64[np.ndarray, " N"]:
    """Positions at which a condition holds; null does not."""
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy())


def is_blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Null, empty, or nothing but white space and control characters."""
    return pc.invert(pc.fill_null(pc.match_substring_regex(column, _VISIBLE), False))


def check_images(images: pa.Table, numbers: Int64[np.ndarray, " N"]) -> list[str]:
    """Look for everything that would make an image table untrustworthy.

    Args:
        images: With the columns and types of `images.parquet`, in any order, identical duplicates
            allowed.
        numbers: Row number of each row, as a person counts them.

    Returns:
        A sentence for each problem, with row numbers and without identifiers; empty when all is
        well.
    """
    faults: dict[str, np.ndarray] = {}
    for name, needed in IMAGE_COLUMNS.items():
        blank = is_blank(images[name])
        fault = blank if needed else pc.and_(blank, pc.is_valid(images[name]))
        faults[f"`{name}` is blank"] = _where(fault)
    keys = images["key"]
    faults[f"`key` is longer than {MAX_KEY_BYTES} bytes"] = _where(
        pc.greater(pc.binary_length(keys), MAX_KEY_BYTES)
    )
    for name in ("key", "image_path"):
        control = pc.match_substring_regex(images[name], r"\p{Cc}")
        faults[f"`{name}` holds a control character"] = _where(control)
    outside = pc.invert(pc.is_in(images["split"], pa.array([*SPLIT_NAMES, None])))
    faults[f"`split` is none of {', '.join(SPLIT_NAMES)}"] = _where(outside)
    for name in images.column_names:
        if name.startswith(LABEL_PREFIX):
            faults |= _label_faults(name, images[name])
    if MASK_COLUMN in images.column_names:
        faults |= _mask_faults(images[MASK_COLUMN])
    problems = [f"{what}: {rows_text(numbers[at])}" for what, at in faults.items() if len(at)]
    if not len(images):
        problems.append("no image is left: an empty manifest is of no use")
    shared = patients_in_two_splits(images)
    if shared:
        problems.append(f"{shared:,} patients are in more than one split")
    return problems


def _label_faults(name: str, column: pa.ChunkedArray) -> dict[str, Int64[np.ndarray, " N"]]:
    """Label values that are not allowed: blank classes, findings other than 1, 0, -1."""
    if pa.types.is_string(column.type):
        blank = pc.and_(is_blank(column), pc.is_valid(column))
        return {f"`{name}` is blank where null is meant": _where(blank)}
    allowed = pa.array([1, 0, -1, None], pa.int8())
    return {f"`{name}` is none of 1, 0, -1": _where(pc.invert(pc.is_in(column, allowed)))}


def _mask_faults(column: pa.ChunkedArray) -> dict[str, Int64[np.ndarray, " N"]]:
    """Masks that cannot be: by what is wrong, the positions."""
    faults: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(column.to_pylist()):
        problem = mask_problem(text) if text else None
        if problem:
            faults[problem].append(position)
    return {problem: np.array(at, dtype=np.int64) for problem, at in faults.items()}


def patients_in_two_splits(images: pa.Table) -> int:
    """Number of patients whose images are in more than one split."""
    counted = images.group_by("subject_id").aggregate([("split", "count_distinct")])
    return int(pc.sum(pc.greater(counted["split_count_distinct"], 1)).as_py() or 0)


def check_texts(texts: pa.Table, images: pa.Table) -> list[str]:
    """Look for everything that would make a text table untrustworthy.

    Args:
        texts: With the columns and types of `texts.parquet`, in any order.
        images: The image table that it belongs to.

    Returns:
        A sentence for each problem, with row numbers and never with text.
    """
    wrong_id = pc.fill_null(pc.not_equal(texts["text_id"], text_ids(texts["text"])), True)
    faults = {
        "`key` is that of no image": _where(pc.invert(pc.is_in(texts["key"], images["key"]))),
        "`text` is blank": _where(is_blank(texts["text"])),
        "`text_id` is not the hash of the text": _where(wrong_id),
        f"`unit` is none of {', '.join(TEXT_UNITS)}": _where(
            pc.invert(pc.is_in(texts["unit"], pa.array(TEXT_UNITS)))
        ),
    }
    return [f"{what}: {rows_text(at + 1)}" for what, at in faults.items() if len(at)]
