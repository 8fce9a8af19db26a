"""Where something lies in an image: the text of a manifest's column `mask`.

    null                          not annotated
    (empty)                       annotated, nothing is there
    boxes:HxW:x,y,w,h;x,y,w,h     pixels of the stored image (H rows, W columns), floats allowed
    runs:HxW:start,length;...     zero-based, row by row, absolute, sorted, not overlapping
    file:relative/path.png        below the image root; what is not zero is inside

A box takes in every pixel that it touches, so whole numbers are the slices `[y:y+h, x:x+w]`.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from PIL import Image

from featcache.errors import ManifestError

MAX_PIXELS = 89_478_485  # as for pictures; a few bytes of text must not fill the memory
FILE_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # without loss: zero has to stay zero
_HEAD = re.compile(r"(boxes|runs):(\d{1,9})x(\d{1,9}):(.*)", re.DOTALL)
_RUNS = re.compile(r"\d{1,12},\d{1,12}(?:;\d{1,12},\d{1,12})*")
_DUST = 1e-6  # of a pixel; sums of decimal fractions are off by less

Box = tuple[float, float, float, float]


class _Mask(NamedTuple):
    """A mask as its text says it: quadruples of boxes, or starts and lengths of runs."""

    kind: Literal["boxes", "runs"]
    height: int
    width: int
    numbers: Float64[np.ndarray, "K 4"] | Int64[np.ndarray, "K 2"]


class _BadMaskError(ValueError):
    """A sentence about what is wrong with a text; it never quotes it."""


def encode_boxes(height: int, width: int, boxes: Sequence[Box]) -> str:
    """Boxes as the text of a mask.

    Args:
        height: Rows of the stored image.
        width: Columns of the stored image.
        boxes: Left, top, width, height of each, in pixels; none for an empty mask.

    Returns:
        The text; empty without boxes.

    Raises:
        ManifestError: A box has no area, or leaves the image.
    """
    if not boxes:
        return ""
    listed = ";".join(",".join(_plain(number) for number in box) for box in boxes)
    text = f"boxes:{height}x{width}:{listed}"
    if problem := mask_problem(text):
        raise ManifestError(problem, where="a mask of boxes")
    return text


def encode_runs(mask: Bool[np.ndarray, "h w"]) -> str:
    """A mask as text, pixel by pixel.

    Args:
        mask: True = inside.

    Returns:
        The text; empty when nothing is inside.
    """
    steps = np.diff(np.concatenate([[False], mask.ravel(), [False]]).astype(np.int8))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not len(starts):
        return ""
    runs = zip(starts.tolist(), (ends - starts).tolist(), strict=True)
    height, width = mask.shape
    return f"runs:{height}x{width}:" + ";".join(f"{start},{length}" for start, length in runs)


def decode_mask(
    text: str, root: Path, *, where: str | None = None
) -> Bool[np.ndarray, "h w"] | None:
    """The mask that a text describes.

    Args:
        text: A value of the column `mask`, not null.
        root: Folder that `file:` paths start from.
        where: What an error shall name, e.g. `row 7 of images.parquet`.

    Returns:
        The mask in the size of the stored image, True = inside; None for an empty mask, whose size
        the text does not say.

    Raises:
        ManifestError: The text is no mask, or its file cannot be read.
    """
    where = where or "a mask"
    if text == "":
        return None
    try:
        if text.startswith("file:"):
            return _read_file(root / _file_path(text))
        mask = _parse(text)
    except _BadMaskError as problem:
        raise ManifestError(str(problem), where=where) from None
    if mask.kind == "boxes":
        return _fill_boxes(mask)
    steps = np.zeros(mask.height * mask.width + 1, np.int8)
    starts, lengths = mask.numbers.T
    steps[starts] += 1
    steps[starts + lengths] -= 1
    inside = np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)
    return inside.reshape(mask.height, mask.width)


def mask_problem(text: str) -> str | None:
    """What is wrong with a text of the column `mask`; files are not opened.

    Args:
        text: Not null.

    Returns:
        A sentence that does not quote the text; None when all is well.
    """
    try:
        if text.startswith("file:"):
            _file_path(text)
        elif text:
            _parse(text)
    except _BadMaskError as problem:
        return str(problem)
    return None


def mask_size(text: str) -> tuple[int, int]:
    """Height and width that a text says, in pixels; 0, 0 where it does not.

    Args:
        text: Of the column `mask`, not null.
    """
    match = _HEAD.fullmatch(text)
    return (int(match[2]), int(match[3])) if match else (0, 0)


def resize_mask(
    mask: Bool[np.ndarray, "h w"],
    height: int,
    width: int,
    *,
    fit: Literal["pad", "squash"] = "pad",
) -> Float32[np.ndarray, "height width"]:
    """The share of each new pixel that lies inside a mask.

    Args:
        mask: True = inside, in the size of the stored image.
        height: Rows wanted.
        width: Columns wanted.
        fit: As the encoder's decoder fits the picture. `pad`: whole picture in its proportions,
            margins outside the mask; `squash`: other proportions.

    Returns:
        Shares in [0, 1], not thresholded.
    """
    rows, columns = mask.shape
    size, top, left = (height, width), 0, 0
    if fit == "pad":
        ratio = min(width / columns, height / rows)
        size = max(1, round(rows * ratio)), max(1, round(columns * ratio))
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
    shares = _shares(_shares(mask.astype(np.float64), size[0]).T, size[1]).T
    placed = np.zeros((height, width), np.float32)
    placed[top : top + size[0], left : left + size[1]] = shares.clip(0.0, 1.0)
    return placed


def _shares(values: Float64[np.ndarray, "H K"], want: int) -> Float64[np.ndarray, "want K"]:
    """Means over `want` equal parts of the first axis; pixels at the edges count by their share."""
    have = len(values)
    total = np.zeros((have + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=total[1:])
    edges = np.linspace(0.0, have, want + 1)
    below = np.minimum(edges.astype(np.int64), have - 1)
    part = (edges - below)[:, None]
    # In this form equal totals give exactly 0 outside of the mask.
    sums = total[below] + part * (total[below + 1] - total[below])
    return np.asarray(np.diff(sums, axis=0) * (want / have))


def _plain(number: float) -> str:
    """A number without a trailing `.0`."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))


