"""Picture files to grey pixels: formats, depths, orientations, and files that are no pictures."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageFile

from featcache.encoders.decode import (
    MAX_PIXELS,
    Preprocessing,
    decode_image,
    decode_images,
    to_input,
)
from featcache.errors import ConfigError, EncoderError, ImageError, UsageError

ONE = {"mean": (0.5,), "std": (0.5,)}
SMALL = Preprocessing(image_size=(64, 64), **ONE)


def radiograph(height=256, width=256):
    """A smooth grey picture without symmetry: dark lungs, a bright heart, a bright corner."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    levels = 150 + 60 * np.cos(3 * x + 2 * y)
    for cx, cy, depth in [(0.3, 0.5, -90), (0.72, 0.5, -90), (0.55, 0.65, 70)]:
        levels += depth * np.exp(-(((x - cx) / 0.12) ** 2 + ((y - cy) / 0.25) ** 2))
    levels[: height // 8, : width // 8] = 250
    return levels.clip(0, 255).astype(np.uint8)


GREY = radiograph()


def save(path, image, **options):
    image.save(path, **options)
    return path


def close(one, other, mean=1.0):
    return np.abs(one.astype(float) - other).mean() <= mean


@pytest.fixture
def reference(tmp_path):
    return decode_image(save(tmp_path / "reference.png", Image.fromarray(GREY)), SMALL)


def palette_reversed():
    image = Image.fromarray(255 - GREY).convert("P")
    image.putdata((255 - GREY).ravel().tolist())
    image.putpalette([255 - i for i in range(256) for _ in range(3)])
    return image


def with_alpha(mode):
    image = Image.fromarray(GREY).convert(mode)
    image.putalpha(255)
    return image


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("l.png", lambda g: g, {}),
        ("l.jpg", lambda g: g, {"quality": 95}),
        ("progressive.jpg", lambda g: g, {"quality": 95, "progressive": True}),
        ("rgb.jpg", lambda g: g.convert("RGB"), {"quality": 95}),
        ("rgb.png", lambda g: g.convert("RGB"), {}),
        ("rgba.png", lambda g: with_alpha("RGB"), {}),
        ("la.png", lambda g: with_alpha("L"), {}),
        ("p.png", lambda g: palette_reversed(), {}),
        ("cmyk.jpg", lambda g: g.convert("CMYK"), {"quality": 95}),
        ("inverted.jpg", lambda g: ImageChops.invert(g.convert("CMYK")), {"quality": 95}),
        ("cmyk.tif", lambda g: g.convert("CMYK"), {}),
        ("l.tif", lambda g: g, {}),
        ("l.bmp", lambda g: g, {}),
        ("l.gif", lambda g: g, {}),
        ("l.webp", lambda g: g, {"lossless": True}),
        ("l.jp2", lambda g: g, {}),
    ],
)
def test_every_kind_of_file_gives_the_same_picture(tmp_path, reference, name, make, options):
    path = save(tmp_path / name, make(Image.fromarray(GREY)), **options)
    decoded = decode_image(path, SMALL)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (64, 64)
    assert close(decoded, reference)
    wrong = path.rename(tmp_path / "wrong.extension")
    assert np.array_equal(decode_image(wrong, SMALL), decoded)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("scale", [1, 257])
def test_16_bits_are_stretched_from_smallest_to_largest(tmp_path, suffix, scale):
    """12 of 16 bits: divided by 65,535 it would be black, clipped at 255 white."""
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64) * (16 if scale == 257 else 1)
    eight = np.rint(np.arange(4096).reshape(64, 64) * (255 / 4095)).astype(np.uint8)
    deep = decode_image(save(tmp_path / f"deep.{suffix}", Image.fromarray(ramp)), SMALL)
    plain = decode_image(save(tmp_path / "plain.png", Image.fromarray(eight)), SMALL)
    assert np.abs(deep.astype(int) - plain).max() <= 1
    assert (deep.min(), deep.max()) == (0, 255)


def test_16_bits_do_not_overflow_at_sharp_edges(tmp_path):
    """Bicubic overshoots beside an edge; beyond black and white there is nothing."""
    edge = np.tile(np.where(np.arange(100) < 50, 0, 255), (100, 1))
    deep = save(tmp_path / "deep.png", Image.fromarray((edge * 257).astype(np.uint16)))
    flat = save(tmp_path / "flat.png", Image.fromarray(edge.astype(np.uint8)))
    difference = decode_image(deep, SMALL).astype(int) - decode_image(flat, SMALL)
    assert np.abs(difference).max() <= 1


