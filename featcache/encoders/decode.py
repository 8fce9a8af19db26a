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
7.  Pillow's antialiased filter resizes, and the result is rounded to 8 bits. Margins are black.
"""

import io
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
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
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from featcache.config import Config, to_plain
from featcache.errors import EncoderError, ImageError, UsageError

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as 24-bit colour
MAX_BYTES = 512 * 2**20
RULES_VERSION = 1

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

# What Pillow raises on damaged files, besides its own OSError and SyntaxError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class Preprocessing(Config):
    """From pixels to an encoder's input; recorded completely with every feature set."""

    image_size: tuple[int, int] = Field(description="Height, width of the input, in pixels.")
    fit: Literal["pad", "squash", "crop"] = Field(
        default="pad",
        description="`pad`: whole picture, black margins; `squash`: whole picture, other aspect; "
        "`crop`: fitted by its shorter side, the centre cut out.",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="Filter of the resize, always antialiased."
    )
    value_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="What black and white become before mean and std."
    )
    mean: tuple[float, ...] = Field(description="One value per channel, in `value_range`.")
    std: tuple[float, ...] = Field(description="One value per channel.")

    @model_validator(mode="after")
    def _check(self) -> "Preprocessing":
        if min(self.image_size) < 1:
            raise ValueError("a side of `image_size` is below 1 pixel")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError("`mean` and `std` need one value per channel, for 1 or 3 channels")
        if min(self.std) <= 0:
            raise ValueError("a value of `std` is not above 0")
        return self

    @property
    def channels(self) -> int:
        """Channels of the input; a grey picture is repeated."""
        return len(self.mean)

    def check_patches(self, patch: int, *, encoder: str) -> None:
        """Refuse a size that is no whole number of patches, which a network would cut or pad.

        Raises:
            UsageError: With the nearest sizes that can be.
        """
        height, width = self.image_size
        if height % patch == 0 and width % patch == 0:
            return
        down, up = (max(1, side) * patch for side in (height // patch, height // patch + 1))
        raise UsageError(
            f"an image of {height} x {width} pixels is no whole number of the {patch}-pixel "
            f"patches of `{encoder}`",
            where="--image-size",
            fix=f"--image-size {down} or --image-size {up}",
        )

    def record(self) -> dict[str, JsonValue]:
        """All that decides the input of the network, as a feature set's spec holds it."""
        return to_plain(self) | {
            "channels": self.channels,
            "antialias": True,
            "decode": "grey, jpeg dct scaling to >= 2x, exif turned, alpha on black, "
            "over 8 bits min-max",
            "decode_rules": RULES_VERSION,
        }


class _Placement(NamedTuple):
    """Where a whole picture goes: resized to `size`, then pasted at `offset` (both width first)."""

    size: tuple[int, int]
    offset: tuple[int, int]


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

    The file is read once, and decoded once for each JPEG scale that the sizes ask for.

    Raises:
        ImageError: The file cannot be decoded; the message is a reason without the path.
    """
    content = _read(path)
    decoded: dict[tuple[int, int], Image.Image] = {}
    greys = []
    try:
        for preprocessing in preprocessings:
            image = _open(content)
            placement = _place(image, preprocessing)
            _draft(image, placement)
            if image.size not in decoded:
                decoded[image.size] = _to_grey(image)
            greys.append(_fit(decoded[image.size], placement, preprocessing))
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
    return greys


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


def _explain(content: bytes) -> str:
    """Say what a file is that is no picture."""
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    bare_dicom = content[:2] == b"\x08\x00" and content[3:4] == b"\x00"  # group 8, no preamble
    if content[128:132] == b"DICM" or bare_dicom:
        return "the file is DICOM, which is not read yet"
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


def _place(image: Image.Image, preprocessing: Preprocessing) -> _Placement:
    """Decide the size after the resize from the size in the header."""
    height, width = preprocessing.image_size
    have_w, have_h = image.size[::-1] if _lies_turned(image) else image.size
    if preprocessing.fit == "squash":
        return _Placement((width, height), (0, 0))
    ratios = (width / have_w, height / have_h)
    ratio = min(ratios) if preprocessing.fit == "pad" else max(ratios)
    size = (max(1, round(have_w * ratio)), max(1, round(have_h * ratio)))
    return _Placement(size, ((width - size[0]) // 2, (height - size[1]) // 2))


def _draft(image: Image.Image, placement: _Placement) -> None:
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


def _fit(
    grey: Image.Image, placement: _Placement, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "H W"]:
    """Resize, round to 8 bits, and put onto black or cut."""
    resized = grey.resize(placement.size, _FILTERS[preprocessing.interpolation])
    levels = np.asarray(resized)
    if resized.mode == "F":
        levels = np.rint(levels.clip(0.0, 255.0)).astype(np.uint8)
    if levels.shape == preprocessing.image_size:
        return np.array(levels)
    if preprocessing.fit == "crop":
        (height, width), (left, top) = preprocessing.image_size, placement.offset
        return np.array(levels[-top : height - top, -left : width - left])
    canvas = np.zeros(preprocessing.image_size, np.uint8)
    left, top = placement.offset
    canvas[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    return canvas


def to_input(
    greys: UInt8[Tensor, "B H W"], preprocessing: Preprocessing
) -> Float32[Tensor, "B C H W"]:
    """Grey levels to what the encoder reads, on the device where the levels are.

    Args:
        greys: Grey levels, 0 to 255, of the preprocessing's size.
        preprocessing: Range, mean and std; its length of `mean` is the number of channels.
    """
    low, high = preprocessing.value_range
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=greys.device)
    std = torch.tensor(preprocessing.std, dtype=torch.float32, device=greys.device)
    values = greys[:, None].to(torch.float32).mul_((high - low) / 255.0).add_(low)  # B 1 H W
    return values.sub(mean.view(1, -1, 1, 1)).div_(std.view(1, -1, 1, 1))
