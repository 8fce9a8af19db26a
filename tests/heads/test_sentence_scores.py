"""Scores of sentences as scores of classes: order is kept at any logit scale."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featcache.adaptor.model import MAX_LOGIT_SCALE
from featcache.heads.answers import Answers
from featcache.heads.judge import Judge
from featcache.heads.sentence_scores import class_scores


def softmax(logits):
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def test_score_of_a_class_is_the_log_odds_of_its_mean_logit():
    logits = np.array([[2.0, 0.0, 1.0, 3.0]], dtype=np.float32)
    found = class_scores(logits, [[0, 1], [2], [3]], of_findings=False)
    chances = softmax(np.array([[1.0, 1.0, 3.0]]))
    np.testing.assert_allclose(found, np.log(chances / (1 - chances)))
    pairs = class_scores(logits, [[0], [1], [2], [3]], of_findings=True)
    np.testing.assert_array_equal(pairs, [[2.0, -2.0]])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_largest_score_is_the_class_of_softmax(count):
    logits = np.random.default_rng(count).normal(size=(200, count)) * 3
    found = class_scores(logits, [[one] for one in range(count)], of_findings=False)
    np.testing.assert_array_equal(found.argmax(axis=1), logits.argmax(axis=1))
    for number in range(count):
        np.testing.assert_array_equal(
            np.argsort(found[:, number]), np.argsort(softmax(logits)[:, number])
        )


def test_equal_classes_score_equal_to_the_last_digit():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2000, 9))  # without sorting, 125 of them differ
    logits[:, 7] = logits[:, 1]
    found = class_scores(logits, [[one] for one in range(9)], of_findings=False)
    np.testing.assert_array_equal(found[:, 1], found[:, 7])


def saturated(count):
    """Cosines of images with sentences at the largest scale there is, and classes they follow."""
    generator = np.random.default_rng(1)
    targets = np.repeat(np.arange(count), 40)
    cosines = generator.uniform(-0.2, 0.2, size=(len(targets), count))
    cosines[np.arange(len(targets)), targets] += 0.15
    cosines[:, 0] += 0.5  # every image resembles the first class most, by far
    return (math.exp(MAX_LOGIT_SCALE) * cosines).astype(np.float32), targets


@pytest.mark.parametrize("count", [2, 3])
def test_order_survives_a_logit_scale_of_a_hundred(count):
    assert math.exp(MAX_LOGIT_SCALE) == pytest.approx(100)
    logits, targets = saturated(count)
    found = class_scores(logits, [[one] for one in range(count)], of_findings=False)
    chances = softmax(logits.astype(np.float64))
    assert len(np.unique(chances[:, 0])) < len(targets) / 2  # softmax ties: what this is about
    assert len(np.unique(found[:, 0])) == len(targets)
    judge = Judge(targets, [f"p{n}" for n in range(len(targets))], "abc"[:count], 100, seed=0)
    ours, tied = (
        judge.judge(Answers(one[None])).details["class_auroc"] for one in (found, chances)
    )
    if count == 2:  # the difference of two logits is what ranks
        expected = roc_auc_score(targets == 0, logits[:, 0].astype(np.float64) - logits[:, 1])
        assert ours["a"] == pytest.approx(expected, abs=1e-6)
    assert ours["a"] > tied["a"] + 0.01


def test_finding_keeps_its_order_where_a_sigmoid_is_one():
    present = np.linspace(50, 100, 30)
    logits = np.stack([present, np.zeros(30)], axis=1).astype(np.float32)
    found = class_scores(logits, [[0], [1]], of_findings=True)[:, 0]
    assert len(np.unique(1 / (1 + np.exp(-found)))) == 1
    assert len(np.unique(found)) == 30
    assert (np.diff(found) > 0).all()
