"""DICOM files to grey pixels: syntaxes, windows, polarity, and files that are damaged."""

import contextlib
import logging
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from encoders.dicom_files import (
    dataset,
    ramp,
    save,
    table,
    without_preamble,
    write,
    write_jpeg,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence

from featcache.encoders import decode
from featcache.encoders.decode import Preprocessing, decode_image
from featcache.errors import ImageError

VALUES = ramp()


def decoded(path, shape=None):
    """The picture at its own size, so that no filter blurs a comparison."""
    size = shape or VALUES.shape[:2]
    return decode_image(path, Preprocessing(image_size=size, mean=(0.5,), std=(0.5,)))


def stretched(values):
    values = values.astype(float)
    return np.rint((values - values.min()) * (255 / (values.max() - values.min())))


NATIVE = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
]
LOSSLESS = [
    uid.RLELossless,
    uid.JPEG2000Lossless,
    uid.JPEGLSLossless,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
]


@pytest.mark.parametrize("syntax", [*NATIVE, *LOSSLESS], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_every_lossless_syntax_gives_the_same_picture(tmp_path, syntax, bits):
    values = ramp(bits=bits)
    path = write(tmp_path / "a.dcm", values, bits=bits, syntax=syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert np.abs(decoded(path) - stretched(values)).max() <= (1 if bits == 16 else 0)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_jpeg_baseline_differs_by_its_loss_alone(tmp_path, kind):
    values = ramp(bits=8)
    got = decoded(write_jpeg(tmp_path / "a.dcm", values, kind=kind)).astype(int)
    wanted = 255 - values.astype(int) if kind == "MONOCHROME1" else values
    assert np.abs(got - wanted).mean() < 3


def test_jpeg_of_12_bits_is_decoded(tmp_path):
    path = Path(get_testdata_file("JPEG-lossy.dcm"))
    found = decoded(path, (1024, 256))
    lowest, highest = 0, 264  # of this file, and two of its pixels, by three other decoders
    for at, value in [((420, 140), 244), ((230, 120), 95)]:
        assert found[at] == round((value - lowest) * 255 / (highest - lowest))


@pytest.mark.parametrize("suffix", ["dcm", "jpg", "png", ""])
def test_the_content_decides_not_the_name(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", VALUES)
    assert np.array_equal(decoded(path), stretched(VALUES))


@pytest.mark.parametrize("syntax", NATIVE[:2], ids=lambda syntax: syntax.keyword)
def test_a_bare_data_set_is_read(tmp_path, syntax):
    path = without_preamble(write(tmp_path / "a.dcm", VALUES, syntax=syntax))
    assert path.read_bytes()[:2] == b"\x08\x00"
    assert np.array_equal(decoded(path), stretched(VALUES))


@pytest.mark.parametrize("syntax", [NATIVE[0], uid.JPEG2000Lossless], ids=lambda s: s.keyword)
def test_monochrome1_of_the_negative_is_the_same_bit_for_bit(tmp_path, syntax):
    """Rounding to grey levels before the inversion would move halves."""
    two = write(tmp_path / "2.dcm", VALUES, syntax=syntax)
    one = write(tmp_path / "1.dcm", 4095 - VALUES, kind="MONOCHROME1", syntax=syntax)
    for size in [VALUES.shape, (17, 23), (224, 224)]:
        assert np.array_equal(decoded(one, size), decoded(two, size))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("centre", "width"), [(2048, 4096), (1000, 700), (100.5, 1), (9000, 500)])
def test_windows_are_those_of_pydicom(tmp_path, function, centre, width):
    window = {"WindowCenter": centre, "WindowWidth": width}
    if function:
        window["VOILUTFunction"] = function
    two = dataset(VALUES, **window)
    wanted = np.rint(apply_windowing(VALUES, two) * (255 / 4095))
    got = decoded(save(two, tmp_path / "2.dcm"))
    assert np.abs(got - wanted).max() <= 1
    assert (got != wanted).mean() < 0.01  # halves may round either way

    exact = function in ("LINEAR_EXACT", "SIGMOID")
    mirrored = 4095 - centre if exact else 4096 - centre
    window["WindowCenter"] = mirrored
    one = write(tmp_path / "1.dcm", 4095 - VALUES, kind="MONOCHROME1", **window)
    if (centre, width, function) != (100.5, 1, "LINEAR_EXACT"):
        assert np.array_equal(decoded(one), got)


def test_the_first_of_several_windows_counts(tmp_path):
    several = {"WindowCenter": [2048, 600], "WindowWidth": [4096, 400]}
    one = {"WindowCenter": 2048, "WindowWidth": 4096}
    got = decoded(write(tmp_path / "a.dcm", VALUES, **several))
    assert np.array_equal(got, decoded(write(tmp_path / "b.dcm", VALUES, **one)))
    other = {"WindowCenter": 600, "WindowWidth": 400}
    assert not np.array_equal(got, decoded(write(tmp_path / "c.dcm", VALUES, **other)))


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ({"WindowCenter": 5, "WindowWidth": 0}, "no width"),
        ({"WindowCenter": 5, "WindowWidth": -1, "VOILUTFunction": "SIGMOID"}, "no width"),
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CURVE"}, "unknown function"),
    ],
)
def test_an_impossible_window_has_a_reason(tmp_path, window, reason):
    with pytest.raises(ImageError, match=reason):
        decoded(write(tmp_path / "a.dcm", VALUES, **window))


