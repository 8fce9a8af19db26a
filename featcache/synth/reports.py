"""Reports written from findings: several phrasings, negations, doubts, MIMIC's layout."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)


class Phrases(NamedTuple):
    """How a finding is said to be there, not to be there, or perhaps to be there."""

    present: tuple[str, ...]
    absent: tuple[str, ...]
    uncertain: tuple[str, ...]


PHRASES: dict[str, Phrases] = {
    "Atelectasis": Phrases(
        (
            "There is {degree} {side} basilar atelectasis.",
            "{Degree} plate-like atelectasis, {side}.",
        ),
        ("No atelectasis.", "There is no volume loss or atelectasis."),
        ("A {side} basilar line may be atelectasis.", "Possible {side} atelectasis."),
    ),
    "Cardiomegaly": Phrases(
        (
            "The heart is {degree}ly enlarged.",
            "{Degree} cardiomegaly.",
            "Cardiomegaly is {degree}.",
        ),
        ("The heart size is normal.", "Cardiac silhouette is within normal limits."),
        ("The heart is perhaps enlarged.", "Borderline cardiomegaly cannot be excluded."),
    ),
    "Consolidation": Phrases(
        ("Dense consolidation in the {side} lung.", "There is {degree} {side} consolidation."),
        ("No focal consolidation.", "There is no consolidation in either lung."),
        ("Early {side} consolidation is possible.", "Questionable {side} consolidation."),
    ),
    "Edema": Phrases(
        ("{Degree} pulmonary edema.", "Perihilar haze in keeping with {degree} edema."),
        ("No pulmonary edema.", "There is no vascular congestion or edema."),
        ("Pulmonary edema is possible.", "Mild edema cannot be excluded."),
    ),
    "Enlarged Cardiomediastinum": Phrases(
        ("The mediastinum is {degree}ly widened.", "{Degree} widening of the mediastinum."),
        ("Mediastinal contours are normal.", "The mediastinum is not widened."),
        ("The mediastinum may be widened.", "Possible mediastinal widening."),
    ),
    "Fracture": Phrases(
        ("A {side} rib fracture is seen.", "There is a fracture of a {side} lateral rib."),
        ("No displaced rib fracture.", "No acute fracture is seen."),
        ("A {side} rib fracture is suspected.", "Possible nondisplaced {side} rib fracture."),
    ),
    "Lung Lesion": Phrases(
        ("A nodule lies in the {side} lung.", "There is a round {side} lung nodule."),
        ("No lung nodule or mass.", "No mass is seen."),
        ("A {side} nodule is questioned.", "A small {side} nodule cannot be excluded."),
    ),
    "Lung Opacity": Phrases(
        ("Hazy opacity in the {side} lung.", "There is a {degree} {side} opacity."),
        ("The lungs are clear.", "No focal opacity."),
        ("A faint {side} opacity is possible.", "Questionable opacity on the {side}."),
    ),
    "Pleural Effusion": Phrases(
        (
            "{Degree} {side} pleural effusion.",
            "There is a {degree} pleural effusion on the {side}.",
        ),
        ("No pleural effusion.", "There is no effusion on either side."),
        ("A small {side} effusion is possible.", "A trace {side} effusion cannot be excluded."),
    ),
    "Pleural Other": Phrases(
        ("{Degree} {side} apical pleural thickening.", "Pleural scarring at the {side} apex."),
        ("No pleural thickening.", "The pleural surfaces are smooth."),
        ("Possible {side} pleural thickening.", "The {side} apical pleura may be thickened."),
    ),
    "Pneumonia": Phrases(
        ("Findings in keeping with {side} pneumonia.", "{Side} lung pneumonia."),
        ("No evidence of pneumonia.", "No sign of pneumonia."),
        ("{Side} lung pneumonia is possible.", "Could represent {side} pneumonia."),
    ),
    "Pneumothorax": Phrases(
        ("{Degree} {side} pneumothorax.", "There is a {degree} apical pneumothorax, {side}."),
        ("No pneumothorax.", "There is no pneumothorax."),
        ("A tiny {side} pneumothorax cannot be excluded.", "Possible {side} pneumothorax."),
    ),
    "Support Devices": Phrases(
        (
            "A {side} central line ends in the superior vena cava.",
            "{Side} sided catheter in place.",
        ),
        ("The central line has been removed.", "No lines or tubes."),
        ("A {side} line is perhaps malpositioned.", "The tip of the {side} line is not well seen."),
    ),
}

NORMAL_IMPRESSIONS = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "No acute intrathoracic abnormality.",
)
INDICATIONS = (
    "___ with shortness of breath.",
    "___ year old woman with cough and fever.",
    "History: ___M with chest pain.",
    "___ year old man after line placement.",
)
FILLERS = (
    "The osseous structures are unremarkable.",
    "Lung volumes are low.",
    "The patient is rotated to the right.",
    "Degenerative changes of the thoracic spine are again noted.",
    "The hilar contours are stable since the study of ___.",
    "The upper abdomen is unremarkable.",
    "Assessment is limited by portable technique.",
    "The trachea is midline.",
    "The aorta is tortuous and calcified, unchanged.",
    "Overlying wires and clips are noted.",
)
DECIMALS = "A 1.5 cm density overlies T12. Findings were called to Dr. ___ at 3:10 p.m."
NON_ASCII = "Fine naïve-appearing rétrocardiac markings of 300 µm\ufffd\ufffd are noted."
LATIN_1 = "Calibre 5 µm, aspect dégagé."
IDENTICAL = (
    "The lungs are clear. There is no pleural effusion or pneumothorax. The heart size is normal.",
    "No acute cardiopulmonary process.",
)


@dataclass(frozen=True)
class Statement:
    """What a report says about one label.

    Attributes:
        label: One of `LABELS`, not `No Finding`.
        value: 1 present, 0 denied, -1 doubtful.
        side: -1 right lung, 1 left lung, 0 both.
        strength: 0 (mild) to 1 (severe).
    """

    label: str
    value: int
    side: int
    strength: float


def sentence(statement: Statement, rng: np.random.Generator) -> str:
    """Say one statement in one of its phrasings."""
    phrases = PHRASES[statement.label]
    pool = {1: phrases.present, 0: phrases.absent, -1: phrases.uncertain}[statement.value]
    side = {-1: "right", 0: "bilateral", 1: "left"}[statement.side]
    degree = ("mild", "moderate", "severe")[min(int(statement.strength * 3), 2)]
    chosen = pool[rng.integers(len(pool))]
    return chosen.format(side=side, Side=side.title(), degree=degree, Degree=degree.title())


def findings_text(statements: Sequence[Statement], rng: np.random.Generator) -> str:
    """All statements in shuffled order, with one or two sentences that mean nothing."""
    said = [sentence(statement, rng) for statement in statements]
    said += list(rng.choice(FILLERS, rng.integers(1, 3), replace=False))
    rng.shuffle(said)
    return " ".join(said)


def impression_text(statements: Sequence[Statement], rng: np.random.Generator) -> str:
    """What is there or may be there, said again; a normal sentence when nothing is."""
    said = [sentence(statement, rng) for statement in statements if statement.value != 0]
    if not said:
        said = [NORMAL_IMPRESSIONS[rng.integers(len(NORMAL_IMPRESSIONS))]]
    return " ".join(said)


def numbered(text: str) -> str:
    """The sentences of a text as a numbered list."""
    parts = [part for part in text.split(". ") if part]
    return "\n".join(f"{n}. {part.rstrip('.')}." for n, part in enumerate(parts, 1))


def _lines(text: str) -> str:
    """A text in MIMIC's layout: every line starts with one space, long ones are wrapped."""
    wrapped = [line for part in text.split("\n") for line in textwrap.wrap(part, 76) or [""]]
    return "".join(f" {line}\n" for line in wrapped)


