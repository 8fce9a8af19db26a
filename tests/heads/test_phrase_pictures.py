"""Pictures of maps: what is drawn where, and what a file's name gives away."""

import numpy as np
import pytest
from heads.kit_masks import SIDE, masked_toy
from PIL import Image

from featcache.heads.phrase_pictures import OUTLINE, Pictures, draw
from featcache.heads.segment_masks import masked_images


def test_map_colours_the_right_half_and_the_mask_is_outlined_in_both():
    grey = np.full((8, 8), 100, np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1.0
    mask = np.zeros((8, 8), bool)
    mask[1:6, 1:6] = True
    drawn = draw(grey, heat, mask)
    assert drawn.shape == (8, 16, 3)
    assert (drawn[1, 1] == OUTLINE).all()
    assert (drawn[1, 9] == OUTLINE).all()
    assert (drawn[3, 3] == 100).all()  # inside the outline the picture is seen
    assert (drawn[7, 8] == 100).all()  # nothing where the map is lowest
    red, green, blue = drawn[7, 15].astype(int)
    assert red > 190
    assert green > 190
    assert blue == 40


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


def test_images_with_a_mask_come_first(masked):
    found = masked_images(masked.images, masked.manifest)
    pictures = Pictures(masked.manifest, found, (SIDE, SIDE))
    test, positive = found.labelled.of("test"), found.positive
    few = pictures.choose(4)
    assert few == test[positive[test]][:4].tolist()
    assert sorted(pictures.choose(1000)) == test.tolist()


def test_names_are_row_numbers_and_earlier_pictures_go(masked, tmp_path):
    found = masked_images(masked.images, masked.manifest)
    pictures = Pictures(masked.manifest, found, (SIDE, SIDE))
    (tmp_path / "row-999999.png").write_bytes(b"old")
    numbers = pictures.choose(2)
    maps = np.random.default_rng(0).random((2, 4, 4), dtype=np.float32)
    pictures.save(tmp_path, numbers, maps)  # the pictures themselves are not there: black
    rows = found.labelled.rows[numbers].tolist()
    names = [one.name for one in sorted(tmp_path.iterdir())]
    assert names == sorted(f"row-{row:06d}.png" for row in rows)
    with Image.open(tmp_path / names[0]) as picture:
        left = np.asarray(picture)[:, :SIDE]
    assert set(map(tuple, left.reshape(-1, 3).tolist())) == {(0, 0, 0), OUTLINE}
