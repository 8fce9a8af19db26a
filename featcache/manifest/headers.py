"""DICOM headers of many files: size, view and the meaning of grey, without the pixels.

No value of a header beside these leaves this module, for it may name a patient.
"""

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError

from featcache.manifest.tree import ZERO_BYTES, each_file

NO_DICOM = "file is no DICOM"
NO_HEADER = "DICOM header that cannot be read"
_TAGS = (
    "Rows",
    "Columns",
    "ViewPosition",
    "SeriesDescription",
    "PhotometricInterpretation",
    "PatientID",
)
_VIEW = re.compile(r"\bview:\s*([A-Za-z]+)")
# What pydicom raises for files that are none, or are cut off or changed anywhere.
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
    zlib.error,
)


class Header(NamedTuple):
    """What one file says of itself.

    Attributes:
        rows: Height of the stored image, in pixels.
        columns: Width of the stored image, in pixels.
        view: ViewPosition in capitals; empty where it is blank or missing.
        described_view: The view that the description of the series names; empty without one.
        photometric: PhotometricInterpretation; empty where it is missing.
        names_file: Whether the patient's id is the file's name without its ending.
    """

    rows: int
    columns: int
    view: str
    described_view: str
    photometric: str
    names_file: bool


def read_headers(root: Path, paths: Sequence[str], *, title: str) -> list[Header | str]:
    """Read the headers of many files.

    Args:
        root: Folder that the paths start from.
        paths: Files of any kind.
        title: What the progress is called.

    Returns:
        For each path, in the order given, its header, or the reason why there is none.
    """
    full = [f"{root}/{path}" for path in paths]
    with _silence():
        return list(each_file(_read_header, full, title=title, unit="headers"))


@contextmanager
def _silence() -> Iterator[None]:
    """No warning and no log line of pydicom: about a value that does not fit, they quote it.

    Around all threads, not in each of them: both filters are those of the whole process.
    """
    logger = logging.getLogger("pydicom")

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.removeFilter(drop)


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
        photometric = str(dataset.get("PhotometricInterpretation") or "").strip()
        named = str(dataset.get("PatientID") or "").strip()
    except InvalidDicomError:
        return NO_DICOM
    except _DAMAGE:
        return NO_HEADER
    if rows < 1 or columns < 1:
        return NO_HEADER
    described_view = described[1].upper() if described else ""
    return Header(rows, columns, view, described_view, photometric, named == path.stem)
