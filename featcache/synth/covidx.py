"""COVIDx as a procedural tree: lists with 3, 4 and 5 fields, mixed sources, several file kinds."""

import io
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.console import task
from featcache.synth.draw import Box, Lesion, draw_frontal, generator, make_anatomy
from featcache.synth.tree import Summary, Tree, assign

SWITCHES = ("no-confound",)
VERSION = "9A"
CLASSES = ("normal", "pneumonia", "COVID-19")
BLOCK = 64  # pictures held in memory at once


class Size(NamedTuple):
    """Listed images by class (normal, pneumonia, COVID-19) and the range of picture sizes."""

    train: tuple[int, int, int]
    test: tuple[int, int, int]
    smallest_px: int
    largest_px: int


SIZES = {
    "tiny": Size((80, 64, 96), (20, 20, 20), 128, 160),
    "small": Size((700, 500, 1_200), (100, 100, 200), 224, 320),
    "large": Size((8_085, 5_555, 16_490), (100, 100, 200), 480, 1_024),
}
# As published, the source gives the class away: COVID-19 never comes from rsna.
_SOURCES = {
    "normal": (("rsna", 0.7), ("cohen", 0.3)),
    "pneumonia": (("rsna", 0.7), ("cohen", 0.3)),
    "COVID-19": (
        ("stonybrook", 0.55),
        ("sirm", 0.15),
        ("ricord", 0.1),
        ("bimcv", 0.1),
        ("actmed", 0.05),
        ("fig1", 0.05),
    ),
}
_TEST_SOURCES = {"normal": "rsna", "pneumonia": "rsna", "COVID-19": "ricord"}
_IMAGES_PER_PATIENT = {"stonybrook": 5, "cohen": 3, "ricord": 2, "bimcv": 2, "rsna": 1}
_EXTENSIONS = {"stonybrook": "jpg", "cohen": "jpeg", "actmed": "jpg"}
# Shares of all train rows of the sources that the published lists have them in.
_MISSING = 0.02
_FILE_KINDS = (
    ("RGB", 0.1),
    ("RGBA", 0.03),
    ("16 bit", 0.05),
    ("JPG in capitals", 0.01),
    ("PNG in capitals", 0.01),
)