def test_floats_are_stretched_and_must_be_finite(tmp_path, reference):
    values = GREY.astype(np.float32) * 3.5 - 700
    stretched = decode_image(save(tmp_path / "f.tif", Image.fromarray(values)), SMALL)
    low, high = GREY.min(), GREY.max()
    assert close(stretched, (reference.astype(float) - low) * 255 / (high - low))
    values[3, 3] = np.nan
    with pytest.raises(ImageError, match="not a finite number"):
        decode_image(save(tmp_path / "nan.tif", Image.fromarray(values)), SMALL)


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_a_constant_picture_keeps_its_level(tmp_path, level):
    flat = np.full((40, 40), level, np.uint8)
    path = save(tmp_path / "flat.png", Image.fromarray(flat))
    assert (decode_image(path, SMALL) == level).all()
    deep = save(tmp_path / "deep.png", Image.fromarray(flat.astype(np.uint16) * 257))
    assert (decode_image(deep, SMALL) == level).all()


def test_one_bit_becomes_black_and_white(tmp_path):
    image = Image.fromarray(GREY > 140)
    assert image.mode == "1"
    same = Preprocessing(image_size=GREY.shape, **ONE)
    decoded = decode_image(save(tmp_path / "bit.png", image), same)
    assert np.array_equal(decoded, np.where(GREY > 140, 255, 0))


def test_transparent_areas_lie_on_black(tmp_path, reference):
    image = with_alpha("RGB")
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :128] = 0
    image.putalpha(Image.fromarray(alpha))
    decoded = decode_image(save(tmp_path / "half.png", image), SMALL)
    assert decoded[:, :30].max() == 0
    assert close(decoded[:, 34:], reference[:, 34:])

    palette = palette_reversed()
    palette.info["transparency"] = 255 - int(GREY[0, 0])
    decoded = decode_image(save(tmp_path / "p.png", palette, transparency=5), SMALL)
    assert decoded[:6, :6].max() == 0  # grey 250 is the transparent index here


def test_colour_becomes_luminance(tmp_path):
    colours = np.zeros((64, 64, 3), np.uint8)
    colours[:, :21, 0] = colours[:, 21:42, 1] = colours[:, 42:, 2] = 255
    decoded = decode_image(save(tmp_path / "c.png", Image.fromarray(colours)), SMALL)
    assert decoded[0, [10, 30, 52]].tolist() == [76, 150, 29]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    tall = radiograph(240, 160)
    wanted = decode_image(save(tmp_path / "up.png", Image.fromarray(tall)), SMALL)
    steps = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True),
             5: (1, True), 6: (1, False), 7: (3, True), 8: (3, False)}  # fmt: skip
    turns, mirrored = steps[orientation]
    stored = np.rot90(np.fliplr(tall) if mirrored else tall, turns)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path / f"o.{suffix}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert close(decode_image(path, SMALL), wanted, mean=2.0)


def test_broken_exif_does_not_cost_the_picture(tmp_path, reference):
    path = save(
        tmp_path / "e.jpg", Image.fromarray(GREY), quality=95, exif=b"Exif\0\0II*\0\xff\xff"
    )
    assert close(decode_image(path, SMALL), reference)


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (64, 64), (8, 320), (1, 1), (3, 500)])
def test_any_shape_fits(tmp_path, fit, size, shape):
    path = save(tmp_path / "s.png", Image.fromarray(np.full(shape, 200, np.uint8)))
    decoded = decode_image(path, Preprocessing(image_size=size, fit=fit, **ONE))
    assert decoded.shape == size
    if fit != "pad":
        assert (decoded == 200).all()
    else:
        ratio = min(size[0] / shape[0], size[1] / shape[1])
        expected = max(1, round(shape[0] * ratio)) * max(1, round(shape[1] * ratio))
        assert (decoded == 200).sum() == expected
        assert set(np.unique(decoded)) <= {0, 200}