def test_an_empty_window_is_none(tmp_path):
    empty = {"WindowCenter": None, "WindowWidth": None}
    assert np.array_equal(decoded(write(tmp_path / "a.dcm", VALUES, **empty)), stretched(VALUES))


def test_signed_pixels_and_a_rescale_end_at_the_same_picture(tmp_path):
    wanted = decoded(write(tmp_path / "a.dcm", VALUES, WindowCenter=1500, WindowWidth=2000))
    signed = (VALUES.astype(int) - 2048).astype(np.int16)
    shift = {"RescaleSlope": 1, "RescaleIntercept": 2048}
    window = {"WindowCenter": 1500, "WindowWidth": 2000}
    assert np.array_equal(decoded(write(tmp_path / "b.dcm", signed, **shift, **window)), wanted)
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    path = write(tmp_path / "c.dcm", 4095 - VALUES, **falling, **window)
    assert np.array_equal(decoded(path), wanted)


def test_a_modality_table_is_looked_up(tmp_path):
    squares = (np.arange(4096) ** 2 / 4095).astype(int)
    path = write(tmp_path / "a.dcm", VALUES, ModalityLUTSequence=table(squares))
    assert np.abs(decoded(path) - stretched(squares[VALUES])).max() <= 1


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_a_voi_table_is_looked_up_before_any_window(tmp_path, bits, top):
    """Values before the first and after the last entry take these; 8 bits hold 4,096 entries."""
    entries = np.rint(np.linspace(top, 0, 3000)).astype(int)
    wanted = entries[(VALUES.astype(int) - 500).clip(0, 2999)]
    window = {"WindowCenter": 5, "WindowWidth": 2}
    lut = table(entries, first=500, bits=bits)
    path = write(tmp_path / "a.dcm", VALUES, VOILUTSequence=lut, **window)
    assert np.abs(decoded(path) - np.rint(wanted * (255 / top))).max() <= (0 if bits == 8 else 1)


def test_a_table_of_bytes_below_zero_is_looked_up(tmp_path):
    signed = (VALUES.astype(int) - 2048).astype(np.int16)
    lut = table([0], first=-2048, bits=12)
    lut[0].LUTDescriptor = [4096, -2048, 12]
    del lut[0].LUTData
    lut[0].add_new("LUTData", "OW", np.arange(4096, dtype="<u2").tobytes())
    path = write(tmp_path / "a.dcm", signed, VOILUTSequence=lut)
    assert np.array_equal(decoded(path), np.rint(VALUES * (255 / 4095)))


def test_a_short_table_and_one_of_an_unknown_depth_have_reasons(tmp_path):
    short = table(range(100))
    short[0].LUTDescriptor = [200, 0, 16]
    for lut, reason in [(short, "shorter than it says"), (table([1, 2], bits=20), "unknown depth")]:
        with pytest.raises(ImageError, match=reason):
            decoded(write(tmp_path / "a.dcm", VALUES, VOILUTSequence=lut))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("bits", "value", "level"), [(12, 2048, 128), (16, 257, 1), (8, 7, 7)])
def test_a_constant_picture_keeps_its_level(tmp_path, kind, bits, value, level):
    values = np.full((20, 20), value, np.uint16 if bits > 8 else np.uint8)
    if kind == "MONOCHROME1":
        values = (2**bits - 1 - values).astype(values.dtype)
    path = write(tmp_path / "a.dcm", values, bits=bits, kind=kind)
    assert (decoded(path, (20, 20)) == level).all()


