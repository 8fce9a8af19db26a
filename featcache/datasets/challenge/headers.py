"""DICOM headers of many files: size and view, without the pixels.

No value of a header beside these leaves this module, for it may name a patient.
"""

import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError

from featcache.manifest.tree import each_file

ZERO_BYTES = "file of zero bytes"
NO_DICOM = "file is no DICOM"
NO_HEADER = "DICOM header that cannot be read"
_TAGS = ("Rows", "Columns", "ViewPosition", "SeriesDescription", "PatientID")
_VIEW = re.compile(r"\bview:\s*([A-Za-z]+)")
_DAMAGE = (
    AttributeError,
    BytesLengthException,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)


class Header(NamedTuple):
    """What one file says of itself.

    Attributes:
        rows: Height of the stored image, in pixels.
        columns: Width of the stored image, in pixels.
        view: `PA`, `AP` or another word of the header; None where it does not say.
        names_file: Whether the patient's id is the file's name without its ending.
    """

    rows: int
    columns: int
    view: str | None
    names_file: bool


def read_headers(root: Path, paths: Sequence[str], *, title: str) -> list[Header | str]:
    """Read the headers of files that are there.

    Args:
        root: Folder that the paths start from.
        paths: Of the files.
        title: What the progress is called.

    Returns:
        For each path its header, or the reason why there is none.
    """
    full = [str(root / path) for path in paths]
    with warnings.catch_warnings(action="ignore"):  # of values that do not fit their type
        return list(each_file(_read_header, full, title=title, unit="headers"))


def _read_header(name: str) -> Header | str:
    """One header, or the reason why there is none."""
    path = Path(name)
    try:
        if not path.stat().st_size:
            return ZERO_BYTES
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        view = str(dataset.get("ViewPosition") or "").strip().upper()
        described = _VIEW.search(str(dataset.get("SeriesDescription") or ""))
        named = str(dataset.get("PatientID") or "").strip()
    except InvalidDicomError:
        return NO_DICOM
    except _DAMAGE:
        return NO_HEADER
    if rows < 1 or columns < 1:
        return NO_HEADER
    view = view or (described[1].upper() if described else "")
    return Header(rows, columns, view or None, named == path.stem)
