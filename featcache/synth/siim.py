"""The SIIM-ACR pneumothorax challenge as a procedural tree: gap-coded masks, several rows each."""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from featcache.console import task
from featcache.manifest.masks import encode_runs
from featcache.synth.draw import Area, Lesion, draw_with_areas, generator, make_anatomy
from featcache.synth.secondary_capture import draw_header, encode_dicom
from featcache.synth.tree import Summary, Tree, assign

SWITCHES = ("rereleased",)
TABLE = "train-rle.csv"
FOLDERS = {"train": "dicom-images-train", "test": "dicom-images-test"}
BLOCK = 64  # pictures held in memory at once

# Shares of the published set: positive images, their numbers of rows, and rows that overlap.
_POSITIVE = 0.223
_ROW_COUNTS = (2_045, 447, 112, 40, 18, 3, 1, 2, 0, 1)
_OVERLAPPING = 0.3
_ODD = (
    ("row without a file", 0.005),
    ("zero bytes", 0.003),
    ("truncated", 0.003),
    ("no view", 0.006),
)


class Size(NamedTuple):
    """Images of the table, images of the test folder, side of a picture."""

    train: int
    test: int
    side_px: int


SIZES = {
    "tiny": Size(300, 24, 128),
    "small": Size(1_000, 100, 256),
    "large": Size(10_675, 1_377, 1_024),
}


@dataclass
class Picture:
    """One image id.

    Attributes:
        number: Of the image; its identifiers are made of it.
        folder: `train` or `test`.
        person: Whose anatomy is drawn; nothing in the tree tells it.
        is_positive: Whether there is a pneumothorax.
        num_rows: Rows of the table: one for each annotation.
        is_overlapping: Whether its annotations overlap.
        mask: The union of the annotations, filled in when it is drawn.
        rows: What the table says, filled in when it is drawn.
    """

    number: int
    folder: str
    person: int
    is_positive: bool
    num_rows: int
    is_overlapping: bool
    odd: list[str] = field(default_factory=list)
    mask: Bool[np.ndarray, "H W"] | None = None
    rows: list[str] = field(default_factory=list)

    def uid(self, level: int) -> str:
        """Identifier of the study (2), the series (3) or the image (4); 9999999 is nobody's."""
        second = 1_517_870_000 + self.number // 300
        part = 100_000 + self.number * 7_919 % 900_000
        return f"1.2.276.0.7230010.3.1.{level}.9999999.{self.number + 300}.{second}.{part}"

    @property
    def path(self) -> str:
        """Where its file lies."""
        return f"{FOLDERS[self.folder]}/{self.uid(2)}/{self.uid(3)}/{self.uid(4)}.dcm"


