"""Masks as text: what is written comes back, what cannot be is refused, shares are areas."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from featcache.encoders.preprocessing import Preprocessing, place, render
from featcache.errors import ManifestError
from featcache.manifest.checks import conform_images
from featcache.manifest.masks import (
    decode_mask,
    encode_boxes,
    encode_runs,
    mask_problem,
    resize_mask,
)
from featcache.manifest.table import open_manifest, write_manifest

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


@given(masks)
def test_runs_come_back_as_they_were(mask):
    back = decode_mask(encode_runs(mask), Path())
    if mask.any():
        assert np.array_equal(back, mask)
    else:
        assert back is None
        assert encode_runs(mask) == ""


def test_runs_go_row_by_row_from_zero():
    mask = np.zeros((3, 4), bool)
    mask[0, 3] = mask[1, 0] = mask[2, 1] = True
    assert encode_runs(mask) == "runs:3x4:3,2;9,1"


def test_boxes_are_slices_and_unite(tmp_path):
    text = encode_boxes(6, 8, [(1.0, 2.0, 3.0, 2.0), (3, 3, 5, 3)])
    assert text == "boxes:6x8:1,2,3,2;3,3,5,3"
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:4] = True
    mask[3:6, 3:8] = True
    assert np.array_equal(decode_mask(text, tmp_path), mask)
    assert encode_boxes(6, 8, []) == ""


def test_a_box_takes_in_every_pixel_that_it_touches(tmp_path):
    mask = decode_mask(encode_boxes(5, 5, [(1.25, 0.5, 1.5, 0.25)]), tmp_path)
    assert np.argwhere(mask).tolist() == [[0, 1], [0, 2]]
    # 0.1 + 0.2 is a little over 0.3, which is dust and no pixel.
    mask = decode_mask(encode_boxes(1, 10, [(10 * 0.1, 0, 10 * (0.1 + 0.2) - 1, 1)]), tmp_path)
    assert mask[0].nonzero()[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (" ", "is none of boxes:HxW:..., runs:HxW:... and file:..."),
        ("boxes:4:1,1,1,1", "is none of"),
        ("polygons:4x4:1,1", "is none of"),
        ("boxes:4x4:", "boxes that are not x,y,w,h"),
        ("boxes:4x4:1,1,1", "boxes that are not x,y,w,h"),
        ("boxes:4x4:1,1,1,1;1,1,1", "boxes that are not x,y,w,h"),
        ("boxes:4x4:1,1,nan,1", "boxes that are not x,y,w,h"),
        ("boxes:4x4:1,1,0,1", "a box without area"),
        ("boxes:4x4:1,1,-1,1", "a box without area"),
        ("boxes:4x4:-1,1,2,1", "a box that leaves its image"),
        ("boxes:4x8:1,1,2,4", "a box that leaves its image"),
        ("boxes:4x8:5,1,4,1", "a box that leaves its image"),
        ("runs:4x4:", "runs that are not start,length"),
        ("runs:4x4:1,1;2", "runs that are not start,length"),
        ("runs:4x4:-1,1", "runs that are not start,length"),
        ("runs:4x4:1,0", "a run of length 0"),
        ("runs:4x4:1,3;3,1", "overlap or are not sorted"),
        ("runs:4x4:5,1;1,1", "overlap or are not sorted"),
        ("runs:4x4:14,3", "beyond the last pixel"),
        ("runs:0x4:0,1", "no pixel"),
        ("runs:99999999x99999999:0,1", "of over 89,478,485"),
        ("file:", "no file below the image root"),
        ("file:/etc/mask.png", "no file below the image root"),
        ("file:../mask.png", "no file below the image root"),
        ("file:a/../../mask.png", "no file below the image root"),
    ],
)
def test_what_is_no_mask_is_refused_in_words(text, problem, tmp_path):
    assert problem in mask_problem(text)
    with pytest.raises(ManifestError) as caught:
        decode_mask(text, tmp_path, where="row 7 of images.parquet")
    assert problem in str(caught.value)
    assert "row 7 of images.parquet" in str(caught.value)


def test_good_texts_have_no_problem():
    for text in (
        "",
        "boxes:4x8:0,0,8,4",
        "boxes:4x8:0.5,0,7.5,1e-1",
        "runs:4x4:0,16",
        "file:a.png",
    ):
        assert mask_problem(text) is None


def test_boxes_that_leave_the_image_are_not_written():
    with pytest.raises(ManifestError, match="leaves its image"):
        encode_boxes(4, 4, [(1, 1, 4, 1)])


def test_a_file_is_inside_where_it_is_not_zero(tmp_path):
    levels = np.zeros((3, 5), np.uint8)
    levels[1, 2:4] = (1, 255)
    grey = Image.fromarray(levels)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(levels > 0).save(tmp_path / "bits.png")
    grey.convert("RGBA").save(tmp_path / "alpha.png")
    palette = grey.copy()
    palette.putpalette([9, 9, 9] * 256)
    palette.save(tmp_path / "palette.png")
    for name in ("grey", "bits", "alpha", "palette"):
        assert np.array_equal(decode_mask(f"file:{name}.png", tmp_path), levels > 0), name


def test_a_file_that_cannot_be_read_is_named_by_its_row_only(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"no picture")
    for name, reason in (("secret", "cannot be read"), ("secret2", "is missing")):
        with pytest.raises(ManifestError, match=reason) as caught:
            decode_mask(f"file:{name}.png", tmp_path, where="row 3")
        assert "secret" not in str(caught.value)
        assert "row 3" in str(caught.value)


def test_a_jpeg_is_no_mask(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "lossy.png", "JPEG")
    with pytest.raises(ManifestError, match="PNG, TIFF, BMP, GIF"):
        decode_mask("file:lossy.png", tmp_path)


def test_shares_are_areas():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[2:, 2:] = True
    half = resize_mask(mask, 2, 2)
    assert half.tolist() == [[0.25, 0.0], [0.0, 1.0]]
    third = resize_mask(np.array([[True, False]]), 3, 3, fit="squash")
    assert np.allclose(third, [[1, 0.5, 0]] * 3)
    twice = resize_mask(mask, 8, 8)
    assert np.array_equal(twice, np.kron(mask, np.ones((2, 2))))


@given(masks, st.integers(1, 12), st.integers(1, 12))
def test_squashing_keeps_the_area(mask, height, width):
    shares = resize_mask(mask, height, width, fit="squash")
    assert shares.shape == (height, width)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.mean() == pytest.approx(mask.mean(), abs=1e-6)
    assert resize_mask(np.ones_like(mask), height, width, fit="squash").min() == 1
    assert resize_mask(np.zeros_like(mask), height, width, fit="squash").max() == 0


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(224, 224), (96, 64), (7, 30)]))
def test_padding_lies_where_the_decoder_pads(rows, columns, target):
    preprocessing = Preprocessing(image_size=target, fit="pad", mean=(0.0,), std=(1.0,))
    placement = place((columns, rows), preprocessing)
    white = render(Image.new("L", (columns, rows), 255), placement, preprocessing)
    shares = resize_mask(np.ones((rows, columns), bool), *target, fit="pad")
    assert np.array_equal(shares, white / np.float32(255))


def images(masks):
    texts = [f"k{n}" for n in range(len(masks))]
    columns = dict.fromkeys(("key", "subject_id", "image_path", "source"), texts)
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    empty = dict.fromkeys(("study_id", "view_position", "split"), pa.nulls(len(masks), pa.string()))
    return pa.table({**table, **empty, "mask": pa.array(masks, pa.string())})


def test_a_manifest_keeps_masks_and_tells_empty_from_not_annotated(tmp_path):
    texts = [None, "", "boxes:4x4:0,0,1,1", "runs:4x4:3,2"]
    made = write_manifest(tmp_path / "m", images(texts), dataset="x", image_root=tmp_path)
    assert made.images["mask"].to_pylist() == texts
    assert open_manifest(tmp_path / "m").images["mask"].to_pylist() == texts
    other = write_manifest(tmp_path / "m", images(["", *texts[1:]]), dataset="x",
                           image_root=tmp_path)  # fmt: skip
    assert other.meta.hash != made.meta.hash
    assert conform_images(images(texts), tmp_path).column_names[-1] == "mask"


def test_a_manifest_refuses_bad_masks_by_row(tmp_path):
    texts = ["", "boxes:4x4:0,0,5,1", "runs:4x4:3,2", "runs:4x4:3", "boxes:4x4:1,1,9,1"]
    with pytest.raises(ManifestError) as caught:
        write_manifest(tmp_path / "m", images(texts), dataset="x", image_root=tmp_path)
    assert "`mask` has a box that leaves its image: rows 2, 5" in str(caught.value)
    assert "`mask` has runs that are not start,length;start,length;...: row 4" in str(caught.value)