def test_8_bits_are_those_of_a_png(tmp_path):
    values = (ramp(bits=8) // 2 + 20).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    wanted = decoded(tmp_path / "a.png", (30, 30))
    same = {"RescaleSlope": 1, "RescaleIntercept": 0}
    for number, options in enumerate([{}, same]):
        path = write(tmp_path / f"{number}.dcm", values, bits=8, **options)
        assert np.array_equal(decoded(path, (30, 30)), wanted)


def test_12_bits_are_not_cut_to_8_before_they_are_resized(tmp_path):
    """Averaged over 16 columns, 0.4 and 0.7 levels are 0.55; rounded before, they would be 0.5."""
    values = np.zeros((64, 64), np.uint16)
    values[:, 0::2], values[:, 1::2], values[0, 0] = 1030, 1036, 4095
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    exact = Image.fromarray((values * (255 / 4095)).astype(np.float32))
    wanted = np.rint(np.asarray(exact.resize((16, 16), Image.Resampling.BICUBIC)))
    got = decoded(write(tmp_path / "a.dcm", values, **window), (16, 16))
    assert np.array_equal(got[4:], wanted[4:])
    cut = Image.fromarray(np.rint(values * (255 / 4095)).astype(np.uint8))
    assert not np.array_equal(got[4:], np.asarray(cut.resize((16, 16), 3))[4:])


@pytest.mark.parametrize(
    "syntax", [NATIVE[1], uid.RLELossless, uid.JPEG2000Lossless], ids=lambda s: s.keyword
)
def test_colour_becomes_the_luminance_of_a_png(tmp_path, syntax):
    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    path = write(tmp_path / "a.dcm", colours, kind="RGB", bits=8, syntax=syntax)
    assert np.array_equal(decoded(path, (40, 40)), decoded(tmp_path / "a.png", (40, 40)))


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_gdcm.dcm", "SC_rgb_dcmtk_+eb+cy+n2.dcm", "SC_rgb_jls_lossy_line.dcm",
             "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle_16bit.dcm"]
)  # fmt: skip
def test_colours_of_other_writers_are_the_same_picture(name):
    """Six bars of one test picture, by lossless JPEG, lossy JPEG in YBR, JPEG-LS and RLE."""
    reference = decoded(Path(get_testdata_file("SC_rgb_rle.dcm")), (100, 100)).astype(int)
    got = decoded(Path(get_testdata_file(name)), (100, 100))
    assert np.abs(got - reference).mean() < 1.5


def test_a_palette_is_looked_up(tmp_path):
    numbers = ramp(bits=8)
    reversed_ = (np.arange(255, -1, -1) * 257).astype("<u2").tobytes()
    palette = {f"{name}PaletteColorLookupTableData": reversed_ for name in ("Red", "Green", "Blue")}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
    path = write(tmp_path / "a.dcm", numbers, kind="PALETTE COLOR", bits=8, **palette)
    assert np.abs(decoded(path) - (255.0 - numbers)).max() <= 1


def test_the_first_frame_counts(tmp_path):
    both = np.concatenate([VALUES, 4095 - VALUES])
    path = write(tmp_path / "a.dcm", both, Rows=len(VALUES), NumberOfFrames=2)
    assert np.array_equal(decoded(path), stretched(VALUES))


@pytest.mark.parametrize("syntax", [*NATIVE, *LOSSLESS], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9, 0.99])
def test_a_file_that_stops_early_is_never_a_picture(tmp_path, syntax, share):
    path = write(tmp_path / "a.dcm", VALUES, syntax=syntax)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"truncated|no pixel data"):
        decoded(path)


def test_a_second_frame_that_stops_early_counts_too(tmp_path):
    both = np.concatenate([VALUES, VALUES])
    path = write(tmp_path / "a.dcm", both, Rows=len(VALUES), NumberOfFrames=2)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ImageError, match="truncated"):
        decoded(path)


def test_a_file_without_pixels_says_so(tmp_path):
    made = dataset(VALUES)
    del made.PixelData
    path = save(made, tmp_path / "a.dcm")
    with pytest.raises(ImageError, match="holds no pixel data"):
        decoded(path)
    with pytest.raises(ImageError, match="holds no pixel data"):
        decoded(without_preamble(path))


