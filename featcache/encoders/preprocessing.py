"""The way from a decoded picture to an encoder's input: size, view, numbers.

A *view* is a rendering with a name, the same at every time: `identity`, `flip` (mirrored left and
right), or a crop. For a crop the picture is fitted at 8/7 of the encoder's size (256 for 224), and
the named window of the encoder's size is cut out of that.
"""

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from featcache.config import Config, to_plain
from featcache.errors import UsageError

RULES_VERSION = 2
View = Literal[
    "identity",
    "flip",
    "crop-center",
    "crop-top-left",
    "crop-top-right",
    "crop-bottom-left",
    "crop-bottom-right",
]
VIEWS: tuple[str, ...] = get_args(View)
_CROP = (8, 7)  # a crop's canvas to the encoder's size, as 256 to 224
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_UNSAID = {"view": "identity", "decoder": "cpu"}  # what older records, made so, do not mention


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
    view: View = Field(
        default="identity",
        description="`flip`: mirrored left and right; `crop-...`: a window out of 8/7 of the size.",
    )
    decoder: Literal["cpu", "gpu"] = Field(
        default="cpu", description="`gpu`: plain JPEGs are decoded and resized on the GPU."
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

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Height, width at which the picture is fitted, before the view cuts its window out."""
        if not self.view.startswith("crop-"):
            return self.image_size
        height, width = (round(side * _CROP[0] / _CROP[1]) for side in self.image_size)
        return height, width

    def check_patches(self, patch: int, *, encoder: str) -> None:
        """Refuse a size that is no whole number of patches, which a network would cut or pad.

        Raises:
            UsageError: With the nearest sizes that can be.
        """
        height, width = self.image_size
        if height % patch == 0 and width % patch == 0:
            return
        down = [max(1, side // patch) * patch for side in self.image_size]
        up = [-(-side // patch) * patch for side in self.image_size]
        words = [str(h) if height == width else f"{h}x{w}" for h, w in (down, up)]
        fix = " or ".join(f"--image-size {word}" for word in dict.fromkeys(words))
        raise UsageError(
            f"an image of {height} x {width} pixels is no whole number of the {patch}-pixel "
            f"patches of `{encoder}`",
            where="--image-size",
            fix=fix,
        )

    def record(self) -> dict[str, JsonValue]:
        """All that decides the input of the network, as a feature set's spec holds it."""
        values = to_plain(self)
        for name, usual in _UNSAID.items():
            if values[name] == usual:
                del values[name]
        return values | {
            "channels": self.channels,
            "antialias": True,
            "decode": "grey, jpeg dct scaling to >= 2x, exif turned, alpha on black, "
            "over 8 bits min-max; dicom: first window, then monochrome1 inverted",
            "decode_rules": RULES_VERSION,
        }


class Placement(NamedTuple):
    """Where a whole picture goes: resized to `size`, then pasted at `offset` (both width first)."""

    size: tuple[int, int]
    offset: tuple[int, int]


def place(picture_size: tuple[int, int], preprocessing: Preprocessing) -> Placement:
    """Decide how large a picture becomes, and where on the canvas it lies.

    Args:
        picture_size: Width, height of the upright picture, in pixels.
        preprocessing: Size, fit and view.

    Returns:
        The size after the resize and the place of its upper left corner, negative where the
        picture is larger than the canvas.
    """
    height, width = preprocessing.canvas_size
    have_w, have_h = picture_size
    if preprocessing.fit == "squash":
        return Placement((width, height), (0, 0))
    ratios = (width / have_w, height / have_h)
    ratio = min(ratios) if preprocessing.fit == "pad" else max(ratios)
    size = (max(1, round(have_w * ratio)), max(1, round(have_h * ratio)))
    return Placement(size, ((width - size[0]) // 2, (height - size[1]) // 2))


def render(
    grey: Image.Image, placement: Placement, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "H W"]:
    """Resize, round to 8 bits, and put onto the black canvas or cut to it; no view is taken yet.

    Args:
        grey: The whole picture, upright, of mode L or F, its levels between 0 and 255.
        placement: What `place` said about it.
        preprocessing: Size, fit and filter.
    """
    resized = grey.resize(placement.size, _FILTERS[preprocessing.interpolation])
    levels = np.asarray(resized)
    if resized.mode == "F":
        levels = np.rint(levels.clip(0.0, 255.0)).astype(np.uint8)
    (height, width), (left, top) = preprocessing.canvas_size, placement.offset
    if preprocessing.fit == "crop":
        levels = levels[-top : height - top, -left : width - left]
    if levels.shape == (height, width):
        return levels
    canvas = np.zeros((height, width), np.uint8)
    canvas[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    return canvas


def show(
    canvas: UInt8[np.ndarray, "H0 W0"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "H W"]:
    """What the view shows of a canvas, as an array of its own."""
    rows, columns = window(preprocessing)
    levels = canvas[rows, columns]
    return np.array(levels[:, ::-1] if preprocessing.view == "flip" else levels)


def window(preprocessing: Preprocessing) -> tuple[slice, slice]:
    """Rows and columns of the canvas that the view shows; all of them where it is no crop."""
    have, want = preprocessing.canvas_size, preprocessing.image_size
    spare_h, spare_w = have[0] - want[0], have[1] - want[1]
    words = preprocessing.view.split("-")
    centred = words[-1] == "center"
    top = spare_h // 2 if centred else spare_h * ("bottom" in words)
    left = spare_w // 2 if centred else spare_w * ("right" in words)
    return slice(top, top + want[0]), slice(left, left + want[1])


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, "1 C 1 1"]:
    """Numbers of the channels on a device, sent there once: a copy would hold up a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def to_input(
    greys: UInt8[Tensor, "B H W"], preprocessing: Preprocessing
) -> Float32[Tensor, "B C H W"]:
    """Grey levels to what the encoder reads, on the device where the levels are.

    Args:
        greys: Grey levels, 0 to 255, of the preprocessing's size.
        preprocessing: Range, mean and std; its length of `mean` is the number of channels.
    """
    low, high = preprocessing.value_range
    mean = _per_channel(preprocessing.mean, greys.device)
    std = _per_channel(preprocessing.std, greys.device)
    values = greys[:, None].to(torch.float32).mul_((high - low) / 255.0).add_(low)  # B 1 H W
    return values.sub(mean).div_(std)