def test_pad_puts_the_whole_picture_into_the_middle(tmp_path):
    path = save(tmp_path / "w.png", Image.fromarray(np.full((50, 100), 90, np.uint8)))
    decoded = decode_image(path, SMALL)
    assert (decoded[16:48] == 90).all()
    assert decoded[:16].max() == decoded[48:].max() == 0


def test_crop_takes_the_centre(tmp_path):
    strip = np.zeros((64, 192), np.uint8)
    strip[:, 64:128] = 255
    path = save(tmp_path / "c.png", Image.fromarray(strip))
    crop = Preprocessing(image_size=(64, 64), fit="crop", **ONE)
    assert (decode_image(path, crop) == 255).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_pillows_own(tmp_path, interpolation):
    path = save(tmp_path / "r.png", Image.fromarray(GREY))
    preprocessing = Preprocessing(image_size=(48, 48), interpolation=interpolation, **ONE)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = np.asarray(Image.fromarray(GREY).resize((48, 48), filters[interpolation]))
    assert np.array_equal(decode_image(path, preprocessing), expected)


def test_a_jpeg_is_scaled_while_it_is_decoded_without_a_visible_change(tmp_path):
    large = radiograph(1024, 1024)
    jpeg = save(tmp_path / "large.jpg", Image.fromarray(large), quality=95)
    with Image.open(jpeg) as image:
        whole = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    difference = np.abs(decode_image(jpeg, SMALL).astype(int) - whole)
    assert difference.mean() < 0.5
    assert difference.max() <= 4


def test_a_jpeg_keeps_twice_the_target_for_the_resize(tmp_path):
    """Checkers of 4 pixels: halved once too often, they are off by 17 levels instead of 2."""
    checkers = np.random.default_rng(0).integers(0, 2, (128, 128)) * 200 + 20
    large = np.kron(checkers, np.ones((4, 4))).astype(np.uint8)
    jpeg = save(tmp_path / "checkers.jpg", Image.fromarray(large), quality=95)
    with Image.open(jpeg) as image:
        whole = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    assert close(decode_image(jpeg, SMALL), whole, mean=4.0)


def test_several_encoders_get_what_each_would_get_alone(tmp_path):
    jpeg = save(tmp_path / "large.jpg", Image.fromarray(radiograph(900, 700)), quality=90)
    sizes = [(64, 64), (200, 200), (64, 64), (90, 120)]
    wanted = [Preprocessing(image_size=size, **ONE) for size in sizes]
    together = decode_images(jpeg, wanted)
    for preprocessing, decoded in zip(wanted, together, strict=True):
        assert np.array_equal(decoded, decode_image(jpeg, preprocessing))


def jpeg_bytes(**options):
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "PNG")
    return buffer.getvalue()


