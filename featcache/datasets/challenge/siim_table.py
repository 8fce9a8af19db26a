"""The table of the SIIM-ACR challenge: several rows of one image, in two spellings."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from featcache.console import note
from featcache.datasets.challenge import gaps
from featcache.datasets.mimic.tables import read_table
from featcache.errors import ManifestError
from featcache.manifest.checks import ROW_COLUMN, rows_text

TABLES = ("train-rle.csv", "stage_2_train.csv")


class Annotated(NamedTuple):
    """One image of the table.

    Attributes:
        rows: Its rows; the header is row 1.
        pairs: Gaps and lengths of each row that holds a mask.
    """

    rows: list[int]
    pairs: list[Int64[np.ndarray, "K 2"]]


def find_table(folder: Path, name: str | None) -> Path:
    """Find the table.

    Args:
        folder: The data set's folder.
        name: Its file name; None for the only one of `TABLES`.

    Raises:
        ManifestError: There is none, or there are two.
    """
    known = [name] if name is not None else [one for one in TABLES if (folder / one).is_file()]
    if len(known) > 1:
        raise ManifestError(
            f"there are {len(known)} tables: {', '.join(known)}",
            where=folder,
            fix=f"--set table={known[0]}",
        )
    if not known or not (folder / known[0]).is_file():
        wanted = name or " and no ".join(TABLES)
        raise ManifestError(
            f"there is no {wanted}", where=folder, fix="pass the challenge's folder with its table"
        )
    return folder / known[0]


def read_annotations(path: Path) -> tuple[dict[str, Annotated], int]:
    """Read the table; blanks around names and cells are of no matter.

    Args:
        path: What `find_table` gave.

    Returns:
        Image by id in the table's order, and the number of rows.

    Raises:
        ManifestError: Cells cannot be read, contradict each other, or look like another code; rows
            are named.
    """
    table = read_table(path, ["ImageId", "EncodedPixels"])
    images: dict[str, Annotated] = {}
    faults: dict[str, list[int]] = defaultdict(list)
    cells = (table[name].to_pylist() for name in (ROW_COLUMN, "ImageId", "EncodedPixels"))
    for row, key, cell in zip(*cells, strict=True):
        if not key:
            faults["`ImageId` is blank"].append(row)
            continue
        image = images.setdefault(key, Annotated([], []))
        image.rows.append(row)
        pairs = gaps.read_pairs(cell)
        if pairs is not None:
            image.pairs.append(pairs)
        elif cell != "-1":
            faults["`EncodedPixels` is neither -1 nor pairs of gap and length"].append(row)
    if not faults:
        for image in images.values():
            if 0 < len(image.pairs) < len(image.rows):
                faults["an image has a mask and also none"].append(image.rows[0])
        _check_code(images, faults)
    if faults:
        sentences = [f"{what}: {rows_text(rows)}" for what, rows in faults.items()]
        raise ManifestError("\n  ".join(sentences), where=path)
    return images, table.num_rows


def _check_code(images: dict[str, Annotated], faults: dict[str, list[int]]) -> None:
    """See that the first numbers of the pairs are gaps; a few rows may look otherwise by chance."""
    looks = [
        (image.rows[0], is_absolute)
        for image in images.values()
        for is_absolute in map(gaps.looks_absolute, image.pairs)
        if is_absolute is not None
    ]
    absolute = [row for row, is_absolute in looks if is_absolute]
    if 2 * len(absolute) > len(looks):
        faults["`EncodedPixels` holds absolute starts where gaps are meant"] = absolute
    elif absolute:
        note(f"siim: {rows_text(absolute)} may hold absolute starts where gaps are meant")
