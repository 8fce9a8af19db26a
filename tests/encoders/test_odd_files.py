"""A folder of odd files that need not lie in the repository, named by FEATCACHE_ODD."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.encoders.decode import Preprocessing, decode_image
from featcache.errors import ImageError

FOLDER = os.environ.get("FEATCACHE_ODD", "")


def size_of(grey: np.ndarray) -> Preprocessing:
    return Preprocessing(image_size=grey.shape, mean=(0.5,), std=(0.5,))


def stretched(grey: np.ndarray) -> np.ndarray:
    levels = grey.astype(float) - grey.min()
    return levels * (255 / max(levels.max(), 1))


@pytest.mark.skipif(not FOLDER, reason="FEATCACHE_ODD names no folder of odd files")
def test_every_odd_file_is_decoded_or_refused_as_its_table_says():
    """Rows of `odd/table.csv`: file, kind, what, should_decode, lossless, reference.

    `reference` is relative to the folder, in min-max levels. A word that is neither yes nor no
    leaves the outcome open; what is decoded has to be like its reference all the same.
    """
    root = Path(FOLDER)
    with (root / "odd/table.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] != "text"]
    wrong = []
    for row in rows:
        reference = np.zeros((64, 64), np.uint8)
        if row["reference"]:
            with Image.open(root / row["reference"]) as image:
                reference = np.asarray(image.convert("L"))
        try:
            grey = decode_image(root / "odd" / row["file"], size_of(reference))
        except ImageError as error:
            if row["should_decode"] in ("yes", "only with force", "only by content"):
                wrong.append((row["file"], error.what))
            continue
        if row["should_decode"] in ("no", "refuse"):
            wrong.append((row["file"], "was decoded"))
        if row["reference"] and "transparent" not in row["file"]:
            off = np.abs(stretched(grey) - stretched(reference))  # a window moves both ends
            if off.mean() > (0.6 if row["lossless"] == "yes" else 4.0):
                wrong.append((row["file"], f"is off by {off.mean():.2f} levels"))
    assert rows
    assert not wrong
