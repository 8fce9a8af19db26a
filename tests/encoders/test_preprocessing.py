"""Views, placements and records: what an encoder's input is made by."""

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.encoders.decode import VIEWS, Preprocessing, decode_image, decode_images, to_input
from featcache.errors import UsageError

ONE = {"mean": (0.5,), "std": (0.5,)}
CORNERS = {"top-left": (0, 0), "top-right": (0, 1), "bottom-left": (1, 0), "bottom-right": (1, 1)}


def shown(view, **changes):
    return Preprocessing(**({"image_size": (56, 56), "view": view} | ONE | changes))


def slope(height, width):
    """A picture without symmetry whose levels go from 0 to 255."""
    y, x = np.mgrid[0:height, 0:width]
    levels = 100 * x / width + 90 * y / height + 20 * np.sin(x / 9)
    return np.rint(255 * (levels - levels.min()) / np.ptp(levels)).astype(np.uint8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(slope(150, 130)).save(path)
    return path


def test_the_plain_view_is_what_was_always_made_and_recorded(picture):
    plain = Preprocessing(image_size=(56, 56), **ONE)
    assert plain.view == "identity" == VIEWS[0]
    assert np.array_equal(decode_image(picture, plain), decode_image(picture, shown("identity")))
    assert not {"view", "decoder"} & set(plain.record())


def test_other_views_and_decoders_are_recorded():
    assert (
        shown("flip", decoder="gpu").record().items() >= {"view": "flip", "decoder": "gpu"}.items()
    )


def test_a_flipped_view_is_the_plain_one_mirrored(picture):
    plain, flipped = decode_images(picture, [shown("identity"), shown("flip")])
    assert np.array_equal(flipped, plain[:, ::-1])
    assert not np.array_equal(flipped, plain)


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", [(56, 56), (56, 112)])
def test_a_crop_is_a_window_of_the_picture_at_eight_sevenths(picture, fit, size):
    canvas = (size[0] * 8 // 7, size[1] * 8 // 7)
    whole = decode_image(picture, Preprocessing(image_size=canvas, fit=fit, **ONE))
    room = (canvas[0] - size[0], canvas[1] - size[1])
    for name, (down, right) in (CORNERS | {"center": (0.5, 0.5)}).items():
        top, left = int(down * room[0]), int(right * room[1])
        part = decode_image(picture, shown(f"crop-{name}", image_size=size, fit=fit))
        assert part.shape == size
        assert np.array_equal(part, whole[top : top + size[0], left : left + size[1]])


def test_sizes_that_place_a_picture_alike_keep_their_own_margins(picture):
    """150 x 130 becomes 56 x 49 at 3 pixels from the left on both."""
    one, other = (shown("identity", image_size=(56, width)) for width in (55, 56))
    for part, alone in zip(decode_images(picture, [one, other]), (one, other), strict=True):
        assert np.array_equal(part, decode_image(picture, alone))


@pytest.mark.parametrize(("side", "canvas"), [(224, 256), (518, 592), (32, 37), (1, 1)])
def test_a_crop_is_cut_out_of_a_canvas_like_256_for_224(side, canvas):
    assert shown("crop-center", image_size=(side, side)).canvas_size == (canvas, canvas)
    assert shown("flip", image_size=(side, side)).canvas_size == (side, side)


@pytest.mark.parametrize("depth", ["8 bits", "16 bits", "a jpeg", "lying on its side"])
def test_every_kind_of_file_has_every_view(tmp_path, depth):
    levels = slope(300, 260)
    path, options = tmp_path / ("a.jpg" if depth == "a jpeg" else "a.png"), {}
    image = Image.fromarray(levels.astype(np.uint16) * 257 if depth == "16 bits" else levels)
    if depth == "lying on its side":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    image.save(path, **options)
    plain = tmp_path / "plain.png"
    Image.fromarray(levels).save(plain)
    views = [shown(view) for view in VIEWS]
    together = decode_images(path, views)
    for part, wanted, view in zip(together, decode_images(plain, views), views, strict=True):
        assert np.array_equal(part, decode_image(path, view))
        assert np.abs(part.astype(int) - wanted).mean() < 2


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="view"):
        shown("upside-down")


@pytest.mark.parametrize(
    ("size", "fix"),
    [
        ((30, 30), "--image-size 28 or --image-size 42"),
        ((28, 60), "--image-size 28x56 or --image-size 28x70"),
        ((9, 28), "--image-size 14x28"),
    ],
)
def test_a_size_of_no_whole_patches_names_the_nearest_that_are(size, fix):
    with pytest.raises(UsageError, match="no whole number of the 14-pixel") as caught:
        shown("identity", image_size=size).check_patches(14, encoder="any")
    assert caught.value.fix == fix


def test_each_channel_has_its_own_mean_and_std():
    preprocessing = Preprocessing(image_size=(1, 3), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    levels = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    for _ in range(2):  # the second time from numbers that are kept
        values = to_input(levels, preprocessing)
        wanted = [
            [(v - mean) / std for v in (0.0, 0.2, 1.0)]
            for mean, std in zip((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), strict=True)
        ]
        assert torch.allclose(values[0, :, 0], torch.tensor(wanted))
