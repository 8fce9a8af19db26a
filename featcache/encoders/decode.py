"""Picture files to grey pixels, by one set of rules.

1.  The content decides the format, the file's name does not. Of several frames the first counts.
2.  A file must be whole: one that stops early is refused, never filled with grey, and so is a PNG
    with a wrong checksum.
3.  Over 89,478,485 pixels or 512 MiB a file is refused, so that no small file fills the memory.
4.  EXIF orientation is applied. Transparent areas lie on black. Colour becomes luminance
    (0.299 R + 0.587 G + 0.114 B), a palette and CMYK by way of their colours. CMYK with so much
    ink everywhere that nothing could be seen is read as inverted.
5.  One bit becomes 0 and 255. More than 8 bits of grey are stretched from the smallest to the
    largest value that occurs; a constant picture keeps its level relative to 16 bits (floats: 0).
6.  A JPEG is decoded at 1/2, 1/4 or 1/8 of its size when that leaves at least twice the target.
7.  DICOM: modality LUT, then the VOI LUT or the first window (without one, rule 5), then
    MONOCHROME1 is inverted; the rest stands in `dicom.py`.
8.  Pillow's antialiased filter resizes, and the result is rounded to 8 bits. Margins are black.
"""

import io
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from featcache.encoders.preprocessing import VIEWS as VIEWS
from featcache.encoders.preprocessing import Placement, place, render, show
from featcache.encoders.preprocessing import Preprocessing as Preprocessing
from featcache.encoders.preprocessing import to_input as to_input
from featcache.errors import EncoderError, ImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as 24-bit colour
MAX_BYTES = 512 * 2**20
_PIXEL_DATA = b"\xe0\x7f\x10\x00"  # the tag of DICOM's pixels

# Importing the plug-ins here fills Pillow's registry once, before any thread decodes.
_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    TiffImagePlugin.TiffImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
)
_FORMATS = tuple(plugin.format for plugin in _PLUGINS)

# What Pillow, pydicom and their decoders raise on damaged files.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def decode_image(path: Path, preprocessing: Preprocessing) -> UInt8[np.ndarray, "H W"]:
    """Decode one file to grey levels of the encoder's size, 0 black to 255 white.

    Safe to call from many threads; Pillow lets go of the interpreter lock while it works.

    Args:
        path: The picture; its extension is not looked at.
        preprocessing: Size, fit and filter.

    Raises:
        ImageError: The file cannot be decoded; the message is a reason without the path.
    """
    return decode_images(path, [preprocessing])[0]


def decode_images(
    path: Path, preprocessings: Sequence[Preprocessing]
) -> list[UInt8[np.ndarray, "H W"]]:
    """Decode one file for several encoders; each gets what `decode_image` alone would give it.

    The file is read once, decoded once for each JPEG scale that the sizes ask for, and resized
    once for all views that are cut out of the same canvas.

    Raises:
        ImageError: The file cannot be decoded; the message is a reason without the path.
    """
    return decode_with_size(path, preprocessings)[0]