def test_an_unread_syntax_is_named(tmp_path):
    made = dataset(VALUES, PixelData=encapsulate([bytes(range(200))]))
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    named = r"MPEG2 Main Profile .*\(1.2.840.10008.1.2.4.100\) is not read: no package"
    with pytest.raises(ImageError, match=named):
        decoded(save(made, tmp_path / "a.dcm"))


@pytest.mark.parametrize(
    "unknown", [b"1.2.840.10008.1.9999", b"1.2.826.0.1.9999\0\0\0\0", b"SECRET" * 3]
)
def test_an_unknown_syntax_is_not_quoted(tmp_path, unknown):
    content = write(tmp_path / "a.dcm", VALUES).read_bytes()
    assert content.count(b"1.2.840.10008.1.2.1\0") == 1
    content = content.replace(b"1.2.840.10008.1.2.1\0", unknown.ljust(20, b"\0"))
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(
        ImageError, match="a transfer syntax that the standard does not know"
    ) as caught:
        decoded(tmp_path / "a.dcm")
    assert "9999" not in str(caught.value)


def test_a_missing_decoder_is_named_with_its_package(tmp_path, monkeypatch):
    from pydicom.pixels.decoders import base

    path = write(tmp_path / "a.dcm", VALUES, syntax=uid.JPEGLosslessSV1)
    decoder = base.get_decoder(uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=r"JPEG Lossless.*1\.2\.4\.70.*install python-gdcm"):
        decoded(path)


def test_the_limit_on_pixels_holds_before_anything_is_decoded(tmp_path):
    path = write(tmp_path / "a.dcm", VALUES, Rows=60_000, Columns=60_000)
    with pytest.raises(ImageError, match="over 89,478,485 pixels"):
        decoded(path)


@pytest.mark.parametrize("syntax", LOSSLESS[1:], ids=lambda syntax: syntax.keyword)
def test_a_stream_of_another_size_than_the_header_is_refused(tmp_path, syntax):
    """A decoder makes room for what the stream says, and would fill the memory."""
    path = write(tmp_path / "a.dcm", VALUES, syntax=syntax)
    made = pydicom.dcmread(path)
    made.Rows -= 1
    made.save_as(path)
    with pytest.raises(ImageError, match="another size than its header says"):
        decoded(path)


@pytest.mark.parametrize(
    ("at", "value"),
    [(4, 208), (9, 3), (1, 0xC0), (15, 0x4D)],
    ids=["depth", "samples", "process", "a table longer than the file's header"],
)
def test_a_stream_that_would_crash_its_decoder_is_refused(tmp_path, at, value):
    """Over the depth and the table GDCM ends the whole process, so it must never see them."""
    path = write(tmp_path / "a.dcm", VALUES, syntax=uid.JPEGLosslessSV1)
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff\xc3") + 2
    table = content.index(b"\xff\xc4", start)
    content[table + 3 if at == 15 else start + at] = value
    path.write_bytes(content)
    with pytest.raises(ImageError, match="damaged"):
        decoded(path)


