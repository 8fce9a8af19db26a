"""Masks of the SIIM-ACR challenge: gap and length of each run, column by column.

A gap counts from the end of the run before it, the first from pixel 0. That is not the absolute
code that other challenges use; read as such, these numbers give another mask and no error.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

_PAIRS = re.compile(r"\d{1,9} +\d{1,9}(?: +\d{1,9} +\d{1,9})*")
_TELLING_PAIRS = 8  # chance alone lets so many gaps grow once in 40,000 rows


def read_pairs(cell: str) -> Int64[np.ndarray, "K 2"] | None:
    """Gaps and lengths of one cell.

    Args:
        cell: Without blanks around it; no `-1`.

    Returns:
        None when it is no even count of whole numbers, or a length is 0.
    """
    if _PAIRS.fullmatch(cell) is None:
        return None
    pairs = np.array(cell.split(), dtype=np.int64).reshape(-1, 2)
    return pairs if (pairs[:, 1] > 0).all() else None


def looks_absolute(pairs: Int64[np.ndarray, "K 2"]) -> bool | None:
    """Whether what should be gaps grows all the time, as absolute starts do.

    Returns:
        None when there are too few pairs to tell.
    """
    if len(pairs) < _TELLING_PAIRS:
        return None
    return bool((np.diff(pairs[:, 0]) > 0).all())


def unite(
    rows: Sequence[Int64[np.ndarray, "_ 2"]], height: int, width: int
) -> Bool[np.ndarray, "{height} {width}"] | None:
    """The union of an image's rows.

    Args:
        rows: Gaps and lengths of each; none for an empty mask.
        height: Rows of the stored image.
        width: Columns of the stored image.

    Returns:
        True = inside; None when a run leaves the image.
    """
    by_column = np.zeros(width * height, np.bool_)
    for pairs in rows:
        ends = np.cumsum(pairs.sum(axis=1))
        if ends[-1] > by_column.size:
            return None
        for start, end in zip((ends - pairs[:, 1]).tolist(), ends.tolist(), strict=True):
            by_column[start:end] = True
    return by_column.reshape(width, height).T
