"""JPEG files to grey pixels on a GPU, for the plain ones among them.

Plain is a whole file, grey or YCbCr, of 8 bits, that lies upright; everything else is left to
`decode_image`. A picture is decoded at its full size there and resized with an antialiased filter,
where the CPU lets the JPEG decoder shrink it first: grey levels differ a little, so a feature set
made this way says so (`Preprocessing.decoder`).
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from featcache.encoders.decode import is_plain_jpeg
from featcache.encoders.preprocessing import Placement, Preprocessing, place, window


class GpuBatch(NamedTuple):
    """A batch of pictures.

    Attributes:
        greys: Grey levels on the device; black where a picture is to be decoded elsewhere.
        fall_back: Which pictures of the batch the CPU has to decode, ascending.
    """

    greys: UInt8[Tensor, "B H W"]
    fall_back: list[int]


def decode_batch_on_gpu(
    contents: Sequence[bytes], preprocessing: Preprocessing, device: str
) -> GpuBatch:
    """Decode, resize and place the plain JPEGs of a batch on a device.

    Args:
        contents: The files' bytes, one per picture, as `read_picture` gives them.
        preprocessing: Size, fit, filter and view.
        device: Usually `cuda`; `cpu` takes the same way with the CPU's JPEG decoder.

    Returns:
        The pictures, and which of them are left to `decode_image`: those that are no plain JPEG
        and those that the GPU's decoder refuses.
    """
    return decode_batches_on_gpu(contents, [preprocessing], device)[0]


def decode_batches_on_gpu(
    contents: Sequence[bytes], preprocessings: Sequence[Preprocessing], device: str
) -> list[GpuBatch]:
    """Decode a batch once for several encoders; each gets what `decode_batch_on_gpu` gives it."""
    sizes = [(len(contents), *preprocessing.image_size) for preprocessing in preprocessings]
    batches = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
    plain = [number for number, content in enumerate(contents) if is_plain_jpeg(content)]
    decoded = _decode([contents[number] for number in plain], device)
    done = []
    for number, picture in zip(plain, decoded, strict=True):
        if picture is not None:
            done.append(number)
            for greys, preprocessing in zip(batches, preprocessings, strict=True):
                greys[number] = fit_on_device(picture, preprocessing)
    fall_back = sorted(set(range(len(contents))) - set(done))
    return [GpuBatch(greys, fall_back) for greys in batches]


def _decode(contents: Sequence[bytes], device: str) -> list[UInt8[Tensor, "1 H W"] | None]:
    """Full-size luminance of JPEGs; None for one that the decoder refuses."""
    if not contents:
        return []
    files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    try:
        return list(_decode_jpeg(files, device))
    except RuntimeError:
        if len(files) == 1:
            return [None]
    # One refusal loses the whole list, so each is tried alone.
    return [picture for content in contents for picture in _decode([content], device)]


def _decode_jpeg(files: list[Tensor], device: str) -> list[Tensor]:
    """Torchvision's decoder, whose notice that it will move to another package is not ours."""
    from torchvision.io import decode_jpeg  # type: ignore[import-untyped]  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: list[Tensor] = decode_jpeg(files, mode="GRAY", device=device)
    return decoded


def fit_on_device(
    grey: UInt8[Tensor, "1 H0 W0"], preprocessing: Preprocessing
) -> UInt8[Tensor, "H W"]:
    """Resize one picture, round to 8 bits, put onto black or cut, and take the view.

    Args:
        grey: Grey levels of the whole picture, upright.
        preprocessing: Size, fit, filter and view.
    """
    placement = place((grey.shape[2], grey.shape[1]), preprocessing)
    levels = _resize(grey, placement, preprocessing)
    (height, width), (left, top) = preprocessing.canvas_size, placement.offset
    if preprocessing.fit == "crop":
        levels = levels[-top : height - top, -left : width - left]
    if levels.shape != (height, width):
        canvas = levels.new_zeros((height, width))
        canvas[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
        levels = canvas
    rows, columns = window(preprocessing)
    levels = levels[rows, columns]
    return levels.flip(1) if preprocessing.view == "flip" else levels


def _resize(
    grey: UInt8[Tensor, "1 H0 W0"], placement: Placement, preprocessing: Preprocessing
) -> UInt8[Tensor, "H1 W1"]:
    """The picture at its size on the canvas: first its rows, then its columns, as Pillow does.

    Pillow cuts each of the two at black and white. In one go an edge of 255 beside 0 would come
    out up to 12 levels apart.
    """
    width, height = placement.size
    levels = grey[None].float()  # 1 1 H0 W0
    for size in [(grey.shape[1], width), (height, width)]:
        if levels.shape[2:] != size:
            levels = nn.functional.interpolate(
                levels,
                size=size,
                mode=preprocessing.interpolation,
                antialias=True,
                align_corners=False,
            )
            levels = levels.round_().clamp_(0, 255)
    return levels[0, 0].to(torch.uint8)