def test_a_deflated_data_set_fills_no_memory(tmp_path, monkeypatch):
    flat = np.zeros((1000, 1000), np.uint16)
    path = write(tmp_path / "a.dcm", flat, syntax=uid.DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(decode, "MAX_BYTES", 2**20)
    with pytest.raises(ImageError, match="over 1 MiB"):
        decoded(path)


def test_floats_that_are_no_numbers_have_a_reason(tmp_path):
    huge = {"RescaleSlope": "1e300", "RescaleIntercept": 0}
    with pytest.raises(ImageError, match="not a finite number"):
        decoded(write(tmp_path / "a.dcm", VALUES, **huge))


def test_no_value_of_the_file_is_said_or_logged(tmp_path, caplog, capfd):
    """Real files hold dates that are none and names in other alphabets: no reason to fail."""
    made = dataset(VALUES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.add_new("StudyDate", "DA", "SECRET19")
        made.add_new("PatientAge", "AS", "SECRET")
        made.add_new("StudyInstanceUID", "UI", "1.2.SECRET")
        made.add_new("SpecificCharacterSet", "CS", "SECRETSET")
        made.add_new("SeriesNumber", "IS", "12")
        save(made, tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    assert np.array_equal(decoded(tmp_path / "a.dcm"), stretched(VALUES))
    for cut in (0.2, 0.5, 0.9):
        (tmp_path / "b.dcm").write_bytes(content[: int(len(content) * cut)])
        with pytest.raises(ImageError) as caught:
            decoded(tmp_path / "b.dcm")
        assert "SECRET" not in str(caught.value).upper()
    said = caplog.text + "".join(capfd.readouterr())
    assert "SECRET" not in said.upper()
    # A cluster of another test may say something in threads of its own.
    mine = [one for one in caplog.records if one.thread == threading.get_ident()]
    assert not mine


def test_the_log_of_somebody_elses_pydicom_stays(tmp_path, caplog):
    caplog.set_level(logging.WARNING)  # a cluster of another test may have silenced it
    decoded(write(tmp_path / "a.dcm", VALUES))
    logging.getLogger("pydicom").warning("hello")
    assert "hello" in caplog.text


@pytest.mark.parametrize("syntax", [NATIVE[0], *LOSSLESS], ids=lambda syntax: syntax.keyword)
def test_damage_is_an_image_error_or_a_picture(tmp_path_factory, syntax):
    folder = tmp_path_factory.mktemp("damage")
    whole = write(folder / "a.dcm", ramp(36, 32), syntax=syntax).read_bytes()

    @settings(max_examples=40, deadline=None, database=None)
    @given(data=st.data())
    def damage(data):
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(132, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        (folder / "b.dcm").write_bytes(content)
        with contextlib.suppress(ImageError):
            assert decoded(folder / "b.dcm", (16, 16)).shape == (16, 16)

    damage()


def test_many_threads_give_the_same_pictures(tmp_path):
    paths = []
    for number, syntax in enumerate([*NATIVE, *LOSSLESS]):
        values = np.roll(VALUES, number * 7, axis=1)
        paths.append(write(tmp_path / f"{number}.dcm", values, syntax=syntax))
    alone = [decoded(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decoded, paths * 10))
    for number, got in enumerate(together):
        assert np.array_equal(got, alone[number % len(paths)])


def test_pydicom_is_imported_when_the_first_dicom_is_met(tmp_path):
    path = write(tmp_path / "a.dcm", VALUES)
    code = f"""
import sys
from pathlib import Path
from featcache.encoders.decode import Preprocessing, decode_image
before = "pydicom" in sys.modules
decode_image(Path({str(path)!r}), Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,)))
print(before, "pydicom" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr == ""


def test_sequences_and_private_elements_before_the_pixels_do_no_harm(tmp_path):
    made = dataset(VALUES)
    made.ProcedureCodeSequence = Sequence([dataset(VALUES[:2, :2])])
    made.private_block(0x0009, "somebody", create=True).add_new(1, "UN", b"\xe0\x7f\x10\x00" * 4)
    assert np.array_equal(decoded(save(made, tmp_path / "a.dcm")), stretched(VALUES))


def test_the_warnings_of_somebody_elses_pydicom_stay(tmp_path):
    """Ours are ignored while a thread decodes, and no longer."""
    made = dataset(VALUES)
    made.add_new("SpecificCharacterSet", "CS", "UNHEARD")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(made, tmp_path / "a.dcm")
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        decoded(tmp_path / "a.dcm")
        assert not recorded
        str(pydicom.dcmread(tmp_path / "a.dcm").PatientName)
    assert any("UNHEARD" in str(warning.message) for warning in recorded)


@pytest.mark.parametrize(
    "name", ["Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "PixelRepresentation"]
)
def test_an_element_that_is_needed_and_missing_is_named(tmp_path, name):
    made = dataset(VALUES)
    delattr(made, name)
    with pytest.raises(ImageError, match=f"does not say its {name}"):
        decoded(save(made, tmp_path / "a.dcm"))


@pytest.mark.parametrize("name", ["Rows", "Columns"])
def test_a_picture_of_no_rows_or_columns_says_so(tmp_path, name):
    with pytest.raises(ImageError, match="no rows or no columns"):
        decoded(write(tmp_path / "a.dcm", VALUES, **{name: 0}))


def test_a_lossless_jpeg_without_its_table_does_not_end_the_process(tmp_path):
    """With the marker of its Huffman table made one without a length, GDCM would abort."""
    path = write(tmp_path / "a.dcm", VALUES, syntax=uid.JPEGLossless)
    content = path.read_bytes()
    assert content.count(b"\xff\xc4\x00") == 1
    path.write_bytes(content.replace(b"\xff\xc4\x00", b"\xff\xd4\x00"))
    with pytest.raises(ImageError, match="damaged"):
        decoded(path)