JPEG, PNG = jpeg_bytes(), png_bytes()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DICOM = bytes(128) + b"DICM" + bytes(200)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (JPEG[: len(JPEG) * 6 // 10], "truncated"),
        (JPEG[:-2], "truncated"),
        (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated"),
        (jpeg_bytes(progressive=True)[:-200], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-12], "truncated"),
        (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "a checksum does not match"),
        (b"", "empty"),
        (LFS, "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML page"),
        (b"<HTML><body>sign in</body></HTML>", "HTML page"),
        (b"No acute cardiopulmonary abnormality.", "is text"),
        (DICOM, "DICOM"),
        (b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100", "DICOM"),
        (bytes(range(256)) * 4, "no picture in a known format"),
        (JPEG[:300], "truncated|damaged|no picture"),
    ],
)
def test_each_broken_file_has_its_own_reason(tmp_path, content, reason):
    path = tmp_path / "patient-12345.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(path, SMALL)
    assert "12345" not in str(caught.value)


def test_trailing_bytes_do_no_harm(tmp_path, reference):
    (tmp_path / "t.jpg").write_bytes(JPEG + os.urandom(900))
    assert close(decode_image(tmp_path / "t.jpg", SMALL), reference)


def test_missing_files_folders_and_odd_paths_have_reasons(tmp_path):
    for path, reason in [
        (tmp_path / "none.png", "missing"),
        (tmp_path / "none" / "none.png", "missing"),
        (tmp_path, "no file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "nul\0.png", "cannot be read"),
    ]:
        with pytest.raises(ImageError, match=reason):
            decode_image(path, SMALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_says_so(tmp_path):
    path = save(tmp_path / "f.png", Image.fromarray(GREY))
    path.chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        decode_image(path, SMALL)


def png_of_size(width, height, depth=1, colour=0):
    """A PNG of a few bytes that claims any size."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 24_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_unopened(tmp_path, side):
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    for action in ("error", "ignore"):  # Pillow warns, which must not be what stops it
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(ImageError, match="over 89,478,485 pixels"):
                decode_image(tmp_path / "bomb.png", SMALL)


def test_16_bit_colour_is_refused_not_cut_to_8(tmp_path):
    (tmp_path / "deep.png").write_bytes(png_of_size(8, 8, depth=16, colour=2))
    with pytest.raises(ImageError, match="16 bits with colour"):
        decode_image(tmp_path / "deep.png", SMALL)


def test_pillow_must_not_be_told_to_accept_truncated_files(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(EncoderError, match="accept truncated files"):
        decode_image(save(tmp_path / "x.png", Image.fromarray(GREY)), SMALL)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_an_image_error_or_a_picture(tmp_path_factory, data):
    """Whatever happens to a file, it is decoded or quarantined; nothing else ever comes out."""
    content = bytearray(data.draw(st.sampled_from([JPEG, PNG, *OTHERS])))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ImageError):
        assert decode_image(path, SMALL).shape == (64, 64)


def encoded(kind, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_TINY = Image.fromarray(radiograph(40, 40))
OTHERS = [
    encoded("GIF", _TINY),
    encoded("BMP", _TINY),
    encoded("TIFF", _TINY),
    encoded("TIFF", _TINY, compression="tiff_lzw"),
    encoded("WEBP", _TINY, lossless=True),
    encoded("JPEG2000", _TINY),
    encoded("JPEG", _TINY.convert("CMYK")),
]


def test_many_threads_give_the_same_pictures(tmp_path):
    paths = []
    for number in range(12):
        picture = Image.fromarray(np.roll(GREY, number * 17, axis=1))
        paths.append(save(tmp_path / f"{number}.{'jpg' if number % 2 else 'png'}", picture))
    alone = [decode_image(path, SMALL) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: decode_image(path, SMALL), paths * 5))
    for number, decoded in enumerate(together):
        assert np.array_equal(decoded, alone[number % 12])


def test_levels_become_input_by_mean_and_std():
    greys = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    preprocessing = Preprocessing(image_size=(2, 2), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 1.0))
    images = to_input(greys, preprocessing)
    assert images.shape == (1, 3, 2, 2)
    assert torch.allclose(images[0, 0], torch.tensor([[-1.0, 1.0], [-0.6, -0.2]]), atol=1e-6)
    assert torch.allclose(images[0, 1], torch.tensor([[-2.0, 8.0], [0.0, 2.0]]), atol=1e-5)
    assert torch.allclose(images[0, 2], greys[0] / 255.0)


def test_levels_become_the_range_of_torchxrayvision():
    greys = torch.tensor([[[0, 255, 100]]], dtype=torch.uint8)
    preprocessing = Preprocessing(
        image_size=(1, 3), value_range=(-1024, 1024), mean=(0.0,), std=(1.0,)
    )
    expected = (2 * greys.float() / 255 - 1) * 1024
    assert torch.allclose(to_input(greys, preprocessing)[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (0, 5)}, "below 1 pixel"),
        ({"std": (0.5, 0.5)}, "one value per channel"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "for 1 or 3 channels"),
        ({"std": (0.0,)}, "not above 0"),
    ],
)
def test_impossible_preprocessing_is_refused(values, message):
    from featcache.config import validate

    with pytest.raises(ConfigError, match=message):
        validate(Preprocessing, {"image_size": (8, 8), **ONE} | values)


def test_a_size_of_no_whole_patches_offers_its_neighbours():
    SMALL.check_patches(16, encoder="vit")
    with pytest.raises(UsageError, match="14-pixel patches of `vit`") as caught:
        SMALL.check_patches(14, encoder="vit")
    assert caught.value.fix == "--image-size 56 or --image-size 70"


def test_the_record_says_every_rule():
    record = SMALL.record()
    assert {"image_size", "fit", "interpolation", "mean", "std", "value_range", "antialias",
            "channels", "decode", "decode_rules"} <= set(record)  # fmt: skip
