"""Texts by sentence, from the manifest to retrieval, with real encoders."""

import json
import shutil

import numpy as np
import pytest
from recipes.conftest import TINY, balanced_rows

from featcache.cache.reader import FeatureSet, open_cache
from featcache.cli import main
from featcache.datasets.registry import make_manifest
from featcache.datasets.sample import sample_folder
from featcache.manifest.table import open_manifest
from featcache.workspace import Workspace

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def sample_of_few(tmp_path_factory):
    """The embedded sample's folder with the rows that were extracted once for all recipes."""
    folder = tmp_path_factory.mktemp("sample")
    keys = {row["key"] for row in balanced_rows()}
    head, *rows = (sample_folder() / "table.csv").read_text().splitlines(keepends=True)
    kept = [row for row in rows if keys & set(row.split(","))]
    (folder / "table.csv").write_text("".join([head, *kept]))
    return folder


def type_line(capsys, root, *words, code=0):
    assert main([*words, "--root", str(root), "--json", "--quiet"]) == code
    return json.loads(capsys.readouterr().out)


def test_an_image_has_many_positives_from_the_manifest_to_retrieval(
    trained_root, sample_of_few, tiny, tmp_path, capsys
):
    root = tmp_path / "sentences"
    made = type_line(
        capsys, root, "manifest", "sample", str(sample_of_few), "--text-unit", "sentence"
    )
    assert (made["images"], made["pairs"]) == (15, 45)
    words = ["--backbone", "none", "--text-encoder", "minilm-demo", "--set", "threads=1"]
    type_line(capsys, root, "extract", *words, "--scheduler", tiny.scheduler)

    # The pictures are those of another workspace: nobody encodes them for each unit of texts.
    images = trained_root / "features/image/lite0-demo"
    cache = open_cache(
        images, root / "features/text/minilm-demo", root / "manifests/sample", split="train"
    )
    assert cache.num_pairs == 18
    assert set(np.bincount(cache.image_rows)[cache.image_rows]) == {3}
    shared = np.bincount(cache.text_rows)
    assert shared.max() > 1

    settings = [word for one in TINY for word in ("--set", one)]
    run = type_line(capsys, root, "train-adaptor", "--backbone", str(images), *settings)
    assert (run["did"], run["pairs"]["train"]) == ("trained", 18)
    assert run["validation"]["images"] == 3
    assert run["validation"]["texts"] > 3
    again = type_line(capsys, root, "train-adaptor", "--backbone", str(images), *settings)
    assert again["did"] == "unchanged"

    result = type_line(capsys, root, "retrieve", "--set", "draws=100")
    note = " ".join(result["notes"])
    assert "6 images have several texts" in note


def test_both_units_of_one_data_set_share_the_pictures_features(
    trained_root, sample_of_few, tmp_path
):
    workspace = Workspace.open(tmp_path)
    features = FeatureSet.open(
        shutil.copytree(trained_root / "features/image/lite0-demo", tmp_path / "set")
    )
    for unit in ("report", "sentence"):
        made = make_manifest(workspace, "sample", sample_of_few, name=unit, text_unit=unit)
        assert set(made.keys) == set(features.keys)
        assert open_manifest(made.folder).meta.hash == made.meta.hash