def decode_with_size(
    path: Path, preprocessings: Sequence[Preprocessing]
) -> tuple[list[UInt8[np.ndarray, "H W"]], tuple[int, int]]:
    """What `decode_images` gives, and the height and width of the picture as it is stored.

    Args:
        path: The picture.
        preprocessings: At least one.

    Raises:
        ImageError: The file cannot be decoded; the message is a reason without the path.
    """
    content = _read(path)
    decoded: dict[tuple[int, int], Image.Image] = {}
    canvases: dict[tuple[object, ...], UInt8[np.ndarray, "H W"]] = {}
    greys, stored = [], (0, 0)
    try:
        dicom = _open_dicom(content) if is_dicom(content) else None
        for preprocessing in preprocessings:
            image = dicom or _open(content)
            stored = image.size  # before the JPEG decoder is told to shrink it
            placement = place(_upright_size(image), preprocessing)
            _draft(image, placement)
            if image.size not in decoded:
                decoded[image.size] = dicom or _to_grey(image)
            how = (placement, preprocessing.fit, preprocessing.interpolation)
            key = (image.size, preprocessing.canvas_size, *how)
            if key not in canvases:
                canvases[key] = render(decoded[image.size], placement, preprocessing)
            greys.append(show(canvases[key], preprocessing))
    except UnidentifiedImageError:
        raise ImageError(_explain(content)) from None
    except _BOMB:
        raise ImageError(f"the picture has over {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise ImageError("the picture does not fit into memory") from None
    except _DAMAGE as error:
        stops = "truncated" in str(error) or isinstance(error, EOFError)
        what = "the file is truncated" if stops else "the file is damaged"
        raise ImageError(f"{what}, it cannot be decoded") from None
    return greys, stored[::-1]


def read_picture(path: Path) -> bytes:
    """A file's bytes, none where they cannot be had: `decode_image` says why."""
    try:
        return _read(path)
    except ImageError:
        return b""


def is_plain_jpeg(content: bytes) -> bool:
    """Whether a file is a whole, upright JPEG, grey or YCbCr, as far as its header says."""
    if content[:2] != b"\xff\xd8" or not content.endswith(b"\xff\xd9"):
        return False
    try:
        image = _open(content)
        upright = _orientation(image) == 1
    except (ImageError, *_BOMB, *_DAMAGE):
        return False
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not upright:
        return False
    components = [layer[0] for layer in image.layer]  # `R`, `G`, `B` would be colours as such
    is_luminance_first = components in ([1], [1, 2, 3], [0, 1, 2], [0])
    return is_luminance_first and image.info.get("adobe_transform", 1) == 1


def _read(path: Path) -> bytes:
    """The file's bytes, or the reason why there are none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("the path is no file")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"the file has over {MAX_BYTES // 2**20} MiB")
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("the file is missing") from None
    except PermissionError:
        raise ImageError("the file may not be read (permission denied)") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a possible path"
        raise ImageError(f"the file cannot be read ({reason.lower()})") from None
    if not content:
        raise ImageError("the file is empty")
    return content


def is_dicom(content: bytes) -> bool:
    """Whether a file is DICOM: by its mark, or as a bare data set that has pixels."""
    return content[128:132] == b"DICM" or (_is_bare_dicom(content) and _PIXEL_DATA in content)


def _is_bare_dicom(content: bytes) -> bool:
    """Whether a file begins with group 2 or 8, as a data set without preamble and mark does."""
    return content[:1] in (b"\x02", b"\x08") and content[1:2] == content[3:4] == b"\x00"


def _open_dicom(content: bytes) -> Image.Image:
    """Decode a DICOM file; what reads it is imported when the first one is met."""
    from featcache.encoders.dicom import decode_dicom  # noqa: PLC0415

    return decode_dicom(content, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)


def _explain(content: bytes) -> str:
    """Say what a file is that is no picture."""
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if _is_bare_dicom(content):
        return "the DICOM file holds no pixel data"
    if head.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, the picture itself was not fetched"
    if head.startswith((b"<!doctype html", b"<html")):
        return "the file is an HTML page, no picture"
    if head.isascii() and b"\x00" not in head:
        return "the file is text, no picture"
    return "the file is no picture in a known format"


def _open(content: bytes) -> Image.Image:
    """Read the header, with the limits checked before any pixel is decoded."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise EncoderError(
            "Pillow was told to accept truncated files, so damaged pictures would pass as whole",
            where="PIL.ImageFile.LOAD_TRUNCATED_IMAGES",
            fix="set it to False in the program that calls featcache",
        )
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.format == "PNG":
        _check_png(content)
    return image


def _check_png(content: bytes) -> None:
    """Refuse what Pillow lets pass: wrong checksums, and 16 bits that it would cut to 8."""
    if content[24] == 16 and content[25] != 0:
        raise ImageError("a PNG of 16 bits with colour or transparency is not read")
    start, kind = 8, b""
    while kind != b"IEND":
        if start + 12 > len(content):
            raise ImageError("the file is truncated, it cannot be decoded")
        (length,) = struct.unpack(">I", content[start : start + 4])
        kind, end = content[start + 4 : start + 8], start + 8 + length
        if content[end : end + 4] != struct.pack(
            ">I", zlib.crc32(memoryview(content)[start + 4 : end])
        ):
            what = "truncated" if end + 4 > len(content) else "damaged, a checksum does not match"
            raise ImageError(f"the file is {what}, it cannot be decoded")
        start = end + 4


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none or the block is unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _lies_turned(image: Image.Image) -> bool:
    """Whether height and width in the header are swapped; Pillow's TIFF reader swaps them back."""
    return _orientation(image) in _TURNED and image.format != "TIFF"


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width, height of the picture as it is looked at."""
    return image.size[::-1] if _lies_turned(image) else image.size


def _draft(image: Image.Image, placement: Placement) -> None:
    """Let the JPEG decoder shrink to at least twice the target, and skip the colours."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        want = (2 * placement.size[0], 2 * placement.size[1])
        image.draft("L", want[::-1] if _lies_turned(image) else want)


def _to_grey(image: Image.Image) -> Image.Image:
    """Decode; the result is upright and of mode L or F, its levels between 0 and 255."""
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _stretch(image)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    if image.mode == "CMYK" and np.asarray(image.convert("RGB").convert("L")).max() <= 2:
        image = ImageChops.invert(image)
    if image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image if image.mode == "L" else image.convert("L")


def _stretch(image: Image.Image) -> Image.Image:
    """Map the smallest value to 0 and the largest to 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("a pixel is not a finite number")
    if high > low:
        levels = values.astype(np.float32)
        levels -= np.float32(low)
        levels *= np.float32(255.0 / (float(high) - float(low)))
    else:
        is_float = values.dtype.kind == "f"
        level = 0.0 if is_float else min(max(float(low), 0.0), 65535.0) / 257.0
        levels = np.full(values.shape, level, np.float32)
    return Image.fromarray(levels)
