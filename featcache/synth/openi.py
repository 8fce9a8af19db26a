"""Open-I as a procedural tree: XML reports, and images as DICOM, PNG or the CSV re-pack has them.

    ecgen-radiology/<n>.xml          one report each; some numbers are left out
    NLMCXR_dcm/<n>/<n>_IM-....dcm    the images; with the switch `png` CXR<n>_IM-....png instead

With the switch `kaggle` there are `indiana_reports.csv`, `indiana_projections.csv` and
`images/images_normalized/<n>_IM-....dcm.png`, and no XML.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.console import task
from featcache.synth import reports
from featcache.synth.dicom import dicom_bytes
from featcache.synth.draw import Lesion, draw_frontal, draw_lateral, generator, make_anatomy
from featcache.synth.tree import Summary, Tree, assign

SWITCHES = ("png", "kaggle")
_FIRST = 9_000  # the real collection ends at 3999


class Size(NamedTuple):
    """Number of reports and range of picture sizes."""

    reports: int
    smallest_px: int
    largest_px: int


SIZES = {
    "tiny": Size(48, 96, 128),
    "small": Size(1_000, 224, 320),
    "large": Size(3_955, 1_529, 4_248),
}
# Shares of all reports.
_REPORTS = (
    ("no image", 0.026),
    ("one image", 0.113),
    ("three images", 0.046),
    ("four images", 0.004),
    ("five images", 0.0003),
    ("no findings", 0.13),
    ("no impression", 0.01),
    ("neither section", 0.007),
    ("identical text", 0.08),
    ("identical letters", 0.02),
    ("not indexed", 0.02),
    ("damaged file", 0.001),
)
_IMAGES = {
    "no image": 0,
    "one image": 1,
    "three images": 3,
    "four images": 4,
    "five images": 5,
}
_PICTURES = (("missing", 0.01), ("LARGE LATERAL", 0.001), ("RL", 0.004))
_FINDINGS = ("Cardiomegaly", "Pleural Effusion", "Lung Lesion", "Consolidation", "Support Devices")


@dataclass
class Picture:
    """One image of a report.

    Attributes:
        name: `9001_IM-0001-1001`, as the DICOM files are called.
        view: ViewPosition; empty for a blank one.
        is_frontal: What is drawn.
        odd: Which odd cases it is.
    """

    name: str
    view: str
    is_frontal: bool
    odd: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """One report.

    Attributes:
        number: Of its file.
        statements: What it says.
        odd: Which odd cases it is.
        findings: Its findings; empty where the section is.
        impression: Its impression; empty where the section is.
        pictures: Its images.
    """

    number: int
    statements: tuple[reports.Statement, ...]
    odd: list[str] = field(default_factory=list)
    findings: str = ""
    impression: str = ""
    pictures: list[Picture] = field(default_factory=list)

    @property
    def lesions(self) -> list[Lesion]:
        """What its images show."""
        return [
            Lesion(s.label, s.side or 1, 0.35, 0.5 + 0.5 * s.strength)
            for s in self.statements
            if s.value == 1
        ]

    @property
    def headings(self) -> list[str]:
        """Its main MeSH headings."""
        if "not indexed" in self.odd:
            return ["No Indexing"]
        return [s.label for s in self.statements if s.value == 1] or ["normal"]


def _statements(rng: np.random.Generator) -> tuple[reports.Statement, ...]:
    """A third of the reports is normal; the others have one or two findings."""
    number = int(rng.choice(3, p=(0.35, 0.45, 0.2)))
    present = set(rng.choice(len(_FINDINGS), number, replace=False).tolist())
    found = []
    for index, label in enumerate(_FINDINGS):
        if index in present or rng.random() < 0.4:
            side = (-1, 1)[rng.integers(2)]
            strength = float(rng.random())
            found.append(reports.Statement(label, int(index in present), side, strength))
    return tuple(found)


def _write_texts(plan: Plan, seed: int) -> None:
    """Compose both sections; every second report holds the mark of removed words."""
    rng = generator(seed, "openi", "text", plan.number)
    plan.findings = reports.findings_text(plan.statements, rng).replace("___", "XXXX")
    plan.impression = reports.impression_text(plan.statements, rng)
    if rng.random() < 0.4:
        plan.findings += " Comparison with XXXX XXXX is recommended."
        plan.odd.append("removed words")
    if "identical text" in plan.odd or "identical letters" in plan.odd:
        plan.statements = ()
        plan.findings, plan.impression = reports.IDENTICAL
    if "identical letters" in plan.odd:
        plan.impression = plan.impression.upper().replace(".", " .")
    if {"no findings", "neither section"} & set(plan.odd):
        plan.findings = ""
    if {"no impression", "neither section"} & set(plan.odd):
        plan.impression = ""


def _pictures(number: int, count: int, rng: np.random.Generator) -> list[Picture]:
    """A frontal image, a lateral one, and further ones by turns; some views are blank."""
    found = []
    for index in range(count):
        is_frontal = index % 2 == 0
        views, shares = (
            (("PA", "AP"), (0.9, 0.1)) if is_frontal else (("LL", "LATERAL"), (0.8, 0.2))
        )
        view = "" if rng.random() < 0.35 else str(rng.choice(views, p=shares))
        name = f"{number}_IM-{number % 10_000:04d}-{1_001 + 1_000 * index}"
        found.append(Picture(name, view, is_frontal, [] if view else ["blank view"]))
    return found


def plan(size: Size, seed: int) -> list[Plan]:
    """Plan a whole tree.

    Args:
        size: Number of reports.
        seed: Equal seeds give equal plans.

    Returns:
        The reports by number, with each odd case at least once.
    """
    rng = generator(seed, "openi", "plan")
    gaps = np.cumsum(1 + (rng.random(size.reports) < 0.05))
    plans = [Plan(_FIRST + int(gap), _statements(rng)) for gap in gaps]
    for number, odd in assign(_REPORTS, range(size.reports), rng).items():
        plans[number].odd.append(odd)
    for one in plans:
        count = next((_IMAGES[odd] for odd in one.odd if odd in _IMAGES), 2)
        _write_texts(one, seed)
        one.pictures = _pictures(one.number, count, rng)
    sound = [one for one in plans if not set(one.odd) & {*_IMAGES, "damaged file", "no findings"}]
    pictures = [picture for one in sound for picture in one.pictures]
    for number, odd in assign(_PICTURES, range(len(pictures)), rng).items():
        pictures[number].odd.append(odd)
        if odd != "missing":
            pictures[number].view = odd
    return plans


def _xml(one: Plan) -> bytes:
    """A report as its file holds it; every section is there, also an empty one."""
    sections = {
        "COMPARISON": "XXXX",
        "INDICATION": "XXXX-year-old with cough.",
        "FINDINGS": one.findings,
        "IMPRESSION": one.impression,
    }
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<eCitation>"]
    lines.append(f'  <uId id="CXR{one.number}"/>')
    lines.append("  <licenseType>open-access</licenseType>")
    lines.append("  <MedlineCitation><Article><Abstract>")
    lines += [
        f'    <AbstractText Label="{name}">{escape(text)}</AbstractText>'
        for name, text in sections.items()
    ]
    lines += ["  </Abstract></Article></MedlineCitation>", "  <MeSH>"]
    lines += [f"    <major>{escape(heading)}</major>" for heading in one.headings]
    lines.append("  </MeSH>")
    for picture in one.pictures:
        lines.append(f"  <parentImage id={quoteattr('CXR' + picture.name)}>")
        lines.append("    <caption>Xray Chest PA and Lateral</caption>")
        lines.append(f"    <panel><url>/hadoop/storage/{picture.name}.jpg</url></panel>")
        lines.append("  </parentImage>")
    content = "\n".join([*lines, "</eCitation>", ""]).encode()
    return content[: len(content) // 2] if "damaged file" in one.odd else content


def _draw(one: Plan, picture: Picture, seed: int, size: Size) -> UInt8[np.ndarray, "H W"]:
    """The grey levels of one image."""
    rng = generator(seed, "openi", "picture", picture.name)
    patient = make_anatomy(generator(seed, "openi", "patient", one.number))
    height, width = (int(side) for side in rng.integers(size.smallest_px, size.largest_px + 1, 2))
    if picture.is_frontal:
        return draw_frontal(patient, one.lesions, rng, height=height, width=width)[0]
    return draw_lateral(patient, rng, height=height, width=width)


def _encode(grey: UInt8[np.ndarray, "H W"], picture: Picture, seed: int, *, is_png: bool) -> bytes:
    """A PNG of 8 bits, or a DICOM file of 12 or 15 bits, half of them inverted."""
    if is_png:
        file = io.BytesIO()
        Image.fromarray(grey).save(file, "PNG")
        return file.getvalue()
    rng = generator(seed, "openi", "dicom", picture.name)
    bits, is_inverted = (12, 15)[int(rng.random() < 0.2)], bool(rng.random() < 0.5)
    picture.odd.append("MONOCHROME1" if is_inverted else "MONOCHROME2")
    levels = grey.astype(np.uint16) << (bits - 8)
    return dicom_bytes(levels, view=picture.view, bits=bits, uid=picture.name, inverted=is_inverted)


def _path(picture: Picture, switches: Collection[str]) -> str:
    """Where an image lies."""
    if "kaggle" in switches:
        return f"images/images_normalized/{picture.name}.dcm.png"
    if "png" in switches:
        return f"CXR{picture.name}.png"
    return f"NLMCXR_dcm/{picture.name.partition('_')[0]}/{picture.name}.dcm"


def _write_kaggle(tree: Tree, plans: Sequence[Plan]) -> None:
    """The two tables of the re-pack; reports without an image are left out."""
    header = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings",
              "impression")  # fmt: skip
    rows: list[Sequence[object]] = [header]
    images: list[Sequence[object]] = [("uid", "filename", "projection")]
    for one in plans:
        if not one.pictures:
            continue
        mesh = ";".join(one.headings)
        rows.append((one.number, mesh, mesh, "Xray Chest PA and Lateral", "XXXX-year-old.", "XXXX",
                     one.findings, one.impression))  # fmt: skip
        for picture in one.pictures:
            view = "Frontal" if picture.is_frontal else "Lateral"
            images.append((one.number, f"{picture.name}.dcm.png", view))
    tree.write_csv("indiana_reports.csv", rows)
    tree.write_csv("indiana_projections.csv", images)


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
    tree, chosen = Tree(root), SIZES[size]
    plans = plan(chosen, seed)
    images = 0
    with task("synth openi", len(plans), "reports") as progress:
        for done, one in enumerate(plans, start=1):
            if "kaggle" not in switches:
                tree.write(f"ecgen-radiology/{one.number}.xml", _xml(one))
            for picture in one.pictures:
                if "missing" not in picture.odd:
                    grey = _draw(one, picture, seed, chosen)
                    content = _encode(
                        grey, picture, seed, is_png=bool({"png", "kaggle"} & {*switches})
                    )
                    tree.write(_path(picture, switches), content)
                    images += 1
            progress.update(done)
    if "kaggle" in switches:
        _write_kaggle(tree, plans)
    else:
        extra = Picture(f"{_FIRST}_IM-0000-1001", "PA", True)
        blank = np.full((64, 64), 90, dtype=np.uint8)
        tree.write(_path(extra, switches), _encode(blank, extra, seed, is_png="png" in switches))
        images += 1
    return Summary(
        images, len(plans), {"reports": {f"CXR{one.number}": _truth(one) for one in plans}}
    )


def _truth(one: Plan) -> dict[str, object]:
    """What is hidden in one report and its images."""
    return {
        "said": {s.label: s.value for s in one.statements},
        "odd": one.odd,
        "images": {
            f"CXR{picture.name}": {
                "view": picture.view,
                "is_frontal": picture.is_frontal,
                "odd": picture.odd,
            }
            for picture in one.pictures
        },
    }
