"""Masks from cached tokens, by the recipes: stand-ins of RSNA and SIIM, and the embedded lungs."""

import json

import pyarrow as pa
import pytest
from conftest_extract import sample_rows

from featcache.datasets.sample import sample_folder
from featcache.manifest.table import open_manifest, write_manifest

pytestmark = [pytest.mark.weights, pytest.mark.slow]
QUICK = (
    "--set fractions=[100] --set seeds=1 --set steps=20 --set epochs=1 --set draws=100 "
    "--set random_encoder=false"
)
GAPS = ("Adaptor minus raw", "paired: same subsets, seeds and draws")


@pytest.mark.parametrize("dataset", ["rsna", "siim"])
def test_recipe_makes_masks_of_a_stand_in_and_runs_again_untouched(clone, dataset):
    line = f"SETTINGS='{QUICK}' sh pipelines/segment-{dataset}.sh"
    first = clone.type(line)
    assert first.returncode == 0, first.stderr
    for row in ("all empty", "mean training mask", "raw backbone", *GAPS, "minus all empty"):
        assert row in first.stdout
    assert f"{dataset} (synthetic stand-in)" in first.stdout
    assert "none stand beside this synthetic stand-in" in first.stdout.replace("\n", " ")
    again = clone.type(line)
    assert "found finished, left untouched" in again.stdout
    root = clone.root / f"segment-{dataset}-stand-in"
    found = clone.type(f"featcache ground --run featcache-data --root '{root}' --json")
    assert found.returncode == 0, found.stderr
    methods = [row["method"] for row in json.loads(found.stdout)["rows"]]
    assert methods[-2:] == ["Adaptor minus mean training mask", "Adaptor minus untrained"]


def test_lungs_of_the_embedded_radiographs_need_no_data(clone):
    folder = clone.root / "manifests" / "demo"
    manifest = open_manifest(folder)
    mask_of = {row["key"]: f"file:{row['lung_mask']}" for row in sample_rows(1290)}
    masks = pa.array([mask_of[key] for key in manifest.keys], pa.string())
    write_manifest(
        folder,
        manifest.images.append_column("mask", masks),
        manifest.texts,
        dataset="sample",
        image_root=sample_folder(),
    )
    line = f"SETTINGS='{QUICK}' sh pipelines/segment-lungs.sh"
    first = clone.type(line)
    assert first.returncode == 0, first.stderr
    # Every picture has lungs: the mask to beat is the mean one.
    for row in ("all empty", *GAPS, "minus mean training mask"):
        assert row in first.stdout
    again = clone.type(line)
    assert "found finished, left untouched" in again.stdout


def test_set_without_grid_and_manifest_without_masks_are_one_sentence(clone):
    done = clone.type("featcache segment")
    assert done.returncode == 1
    assert "has no column `mask`" in done.stderr
    assert "Traceback" not in done.stderr