def _section(header: str, text: str) -> str:
    return f" {header}: \n \n{_lines(text)} \n"


_HEAD = " " * 33 + "FINAL REPORT\n"
_TYPOS = ("IMPRESSOIN", "IMPRSSION", "FINDINS", "CONCLUSION")


def layout_report(kind: str, findings: str, impression: str, rng: np.random.Generator) -> str:
    """Lay a report out.

    Args:
        kind: One of the odd layouts that readers have to survive; any other name is the usual one.
        findings: Text of the findings.
        impression: Text of the impression.
        rng: Chooses among equivalent openings.

    Returns:
        The file's text with Unix line ends.
    """
    indication = INDICATIONS[rng.integers(len(INDICATIONS))]
    opening = f" INDICATION: {indication}\n \n COMPARISON: ___.\n \n"
    if rng.random() < 0.5:
        opening = f" EXAMINATION: CHEST RADIOGRAPH\n \n{opening}"
    said, concluded = _section("FINDINGS", findings), _section("IMPRESSION", impression)
    bodies = {
        "both": said + concluded,
        "impression only": concluded,
        "findings only": said,
        "last paragraph": f"{_lines(findings)} \n{_lines(impression)}",
        "comparison only": "",
        "two impressions": f"{said}{_section('IMPRESSION', 'Pending.')} ADDENDUM \n \n{concluded}",
        "swallowed impression": f" FINDINGS:\n IMPRESSION: {findings} {impression}\n",
        "unseen header": f" Findings: \n{_lines(findings)} \n CHEST, 2 VIEWS: \n \n{concluded}",
        "typo header": _section(_TYPOS[rng.integers(len(_TYPOS))], impression),
        "wet read": said + concluded,
        "joint header": _section("FINDINGS AND IMPRESSION", f"{findings} {impression}"),
        "one word": _section("IMPRESSION", ("Normal.", "Clear lungs.")[rng.integers(2)]),
    }
    if kind == "comparison only":
        opening = " COMPARISON: None available.\n"
    head = _HEAD
    if kind == "wet read":
        wet = f" WET READ: ___ ___ 3:10 p.m.\n   {impression}\n"
        head = f"{wet} {'_' * 78}\n{_HEAD}"
    return f"{head}{opening}{bodies.get(kind, bodies['both'])}"
