"""Ranks, their figures, and chance."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.adaptor.retrieval import retrieval_ranks
from featcache.errors import TrainingError
from featcache.heads import ranking
from featcache.heads.ranking import (
    METRICS,
    Candidates,
    RankJudge,
    chance_figures,
    rank_figures,
    ranks_both_ways,
)


def candidates(images: int, texts: int, pairs) -> Candidates:
    image_of, text_of = np.array(pairs, dtype=np.int64).T
    return Candidates(
        np.arange(images),
        np.arange(texts),
        np.ascontiguousarray(image_of),
        np.ascontiguousarray(text_of),
        [f"p{i}" for i in range(images)],
        [f"p{i}" for i in range(texts)],
    )


def named(figures):
    return dict(zip(METRICS, figures[0], strict=True))


def plain_ranks(scores, right):
    """Rank of the best right candidate among the wrong ones, ties against us."""
    found = []
    for line, mask in zip(scores, right, strict=True):
        best = line[mask].max()
        found.append(1 + int((line[~mask] >= best).sum()))
    return found


def test_ranks_in_blocks_equal_plain_ranks(monkeypatch):
    generator = np.random.default_rng(0)
    pairs = [(i, i % 9) for i in range(13)] + [(3, 0), (4, 8)]
    some = candidates(13, 9, pairs)
    scores = np.round(generator.random((13, 9)), 1).astype(np.float32)
    right = some.positives(slice(0, 13))
    assert right.sum() == 15
    monkeypatch.setattr(ranking, "ROWS_AT_ONCE", 4)
    blocks = [scores[:5], scores[5:10], scores[10:]]
    to_text, to_image = ranks_both_ways(lambda: blocks, some)
    assert to_text.tolist() == plain_ranks(scores, right)
    assert to_image.tolist() == plain_ranks(scores.T, right.T)


def test_scores_made_twice_give_the_ranks_of_those_kept(monkeypatch):
    scores = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    some = candidates(8, 8, [(i, i) for i in range(8)])
    expected = ranks_both_ways(lambda: [scores], some)
    monkeypatch.setattr(ranking, "LARGEST_IN_MEMORY", 1)
    found = ranks_both_ways(lambda: iter([scores[:3], scores[3:]]), some)
    assert [ranks.tolist() for ranks in found] == [ranks.tolist() for ranks in expected]


def test_shared_text_counts_for_each_of_its_images():
    some = candidates(3, 2, [(0, 0), (1, 0), (2, 1)])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6]], dtype=np.float32)
    to_text, to_image = ranks_both_ways(lambda: [scores], some)
    assert to_text.tolist() == [1, 1, 2]
    assert to_image.tolist() == [1, 1]


def test_constant_scores_are_never_above_chance():
    some = candidates(5, 5, [(i, i) for i in range(5)])
    to_text, to_image = ranks_both_ways(lambda: [np.zeros((5, 5), dtype=np.float32)], some)
    assert to_text.tolist() == to_image.tolist() == [5] * 5


def test_weighted_figures_equal_repeated_queries():
    ranks = np.array([1, 4, 2, 30, 7])
    weights = np.array([[1, 1, 1, 1, 1], [3, 0, 1, 0, 2]], dtype=float)
    found = rank_figures(ranks, weights)
    for line, figures in zip(weights.astype(int), found, strict=True):
        repeated = np.repeat(ranks, line)
        assert figures[0] == pytest.approx((repeated == 1).mean())
        assert figures[1] == pytest.approx((repeated <= 5).mean())
        assert figures[2] == pytest.approx((repeated <= 10).mean())
        assert figures[3] == np.sort(repeated)[(len(repeated) - 1) // 2]
        assert figures[4] == pytest.approx((1 / repeated).mean())


@pytest.mark.parametrize(("total", "right"), [(6, [1, 1]), (6, [2, 1, 3]), (3, [3]), (1, [1])])
def test_chance_equals_the_mean_over_all_orders(total, right):
    curves = []
    for size in right:
        first = [1 + min(order[:size]) for order in permutations(range(total))]
        curves.append(np.array(first))
    found = named(chance_figures(np.array(right), total))
    for k in (1, 5, 10):
        expected = np.mean([(curve <= k).mean() for curve in curves])
        assert found[f"recall_at_{k}"] == pytest.approx(expected)
    assert found["mrr"] == pytest.approx(np.mean([(1 / curve).mean() for curve in curves]))
    together = np.sort(np.concatenate(curves))
    assert found["median_rank"] == together[(len(together) - 1) // 2]


def test_random_scores_score_as_chance_says():
    generator = np.random.default_rng(2)
    some = candidates(400, 400, [(i, i) for i in range(400)])
    scores = generator.random((400, 400)).astype(np.float32)
    ranks, _ = ranks_both_ways(lambda: [scores], some)
    found = rank_figures(ranks, np.ones((1, 400)))[0]
    chance = named(chance_figures(np.ones(400, dtype=np.int64), 400))
    assert found[METRICS.index("median_rank")] == pytest.approx(chance["median_rank"], rel=0.15)
    assert chance["recall_at_10"] == pytest.approx(10 / 400)


def test_weighted_chance_equals_chance_of_repeated_queries():
    right = np.array([3, 1, 2, 1, 7])
    weights = np.array([[1, 1, 1, 1, 1], [3, 0, 1, 0, 2], [0, 5, 0, 0, 0]], dtype=float)
    found = chance_figures(right, 9, weights)
    for line, expected in zip(weights.astype(int), found, strict=True):
        repeated = chance_figures(np.repeat(right, line), 9)[0]
        assert repeated == pytest.approx(expected)


def test_difference_to_chance_is_drawn_with_the_patients():
    right = np.array([1] * 20 + [10] * 20)
    ranks = np.array([5] * 20 + [1] * 20)
    judge = RankJudge([f"p{i}" for i in range(40)], draws=200, seed=0)
    chance = judge.chance(right, 50)
    own = judge.judge(ranks)
    gap = judge.difference(own, chance)
    assert chance.figures["mrr"].interval is None
    assert chance.drawn[:, -1].std() > 0.01  # who asks decides how many right ones there are
    assert gap.drawn == pytest.approx(own.drawn - chance.drawn)
    assert gap.figures["mrr"].interval.low > 0


def test_no_interval_when_a_single_patient_asks():
    judged = RankJudge(["p"] * 4, draws=100, seed=0).judge(np.array([1, 2, 3, 4]))
    assert judged.figures["mrr"].interval is None


def test_scores_that_are_no_number_stand_against_us(monkeypatch):
    scores = np.random.default_rng(3).random((6, 5)).astype(np.float32)
    scores[0, 3] = scores[1, 1] = scores[4, 4] = np.nan
    scores[2, 0], scores[2, 2] = np.inf, -np.inf
    some = candidates(6, 5, [(i, i % 5) for i in range(6)] + [(1, 4)])
    right = some.positives(slice(0, 6))
    for limit in (2**27, 1):
        monkeypatch.setattr(ranking, "LARGEST_IN_MEMORY", limit)
        to_text, to_image = ranks_both_ways(lambda: [scores[:4], scores[4:]], some)
        for found, given, mask in ((to_text, scores, right), (to_image, scores.T, right.T)):
            expected = retrieval_ranks(
                torch.from_numpy(np.ascontiguousarray(given)),
                torch.from_numpy(np.ascontiguousarray(mask)),
            )
            assert found.tolist() == expected.tolist()


def test_query_without_a_right_candidate_is_refused():
    some = candidates(2, 3, [(0, 0), (1, 1)])
    with pytest.raises(TrainingError, match="1 of 3 queries have no right candidate"):
        ranks_both_ways(lambda: [np.zeros((2, 3), dtype=np.float32)], some)


@pytest.mark.slow
def test_memory_does_not_grow_with_images_times_texts():
    script = Path(__file__).parent / "kit_large_ranking.py"
    command = [sys.executable, str(script), "100000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["table_mb"] > 38_000
    assert found["peak_mb"] - found["peak_mb_before"] < 600
    assert found["peak_mb"] < 1500
    assert found["wrong_ranks"] == 0
    assert 0.05 < found["mrr"] < 0.95  # neither chance nor a foregone conclusion


def test_large_kit_ranks_as_the_plain_way_does():
    from heads.kit_large_ranking import measure

    assert measure(600)["wrong_ranks"] == 0
