"""DICOM headers of the challenges: size and view, and a reason for every file without."""

import io

import numpy as np
import pydicom
import pytest

from featcache.datasets.challenge.headers import (
    NO_DICOM,
    NO_HEADER,
    ZERO_BYTES,
    Header,
    read_headers,
)
from featcache.synth import secondary_capture as synth

WHOLE = synth.Header("image-1", "1.2.1", "1.2.2", "1.2.3", "AP", "F", "155", 0.1)


def content(change=None, header=WHOLE):
    """A file of 6 x 9 pixels, changed by a function."""
    dataset = pydicom.dcmread(io.BytesIO(synth.encode_dicom(np.zeros((6, 9), np.uint8), header)))
    if change is not None:
        change(dataset)
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


def read(folder, files):
    for name, one in files.items():
        (folder / name).write_bytes(one)
    return read_headers(folder, list(files), title="test")


def test_size_view_and_whose_name_it_is(tmp_path):
    blank = WHOLE._replace(view="", patient="another")
    described = content(lambda dataset: delattr(dataset, "ViewPosition"))
    files = {"image-1.dcm": content(), "b.dcm": content(header=blank), "c.dcm": described}
    assert read(tmp_path, files) == [
        Header(6, 9, "AP", True),
        Header(6, 9, None, False),
        Header(6, 9, "AP", False),
    ]


def test_a_file_without_a_header_has_a_reason(tmp_path):
    files = {
        "empty.dcm": b"",
        "text.dcm": b"<html>not found</html>",
        "png.dcm": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "no rows.dcm": content(lambda dataset: delattr(dataset, "Rows")),
        "no columns.dcm": content(lambda dataset: setattr(dataset, "Columns", 0)),
        "two values.dcm": content(lambda dataset: setattr(dataset, "Rows", [6, 9])),
    }
    assert read(tmp_path, files) == [ZERO_BYTES, NO_DICOM, NO_DICOM, *[NO_HEADER] * 3]
    assert read_headers(tmp_path, ["nowhere.dcm"], title="test") == [NO_HEADER]


def test_a_file_cut_off_anywhere_gives_a_header_or_a_reason(tmp_path):
    whole = content()
    cuts = range(0, len(whole), 37)
    found = read(tmp_path, {f"{cut:05d}.dcm": whole[:cut] for cut in cuts})
    kinds = {one if isinstance(one, str) else "header" for one in found}
    assert kinds == {ZERO_BYTES, NO_DICOM, NO_HEADER, "header"}
    assert found[-1] == Header(6, 9, "AP", False)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_never_raise(tmp_path, seed):
    rng = np.random.default_rng(seed)
    whole = np.frombuffer(content(), np.uint8)
    files = {}
    for number in range(40):
        damaged = whole.copy()
        damaged[rng.integers(132, len(whole), 12)] = rng.integers(0, 256, 12)
        files[f"{number}.dcm"] = damaged.tobytes()
    found = read(tmp_path, files)
    assert all(isinstance(one, Header) or one in (NO_DICOM, NO_HEADER) for one in found)
