"""The embedded radiographs: real pictures of children, with texts composed from their labels.

The publication holds three classes and no reports. Each picture gets one text, drawn from several
phrasings by a hash of its key, so that a text encoder has something to read. These texts carry the
class, which every table made from them must say.

Sources: Kermany, Zhang, Goldbaum 2018, CC BY 4.0; masks of the lungs: V7 Labs, CC BY 4.0;
`featcache/sample/ATTRIBUTION.md`.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from featcache.config import shipped
from featcache.errors import ManifestError
from featcache.manifest.table import FunnelStep, Manifest, text_id, write_manifest
from featcache.manifest.units import TextOptions

DESCRIPTION = "The 1,290 real paediatric radiographs that travel with featcache."

NOTES = (
    "The texts are composed from the published labels: training texts carry their picture's class, "
    "so stage two is label supervision through text, and a 1 % head on adapted features is not a "
    "1 % result of the whole.",
    "The pictures show children, the encoders know no radiology: this shows the pipeline at work "
    "and supports no medical claim.",
)

_OPENING = (
    "Frontal chest radiograph of a child.",
    "Paediatric chest X-ray, anteroposterior view.",
    "AP view of the chest in a child.",
    "Chest radiograph, one frontal view.",
    "Single anteroposterior radiograph of a paediatric chest.",
    "Portable AP chest film of a child.",
)
_FINDING = {
    "normal": (
        "The lungs are clear.",
        "No focal consolidation is seen.",
        "There is no sign of pneumonia.",
        "No opacity in either lung.",
        "Clear lungs without consolidation or infiltrate.",
        "Both lungs are well aerated and free of opacity.",
    ),
    "bacterial pneumonia": (
        "Focal consolidation, as in bacterial pneumonia.",
        "There is an airspace opacity that suggests bacterial pneumonia.",
        "Findings of a bacterial pneumonia with consolidation.",
        "Dense opacity consistent with bacterial infection of the lung.",
        "Consolidated lung; bacterial pneumonia is the label.",
        "Alveolar infiltrate, bacterial in origin.",
    ),
    "viral pneumonia": (
        "Diffuse interstitial pattern, as in viral pneumonia.",
        "There are hazy interstitial markings that suggest viral pneumonia.",
        "Findings of a viral pneumonia with interstitial infiltrates.",
        "Diffuse opacities consistent with viral infection of the lungs.",
        "Increased interstitial markings; viral pneumonia is the label.",
        "Interstitial infiltrate, viral in origin.",
    ),
}
_CLOSING = {
    "normal": (
        "Normal study.",
        "Impression: normal chest.",
        "No acute abnormality.",
        "Unremarkable examination.",
    ),
    "bacterial pneumonia": (
        "Impression: bacterial pneumonia.",
        "Abnormal study: pneumonia, bacterial.",
        "Pneumonia of bacterial type.",
        "Impression: consolidation, bacterial pneumonia.",
    ),
    "viral pneumonia": (
        "Impression: viral pneumonia.",
        "Abnormal study: pneumonia, viral.",
        "Pneumonia of viral type.",
        "Impression: interstitial changes, viral pneumonia.",
    ),
}


class Options(TextOptions):
    """How the sample is read."""


def compose_text(key: str, finding: str) -> str:
    """The text of one picture: an opening, a finding and a closing, chosen by the key's hash.

    Args:
        key: The picture's key.
        finding: One of the three published classes.

    Returns:
        Three sentences; equal input gives equal text on every machine.
    """
    choice = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    parts: list[Sequence[str]] = [_OPENING, _FINDING[finding], _CLOSING[finding]]
    chosen = []
    for phrases in parts:
        choice, index = divmod(choice, len(phrases))
        chosen.append(phrases[index])
    return " ".join(chosen)


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of the embedded sample.

    Args:
        folder: The sample's folder, normally `sample_folder()`.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: The sample did not come with this installation.
    """
    table = folder / "table.csv"
    if not table.is_file():
        raise ManifestError(
            "the embedded radiographs are missing from this installation",
            where=table,
            fix="pip install --force-reinstall featcache",
        )
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    copied = ("key", "subject_id", "view_position", "split", "source", "image_path")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in copied}
    columns["study_id"] = columns["key"]  # each picture is a study of its own
    columns["label:class"] = pa.array([row["finding"] for row in rows], pa.string())
    masks = [f"file:{row['lung_mask']}" if row["lung_mask"] else None for row in rows]
    columns["mask"] = pa.array(masks, pa.string())
    texts = [compose_text(row["key"], row["finding"]) for row in rows]
    text_columns = {
        "key": columns["key"],
        "text_id": pa.array([text_id(text) for text in texts], pa.string()),
        "text": pa.array(texts, pa.string()),
        "unit": pa.array(["report"] * len(texts), pa.string()),
    }
    return write_manifest(
        out,
        pa.table(columns),
        pa.table(text_columns),
        dataset="sample",
        image_root=folder,
        funnel=[FunnelStep(name="rows in table.csv", count=len(rows))],
        notes=NOTES,
        policies={
            "mask": "both lungs, of the pictures of kermany512; the others are not annotated"
        },
        text_unit=options.text_unit,
    )


def sample_folder() -> Path:
    """Where the embedded radiographs lie."""
    return shipped("sample")
