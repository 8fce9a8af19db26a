"""The linear map that stands in for an Adaptor."""

import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from featcache.errors import TrainingError
from featcache.heads import ridge
from featcache.heads.ridge import fit_linear_map


def draw(pairs: int = 80, seed: int = 0):
    generator = np.random.default_rng(seed)
    images = generator.normal(size=(60, 7)) * [1, 2, 3, 4, 5, 6, 7]
    texts = generator.normal(size=(50, 4)) + 3
    image_of = generator.integers(0, 60, pairs)
    text_of = generator.integers(0, 50, pairs)
    return images.astype(np.float32), texts.astype(np.float32), image_of, text_of


def test_map_equals_scikit_learn_on_standardised_pairs():
    images, texts, image_of, text_of = draw()
    fitted = fit_linear_map(images, texts, image_of, text_of, [0.1, 10.0])
    x, y = (table.astype(np.float64) for table in (images[image_of], texts[text_of]))
    x, y = ((table - table.mean(axis=0)) / table.std(axis=0) for table in (x, y))
    for weights, penalty in zip(fitted.weights, [0.1, 10.0], strict=True):
        peer = Ridge(alpha=penalty * len(x), fit_intercept=False).fit(x, y)
        np.testing.assert_allclose(weights, peer.coef_.T, atol=1e-9)


def test_map_finds_a_linear_relation_across_widths():
    generator = np.random.default_rng(0)
    images = generator.normal(size=(200, 12)).astype(np.float32)
    texts = (images @ generator.normal(size=(12, 5)) + 4).astype(np.float32)
    pairs = np.arange(150)
    fitted = fit_linear_map(images, texts, pairs, pairs, [0.01])
    scores = np.concatenate(list(fitted.scores(images[150:], texts[150:], 0)))
    assert scores.shape == (50, 50)
    assert (scores.argmax(axis=1) == np.arange(50)).mean() > 0.9


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(20_000, 32)).astype(np.float32)
    pairs = generator.permutation(20_000)
    whole = fit_linear_map(vectors, vectors, pairs, pairs, [0.1])
    monkeypatch.setattr(ridge, "PAIRS_AT_ONCE", 1_000)
    tracemalloc.start()
    fitted = fit_linear_map(vectors, vectors, pairs, pairs, [0.1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < vectors.nbytes
    np.testing.assert_allclose(fitted.weights, whole.weights, atol=1e-9)


def test_constant_channel_does_no_harm():
    images, texts, image_of, text_of = draw()
    images[:, 0] = 5.0
    texts[:, 1] = -2.0
    fitted = fit_linear_map(images, texts, image_of, text_of, [0.1])
    assert all(np.isfinite(block).all() for block in fitted.scores(images, texts, 0))


def test_single_pair_is_refused():
    images, texts, image_of, text_of = draw()
    with pytest.raises(TrainingError, match="at least 2 training pairs, there are 1"):
        fit_linear_map(images, texts, image_of[:1], text_of[:1], [0.1])
