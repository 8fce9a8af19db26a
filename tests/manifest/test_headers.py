"""DICOM headers: size, view and the meaning of grey, and a reason for every file without."""

import io
import logging
import threading
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from featcache.manifest import headers
from featcache.manifest.headers import NO_DICOM, NO_HEADER, ZERO_BYTES, Header, read_headers
from featcache.synth import secondary_capture as synth
from featcache.synth.dicom import dicom_bytes

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
        Header(6, 9, "AP", "AP", "MONOCHROME2", True),
        Header(6, 9, "", "", "MONOCHROME2", False),
        Header(6, 9, "", "AP", "MONOCHROME2", False),
    ]


def test_elements_are_read_without_the_pixels(tmp_path):
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4)
    inverted = dicom_bytes(grey, view="PA", bits=12, uid="a", inverted=True)
    lacking = ("ViewPosition", "PhotometricInterpretation")
    files = {
        "a.dcm": inverted[:-8],  # pixels cut off
        "b.dcm": dicom_bytes(grey, view="", bits=15, uid="b"),
        "c.dcm": dicom_bytes(grey, view="", bits=12, uid="c", missing=lacking),
    }
    assert read(tmp_path, files) == [
        Header(3, 4, "PA", "", "MONOCHROME1", False),
        Header(3, 4, "", "", "MONOCHROME2", False),
        Header(3, 4, "", "", "", False),
    ]


def test_a_file_without_a_header_has_a_reason(tmp_path):
    whole = content()
    syntax = str(pydicom.uid.JPEGBaseline8Bit).encode()
    at = whole.index(syntax)
    other = str(DeflatedExplicitVRLittleEndian).encode()
    assert len(other) == len(syntax)
    files = {
        "empty.dcm": b"",
        "text.dcm": b"<html>not found</html>",
        "png.dcm": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "no rows.dcm": content(lambda dataset: delattr(dataset, "Rows")),
        "no columns.dcm": content(lambda dataset: setattr(dataset, "Columns", 0)),
        "two values.dcm": content(lambda dataset: setattr(dataset, "Rows", [6, 9])),
        "not deflated.dcm": whole[:at] + other + whole[at + len(syntax) :],
    }
    assert read(tmp_path, files) == [ZERO_BYTES, NO_DICOM, NO_DICOM, *[NO_HEADER] * 4]
    assert read_headers(tmp_path, ["nowhere.dcm"], title="test") == [NO_HEADER]


def test_a_file_cut_off_anywhere_gives_a_header_or_a_reason(tmp_path):
    whole = content()
    cuts = range(0, len(whole), 37)
    found = read(tmp_path, {f"{cut:05d}.dcm": whole[:cut] for cut in cuts})
    kinds = {one if isinstance(one, str) else "header" for one in found}
    assert kinds == {ZERO_BYTES, NO_DICOM, NO_HEADER, "header"}
    assert found[-1] == Header(6, 9, "AP", "AP", "MONOCHROME2", False)


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


def test_no_value_is_logged(tmp_path, caplog, monkeypatch):
    # Other libraries configure logging as they are imported, and switch the loggers off that exist.
    logger = logging.getLogger("pydicom")
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger="pydicom")
    odd = content().replace(b"ISO_IR 100", b"ISO_IR 999")
    assert read(tmp_path, {"a.dcm": odd})[0].view == "AP"
    assert not caplog.records
    with pytest.warns(UserWarning, match="ISO_IR 999"):
        pydicom.dcmread(tmp_path / "a.dcm", specific_tags=["PatientID"])
    assert "ISO_IR 999" in caplog.text


def test_the_filters_of_warnings_are_not_touched_by_threads(tmp_path, monkeypatch):
    """They belong to the process: threads that set them back overtake each other."""
    whole, before, seen = content(), list(warnings.filters), []
    dcmread = pydicom.dcmread

    def spy(*args, **options):
        warnings.warn("a value of a header", stacklevel=1)  # an error, were it not ignored
        seen.append((threading.get_ident(), id(warnings.filters)))
        return dcmread(*args, **options)

    monkeypatch.setattr(headers.pydicom, "dcmread", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, {f"{number}.dcm": whole for number in range(200)})
    assert len({filters for _, filters in seen}) == 1
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert warnings.filters == before
