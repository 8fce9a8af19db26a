"""True masks: joined by key, resized as the encoder saw the picture."""

import numpy as np
import pytest
from heads.conftest import image_spec
from heads.kit_masks import masked_toy
from PIL import Image

from featcache.errors import CacheError, ManifestError
from featcache.heads.segment_masks import masked_images, pixel_size, refuse_without_grid
from featcache.manifest.masks import encode_boxes


def test_masks_join_by_key_and_say_which_images_have_one(tmp_path):
    toy = masked_toy(tmp_path)
    masked = masked_images(toy.images, toy.manifest)
    text_of = dict(zip(toy.manifest.keys, toy.manifest.images["mask"].to_pylist(), strict=True))
    assert [text_of[key] != "" for key in masked.labelled.keys] == masked.positive.tolist()
    numbers = masked.labelled.of("test")
    found = masked.masks(numbers, (16, 16)).of(numbers.tolist())
    areas = found.sum(axis=(1, 2))
    assert set(areas.tolist()) == {0, 64}  # 16 x 16 of 32 x 32 pixels, halved
    assert ((areas > 0) == masked.positive[numbers]).all()


def test_wide_picture_is_padded_like_the_encoder_pads_it(tmp_path):
    def wide(columns):
        columns["mask"] = [
            encode_boxes(16, 32, [(0, 0, 32, 16)]) if mask else mask for mask in columns["mask"]
        ]

    toy = masked_toy(tmp_path, edit=wide)
    masked = masked_images(toy.images, toy.manifest)
    number = int(np.flatnonzero(masked.positive)[0])
    found = masked.masks(np.array([number]), (16, 16)).of([number])[0]
    assert found[4:12].all()
    assert not found[:4].any()
    assert not found[12:].any()


def test_mask_too_thin_for_half_a_pixel_is_kept(tmp_path):
    def thin(columns):
        columns["mask"] = [
            encode_boxes(32, 32, [(3, 5, 1, 20)]) if mask else mask for mask in columns["mask"]
        ]

    toy = masked_toy(tmp_path, edit=thin)
    masked = masked_images(toy.images, toy.manifest)
    numbers = np.flatnonzero(masked.positive)
    masks = masked.masks(numbers, (4, 4))
    assert masks.thin == len(numbers)
    assert (masks.of(numbers.tolist()).sum(axis=(1, 2)) > 0).all()


def test_content_of_mask_files_has_a_hash_that_the_manifest_lacks(tmp_path):
    def in_files(columns):
        columns["mask"] = [f"file:{i % 2}.png" if m else m for i, m in enumerate(columns["mask"])]

    for name in ("0.png", "1.png"):
        Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(tmp_path / name)
    toy = masked_toy(tmp_path, edit=in_files)
    first = masked_images(toy.images, toy.manifest).facts()
    assert first == masked_images(toy.images, toy.manifest).facts()
    assert list(first) == ["mask_files"]
    Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / "1.png")
    assert masked_images(toy.images, toy.manifest).facts() != first


def test_masks_in_the_manifest_itself_need_no_hash(tmp_path):
    toy = masked_toy(tmp_path)
    assert masked_images(toy.images, toy.manifest).facts() == {}


def test_what_is_not_annotated_is_counted_not_taken_for_empty(tmp_path):
    def some_unknown(columns):
        columns["mask"] = [None if i % 9 == 0 else m for i, m in enumerate(columns["mask"])]

    toy = masked_toy(tmp_path, edit=some_unknown)
    masked = masked_images(toy.images, toy.manifest)
    assert masked.labelled.left_out == {"without a mask annotation": 10}
    assert len(masked.labelled.keys) == 80


def test_manifest_without_masks_is_refused(tmp_path):
    toy = masked_toy(tmp_path, edit=lambda columns: columns.pop("mask"))
    with pytest.raises(ManifestError, match="has no column `mask`"):
        masked_images(toy.images, toy.manifest)


def test_split_without_a_mask_is_refused(tmp_path):
    def none_in_test(columns):
        pairs = zip(columns["mask"], columns["split"], strict=True)
        columns["mask"] = ["" if split == "test" else mask for mask, split in pairs]

    toy = masked_toy(tmp_path, edit=none_in_test)
    with pytest.raises(ManifestError, match="no image of split `test` has a mask"):
        masked_images(toy.images, toy.manifest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": None}, "has no grid of patch tokens"),
        ({"preprocessing": {"fit": "crop"}}, "does not show the whole picture"),
        ({"preprocessing": {"view": "flip"}}, "does not show the whole picture"),
    ],
)
def test_set_whose_tokens_have_no_places_is_refused(tmp_path, changes, words):
    with pytest.raises(CacheError, match=words) as caught:
        refuse_without_grid(image_spec(**changes), tmp_path)
    assert caught.value.where == str(tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("grid", "expected"), [((14, 14), 224), ((16, 16), 224), ((7, 7), 224), ((37, 37), 222)]
)
def test_masks_have_whole_pixels_per_token(grid, expected):
    assert pixel_size(grid, 224) == (expected, expected)
    assert pixel_size((14, 28), 224) == (112, 224)