@dataclass
class Row:
    """One line of a list.

    Attributes:
        patient: First field, may hold a space.
        file: Name in the list.
        finding: One of `CLASSES`.
        source: Last field; left out of the line when `has_source` is False.
        person: Whose anatomy is drawn; for rsna, several patient fields share one person.
        stored_as: Name on disk, None when the file is missing.
    """

    patient: str
    file: str
    finding: str
    source: str
    person: str
    stored_as: str | None
    has_source: bool = True
    odd: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The row as the list has it."""
        fields = [self.patient, self.file, self.finding]
        return " ".join([*fields, self.source] if self.has_source else fields) + "\n"


def _names(source: str, patient: int, number: int, seed: int) -> tuple[str, str]:
    """Patient field and file name as a source spells them, for its n-th patient and image."""
    extension = _EXTENSIONS.get(source, "png")
    if source == "rsna":
        digits = generator(seed, "rsna", patient).bytes(16).hex()
        name = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        return name, f"{name}.{extension}"
    if source == "stonybrook":
        name = f"A9{patient % 100_000:05d}"
        view = "AP" if number else "PORTABLE"
        return name, f"{name}-12-31-1900-NA-CHEST-{view}-{10_000 + number}-1-1.{extension}"
    if source == "ricord":
        name = f"419639-{patient:06d}"
        return name, f"MIDRC-RICORD-1C-{name}-{90_000 + patient}-{number}.{extension}"
    if source == "sirm":
        return f"COVID {patient}", f"COVID({patient}).{extension}"
    return f"9{source[0]}{patient}", f"{source}-9{patient:05d}-{number}.{extension}"


def _draw_rows(
    split: str, counts: Sequence[int], seed: int, *, has_confound: bool, first_patient: int
) -> list[Row]:
    """Rows of one list, sorted by class: patients with several images, by source."""
    rng = generator(seed, "covidx", split)
    rows: list[Row] = []
    patient = first_patient
    for finding, count in zip(CLASSES, counts, strict=True):
        end = len(rows) + count
        while len(rows) < end:
            patient += 1
            choices = _SOURCES[finding if has_confound else CLASSES[rng.integers(3)]]
            if split == "test":
                choices = ((_TEST_SOURCES[finding], 1.0),)
            shares = [share for _, share in choices]
            source = choices[rng.choice(len(choices), p=shares)][0]
            # Two rsna patients in a row are one person: their identifiers name images.
            person = f"{split} {patient // 2 if source == 'rsna' else patient} {source}"
            several = int(rng.integers(1, _IMAGES_PER_PATIENT.get(source, 1) + 1))
            for number in range(min(several, end - len(rows))):
                name, file = _names(source, patient, number, seed)
                rows.append(Row(name, file, finding, source, person, file))
    return rows


def _rename(row: Row, odd: str) -> None:
    """An extension in capitals, in the list as on disk."""
    extension = odd.split(" ")[0]
    row.file = row.stored_as = f"{row.file.rpartition('.')[0]}.{extension}"


def _give_odd_cases(train: Sequence[Row], test: Sequence[Row], seed: int) -> None:
    """File kinds, missing and renamed files, a misspelt source, lines of three fields."""
    rng = generator(seed, "covidx", "odd")
    for rows in (train, test):
        pngs = [n for n, row in enumerate(rows) if row.file.endswith("png")]
        for number, odd in assign(_FILE_KINDS, pngs, rng).items():
            rows[number].odd.append(odd)
            if odd.endswith("capitals"):
                _rename(rows[number], odd)
    slides = [row for row in train if row.source == "sirm"]
    for row in slides[::2]:
        row.stored_as = row.file.replace("(", "-").replace(")", "")
        row.odd.append("renamed on disk")
    misspelt = [row for row in train if row.source == "rsna"]
    for row in misspelt[:: max(len(misspelt) // max(len(train) // 100, 2), 1)]:
        row.source = "rnsa"
        row.odd.append("misspelt source")
    for row in test[::15]:
        row.has_source = False
        row.odd.append("three fields")
    left = [n for n, row in enumerate(train) if not row.odd]
    for number in rng.choice(left, max(1, round(_MISSING * len(train))), replace=False):
        row = train[number]
        if row.source == "stonybrook":
            row.file = row.file.replace("CHEST", "ABDOMEN")
        row.stored_as = None
        row.odd.append("missing")


def _lesions(row: Row, rng: np.random.Generator) -> list[Lesion]:
    """What distinguishes the classes, faint in many pictures, with distractors in all of them."""
    strength = float(rng.uniform(0.2, 0.45))
    size = float(rng.uniform(0.9, 1.6))
    lesions = []
    if row.finding == "pneumonia":
        lesions.append(Lesion("Consolidation", (-1, 1)[rng.integers(2)], strength, size))
    elif row.finding == "COVID-19":
        side = (0, 0, -1, 1)[rng.integers(4)]
        lesions.append(Lesion("COVID-19", side, strength, size))
    if rng.random() < 0.25:
        lesions.append(Lesion("Support Devices", (-1, 1)[rng.integers(2)], 0.3, size))
    if rng.random() < 0.2:
        lesions.append(Lesion("Atelectasis", (-1, 1)[rng.integers(2)], 0.12, size))
    if rng.random() < 0.2:
        lesions.append(Lesion("Cardiomegaly", 0, 0.0, size))
    return lesions


def _draw(
    row: Row, seed: int, size: Size
) -> tuple[UInt8[np.ndarray, "H W"], list[tuple[str, Box]]]:
    """The grey levels of a row, and its boxes."""
    rng = generator(seed, "covidx picture", row.patient, row.file)
    patient = make_anatomy(generator(seed, "covidx person", row.person))
    height, width = (int(side) for side in rng.integers(size.smallest_px, size.largest_px + 1, 2))
    return draw_frontal(patient, _lesions(row, rng), rng, height=height, width=width)


def _encode(grey: UInt8[np.ndarray, "H W"], row: Row) -> bytes:
    """The file's bytes in the row's file kind."""
    image = Image.fromarray(grey)
    if "RGB" in row.odd:
        image = image.convert("RGB")
    elif "RGBA" in row.odd:
        image = image.convert("RGBA")
    elif "16 bit" in row.odd:
        image = Image.fromarray(grey.astype(np.uint16) * 16 + 200)  # 12 bits with an offset
    file = io.BytesIO()
    if row.file.lower().endswith("png"):
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write(root: Path, *, size: str, seed: int, switches: Collection[str] = ()) -> Summary:
    """Write the tree.

    Args:
        root: Empty folder that exists.
        size: A key of `SIZES`.
        seed: Equal seeds give equal bytes.
        switches: Which of `SWITCHES` are on.

    Returns:
        Counts and the truth.
    """
    tree, has_confound, chosen = Tree(root), "no-confound" not in switches, SIZES[size]
    train = _draw_rows("train", chosen.train, seed, has_confound=has_confound, first_patient=0)
    test = _draw_rows("test", chosen.test, seed, has_confound=True, first_patient=100_000)
    _give_odd_cases(train, test, seed)
    order = generator(seed, "covidx", "order").permutation(len(train))
    lists = {"train": [train[i] for i in order], "test": test}  # test is sorted by class
    wanted = [(f"{split}/{row.stored_as}", row) for split, rows in lists.items() for row in rows]
    truth: dict[str, object] = {}
    images = 0
    with ThreadPoolExecutor() as pool, task("synth covidx", len(wanted)) as progress:
        for start in range(0, len(wanted), BLOCK):
            block = wanted[start : start + BLOCK]
            drawn = pool.map(lambda item: _draw(item[1], seed, chosen), block)
            for (path, row), (grey, boxes) in zip(block, drawn, strict=True):
                truth[f"{path.partition('/')[0]}/{row.file}"] = {
                    "person": row.person,
                    "source": row.source,
                    "class": row.finding,
                    "boxes": [[kind, *box] for kind, box in boxes],
                    "odd": row.odd,
                }
                if row.stored_as is not None:
                    tree.write(path, _encode(grey, row))
                    images += 1
            progress.update(start + len(block))
    for split, rows in lists.items():
        content = "".join(row.line for row in rows).encode()
        tree.write(f"{split}_COVIDx{VERSION}.txt", content)
    return Summary(images, len(wanted), {"images": truth})
