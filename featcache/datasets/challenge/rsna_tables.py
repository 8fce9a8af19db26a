"""The tables of the RSNA challenge: one row per box, joined by image, and the mapping to NIH."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from featcache.datasets.mimic.tables import read_table
from featcache.errors import ManifestError
from featcache.manifest.checks import ROW_COLUMN, rows_text
from featcache.manifest.masks import Box

LABELS_FILE = "stage_2_train_labels.csv"
CLASS_INFO = "stage_2_detailed_class_info.csv"
OPACITY = "Lung Opacity"
CLASSES = ("Normal", "No Lung Opacity / Not Normal", OPACITY)
_BOX_COLUMNS = ("x", "y", "width", "height")
_TARGETS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NIH_NAME = re.compile(r"(\d{8})_\d+(\.\w+)?")


class Labelled(NamedTuple):
    """One image of the label table.

    Attributes:
        row: Its first row; the header is row 1.
        target: 1 where an opacity was found.
        boxes: Left, top, width, height in pixels; none without an opacity.
    """

    row: int
    target: int
    boxes: list[Box]


def read_labels(folder: Path) -> tuple[dict[str, Labelled], int]:
    """Read the label table.

    Returns:
        Image by id, in the table's order; and the number of rows.

    Raises:
        ManifestError: Ids, targets or boxes are not what they should be; rows are named.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        raise ManifestError(
            f"the table {LABELS_FILE} is missing",
            where=folder,
            fix="pass the folder of stage 2 of the challenge, with its tables and image folders",
        )
    table = read_table(path, ["patientId", *_BOX_COLUMNS, "Target"])
    keys, targets = table["patientId"].to_pylist(), table["Target"].to_pylist()
    cells = zip(*(table[name].to_pylist() for name in _BOX_COLUMNS), strict=True)
    numbers = table[ROW_COLUMN].to_pylist()
    images: dict[str, Labelled] = {}
    faults: dict[str, list[int]] = defaultdict(list)
    for row, key, target, box_cells in zip(numbers, keys, targets, cells, strict=True):
        if _KEY.fullmatch(key) is None:
            faults["`patientId` has not the published form"].append(row)
        if target not in _TARGETS:
            faults["`Target` is neither 0 nor 1"].append(row)
            continue
        image = images.setdefault(key, Labelled(row, _TARGETS[target], []))
        if image.target != _TARGETS[target]:
            faults["an image has the targets 0 and 1"].append(row)
            continue
        box = _read_box(box_cells)
        if image.target and box is None:
            faults["`Target` is 1 and the box is blank or no box"].append(row)
        elif image.target and box is not None:
            image.boxes.append(box)
        elif any(box_cells):
            faults["`Target` is 0 and there is a box"].append(row)
    _raise_faults(faults, path)
    return images, table.num_rows


def _read_box(cells: Sequence[str]) -> Box | None:
    """Left, top, width, height; None for blanks and for what are no numbers."""
    try:
        left, top, width, height = (float(cell) for cell in cells)
    except ValueError:
        return None
    box = (left, top, width, height)
    is_box = all(math.isfinite(number) for number in box) and width > 0 and height > 0
    return box if is_box else None


def read_class_info(folder: Path, images: dict[str, Labelled]) -> dict[str, str] | None:
    """Read the class of each image.

    Returns:
        Class by id; None where the table is not there.

    Raises:
        ManifestError: It contradicts itself or the label table, or lacks images of it.
    """
    path = folder / CLASS_INFO
    if not path.is_file():
        return None
    table = read_table(path, ["patientId", "class"])
    classes: dict[str, str] = {}
    faults: dict[str, list[int]] = defaultdict(list)
    cells = (table[name].to_pylist() for name in (ROW_COLUMN, "patientId", "class"))
    for row, key, name in zip(*cells, strict=True):
        if name not in CLASSES:
            faults[f"`class` is none of {', '.join(CLASSES)}"].append(row)
        elif classes.setdefault(key, name) != name:
            faults["an image has two classes"].append(row)
        elif key in images and (images[key].target == 1) != (name == OPACITY):
            faults[f"`class` and `Target` of {LABELS_FILE} contradict each other"].append(row)
    missing = [image.row for key, image in images.items() if key not in classes]
    if missing and not faults:
        what = f"{len(missing):,} images of {LABELS_FILE} have no class here, by their row there"
        faults[what] = missing
    _raise_faults(faults, path)
    return {key: classes[key] for key in images}


def read_mapping(path: Path) -> dict[str, str]:
    """Read the published mapping of the challenge's images to those of NIH ChestX-ray14.

    Returns:
        NIH patient by image id: the first 8 digits of the file's name.

    Raises:
        ManifestError: It is no such file, or gives one image two patients.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        pairs = [(str(entry["subset_img_id"]), str(entry["img_id"])) for entry in entries]
    except FileNotFoundError:
        raise ManifestError(
            "the mapping is missing", where=path, fix="--set nih_mapping=FILE, or leave it out"
        ) from None
    except OSError as error:
        raise ManifestError(
            f"the mapping cannot be read: {error.strerror}", where=path, fix="name the JSON file"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ManifestError(
            "the mapping is no JSON list of objects with `subset_img_id` and `img_id`", where=path
        ) from None
    patients: dict[str, str] = {}
    for number, (key, name) in enumerate(pairs, 1):
        match = _NIH_NAME.fullmatch(name)
        if match is None:
            raise ManifestError(
                f"`img_id` of entry {number} is not like 00012345_006.png", where=path
            )
        if patients.setdefault(key, match[1]) != match[1]:
            raise ManifestError(f"entry {number} gives an image a second patient", where=path)
    return patients


def _raise_faults(faults: dict[str, list[int]], path: Path) -> None:
    """Raise when there is any fault, with all of them."""
    if faults:
        sentences = [f"{what}: {rows_text(rows)}" for what, rows in faults.items()]
        raise ManifestError("\n  ".join(sentences), where=path)
