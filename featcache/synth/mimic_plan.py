"""Who is in a synthetic MIMIC-CXR-JPG: patients, studies, pictures, with the odd case of each.

A plan is a pure function of size, seed and switches; nothing is drawn or written here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from featcache.synth.draw import GEOMETRY, Anatomy, Lesion, generator, make_anatomy
from featcache.synth.reports import LABELS, Statement
from featcache.synth.tree import assign

SWITCHES = ("subject-in-two-splits", "duplicate-metadata-row", "row-without-split")

# Shares of all studies. A study has one layout, at most one wording, at most one odd label row.
LAYOUTS = (
    ("impression only", 0.4),
    ("findings only", 0.12),
    ("last paragraph", 0.05),
    ("comparison only", 0.002),
    ("two impressions", 0.01),
    ("swallowed impression", 0.005),
    ("unseen header", 0.01),
    ("typo header", 0.005),
    ("wet read", 0.01),
    ("joint header", 0.01),
    ("one word", 0.005),
    ("no report file", 0.01),
    ("report without images", 0.01),
)
WORDINGS = (
    ("identical text", 0.1),
    ("over 112 tokens", 0.08),
    ("over 512 tokens", 0.003),
    ("decimals", 0.01),
    ("numbered list", 0.01),
    ("not ASCII", 0.01),
    ("Latin-1 bytes", 0.001),
    ("CRLF", 0.001),
)
LABEL_ROWS = (("no label row", 0.01), ("blank label row", 0.01))
# Shares of all frontal pictures; some make the file useless.
PICTURES = (
    ("missing", 0.002),
    ("zero byte", 0.001),
    ("truncated", 0.001),
    ("HTML instead of JPEG", 0.001),
    ("one pixel wide", 0.0001),
    ("constant", 0.0001),
    ("RGB", 0.0005),
    ("EXIF rotated", 0.0005),
    ("border", 0.03),
    ("marker", 0.05),
)
_PREVALENCE = dict(
    zip(
        LABELS,
        (0.22, 0.2, 0.08, 0.16, 0.07, 0.04, 0.07, 0.2, 0.0, 0.26, 0.03, 0.12, 0.08, 0.25),
        strict=True,
    )
)
_DENIED = {"Pneumothorax": 0.6, "Pleural Effusion": 0.5, "Cardiomegaly": 0.35, "Edema": 0.3}


class Size(NamedTuple):
    """How large a tree is."""

    studies: int
    smallest_px: int
    largest_px: int


SIZES = {
    "tiny": Size(64, 256, 320),
    "small": Size(1_000, 320, 512),
    "large": Size(5_000, 2_000, 3_056),
}


@dataclass(frozen=True)
class Picture:
    """Everything that the pixels of one file depend on; equal pictures give equal bytes."""

    name: str
    patient: Anatomy
    lesions: tuple[Lesion, ...]
    height: int
    width: int
    is_frontal: bool
    gain: float = 1.0
    odd: str = ""


@dataclass
class ImagePlan:
    """One row of the metadata table."""

    dicom_id: str
    view: str
    picture: Picture
    odd: list[str] = field(default_factory=list)


@dataclass
class StudyPlan:
    """One study with its report and its images."""

    subject_id: str
    study_id: str
    split: str
    order: int  # of this patient's studies in time
    lesions: tuple[Lesion, ...]
    statements: tuple[Statement, ...]
    layout: str = "both"
    wording: str = ""
    label_row: str = ""
    images: list[ImagePlan] = field(default_factory=list)

    @property
    def image_folder(self) -> str:
        """Path of the study's folder below the root, as the published tree has it."""
        return f"files/p{self.subject_id[:2]}/p{self.subject_id}/s{self.study_id}"

    @property
    def odd(self) -> list[str]:
        """Which odd cases of report and labels this study is."""
        layout = self.layout if self.layout != "both" else ""
        return [name for name in (layout, self.wording, self.label_row) if name]

    @property
    def is_odd(self) -> bool:
        """Whether it is more than one of the layouts and texts that are everywhere."""
        return bool(set(self.odd) - {"impression only", "findings only", "identical text"})


