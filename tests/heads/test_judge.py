"""Answers held against the test labels."""

import numpy as np
import pytest

from featcache.heads.answers import Answers
from featcache.heads.judge import Judge, Judgement, differences, subtract
from featcache.heads.protocol import Estimate
from featcache.heads.scores import METRICS


def judge_of(targets, subjects=None, *, classes=("a", "b", "c"), draws=200) -> Judge:
    targets = np.asarray(targets, dtype=np.int64)
    subjects = subjects or [f"p{i}" for i in range(len(targets))]
    return Judge(targets, subjects, classes, draws, seed=0)


def noisy(targets, runs=3, seed=0, weight=1.0):
    generator = np.random.default_rng(seed)
    scores = generator.random((runs, len(targets), 3)) + weight * np.eye(3)[targets]
    return scores / scores.sum(axis=2, keepdims=True)


def test_mean_and_spread_are_over_the_runs():
    targets = np.arange(30) % 3
    judged = judge_of(targets).judge(Answers(noisy(targets)))
    assert len(judged.figures["accuracy"].values) == 3
    for name in METRICS:
        figure = judged.figures[name]
        assert figure.interval.low <= figure.mean <= figure.interval.high


def test_difference_of_a_method_with_itself_is_zero_with_a_zero_interval():
    targets = np.arange(30) % 3
    judge = judge_of(targets)
    judged = judge.judge(Answers(noisy(targets)))
    gap = judge.difference(judged, judged).figures["auroc"]
    assert (gap.mean, gap.sd, gap.interval.low, gap.interval.high) == (0, 0, 0, 0)


def test_paired_interval_is_narrower_than_that_of_independent_draws():
    targets = np.arange(150) % 3
    judge = judge_of(targets, draws=500)
    first = judge.judge(Answers(noisy(targets, seed=0, weight=0.7)))
    second = judge.judge(Answers(np.sqrt(noisy(targets, seed=0, weight=0.7)) + 0.02))
    paired = judge.difference(first, second).figures["auroc"].interval
    single = first.figures["auroc"].interval
    assert paired.high - paired.low < 0.5 * (single.high - single.low)


def test_absent_class_is_named_and_left_out_of_the_macro_mean():
    targets = np.array([0, 1] * 6)
    judge = judge_of(targets)
    assert judge.undefined_classes() == {"c": (0, 12)}
    judged = judge.judge(Answers(np.eye(3)[targets][None] * 0.9 + 1 / 30))
    assert judged.figures["auroc"].mean == 1.0
    assert judged.details["class_auroc"] == {"a": 1.0, "b": 1.0, "c": None}
    assert judged.details["confusion"]["a"] == {"a": 6.0, "b": 0.0, "c": 0.0}


def test_class_of_one_patient_gets_no_interval():
    targets = np.array([0] * 10 + [1] * 10 + [2] * 2)
    subjects = [f"p{i}" for i in range(20)] + ["last", "last"]
    judge = judge_of(targets, subjects)
    assert judge.rare_classes() == ["c"]
    figures = judge.judge(Answers(noisy(targets))).figures
    assert figures["accuracy"].interval is not None
    assert figures["auroc"].interval is None
    assert np.isfinite(figures["auroc"].mean)


def test_draws_without_a_rare_class_are_counted():
    targets = np.array([0] * 29 + [1] * 28 + [2] * 3)
    figure = judge_of(targets, draws=1000).judge(Answers(noisy(targets))).figures["auroc"]
    assert figure.interval.undefined == pytest.approx(1000 * np.exp(-3), rel=0.35)


def test_single_class_has_no_auroc_and_says_so():
    targets = np.zeros(8, dtype=np.int64)
    judged = judge_of(targets).judge(Answers(noisy(targets)))
    assert np.isnan(judged.figures["auroc"].mean)
    assert judged.figures["auroc"].interval is None
    assert judged.figures["accuracy"].interval is not None


def of_runs(*values, drawn=(0.0, 1.0)):
    return Judgement({"dice": Estimate(values)}, np.array(drawn)[:, None])


def test_each_run_of_a_trivial_row_stands_beside_the_seeds_of_its_subset():
    of_seeds, of_subsets = of_runs(6.0, 5.0, 4.0, 3.0), of_runs(2.0, 1.0)
    gap = subtract(of_seeds, of_subsets, {"dice": True})
    assert gap.figures["dice"].values == (4.0, 3.0, 3.0, 2.0)
    back = subtract(of_subsets, of_seeds, {"dice": True})
    assert back.figures["dice"].values == (-4.0, -3.0, -3.0, -2.0)


def test_a_single_run_stands_beside_all_runs_and_draws_are_subtracted_one_by_one():
    first, second = of_runs(0.6, 0.8, drawn=(0.5, 0.9)), of_runs(0.5, drawn=(0.4, 0.7))
    gap = subtract(first, second, {"dice": True})
    assert gap.figures["dice"].values == pytest.approx((0.1, 0.3))
    assert gap.drawn[:, 0] == pytest.approx([0.1, 0.2])
    assert gap.figures["dice"].interval.low == pytest.approx(0.1025)
    assert subtract(first, second, {"dice": False}).figures["dice"].interval is None


def test_numbers_of_runs_that_do_not_fit_leave_the_difference_of_the_means():
    gap = subtract(of_runs(1.0, 2.0, 3.0), of_runs(1.0, 0.0), {"dice": True})
    assert gap.figures["dice"].values == (1.5,)


def test_every_method_is_compared_with_every_one_before_it():
    targets = np.arange(30) % 3
    judge = judge_of(targets)
    judged = {name: judge.judge(Answers(noisy(targets, seed=n))) for n, name in enumerate("abc")}
    found = list(differences(judged, judge))
    assert [(one["first"], one["second"]) for one in found] == [("b", "a"), ("c", "a"), ("c", "b")]
    expected = judged["c"].figures["auroc"].mean - judged["a"].figures["auroc"].mean
    assert found[1]["figures"]["auroc"]["mean"] == pytest.approx(expected, abs=1e-6)
