"""The boxes of NIH ChestX-ray14: 984 of them, each around one finding in one of 880 images.

    Image Index,Finding Label,Bbox [x,y,w,h],,,
    00000001_000.png,Infiltrate,225.08,547.02,86.78,79.19

The header has the comma inside brackets and three too many at its end, so cells are read by their
place. `Infiltrate` is what the table of images calls Infiltration. Numbers are pixels of the
published pictures of 1024 x 1024.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from featcache.errors import ManifestError
from featcache.manifest.checks import rows_text
from featcache.manifest.files import glance
from featcache.manifest.masks import Box, encode_boxes
from featcache.manifest.tree import each_file

BOX_TABLE = "BBox_List_2017.csv"
SIDE = 1_024
Boxed = Literal[
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
]
_SPELLED = {"Infiltrate": "Infiltration"}
_HEADER = ["image index", "finding label", "bbox [x", "y", "w", "h]"]
_NAME = re.compile(r"\d{8}_\d{3}\.png")
_DUST = 1e-6


class BoxRow(NamedTuple):
    """One row of the table.

    Attributes:
        row: Its number; the header is row 1.
        image: Name of the image.
        finding: As the table of images calls it.
        box: Left, top, width, height in pixels of 1024 x 1024.
    """

    row: int
    image: str
    finding: str
    box: Box


def read_boxes(folder: Path) -> list[BoxRow]:
    """Read the table of boxes.

    Raises:
        ManifestError: It is missing, is another table, or holds what is no box; rows are named.
    """
    path = folder / BOX_TABLE
    if not path.is_file():
        raise ManifestError(
            f"the table {BOX_TABLE} is missing",
            where=folder,
            fix="put it there, or leave out boxes",
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error):
        raise ManifestError("the table cannot be read as CSV", where=path) from None
    if [cell.strip().casefold() for cell in header[:6]] != _HEADER:
        raise ManifestError(
            "the header is not `Image Index,Finding Label,Bbox [x,y,w,h],,,`", where=path
        )
    found: list[BoxRow] = []
    faults: dict[str, list[int]] = defaultdict(list)
    for number, cells in enumerate(rows, start=2):
        if any(cell.strip() for cell in cells):
            one = _read_row(number, [cell.strip() for cell in cells])
            if isinstance(one, str):
                faults[one].append(number)
            else:
                found.append(one)
    if faults:
        problems = [f"{what}: {rows_text(at)}" for what, at in faults.items()]
        raise ManifestError("\n  ".join(problems), where=path)
    return found


def _read_row(number: int, cells: Sequence[str]) -> BoxRow | str:
    """One row, or what is wrong with it."""
    if len(cells) < 6 or any(cells[6:]):
        return "a row is not `image,finding,x,y,w,h`"
    image, finding = cells[0], _SPELLED.get(cells[1], cells[1])
    if not _NAME.fullmatch(image):
        return "`Image Index` is not `00000001_000.png`"
    if finding not in get_args(Boxed):
        return f"`Finding Label` is none of {', '.join(get_args(Boxed))}"
    try:
        left, top, width, height = (float(cell) for cell in cells[2:6])
    except ValueError:
        return "`Bbox` holds what is no number"
    if not (math.isfinite(left + top + width + height) and min(width, height) > 0):
        return "`Bbox` has no area"
    edge = SIDE + _DUST
    if min(left, top) < 0 or left + width > edge or top + height > edge:
        return f"`Bbox` leaves its image of {SIDE} x {SIDE}"
    return BoxRow(number, image, finding, (left, top, width, height))


def box_masks(
    folder: Path,
    rows: Sequence[BoxRow],
    finding: Boxed,
    labelled: Mapping[str, bool],
    paths: Mapping[str, str],
) -> tuple[dict[str, str], str]:
    """Masks of one finding, scaled to the pictures as they lie there.

    Args:
        folder: That paths start from.
        rows: Of `read_boxes`.
        finding: Whose boxes are wanted.
        labelled: For each image of the table whether it has the finding.
        paths: File of each image that is there.

    Returns:
        Text of the column `mask` by image, and how many there are, in a sentence.

    Raises:
        ManifestError: A box is around a finding that its image does not have, or lies in a picture
            that is no square.
    """
    chosen = [one for one in rows if one.finding == finding]
    denied = [one.row for one in chosen if not labelled.get(one.image, True)]
    if denied:
        raise ManifestError(
            f"boxes around {finding} in images that are not labelled so: {rows_text(denied)}",
            where=folder / BOX_TABLE,
            fix="use the tables of one release",
        )
    boxes: dict[str, list[Box]] = defaultdict(list)
    row_of: dict[str, int] = {}
    for one in chosen:
        if one.image in paths:
            boxes[one.image].append(one.box)
            row_of[one.image] = one.row
    names = sorted(boxes)
    full = [str(folder / paths[name]) for name in names]
    sizes = [
        (look.height, look.width)
        for look in each_file(glance, full, title="look at pictures with boxes", unit="images")
    ]
    oblong = [row_of[n] for n, (h, w) in zip(names, sizes, strict=True) if h != w]
    if oblong:
        raise ManifestError(
            f"boxes in pictures that are no squares: {rows_text(oblong)}",
            where=folder / BOX_TABLE,
            fix="use the published pictures, or copies that keep their proportions",
        )
    masks = {
        name: encode_boxes(side, side, [_scaled(box, side) for box in sorted(boxes[name])])
        for name, (side, _) in zip(names, sizes, strict=True)
        if side > 0  # a file that is no picture has no size; it is found by the checks
    }
    images = len({one.image for one in chosen})
    return masks, f"{finding}: {len(chosen):,} boxes in {images:,} images, {len(masks):,} here"


def _scaled(box: Box, side: int) -> Box:
    """A box in pixels of a picture of another size, cut at its edges against rounding."""
    left, top, width, height = (number * side / SIDE for number in box)
    return left, top, min(width, side - left), min(height, side - top)
