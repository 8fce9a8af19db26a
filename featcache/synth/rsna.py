"""The RSNA pneumonia challenge as a procedural tree: one row per box, patients hidden in ids."""

import io
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.console import task
from featcache.synth.draw import Lesion, draw_frontal, generator, make_anatomy
from featcache.synth.secondary_capture import draw_header, encode_dicom
from featcache.synth.tree import Summary, Tree, assign

SWITCHES = ("no-mapping",)
LABELS = "stage_2_train_labels.csv"
CLASS_INFO = "stage_2_detailed_class_info.csv"
SUBMISSION = "stage_2_sample_submission.csv"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
FOLDERS = {"train": "stage_2_train_images", "test": "stage_2_test_images"}
CLASSES = ("No Lung Opacity / Not Normal", "Normal", "Lung Opacity")
BLOCK = 64  # pictures held in memory at once
PixelBox = tuple[int, int, int, int]

# Shares of the published set: classes of images, and boxes of an image with an opacity.
_CLASS_SHARES = (0.443, 0.332, 0.225)
_BOX_SHARES = (0.435, 0.543, 0.02, 0.002)
_ODD = (
    ("missing file", 0.004),
    ("zero bytes", 0.003),
    ("truncated", 0.003),
    ("PNG named dcm", 0.003),
    ("no view", 0.006),
    ("age over 120", 0.006),
    ("not in the mapping", 0.01),
)
_MAX_IMAGES_PER_PERSON = 65


class Size(NamedTuple):
    """Labelled images, images without labels, side of a picture."""

    train: int
    test: int
    side_px: int


SIZES = {
    "tiny": Size(300, 24, 128),
    "small": Size(1_000, 100, 256),
    "large": Size(26_684, 3_000, 1_024),
}


@dataclass
class Picture:
    """One image id.

    Attributes:
        key: What the tables call `patientId`.
        folder: `train` or `test`.
        person: Number of the NIH patient behind it.
        visit: Number of the image among that patient's.
        finding: One of `CLASSES`.
        num_boxes: Opacities that get a box.
        is_listed: Whether the tables have it.
        boxes: Left, top, width, height in pixels, filled in when it is drawn.
    """

    key: str
    folder: str
    person: int
    visit: int
    finding: str
    num_boxes: int
    is_listed: bool = True
    odd: list[str] = field(default_factory=list)
    boxes: list[PixelBox] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where its file lies."""
        return f"{FOLDERS[self.folder]}/{self.key}.dcm"

    @property
    def nih_name(self) -> str:
        """The file name that NIH gave it; numbers from 90,000 on are nobody's."""
        return f"{90_000 + self.person:08d}_{self.visit:03d}.png"


def _key(seed: int, number: int) -> str:
    """An id in the form of a UUID of version 0, which does not exist."""
    digits = generator(seed, "rsna id", number).bytes(16).hex()
    digits = f"{digits[:12]}0{digits[13:]}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _persons(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Person and visit of each image: most have one or two, some have many."""
    visits: list[tuple[int, int]] = []
    person = 0
    while len(visits) < count:
        several = min(int(rng.geometric(0.42)), _MAX_IMAGES_PER_PERSON)
        if person == 0:
            several = 12
        visits += [(person, visit) for visit in range(several)]
        person += 1
    return [visits[i] for i in rng.permutation(count)]


def _findings(count: int, rng: np.random.Generator) -> list[str]:
    """Classes in their shares, shuffled."""
    edges = np.rint(np.cumsum((0, *_CLASS_SHARES)) * count).astype(int)
    names = [name for name, n in zip(CLASSES, np.diff(edges), strict=True) for _ in range(n)]
    return [names[i] for i in rng.permutation(count)]