def _findings(
    rng: np.random.Generator, *, is_normal: bool
) -> tuple[tuple[Lesion, ...], tuple[Statement, ...]]:
    """What is in a study and what its report says about it."""
    lesions, statements = [], []
    for label in LABELS:
        if label == "No Finding" or (is_normal and label != "Support Devices"):
            continue
        strength, side = float(rng.uniform(0, 1)), (-1, 1, 0)[rng.choice(3, p=(0.4, 0.4, 0.2))]
        if label in ("Lung Lesion", "Pneumothorax", "Fracture", "Support Devices"):
            side = side or 1
        is_present = rng.random() < _PREVALENCE[label]
        is_doubtful = rng.random() < (0.15 if is_present else 0.03)
        if is_present:
            size = 0.35 + 0.6 * strength
            brightness = size if label in GEOMETRY else 0.15 + 0.25 * strength
            lesions.append(Lesion(label, side, brightness, size))
        if is_doubtful:
            statements.append(Statement(label, -1, side, strength))
        elif is_present:
            statements.append(Statement(label, 1, side, strength))
        elif rng.random() < _DENIED.get(label, 0.1):
            statements.append(Statement(label, 0, side, strength))
    if is_normal:
        said = {statement.label for statement in statements}
        denied = [name for name in _DENIED if name not in said]
        statements += [Statement(name, 0, 0, 0.0) for name in denied if rng.random() < 0.6]
    return tuple(lesions), tuple(statements)


def _split_of(share: float) -> str:
    """Official split names; the shares leave enough held-out studies in a small tree."""
    if share < 0.12:
        return "validate"
    return "test" if share < 0.3 else "train"


def _plan_studies(seed: int, number: int) -> list[StudyPlan]:
    """Patients with one to four studies each, until there are `number` studies."""
    rng = generator(seed, "mimic", "studies")
    study_ids = 59_900_000 + rng.choice(80_000, number, replace=False)  # order says nothing
    subject_ids = iter(19_900_000 + rng.choice(90_000, number, replace=False))
    studies: list[StudyPlan] = []
    while len(studies) < number:
        subject_id = str(next(subject_ids))
        split = _split_of(len(studies) / number)
        for order in range(min(int(rng.integers(1, 5)), number - len(studies))):
            lesions, statements = _findings(rng, is_normal=bool(rng.random() < 0.3))
            study_id = str(study_ids[len(studies)])
            studies.append(StudyPlan(subject_id, study_id, split, order, lesions, statements))
    return studies


def _give_odd_cases(studies: Sequence[StudyPlan], seed: int) -> None:
    """Layouts, wordings and label rows; some of them change what the study shows."""
    rng = generator(seed, "mimic", "odd")
    for number, layout in assign(LAYOUTS, range(len(studies)), rng).items():
        studies[number].layout = layout
    plain = [n for n, s in enumerate(studies) if s.layout in ("both", "impression only")]
    for number, wording in assign(WORDINGS, plain, rng).items():
        studies[number].wording = wording
        if wording != "identical text":
            studies[number].layout = "both"
    with_images = [n for n, s in enumerate(studies) if s.layout != "report without images"]
    for number, label_row in assign(LABEL_ROWS, with_images, rng).items():
        studies[number].label_row = label_row
    for study in studies:
        if study.wording == "identical text":
            study.layout, study.lesions = "both", ()
            absent = ("Lung Opacity", "Pleural Effusion", "Pneumothorax", "Cardiomegaly")
            study.statements = tuple(Statement(label, 0, 0, 0.0) for label in absent)
        elif study.layout == "one word":
            study.lesions = study.statements = ()


def _dicom_id(seed: int, *names: object) -> str:
    """Five groups of eight hexadecimal digits."""
    digits = generator(seed, "dicom", *names).bytes(20).hex()
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))


def _views(rng: np.random.Generator) -> list[str]:
    """A frontal view, in one study of ten a second one, in every other study a lateral one."""
    frontal = "PA" if rng.random() < 0.45 else "AP"
    views = [frontal]
    if rng.random() < 0.1:
        views.append(frontal)
    if rng.random() < 0.55:
        views.append("LATERAL" if rng.random() < 0.7 else "LL")
    return views


