"""The embedded radiographs and the masks of their lungs."""

import numpy as np
from PIL import Image

from featcache.datasets.sample import Options, read, sample_folder
from featcache.manifest.masks import decode_mask


def test_masks_of_the_lungs_have_their_pictures_size(tmp_path):
    manifest = read(sample_folder(), tmp_path / "demo", options=Options())
    rows = zip(
        manifest.images["source"].to_pylist(),
        manifest.images["image_path"].to_pylist(),
        manifest.images["mask"].to_pylist(),
        strict=True,
    )
    annotated = 0
    for number, (source, picture, text) in enumerate(rows):
        assert (text is not None) == (source == "kermany512")
        if text is None:
            continue
        annotated += 1
        with Image.open(sample_folder() / text.removeprefix("file:")) as mask:
            assert mask.mode == "1"
            size = mask.size
        with Image.open(sample_folder() / picture) as image:
            assert image.size == size
        if number % 50 == 0:
            share = np.mean(decode_mask(text, sample_folder()))
            assert 0.15 < share < 0.55
    assert annotated == 540