def _parse(text: str) -> _Mask:
    """Read boxes or runs.

    Raises:
        _BadMaskError: It is none, or does not fit its image.
    """
    match = _HEAD.fullmatch(text)
    if match is None:
        raise _BadMaskError("`mask` is none of boxes:HxW:..., runs:HxW:... and file:...")
    kind, height, width, body = match[1], int(match[2]), int(match[3]), match[4]
    if not 0 < height * width <= MAX_PIXELS:
        raise _BadMaskError(f"`mask` names an image of no pixel, or of over {MAX_PIXELS:,}")
    if kind == "runs":
        return _Mask("runs", height, width, _parse_runs(body, height * width))
    return _Mask("boxes", height, width, _parse_boxes(body, height, width))


def _parse_runs(body: str, num_pixels: int) -> Int64[np.ndarray, "K 2"]:
    """Starts and lengths."""
    if _RUNS.fullmatch(body) is None:
        raise _BadMaskError("`mask` has runs that are not start,length;start,length;...")
    runs = np.array(body.replace(";", ",").split(","), dtype=np.int64).reshape(-1, 2)
    ends = runs.sum(axis=1)
    if not (runs[:, 1] > 0).all():
        raise _BadMaskError("`mask` has a run of length 0")
    if (runs[1:, 0] < ends[:-1]).any():
        raise _BadMaskError("`mask` has runs that overlap or are not sorted")
    if ends[-1] > num_pixels:
        raise _BadMaskError("`mask` has a run beyond the last pixel of its image")
    return runs


def _parse_boxes(body: str, height: int, width: int) -> Float64[np.ndarray, "K 4"]:
    """Left, top, width, height."""
    try:
        boxes = np.array([[float(n) for n in box.split(",")] for box in body.split(";")])
    except ValueError:
        boxes = np.zeros((0, 0))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise _BadMaskError("`mask` has boxes that are not x,y,w,h;x,y,w,h;...")
    left, top, box_width, box_height = boxes.T
    if not (boxes[:, 2:] > _DUST).all():
        raise _BadMaskError("`mask` has a box without area")
    beyond = (left + box_width > width + _DUST) | (top + box_height > height + _DUST)
    if (boxes[:, :2] < 0).any() or beyond.any():
        raise _BadMaskError("`mask` has a box that leaves its image")
    return boxes


def _fill_boxes(mask: _Mask) -> Bool[np.ndarray, "h w"]:
    """The union of boxes."""
    inside = np.zeros((mask.height, mask.width), np.bool_)
    for left, top, width, height in mask.numbers.tolist():
        rows = slice(math.floor(top + _DUST), math.ceil(top + height - _DUST))
        columns = slice(math.floor(left + _DUST), math.ceil(left + width - _DUST))
        inside[rows, columns] = True
    return inside


def _file_path(text: str) -> str:
    """The path of a mask's file, which stays below its root."""
    path = text.removeprefix("file:")
    pure = PurePosixPath(path)
    if not path.strip() or not path.isprintable() or pure.is_absolute() or ".." in pure.parts:
        raise _BadMaskError("`mask` names no file below the image root")
    return path


def _read_file(path: Path) -> Bool[np.ndarray, "h w"]:
    """A mask out of a picture: any channel but transparency, the number of a palette's colour."""
    try:
        with Image.open(path, formats=FILE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _BadMaskError(f"the mask's file has over {MAX_PIXELS:,} pixels")
            has_alpha = image.mode in ("LA", "PA", "La", "RGBA", "RGBa")
            levels: np.ndarray = np.asarray(image)
    except FileNotFoundError:
        raise _BadMaskError("the mask's file is missing") from None
    except _BadMaskError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning):
        kinds = ", ".join(FILE_FORMATS)
        raise _BadMaskError(f"the mask's file cannot be read as one of {kinds}") from None
    if levels.ndim == 3:
        levels = np.any(levels[..., : levels.shape[2] - has_alpha], axis=2)
    return np.asarray(levels != 0)
