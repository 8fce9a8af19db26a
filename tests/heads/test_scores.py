"""Scores of class probabilities, and their weighted twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import from_numpy
from torchmetrics.functional.classification import multiclass_accuracy

from featcache.heads.scores import METRICS, class_auroc, score, weighted_scores


def draw(seed: int, rows: int = 40, classes: int = 3, *, ties: bool = False):
    generator = np.random.default_rng(seed)
    scores = generator.random((rows, classes))
    if ties:
        scores = np.round(scores, 1) + 0.1
    targets = np.r_[np.arange(classes), generator.integers(0, classes, rows - classes)]
    return scores / scores.sum(axis=1, keepdims=True), targets.astype(np.int64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_weighted_scores_equal_scikit_learn_on_repeated_rows(seed, ties):
    probabilities, targets = draw(seed, ties=ties)
    counts = np.random.default_rng(seed + 1).integers(0, 4, (5, len(targets)))
    counts[:, :3] = np.maximum(counts[:, :3], 1)  # every class stays
    found = weighted_scores(probabilities, targets, counts.astype(float))
    for line, figures in zip(counts, found, strict=True):
        rows = np.repeat(np.arange(len(targets)), line)
        plain = score(probabilities[rows], targets[rows])
        np.testing.assert_allclose(figures, [plain[name] for name in METRICS], atol=1e-12)


def test_scores_equal_the_libraries():
    probabilities, targets = draw(3)
    found = score(probabilities, targets)
    predicted = probabilities.argmax(axis=1)
    micro = multiclass_accuracy(
        from_numpy(predicted), from_numpy(targets), num_classes=3, average="micro"
    )
    assert found["accuracy"] == pytest.approx(float(micro))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, predicted))
    expected = roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    assert found["auroc"] == pytest.approx(expected)


def test_class_that_never_occurs_is_undefined_and_left_out():
    targets = np.array([0, 1, 0, 1])
    probabilities = np.eye(3)[targets] * 0.9 + 1 / 30
    areas = class_auroc(probabilities, targets)
    assert areas[:2].tolist() == [1.0, 1.0]
    assert np.isnan(areas[2])
    assert score(probabilities, targets)["auroc"] == 1.0


def test_single_class_has_no_auroc():
    probabilities = np.full((3, 2), 0.5)
    found = score(probabilities, np.zeros(3, dtype=np.int64))
    assert np.isnan(found["auroc"])
    assert found["accuracy"] == 1.0
    drawn = weighted_scores(probabilities, np.zeros(3, dtype=np.int64), np.ones((2, 3)))
    assert np.isnan(drawn[:, 2]).all()


def test_weighting_without_a_class_is_undefined():
    probabilities, targets = draw(0, rows=6)
    weights = np.stack([np.ones(6), (targets != 1).astype(float)])
    figures = weighted_scores(probabilities, targets, weights)
    assert np.isfinite(figures[0]).all()
    assert np.isfinite(figures[1, 0])
    assert np.isnan(figures[1, 1:]).all()
