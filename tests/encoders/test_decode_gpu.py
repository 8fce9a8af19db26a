"""JPEGs by way of a device: what goes there, and how far it is from the CPU's way."""

import io

import numpy as np
import pytest
import torch
from encoders.test_decode import radiograph
from PIL import Image

from featcache.encoders.decode import (
    VIEWS,
    Preprocessing,
    decode_image,
    is_plain_jpeg,
    read_picture,
)
from featcache.encoders.decode_gpu import decode_batch_on_gpu, decode_batches_on_gpu, fit_on_device

ONE = {"mean": (0.5,), "std": (0.5,)}
PICTURE = radiograph(700, 600)
EDGES = PICTURE.copy()
EDGES[300:400, 100:300] = np.kron(np.eye(10, 20) > 0, np.ones((10, 10))) * 255  # as burnt-in text


def jpeg(levels=PICTURE, mode="L", **options):
    file = io.BytesIO()
    Image.fromarray(levels).convert(mode).save(file, "JPEG", **({"quality": 95} | options))
    return file.getvalue()


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def other_format(kind):
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, kind)
    return file.getvalue()


def colours_under_usual_numbers():
    """Red, green and blue as components 1, 2, 3: only Adobe's mark says that they are colours."""
    content = jpeg(mode="RGB", keep_rgb=True)
    frame, scan = b"R\x11\x00G\x11\x00B\x11\x00", b"\x03R\x00G\x00B\x00"
    assert content.count(frame) == content.count(scan) == 1
    return content.replace(frame, b"\x01\x11\x00\x02\x11\x00\x03\x11\x00").replace(
        scan, b"\x03\x01\x00\x02\x00\x03\x00"
    )


