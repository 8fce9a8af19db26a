"""Patients with several labelled radiographs each, for data sets that have labels and no text."""

import io
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from featcache.synth.draw import Box, Lesion, draw_frontal, draw_lateral, generator, make_anatomy


class Size(NamedTuple):
    """Number of patients and range of picture sizes."""

    patients: int
    smallest_px: int
    largest_px: int


SIZES = {
    "tiny": Size(60, 64, 96),
    "small": Size(500, 224, 320),
    "large": Size(5_000, 512, 1_024),
}


@dataclass
class Exposure:
    """One image.

    Attributes:
        patient: Number of the patient, from 1.
        study: Number of the study among the patient's, from 1.
        order: Number of the image among the study's, from 1.
        view: PA, AP or LATERAL.
        findings: What the study shows.
        odd: Which odd cases it is.
    """

    patient: int
    study: int
    order: int
    view: str
    findings: tuple[str, ...]
    odd: list[str] = field(default_factory=list)


def plan_exposures(
    name: str, size: Size, seed: int, findings: tuple[str, ...], *, laterals: bool
) -> list[Exposure]:
    """One to three studies of each patient.

    Args:
        name: Of the data set: two sets of one seed differ.
        size: Number of patients.
        seed: Equal seeds give equal plans.
        findings: What a study may show; a third shows nothing.
        laterals: Whether some studies have a second, lateral image.
    """
    rng = generator(seed, name, "plan")
    found = []
    for patient in range(1, size.patients + 1):
        for study in range(1, int(rng.integers(1, 4)) + 1):
            number = int(rng.choice(3, p=(0.35, 0.45, 0.2)))
            shown = rng.choice(len(findings), number, replace=False)
            present = tuple(findings[index] for index in sorted(shown))
            view = "PA" if rng.random() < 0.5 else "AP"
            found.append(Exposure(patient, study, 1, view, present))
            if laterals and rng.random() < 0.3:
                found.append(Exposure(patient, study, 2, "LATERAL", present))
    return found


def picture_with_boxes(
    name: str,
    exposure: Exposure,
    lesions: dict[str, str],
    size: Size,
    seed: int,
    *,
    kind: str,
    square: bool = False,
) -> tuple[bytes, dict[str, Box]]:
    """Draw an image and encode it.

    Args:
        name: Of the data set.
        exposure: What to draw.
        lesions: Our name of each finding's lesion; a finding without one is not drawn.
        size: Range of sides in pixels.
        seed: The tree's seed.
        kind: `JPEG` or `PNG`.
        square: As wide as it is high.

    Returns:
        The file, and for each finding that has a place its box: left, top, right, bottom as shares
        of the picture.
    """
    names = (exposure.patient, exposure.study, exposure.order)
    rng = generator(seed, name, "picture", *names)
    patient = make_anatomy(generator(seed, name, "patient", exposure.patient))
    height, width = (int(side) for side in rng.integers(size.smallest_px, size.largest_px + 1, 2))
    width = height if square else width
    present = [finding for finding in exposure.findings if finding in lesions]
    drawn = [Lesion(lesions[finding], (-1, 1)[rng.integers(2)], 0.35, 0.8) for finding in present]
    places: list[tuple[str, Box]] = []
    if exposure.view == "LATERAL":
        grey = draw_lateral(patient, rng, height=height, width=width)
    else:
        grey, places = draw_frontal(patient, drawn, rng, height=height, width=width)
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(grey))
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    boxes: dict[str, Box] = {}
    for finding in present:  # of two findings that are drawn alike the first has the first place
        index = next((i for i, (drew, _) in enumerate(places) if drew == lesions[finding]), None)
        if index is not None:
            boxes[finding] = places.pop(index)[1]
    return file.getvalue(), boxes


def picture_bytes(
    name: str, exposure: Exposure, lesions: dict[str, str], size: Size, seed: int, *, kind: str
) -> bytes:
    """The file of `picture_with_boxes` alone."""
    return picture_with_boxes(name, exposure, lesions, size, seed, kind=kind)[0]