def _plan(size: Size, seed: int) -> list[Picture]:
    """All images: those of the table in its order, files without a row, the test folder's."""
    rng = generator(seed, "siim")
    unlisted = max(1, size.train // 290)
    total = size.train + unlisted + size.test
    positives = np.arange(total) < round(_POSITIVE * total)
    counts = np.array(_ROW_COUNTS) / sum(_ROW_COUNTS)
    pictures = []
    for number, is_positive in enumerate(rng.permutation(positives).tolist()):
        num_rows = 1 + int(rng.choice(len(counts), p=counts)) if is_positive else 1
        is_overlapping = num_rows > 1 and bool(rng.random() < _OVERLAPPING)
        folder = "train" if number < size.train + unlisted else "test"
        person = int(rng.integers(total // 2))
        pictures.append(Picture(number, folder, person, is_positive, num_rows, is_overlapping))
    several = [p for p in pictures[: size.train] if p.is_positive]
    wanted = ((1, False), (10, True), (3, True), (2, False), (4, True), (2, True))
    for picture, (num_rows, is_overlapping) in zip(several, wanted, strict=False):
        picture.num_rows, picture.is_overlapping = num_rows, is_overlapping
    for picture in pictures[size.train : size.train + unlisted]:
        picture.odd.append("file without a row")
    for number, odd in assign(_ODD, range(size.train), rng).items():
        pictures[number].odd.append(odd)
    order = [*rng.permutation(size.train).tolist(), *range(size.train, total)]
    return [pictures[i] for i in order]


def encode_gaps(mask: Bool[np.ndarray, "H W"]) -> str:
    """A mask as the challenge's tables have it: column by column, gap and length of each run.

    A gap counts from the end of the run before it.

    Args:
        mask: True = inside, not empty.
    """
    columns = np.concatenate([[False], mask.T.ravel(), [False]]).astype(np.int8)
    starts = np.flatnonzero(np.diff(columns) == 1)
    ends = np.flatnonzero(np.diff(columns) == -1)
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {length}" for gap, length in zip(gaps, ends - starts, strict=True))


def _cut(mask: Bool[np.ndarray, "H W"], picture: Picture) -> list[Bool[np.ndarray, "H W"]]:
    """Bands of a mask, side by side; they overlap by half a band where the picture's rows do."""
    columns = np.flatnonzero(mask.any(axis=0))
    edges = np.linspace(0, len(columns), min(picture.num_rows, len(columns)) + 1).astype(int)
    bands = []
    for low, high in pairwise(edges.tolist()):
        further = max((high - low) // 2, 1) if picture.is_overlapping else 0
        band = np.zeros_like(mask)
        band[:, columns[low : high + further]] = True
        bands.append(band & mask)
    return bands


def _lesions(picture: Picture, rng: np.random.Generator) -> list[Lesion]:
    """The pneumothorax first, then what is not annotated: drains and other findings."""
    side = (-1, 1)[rng.integers(2)]
    strength, size = float(rng.uniform(0.08, 0.25)), float(rng.uniform(0.4, 1.4))
    lesions = [Lesion("Pneumothorax", side, strength, size)] if picture.is_positive else []
    if rng.random() < (0.4 if picture.is_positive else 0.15):
        lesions.append(Lesion("Support Devices", side, 0.3, 0.5))
    if rng.random() < 0.25:
        lesions.append(Lesion("Lung Opacity", -side, 0.15, 0.8))
    if rng.random() < 0.2:
        lesions.append(Lesion("Cardiomegaly", 0, 0.0, float(rng.uniform(0.5, 1.2))))
    return lesions


def _enlarge(area: Area, side_px: int) -> Bool[np.ndarray, "H W"]:
    """An area in the size of its picture."""
    nearest = np.arange(side_px) * len(area) // side_px
    return area[np.ix_(nearest, nearest)]


def _draw(picture: Picture, seed: int, side_px: int) -> UInt8[np.ndarray, "H W"]:
    """The grey levels of a picture, whose mask and rows are filled in."""
    rng = generator(seed, "siim picture", picture.number)
    patient = make_anatomy(generator(seed, "siim person", picture.person))
    lesions = _lesions(picture, rng)
    grey, areas = draw_with_areas(patient, lesions, rng, height=side_px, width=side_px)
    if picture.is_positive:
        picture.mask = _enlarge(areas[0][1], side_px)
        picture.rows = [encode_gaps(band) for band in _cut(picture.mask, picture)]
    else:
        picture.rows = ["-1"]
    return grey


def _encode(grey: UInt8[np.ndarray, "H W"], picture: Picture, seed: int) -> bytes:
    """The file's bytes, damaged where the picture is odd."""
    rng = generator(seed, "siim header", picture.number)
    digits = rng.bytes(16).hex()
    patient = "-".join((digits[:8], digits[8:12], f"0{digits[13:16]}", digits[16:20], digits[20:]))
    header = draw_header(rng, patient, (picture.uid(2), picture.uid(3), picture.uid(4)))
    if "no view" in picture.odd:
        header = header._replace(view="")
    content = encode_dicom(grey, header)
    if "truncated" in picture.odd:
        return content[: len(content) * 6 // 10]
    return b"" if "zero bytes" in picture.odd else content


def _table(pictures: Sequence[Picture], blank: str) -> bytes:
    """The table; in the first release a blank precedes the second name and each cell below it."""
    lines = [f"ImageId,{blank}EncodedPixels\n"]
    for picture in pictures:
        if picture.folder == "train" and "file without a row" not in picture.odd:
            lines += [f"{picture.uid(4)},{blank}{row}\n" for row in picture.rows]
    return "".join(lines).encode()


def _truth(picture: Picture) -> dict[str, object]:
    """What is hidden in a picture."""
    return {
        "folder": picture.folder,
        "path": picture.path,
        "person": picture.person,
        "pneumothorax": picture.is_positive,
        "mask": encode_runs(picture.mask) if picture.mask is not None else "",
        "rows": len(picture.rows),
        "overlapping": picture.is_overlapping,
        "odd": picture.odd,
    }


def write(root: Path, *, size: str, seed: int, switches: Collection[str] = ()) -> Summary:
    """Write the tree.

    Args:
        root: Empty folder that exists.
        size: A key of `SIZES`.
        seed: Equal seeds give equal bytes.
        switches: Which of `SWITCHES` are on; `rereleased` writes the table without its blanks.

    Returns:
        Counts and the truth.
    """
    tree, chosen = Tree(root), SIZES[size]
    pictures = _plan(chosen, seed)
    truth: dict[str, object] = {}
    with ThreadPoolExecutor() as pool, task("synth siim", len(pictures)) as progress:
        for start in range(0, len(pictures), BLOCK):
            block = pictures[start : start + BLOCK]
            drawn = pool.map(lambda picture: _draw(picture, seed, chosen.side_px), block)
            for picture, grey in zip(block, drawn, strict=True):
                truth[picture.uid(4)] = _truth(picture)
                picture.mask = None  # a megabyte each in `large`
                if "row without a file" not in picture.odd:
                    tree.write(picture.path, _encode(grey, picture, seed))
            progress.update(start + len(block))
    tree.write(TABLE, _table(pictures, "" if "rereleased" in switches else " "))
    images = sum("row without a file" not in picture.odd for picture in pictures)
    return Summary(images, len(pictures), {"side_px": chosen.side_px, "images": truth})