ELSEWHERE = {
    "colours by Adobe's mark": colours_under_usual_numbers(),
    "png": other_format("PNG"),
    "turned": jpeg(exif=exif(6)),
    "cmyk": jpeg(mode="CMYK"),
    "colours as such": jpeg(mode="RGB", keep_rgb=True),
    "cut off": jpeg()[:-400],
    "empty": b"",
    "a header alone": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize(
    "content",
    [jpeg(), jpeg(mode="RGB"), jpeg(progressive=True), jpeg(exif=exif(1))],
    ids=["grey", "colour", "progressive", "upright"],
)
def test_plain_jpegs_are_decoded_on_the_device(content):
    assert is_plain_jpeg(content)
    batch = decode_batch_on_gpu([content], Preprocessing(image_size=(64, 64), **ONE), "cpu")
    assert batch.fall_back == []
    assert batch.greys.float().std() > 20


def test_all_others_are_left_to_the_cpu_and_keep_their_place():
    contents = [jpeg(), *ELSEWHERE.values(), jpeg()]
    batch = decode_batch_on_gpu(contents, Preprocessing(image_size=(64, 64), **ONE), "cpu")
    assert batch.fall_back == list(range(1, 1 + len(ELSEWHERE)))
    assert not batch.greys[1:-1].any()
    assert torch.equal(batch.greys[0], batch.greys[-1])
    assert not any(is_plain_jpeg(content) for content in ELSEWHERE.values())


def test_one_that_the_decoder_refuses_does_not_take_the_batch_with_it():
    broken = bytearray(jpeg())
    scan = broken.index(b"\xff\xda")
    del broken[scan:-2]  # a whole header, no pixels
    assert is_plain_jpeg(bytes(broken))
    batch = decode_batch_on_gpu(
        [jpeg(), bytes(broken), jpeg()], Preprocessing(image_size=(32, 32), **ONE), "cpu"
    )
    assert batch.fall_back == [1]
    assert batch.greys[0].any()
    assert torch.equal(batch.greys[0], batch.greys[2])


def test_several_encoders_get_what_each_would_get_alone():
    kinds = [
        Preprocessing(image_size=size, view=view, **ONE)
        for size, view in [((64, 64), "identity"), ((32, 64), "identity"), ((64, 64), "flip")]
    ]
    contents = [jpeg(), ELSEWHERE["png"], jpeg(EDGES)]
    for batch, kind in zip(decode_batches_on_gpu(contents, kinds, "cpu"), kinds, strict=True):
        alone = decode_batch_on_gpu(contents, kind, "cpu")
        assert torch.equal(batch.greys, alone.greys)
        assert batch.fall_back == alone.fall_back == [1]


def test_a_batch_without_any_plain_jpeg_is_no_error():
    preprocessing = Preprocessing(image_size=(32, 48), **ONE)
    batch = decode_batch_on_gpu([b"", b"x"], preprocessing, "cpu")
    assert (batch.greys.shape, batch.fall_back) == ((2, 32, 48), [0, 1])
    assert decode_batch_on_gpu([], preprocessing, "cpu").fall_back == []


def test_a_file_that_cannot_be_read_is_left_to_the_cpu_which_says_why(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    contents = [read_picture(tmp_path / name) for name in ("a.jpg", "missing.jpg", "")]
    assert (contents[0], contents[1:]) == (jpeg(), [b"", b""])
    batch = decode_batch_on_gpu(contents, Preprocessing(image_size=(32, 32), **ONE), "cpu")
    assert batch.fall_back == [1, 2]


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("view", VIEWS)
def test_size_place_and_view_are_those_of_the_cpu(tmp_path, fit, interpolation, view):
    """The same pixels in, without the JPEG decoder's shrinking: at most one grey level apart."""
    preprocessing = Preprocessing(
        image_size=(64, 96), fit=fit, interpolation=interpolation, view=view, **ONE
    )
    Image.fromarray(EDGES).save(tmp_path / "a.png")
    cpu = decode_image(tmp_path / "a.png", preprocessing)
    device = fit_on_device(torch.from_numpy(EDGES)[None], preprocessing).numpy()
    assert device.shape == cpu.shape
    assert np.abs(device.astype(int) - cpu).max() <= 1


def test_a_picture_smaller_than_asked_is_enlarged_alike(tmp_path):
    preprocessing = Preprocessing(image_size=(64, 64), **ONE)
    Image.fromarray(PICTURE[:40, :30]).save(tmp_path / "a.png")
    cpu = decode_image(tmp_path / "a.png", preprocessing)
    device = fit_on_device(torch.from_numpy(PICTURE[:40, :30].copy())[None], preprocessing)
    assert np.abs(device.numpy().astype(int) - cpu).max() <= 1


def test_the_whole_way_stays_near_the_cpus(tmp_path):
    """The CPU lets the decoder shrink first, so the greys differ a little."""
    preprocessing = Preprocessing(image_size=(64, 64), **ONE)
    content = jpeg(radiograph(1100, 900), mode="RGB")
    (tmp_path / "a.jpg").write_bytes(content)
    cpu = decode_image(tmp_path / "a.jpg", preprocessing).astype(int)
    device = decode_batch_on_gpu([content], preprocessing, "cpu").greys[0].numpy()
    assert np.abs(device - cpu).mean() < 1
    assert np.abs(device - cpu).max() < 16


@pytest.mark.gpu
def test_cuda_decodes_what_the_cpu_decodes():
    preprocessing = Preprocessing(image_size=(224, 224), **ONE)
    contents = [jpeg(), jpeg(mode="RGB"), *ELSEWHERE.values(), jpeg(progressive=True)]
    cuda = decode_batch_on_gpu(contents, preprocessing, "cuda")
    cpu = decode_batch_on_gpu(contents, preprocessing, "cpu")
    assert cuda.greys.is_cuda
    assert cuda.fall_back == cpu.fall_back
    difference = (cuda.greys.cpu().int() - cpu.greys.int()).abs()
    assert difference.max() <= 4
    assert difference.float().mean() < 0.5
