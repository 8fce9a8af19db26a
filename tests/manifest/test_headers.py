"""A few elements of DICOM headers, and what is none."""

import numpy as np

from featcache.manifest.headers import Header, read_header, read_headers
from featcache.synth.dicom import dicom_bytes


def test_elements_are_read_without_the_pixels(tmp_path):
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4)
    content = dicom_bytes(grey, view="PA", bits=12, uid="a", inverted=True)
    (tmp_path / "a.dcm").write_bytes(content[:-8])  # pixels cut off
    (tmp_path / "b.dcm").write_bytes(dicom_bytes(grey, view="", bits=15, uid="b"))
    lacking = dicom_bytes(grey, view="", bits=12, uid="c", missing=("ViewPosition", "BitsStored"))
    (tmp_path / "c.dcm").write_bytes(lacking)
    (tmp_path / "d.dcm").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    (tmp_path / "e.dcm").write_bytes(b"")
    assert read_headers(tmp_path, [f"{name}.dcm" for name in "abcdef"]) == [
        Header("PA", "MONOCHROME1", 12, 3, 4),
        Header("", "MONOCHROME2", 15, 3, 4),
        Header("", "MONOCHROME2", 0, 3, 4),
        None,
        None,
        None,
    ]


def test_a_header_cut_anywhere_gives_what_is_there_or_nothing(tmp_path):
    content = dicom_bytes(np.zeros((2, 2), np.uint8), view="AP", bits=8, uid="a")
    path = tmp_path / "a.dcm"
    for kept in range(0, len(content), 11):
        path.write_bytes(content[:kept])
        header = read_header(str(path))
        assert header is None or header.view in ("AP", "A", "")
