"""DICOM files to grey levels.

1.  The first frame counts. A file must be whole, with all of its frames.
2.  Stored values go through the modality LUT (a table, or slope and intercept), then through the
    VOI LUT's table or else the first of several windows (LINEAR, LINEAR_EXACT, SIGMOID).
3.  Without either, 8 bits stay as they are, and other depths are stretched from the smallest to
    the largest value that occurs; a constant picture keeps its level relative to its bits stored.
4.  MONOCHROME1 is inverted after that. Colour becomes luminance, without a window.
5.  Nothing else of the file is looked at: no pixel spacing, padding value, overlay or shutter.

Import this module when the first DICOM file is met: it loads pydicom with all its decoders. A
JPEG 2000 stream that is damaged in its middle can decode to wrong pixels, which no decoder reports.
No value of a data set enters a message or the log, for it may name a patient.
"""

import io
import logging
import struct
import threading
import warnings
import zlib  # must stay before gdcm: a libz that gdcm loads first is mixed up with its own
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import gdcm
import numpy as np
import pydicom
from jaxtyping import Float32, Num, UInt8, UInt16
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array

from featcache.errors import ImageError

# One decoder per syntax, so that the pixels do not depend on what else is installed.
_OURS = {
    uid.JPEGBaseline8Bit: ("pillow", "pillow"),
    uid.JPEGExtended12Bit: ("pillow", "pillow"),
    uid.JPEGLossless: ("gdcm", "python-gdcm"),
    uid.JPEGLosslessSV1: ("gdcm", "python-gdcm"),
    uid.JPEGLSLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEGLSNearLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEG2000Lossless: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.JPEG2000: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2KLossless: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2K: ("pylibjpeg", "pylibjpeg-openjpeg"),
}
_PROCESSES = {  # markers that may begin a stream of the syntax, where a decoder trusts in them
    uid.JPEGBaseline8Bit: (0xC0,),
    uid.JPEGExtended12Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
}
_COLOURS = {  # photometric interpretations by samples per pixel
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"),
}
_NEEDED = (
    "Rows",
    "Columns",
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
_END = b"\xff\xd9"  # how every JPEG, JPEG-LS and JPEG 2000 stream ends
_TRUNCATED = "the DICOM file is truncated, it cannot be decoded"
_DAMAGED = "the DICOM file is damaged, it cannot be decoded"
_NO_SIZE = "the DICOM file is damaged, its pixels have another size than its header says"
_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls")
_quiet = threading.local()


class _InQuietThread(type):
    """Makes every warning a subclass, but only in a thread that decodes."""

    def __subclasscheck__(cls, other: type) -> bool:
        return getattr(_quiet, "on", False)


class _QuietWarning(Warning, metaclass=_InQuietThread):
    """What the filter ignores."""


_IGNORED = ("ignore", None, _QuietWarning, None, 0)


def decode_dicom(content: bytes, *, max_pixels: int, max_bytes: int) -> Image.Image:
    """Decode the first frame.

    Safe to call from many threads; most of the decoders keep the interpreter lock while they work.

    Args:
        content: The whole file, with or without a preamble.
        max_pixels: Rows times columns above this are refused before they are decoded.
        max_bytes: Bound on a deflated data set, unpacked.

    Returns:
        The picture, of mode L or F, its levels between 0 and 255.

    Raises:
        ImageError: The file has no picture that can be decoded, for a reason that is understood.
            Other damage raises whatever pydicom raises.
    """
    if _DEFLATED in content[132:4096]:
        _check_deflated(content, max_bytes)
    with _silence():
        try:
            dataset = pydicom.dcmread(io.BytesIO(content), force=True)
            decoder = _check(dataset, content, max_pixels)
            levels = _levels(dataset, _stored_values(dataset, decoder))
        except EOFError:
            raise ImageError(_TRUNCATED) from None
        except (ValueError, BytesLengthException, InvalidDicomError) as error:
            short = "less than expected" in str(error) or "insufficient" in str(error)
            raise ImageError(_TRUNCATED if short else _DAMAGED) from None
    if not np.isfinite(levels).all():
        raise ImageError("a pixel is not a finite number")
    return Image.fromarray(levels)


@contextmanager
def _silence() -> Iterator[None]:
    """No log line and no warning in this thread, for pydicom's would quote the data set.

    All threads share the filters, so that none could be taken back safely: this one stays, but it
    matches only while its thread decodes. It must be the first, before one that raises errors.
    """
    _mute_loggers()
    if warnings.filters[:1] != [_IGNORED]:
        filters = cast(list[object], warnings.filters)
        filters.insert(0, _IGNORED)  # in one step; `simplefilter` would first take it out
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = False


@cache
def _mute_loggers() -> None:
    """Let the loggers of pydicom and its decoders drop what this module's threads cause."""
    for turn_off in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
        turn_off()
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in _LOGGERS:
            logging.getLogger(name).addFilter(lambda _: not getattr(_quiet, "on", False))


def _check_deflated(content: bytes, max_bytes: int) -> None:
    """Refuse a data set that is cut off or would fill the memory."""
    if content[132:136] != b"\x02\x00\x00\x00":  # the length of the file's meta group
        raise ImageError(_DAMAGED)
    start = 144 + int.from_bytes(content[140:144], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        size = len(inflater.decompress(memoryview(content)[start:], max_bytes + 1))
    except zlib.error:
        raise ImageError(_DAMAGED) from None
    if size > max_bytes:
        raise ImageError(f"the file has over {max_bytes // 2**20} MiB")
    if not inflater.eof:
        raise ImageError(_TRUNCATED)


def _check(dataset: Dataset, content: bytes, max_pixels: int) -> str:
    """Refuse what has no whole picture of a known syntax; the decoder's name, none for native."""
    _check_description(dataset, content, max_pixels)
    if "TransferSyntaxUID" not in dataset.file_meta:
        usual = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian)
        dataset.file_meta.TransferSyntaxUID = usual[bool(dataset.original_encoding[0])]
    syntax = uid.UID(dataset.file_meta.TransferSyntaxUID)
    decoder, package = _OURS.get(syntax, ("", ""))
    try:
        plugins = get_decoder(syntax).available_plugins if syntax.is_compressed else ("",)
    except (NotImplementedError, ValueError):
        plugins = ()
    if not plugins or (decoder and decoder not in plugins):
        raise ImageError(_unread(syntax, package))
    if decoder:
        frame = _first_frame(dataset)
        if not frame.rstrip(b"\x00\xff").endswith(_END):  # an odd length is filled up with either
            raise ImageError(_TRUNCATED)
        _check_stream(frame, dataset, syntax)
    return decoder


def _check_description(dataset: Dataset, content: bytes, max_pixels: int) -> None:
    """Refuse a data set without pixels, of an impossible size, or of unknown colours."""
    if "PixelData" not in dataset:
        cut = _PIXEL_DATA in content
        raise ImageError(_TRUNCATED if cut else "the DICOM file holds no pixel data")
    for name in _NEEDED:
        if dataset.get(name) is None:
            raise ImageError(f"the DICOM file does not say its {name}")
    pixels = int(dataset.Rows) * int(dataset.Columns)
    if pixels == 0:
        raise ImageError("the DICOM file has a picture of no rows or no columns")
    if pixels > max_pixels:
        raise ImageError(f"the picture has over {max_pixels:,} pixels")
    if dataset.PhotometricInterpretation not in _COLOURS.get(dataset.SamplesPerPixel, ()):
        raise ImageError("the DICOM file has a kind of colour that is not read")


def _unread(syntax: uid.UID, package: str) -> str:
    """Name a syntax that is not read; one that the standard does not know is not quoted."""
    if syntax.name == str(syntax):
        return "the DICOM file has a transfer syntax that the standard does not know"
    fix = f"install {package}" if package else "no package that featcache uses decodes it"
    return f"the DICOM syntax {syntax.name} ({syntax}) is not read: {fix}"


def _first_frame(dataset: Dataset) -> bytes:
    """The compressed stream of the first frame."""
    frames = int(dataset.get("NumberOfFrames", None) or 1)
    return get_frame(dataset.PixelData, 0, number_of_frames=frames)


def _check_stream(frame: bytes, dataset: Dataset, syntax: uid.UID) -> None:
    """Refuse a stream that contradicts the data set: decoders believe it, and some crash."""
    marker, precision, height, width, samples = _stream_header(frame)
    if marker and (height, width) != (dataset.Rows, dataset.Columns):
        raise ImageError(_NO_SIZE)
    expected = _PROCESSES.get(syntax, (marker,))
    room = 2 <= precision <= min(16, int(dataset.BitsAllocated))
    if not marker or marker not in expected or not room or samples != dataset.SamplesPerPixel:
        raise ImageError(_DAMAGED)


def _stream_header(frame: bytes) -> tuple[int, int, int, int, int]:
    """What a JPEG, JPEG-LS or JPEG 2000 stream says of itself.

    Returns:
        Marker of the process, bits of a sample, height, width, samples of a pixel; zeros where
        there is no header.
    """
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        samples, depth = struct.unpack_from(">HB", frame, start + 40)
        return 0x51, (depth & 0x7F) + 1, bottom - top, right - left, samples
    at, header = 2, (0, 0, 0, 0, 0)
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        marker, (length,) = frame[at + 1], struct.unpack_from(">H", frame, at + 2)
        if marker == 0xDA:  # only what follows is compressed
            return header
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # has no length, and GDCM aborts the process
            break
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            header = (marker, *struct.unpack_from(">BHHB", frame, at + 4))
        at += 1 if marker == 0xFF else 2 + length  # FF may be repeated as a filling
    return 0, 0, 0, 0, 0


def _stored_values(dataset: Dataset, decoder: str) -> np.ndarray:
    """The first frame as it was stored; colours as RGB, or as numbers of a palette."""
    extended = dataset.file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit
    if extended and int(dataset.BitsStored) > 8:
        return _decode_extended(dataset)
    return pixel_array(dataset, index=0, decoding_plugin=decoder)


def _decode_extended(dataset: Dataset) -> UInt16[np.ndarray, "H W"]:
    """A grey JPEG of 12 bits, which GDCM decodes but pydicom's way to GDCM refuses."""
    if dataset.SamplesPerPixel != 1 or dataset.PixelRepresentation != 0:
        raise ImageError(_unread(uid.JPEGExtended12Bit, ""))
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(_first_frame(dataset))
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((dataset.Columns, dataset.Rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    syntax = gdcm.TransferSyntax.GetTSType(str(uid.JPEGExtended12Bit))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    levels = image.GetBuffer().encode("utf-8", "surrogateescape")  # bytes, which SWIG made text
    return np.frombuffer(levels, "<u2").reshape(dataset.Rows, dataset.Columns)


def _levels(
    dataset: Dataset, values: np.ndarray
) -> UInt8[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]:
    """Grey levels, 0 to 255: uint8, or float32 where there were more."""
    kind = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        bits = 8 * values.dtype.itemsize
    if values.ndim == 3:
        return _luminance(values, bits)
    inverted = kind == "MONOCHROME1"
    signed = bool(dataset.PixelRepresentation)
    lowest = -(2 ** (bits - 1)) if signed else 0
    shifted = _apply_modality(values, dataset)
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        return _scale(_look_up(shifted, item), 0.0, 2.0 ** _depth(item) - 1, inverted)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        return _apply_window(shifted, dataset, inverted)
    if bits == 8 and not signed and shifted is values:
        eight = values.clip(0, 255).astype(np.uint8)
        return 255 - eight if inverted else eight
    low, high = float(shifted.min()), float(shifted.max())
    if low == high:
        ends = np.array([[lowest, lowest + 2**bits - 1]], np.int64)
        ends = _apply_modality(ends, dataset)
        low, high = float(ends.min()), float(ends.max())
    return _scale(shifted, low, high, inverted)


def _luminance(
    colours: Num[np.ndarray, "H W C"], bits: int
) -> UInt8[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]:
    """Colour to grey, of 8 bits by the same arithmetic as in other files."""
    colours = colours[..., :3]
    if bits == 8:
        eight = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
        return np.asarray(eight.convert("L"))
    weights = np.array([0.299, 0.587, 0.114]) * (255.0 / (2.0**bits - 1))
    return (colours @ weights).astype(np.float32)


def _apply_modality(values: Num[np.ndarray, "H W"], dataset: Dataset) -> Num[np.ndarray, "H W"]:
    """Stored values to what they measure; `values` itself where the file says nothing of it."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(values, dataset.ModalityLUTSequence[0])
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    return values if (slope, intercept) == (1.0, 0.0) else values * slope + intercept


def _depth(item: Dataset) -> int:
    """Bits of a table's entries."""
    bits = int(item.LUTDescriptor[2])
    if not 8 <= bits <= 16:
        raise ImageError("a lookup table of the DICOM file has entries of an unknown depth")
    return bits


def _look_up(values: Num[np.ndarray, "H W"], item: Dataset) -> Num[np.ndarray, "H W"]:
    """Values through a table; those before its first and after its last entry take these."""
    entries = int(item.LUTDescriptor[0]) % 2**16 or 2**16
    first = int(item.LUTDescriptor[1])
    table = item.LUTData
    if isinstance(table, bytes):
        little = item.original_encoding[1] is not False
        in_bytes = _depth(item) == 8 and len(table) < 2 * entries
        table = np.frombuffer(table, "u1" if in_bytes else "<u2" if little else ">u2")
    table = np.atleast_1d(np.asarray(table))[:entries].astype(np.uint16)
    if table.size < entries:
        raise ImageError("a lookup table of the DICOM file is shorter than it says")
    numbers = np.rint(values).astype(np.int64) - first
    return np.asarray(table[numbers.clip(0, entries - 1)])


def _apply_window(
    values: Num[np.ndarray, "H W"], dataset: Dataset, inverted: bool
) -> Float32[np.ndarray, "H W"]:
    """Values through the first window to levels."""
    centre, width = (
        float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth")
    )
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if not np.isfinite(centre) or not np.isfinite(width):
        raise ImageError("the DICOM window is not a finite number")
    if width <= 0 or (width < 1 and function == "LINEAR"):
        raise ImageError("the DICOM window has no width")
    if function == "SIGMOID":
        steps = (values - centre) * ((4.0 if inverted else -4.0) / width)
        levels = 255.0 / (1.0 + np.exp(steps.clip(-700, 700)))
        return np.asarray(levels, np.float32)
    if function == "LINEAR_EXACT":
        return _scale(values, centre - width / 2, centre + width / 2, inverted)
    if function != "LINEAR":
        raise ImageError("the DICOM window has an unknown function")
    middle, half = centre - 0.5, (width - 1) / 2
    return _scale(values, middle - half, middle + half, inverted)


def _scale(
    values: Num[np.ndarray, "H W"], low: float, high: float, inverted: bool
) -> Float32[np.ndarray, "H W"]:
    """Map `low` to black and `high` to white, or the other way round; beyond is cut off.

    Both ways start with an exact difference, so that a negative gives the same levels bit for bit.
    """
    if low == high:
        above = values > low
        return np.where(above != inverted, np.float32(255), np.float32(0))
    levels = values.astype(np.float32)
    np.clip(levels, np.float32(low), np.float32(high), out=levels)
    levels = np.float32(high) - levels if inverted else levels - np.float32(low)
    levels *= np.float32(255.0 / (high - low))
    return levels
