"""MIMIC-CXR-JPG with the reports of MIMIC-CXR: two published trees, one manifest.

The JPG project holds pictures, views, splits and labels; the report text is another project. Both
may lie in one folder. Identifiers stay text from the first byte on. Labels belong to studies and
are copied to each picture: 1 present, 0 denied, -1 uncertain, null not mentioned.

Source: file layout of MIMIC-CXR-JPG and MIMIC-CXR, versions 2.0.0 and 2.1.0, on PhysioNet.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from featcache.console import note
from featcache.datasets.mimic.pictures import (
    LABEL_VALUES,
    Release,
    compare_with_published,
    finish,
    read_metadata,
    with_file,
    with_split,
)
from featcache.datasets.mimic.reports import ReportOptions
from featcache.datasets.mimic.tables import LABELS, read_labels
from featcache.manifest.funnel import Funnel
from featcache.manifest.table import Manifest

__all__ = ["DESCRIPTION", "LABELS", "Options", "read"]

DESCRIPTION = "MIMIC-CXR-JPG: radiographs, official splits, CheXpert labels; MIMIC-CXR's reports."


class Options(ReportOptions):
    """How MIMIC-CXR-JPG is read."""

    labels: Literal["chexpert", "negbio", "radiologist", "none"] = Field(
        default="chexpert",
        description="Whose table becomes the label columns; `radiologist` read studies of the "
        "test split alone.",
    )


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of MIMIC-CXR-JPG.

    Pictures without a usable text are left out, so every row can be paired. Files that are there
    but cannot be decoded stay: stage one quarantines them.

    Args:
        folder: The JPG project: its tables, and `files/` with the pictures.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: A table, all pictures or all reports are missing, tables contradict each
            other, or a patient is in two splits.
    """
    funnel = Funnel()
    images = with_split(folder, read_metadata(folder, funnel), funnel)
    completeness = compare_with_published(images)
    note(f"the tables are {completeness}")
    labels = read_labels(folder, options.labels)
    images = with_file(folder, images, funnel, suffix=".jpg", project="MIMIC-CXR-JPG")
    policies = {
        "tables": completeness,
        "labels": options.labels,
        "label_values": LABEL_VALUES,
    }
    release = Release("mimic-cxr-jpg", labels, policies)
    return finish(folder, out, images, release, options=options, funnel=funnel)
