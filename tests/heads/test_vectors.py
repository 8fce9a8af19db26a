"""Vectors made of cached tokens, and those of an encoder with random weights."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from featcache.adaptor.saved import load_adaptor
from featcache.encoders.interface import locate_encoder, random_encoder
from featcache.errors import FeatcacheError
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.vectors import (
    MEAN_ALL,
    image_vectors,
    mean_rule,
    mean_tokens,
    mean_vectors,
    possible_poolings,
    random_vectors,
)
from featcache.manifest.table import write_manifest


def test_raw_vector_is_the_mean_of_the_patch_tokens(toy):
    rows = np.array([7, 0, 31])
    found = image_vectors(toy.images, rows, None).raw["mean"]
    expected = toy.images.read_tokens(rows).astype(np.float32)[:, 1:].mean(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_set_without_patch_tokens_gives_the_mean_of_all(toy):
    spec = toy.images.spec.model_copy(update={"grid": None, "num_prefix_tokens": 5})
    assert mean_rule(spec) == MEAN_ALL
    tokens = torch.randn(2, 5, 12)
    assert torch.equal(mean_tokens(tokens, None, spec), tokens.mean(dim=1))


def test_padding_of_a_text_does_not_enter_its_mean(toy):
    rows = np.array([3, 0, 8, 5])
    found = mean_vectors(toy.texts, rows, batch_size=4)
    for vector, row in zip(found, rows, strict=True):
        tokens = toy.texts.read_tokens(np.array([row])).astype(np.float32)
        np.testing.assert_allclose(vector, tokens.mean(axis=0), atol=1e-5)


def test_poolings_are_the_class_token_the_mean_and_both(toy):
    rows = np.array([7, 0, 31])
    found = image_vectors(toy.images, rows, None, poolings=("both", "mean", "prefix")).raw
    tokens = toy.images.read_tokens(rows).astype(np.float32)
    assert list(found) == ["mean", "prefix", "both"]
    np.testing.assert_array_equal(found["prefix"], tokens[:, 0])
    np.testing.assert_array_equal(found["both"], np.c_[found["mean"], found["prefix"]])


@pytest.mark.parametrize("poolings", [("mean",), ("prefix",), ("mean", "prefix", "both")])
def test_vectors_in_a_file_are_those_in_memory(toy, make_run, tmp_path, poolings):
    trained = load_adaptor(make_run(tmp_path / "run", toy))
    rows = np.arange(30)
    held = image_vectors(toy.images, rows, trained, poolings=poolings, folder=tmp_path / "out")
    plain = image_vectors(toy.images, rows, trained, poolings=poolings)
    assert tuple(held.raw) == tuple(plain.raw) == poolings
    for pooling in poolings:
        np.testing.assert_array_equal(held.raw[pooling], plain.raw[pooling])
    np.testing.assert_array_equal(held.adaptor, plain.adaptor)
    assert list((tmp_path / "out").iterdir()) == []


def test_set_without_prefix_tokens_has_the_mean_alone(toy):
    spec = toy.images.spec.model_copy(update={"num_prefix_tokens": 0, "num_tokens": 4})
    assert possible_poolings(spec, ("mean", "prefix", "both")) == ("mean",)
    assert possible_poolings(spec, ("prefix",)) == ("mean",)
    assert possible_poolings(toy.images.spec, ("prefix",)) == ("prefix",)


@pytest.mark.parametrize("objective", ["allpairs", "dual", "paper"])
def test_vector_of_an_image_does_not_depend_on_its_batch(toy, make_run, tmp_path, objective):
    trained = load_adaptor(make_run(tmp_path, toy, objective=objective))
    rows = np.arange(20)
    together = image_vectors(toy.images, rows, trained, batch_size=20)
    alone = image_vectors(toy.images, rows, trained, batch_size=1)
    np.testing.assert_allclose(together.adaptor, alone.adaptor, atol=2e-6)
    np.testing.assert_allclose(together.raw["mean"], alone.raw["mean"], atol=1e-6)
    turned = image_vectors(toy.images, rows[::-1].copy(), trained, batch_size=7)
    np.testing.assert_allclose(turned.adaptor[::-1], together.adaptor, atol=2e-6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, write_set):
    """A manifest of 18 drawn pictures with a made-up set of the demo encoder's layout."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    keys = [f"img-{i:02d}" for i in range(18)]
    for number, key in enumerate(keys):
        grey = generator.integers(0, 60, (40, 40)) + 60 * (number % 3)
        Image.fromarray(grey.astype(np.uint8)).save(root / f"{key}.png")
    table = pa.table(
        {
            "key": keys,
            "subject_id": keys,
            "study_id": keys,
            "view_position": ["PA"] * 18,
            "split": ["train"] * 9 + ["validate"] * 3 + ["test"] * 6,
            "source": ["clinic"] * 18,
            "image_path": [f"{key}.png" for key in keys],
            "label:class": [("dark", "grey", "light")[i % 3] for i in range(18)],
        }
    )
    manifest = write_manifest(
        root / "manifests" / "drawn", table, dataset="spreadsheet", image_root=root
    )
    encoder = random_encoder(locate_encoder("lite0-demo", "image"), seed=0)
    spec = encoder.spec(batch_size=4).model_copy(
        update={"encoder": "lite0-demo", "pooled_dim": None}
    )
    tokens = generator.normal(size=(18, spec.num_tokens, spec.dim))
    folder = root / "features" / "image" / "lite0-demo"
    return write_set(folder, spec, keys, list(tokens), shard_bytes=10**7), manifest


@pytest.mark.weights
def test_random_vectors_are_computed_once_and_depend_on_the_seed(pictures, monkeypatch):
    images, manifest = pictures
    keys = tuple(manifest.keys)
    first = random_vectors(images, manifest, keys, seed=0)["mean"]
    assert first.shape == (18, images.spec.dim)
    [kept] = (images.folder.parent.parent / "random").iterdir()
    assert kept.name.startswith("lite0-demo-seed0-")
    before = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(random_vectors(images, manifest, keys, seed=0)["mean"], first)
    assert kept.stat().st_mtime_ns == before
    kept.unlink()  # whoever mapped it keeps what was there
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(random_vectors(images, manifest, keys, seed=0)["mean"], first)
    other = random_vectors(images, manifest, keys[:5], seed=1)["mean"]
    assert np.abs(other - first[:5]).max() > 1e-3


@pytest.mark.weights
def test_random_encoder_gets_its_row(pictures, tmp_path):
    images, manifest = pictures
    config = ProbeConfig(fractions=(100,), seeds=1, weight_decays=(0.1,), draws=100)
    found = finetune(images, manifest, None, tmp_path, config, device="cpu")
    [line] = [r for r in found.values["rows"] if r["method"] == "random encoder"]
    assert line["width"] == images.spec.dim
    assert line["figures"]["accuracy"]["mean"] > 0.6  # brightness is enough here


@pytest.mark.weights
def test_encoder_of_another_layout_is_not_taken_for_the_same(pictures, write_set, tmp_path):
    images, manifest = pictures
    spec = images.spec.model_copy(update={"num_prefix_tokens": 1, "grid": (7, 7), "num_tokens": 50})
    keys = manifest.keys
    tokens = [np.zeros((50, spec.dim))] * 18
    other = write_set(tmp_path / "image" / "lite0-demo", spec, keys, tokens, shard_bytes=10**7)
    with pytest.raises(FeatcacheError, match="differs in `num_prefix_tokens`"):
        random_vectors(other, manifest, tuple(keys), seed=0)