def _plan_images(studies: Sequence[StudyPlan], seed: int, size: Size) -> None:
    """Give every study its pictures."""
    for study in studies:
        if study.layout == "report without images":
            continue
        rng = generator(seed, "mimic", "images", study.study_id)
        patient = make_anatomy(generator(seed, "patient", study.subject_id))
        for number, view in enumerate(_views(rng)):
            long = int(rng.integers(size.smallest_px, size.largest_px + 1))
            short = int(long * rng.uniform(0.8, 0.98))
            is_portrait = rng.random() < 0.7
            height, width = (long, short) if is_portrait else (short, long)
            dicom_id = _dicom_id(seed, study.study_id, number)
            is_frontal = view in ("PA", "AP")
            lesions = study.lesions if is_frontal else ()
            picture = Picture(dicom_id, patient, lesions, height, width, is_frontal)
            study.images.append(ImagePlan(dicom_id, view, picture))


def _repeat_pictures(studies: Sequence[StudyPlan]) -> set[str]:
    """Let files show one exposure twice; returns the `dicom_id`s that are shown twice."""
    repeats: list[tuple[ImagePlan, ImagePlan, str]] = []
    seconds = [s for s in studies if len(s.images) > 1 and s.images[1].picture.is_frontal]
    for number, study in enumerate(seconds[: max(2, len(studies) // 100)]):
        name = ("near-identical", "byte-identical")[number % 2]
        repeats.append((study.images[1], study.images[0], name))
    single = [s for s in studies if len(s.images) == 1 and s.split == "train"]
    for first, other in pairwise(single):
        if first.subject_id != other.subject_id:
            repeats.append((other.images[0], first.images[0], "byte-identical across patients"))
            break
    for image, original, name in repeats:
        gain = 1.06 if name == "near-identical" else 1.0
        image.picture = replace(original.picture, gain=gain)
        image.odd.append(name)
    return {original.dicom_id for _, original, _ in repeats}


def _give_image_cases(studies: Sequence[StudyPlan], seed: int) -> None:
    """Odd files, odd views, and repeated pictures; each at least once."""
    rng = generator(seed, "mimic", "odd images")
    originals = _repeat_pictures(studies)
    # An odd report keeps a good picture: else no reader would ever come to its text.
    images = [i for s in studies if not s.is_odd for i in s.images if i.dicom_id not in originals]
    free = [n for n, image in enumerate(images) if image.picture.is_frontal and not image.odd]
    for number, odd in assign(PICTURES, free, rng).items():
        images[number].odd.append(odd)
        images[number].picture = replace(images[number].picture, odd=odd)
    free = [n for n in free if not images[n].odd]
    views = (("blank view", 0.04), ("AP LLD", 0.0005), ("AP AXIAL", 0.0005))
    for number, odd in assign(views, free, rng).items():
        images[number].odd.append(odd)
        images[number].view = "" if odd == "blank view" else odd
    # Digits and one `e`: a reader that guesses types makes a number of its groups.
    images = [image for study in studies for image in study.images]
    images[0].dicom_id = "19900000-00000001-5990e001-00000000-00000010"
    images[0].odd.append("id that looks like a number")


def plan(size: Size, seed: int, switches: Collection[str]) -> list[StudyPlan]:
    """Plan a whole tree.

    Args:
        size: Number of studies and range of picture sizes.
        seed: Equal seeds give equal plans.
        switches: Which of `SWITCHES` are on.

    Returns:
        The studies, sorted by subject and study as the published metadata is.
    """
    studies = _plan_studies(seed, size.studies)
    _give_odd_cases(studies, seed)
    _plan_images(studies, seed, size)
    _give_image_cases(studies, seed)
    if "subject-in-two-splits" in switches:
        follow_up = next(s for s in studies if s.order == 1 and s.split == "train" and s.images)
        follow_up.split = "test"
    return sorted(studies, key=lambda s: (s.subject_id, s.study_id))