def _plan(size: Size, seed: int) -> list[Picture]:
    """All images, in the order of the label table; those without labels and rows come last."""
    rng = generator(seed, "rsna")
    unlisted = max(1, size.train // 300)
    total = size.train + size.test + unlisted
    persons, findings = _persons(total, rng), _findings(total, rng)
    pictures = []
    for number in range(total):
        num_boxes = 0
        if findings[number] == "Lung Opacity":
            num_boxes = 1 + int(rng.choice(4, p=_BOX_SHARES))
        folder = "test" if size.train <= number < size.train + size.test else "train"
        key, is_listed = _key(seed, number), number < size.train + size.test
        visit = persons[number]
        pictures.append(Picture(key, folder, *visit, findings[number], num_boxes, is_listed))
    opaque = [picture for picture in pictures[: size.train] if picture.num_boxes]
    for picture, num_boxes in zip(opaque, (4, 3, 2, 1), strict=False):
        picture.num_boxes = num_boxes
    for picture in pictures[-unlisted:]:
        picture.odd.append("file without a row")
    for number, odd in assign(_ODD, range(size.train), rng).items():
        pictures[number].odd.append(odd)
    normal = [p for p in pictures[: size.train] if not p.odd and p.finding == "Normal"]
    normal[0].odd.append("black")
    for picture in normal[2 :: max(len(normal) // 2, 1)]:
        picture.odd.append("copy of another file")
    return pictures


def _lesions(picture: Picture, rng: np.random.Generator) -> list[Lesion]:
    """The opacities first, in the order of their boxes; then what else is to be seen."""

    def lesion(kind: str, side: int, low: float, high: float) -> Lesion:
        return Lesion(kind, side, float(rng.uniform(low, high)), float(rng.uniform(0.9, 1.5)))

    side = (-1, 1)[rng.integers(2)]
    lesions = []
    for number in range(picture.num_boxes):
        kind = ("Lung Opacity", "Consolidation")[rng.integers(2)]
        lesions.append(lesion(kind, side if number % 2 == 0 else -side, 0.15, 0.4))
    if picture.finding == "No Lung Opacity / Not Normal":
        kind = ("Cardiomegaly", "Lung Lesion", "Atelectasis", "Pleural Other")[rng.integers(4)]
        lesions.append(lesion(kind, side, 0.15, 0.3))
    if picture.finding != "Normal" and rng.random() < 0.3:
        lesions.append(lesion("Support Devices", side, 0.25, 0.35))
    return lesions


def _draw(picture: Picture, seed: int, side_px: int) -> UInt8[np.ndarray, "H W"]:
    """The grey levels of a picture, whose boxes are filled in."""
    if "black" in picture.odd:
        return np.zeros((side_px, side_px), np.uint8)
    rng = generator(seed, "rsna picture", picture.key)
    patient = make_anatomy(generator(seed, "rsna person", picture.person))
    lesions = _lesions(picture, rng)
    grey, drawn = draw_frontal(patient, lesions, rng, height=side_px, width=side_px)
    for _, edges in drawn[: picture.num_boxes]:
        left, top, right, bottom = (round(edge * side_px) for edge in edges)
        picture.boxes.append((left, top, max(right - left, 1), max(bottom - top, 1)))
    return grey


def _encode(grey: UInt8[np.ndarray, "H W"], picture: Picture, seed: int) -> bytes:
    """The file's bytes, damaged where the picture is odd."""
    if "PNG named dcm" in picture.odd:
        file = io.BytesIO()
        Image.fromarray(grey).save(file, "PNG")
        return file.getvalue()
    rng = generator(seed, "rsna header", picture.key)
    number = int(picture.key[:8], 16)
    uids = tuple(f"1.2.276.0.7230010.3.1.{level}.9999999.{number}.1.1" for level in (2, 3, 4))
    age = int(rng.integers(121, 156)) if "age over 120" in picture.odd else None
    header = draw_header(rng, picture.key, uids, age=age)  # type: ignore[arg-type]
    if "no view" in picture.odd:
        header = header._replace(view="")
    content = encode_dicom(grey, header)
    if "truncated" in picture.odd:
        return content[: len(content) * 6 // 10]
    return b"" if "zero bytes" in picture.odd else content


def _write_files(
    tree: Tree, pictures: Sequence[Picture], seed: int, side_px: int
) -> dict[str, str]:
    """Draw and write all files; the key whose file each copy repeats."""
    sources: dict[str, str] = {}
    last: tuple[str, bytes] | None = None
    with ThreadPoolExecutor() as pool, task("synth rsna", len(pictures)) as progress:
        for start in range(0, len(pictures), BLOCK):
            block = pictures[start : start + BLOCK]
            drawn = pool.map(lambda picture: _draw(picture, seed, side_px), block)
            for picture, grey in zip(block, drawn, strict=True):
                content = _encode(grey, picture, seed)
                if "copy of another file" in picture.odd and last is not None:
                    sources[picture.key], content = last
                elif not picture.odd and picture.finding == "Normal":
                    last = picture.key, content
                if "missing file" not in picture.odd:
                    tree.write(picture.path, content)
            progress.update(start + len(block))
    return sources


def _write_tables(tree: Tree, pictures: Sequence[Picture], *, has_mapping: bool) -> None:
    """Labels with a row for each box, classes repeated as often, a submission, the mapping."""
    listed = [picture for picture in pictures if picture.is_listed]
    labels: list[Sequence[object]] = [("patientId", "x", "y", "width", "height", "Target")]
    classes: list[Sequence[object]] = [("patientId", "class")]
    for picture in (one for one in listed if one.folder == "train"):
        if picture.num_boxes:
            labels += [(picture.key, *map(float, box), 1) for box in picture.boxes]
        else:
            labels.append((picture.key, "", "", "", "", 0))
        classes += [(picture.key, picture.finding)] * max(picture.num_boxes, 1)
    tree.write_csv(LABELS, labels)
    tree.write_csv(CLASS_INFO, classes)
    guesses = [(p.key, "0.5 0 0 100 100") for p in listed if p.folder == "test"]
    tree.write_csv(SUBMISSION, [("patientId", "PredictionString"), *guesses])
    if has_mapping:
        mapped = [
            {
                "img_id": picture.nih_name,
                "orig_labels": ["Infiltration"] if picture.num_boxes else ["No Finding"],
                "subset_img_id": picture.key,
            }
            for picture in listed
            if "not in the mapping" not in picture.odd
        ]
        tree.write(MAPPING, json.dumps(mapped, indent=1).encode())


def write(root: Path, *, size: str, seed: int, switches: Collection[str] = ()) -> Summary:
    """Write the tree.

    Args:
        root: Empty folder that exists.
        size: A key of `SIZES`.
        seed: Equal seeds give equal bytes.
        switches: Which of `SWITCHES` are on; `no-mapping` leaves the patients unknown.

    Returns:
        Counts and the truth.
    """
    tree, chosen = Tree(root), SIZES[size]
    pictures = _plan(chosen, seed)
    sources = _write_files(tree, pictures, seed, chosen.side_px)
    _write_tables(tree, pictures, has_mapping="no-mapping" not in switches)
    truth = {
        picture.key: {
            "folder": picture.folder,
            "person": picture.person,
            "nih_name": picture.nih_name,
            "class": picture.finding,
            "boxes": picture.boxes,
            "odd": picture.odd,
            "copy_of": sources.get(picture.key),
        }
        for picture in pictures
    }
    images = sum("missing file" not in picture.odd for picture in pictures)
    listed = sum(picture.is_listed for picture in pictures)
    return Summary(images, listed, {"side_px": chosen.side_px, "images": truth})
