"""Masks from cached tokens, by the recipes: stand-ins of RSNA and SIIM, and the embedded lungs."""

import json

import pytest

pytestmark = [pytest.mark.weights, pytest.mark.slow]
QUICK = (
    "--set fractions=[100] --set seeds=1 --set steps=20 --set epochs=1 --set draws=100 "
    "--set random_encoder=false"
)


@pytest.mark.parametrize("dataset", ["rsna", "siim"])
def test_recipe_makes_masks_of_a_stand_in_and_runs_again_untouched(clone, dataset):
    line = f"SETTINGS='{QUICK}' sh pipelines/segment-{dataset}.sh"
    first = clone.type(line)
    assert first.returncode == 0, first.stderr
    for row in ("all empty", "mean training mask", "raw backbone", "minus raw backbone"):
        assert row in first.stdout
    assert f"{dataset} (synthetic stand-in)" in first.stdout
    assert "none stand beside this synthetic stand-in" in first.stdout.replace("\n", " ")
    again = clone.type(line)
    assert "found finished, left untouched" in again.stdout
    root = clone.root / f"segment-{dataset}"
    found = clone.type(f"featcache ground --run featcache-data --root '{root}' --json")
    assert found.returncode == 0, found.stderr
    methods = [row["method"] for row in json.loads(found.stdout)["rows"]]
    assert methods[-2:] == ["Adaptor", "Adaptor minus untrained"]


def test_set_without_grid_and_manifest_without_masks_are_one_sentence(clone):
    done = clone.type("featcache segment")
    assert done.returncode == 1
    assert "has no column `mask`" in done.stderr
    assert "Traceback" not in done.stderr
