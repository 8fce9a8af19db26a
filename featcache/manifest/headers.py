"""What the headers of many DICOM files say about their view, without their pixels.

No value but these few is looked at, and none of them ever enters a message.
"""

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError

from featcache.manifest.tree import each_file

_TAGS = ["ViewPosition", "PhotometricInterpretation", "BitsStored", "Rows", "Columns"]
# What pydicom raises for files that are none, or are cut off anywhere.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    struct.error,
    InvalidDicomError,
    BytesLengthException,
)


class Header(NamedTuple):
    """Some elements of one file.

    Attributes:
        view: ViewPosition in capitals; empty when it is blank or missing.
        photometric: PhotometricInterpretation; empty when it is missing.
        bits: BitsStored; 0 when it is missing.
        rows: Height in pixels; 0 when it is missing.
        columns: Width in pixels; 0 when it is missing.
    """

    view: str
    photometric: str
    bits: int
    rows: int
    columns: int


def read_header(path: str) -> Header | None:
    """Read one file's header; None when it is no DICOM file or is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that do not fit their type
            found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            return Header(
                str(found.get("ViewPosition") or "").strip().upper(),
                str(found.get("PhotometricInterpretation") or "").strip(),
                int(found.get("BitsStored") or 0),
                int(found.get("Rows") or 0),
                int(found.get("Columns") or 0),
            )
    except _UNREADABLE:
        return None


def read_headers(root: Path, paths: Sequence[str]) -> list[Header | None]:
    """Read the headers of many files, in the order given.

    Args:
        root: Folder that relative paths start from.
        paths: Files of any kind.
    """
    full = [f"{root}/{path}" for path in paths]
    return list(each_file(read_header, full, title="read DICOM headers", unit="images"))
