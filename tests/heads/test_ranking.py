"""Ranks, their figures, and chance."""

from itertools import permutations

import numpy as np
import pytest

from featcache.heads import ranking
from featcache.heads.ranking import (
    METRICS,
    Candidates,
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
    to_text, to_image = ranks_both_ways(blocks, some)
    assert to_text.tolist() == plain_ranks(scores, right)
    assert to_image.tolist() == plain_ranks(scores.T, right.T)


def test_table_on_disk_gives_the_same_ranks(monkeypatch):
    scores = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    some = candidates(8, 8, [(i, i) for i in range(8)])
    expected = ranks_both_ways([scores], some)
    monkeypatch.setattr(ranking, "LARGEST_IN_MEMORY", 1)
    found = ranks_both_ways([scores[:3], scores[3:]], some)
    assert [ranks.tolist() for ranks in found] == [ranks.tolist() for ranks in expected]


def test_shared_text_counts_for_each_of_its_images():
    some = candidates(3, 2, [(0, 0), (1, 0), (2, 1)])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6]], dtype=np.float32)
    to_text, to_image = ranks_both_ways([scores], some)
    assert to_text.tolist() == [1, 1, 2]
    assert to_image.tolist() == [1, 1]


def test_constant_scores_are_never_above_chance():
    some = candidates(5, 5, [(i, i) for i in range(5)])
    to_text, to_image = ranks_both_ways([np.zeros((5, 5), dtype=np.float32)], some)
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
    found = chance_figures(np.array(right), total)
    for k in (1, 5, 10):
        expected = np.mean([(curve <= k).mean() for curve in curves])
        assert found[f"recall_at_{k}"] == pytest.approx(expected)
    assert found["mrr"] == pytest.approx(np.mean([(1 / curve).mean() for curve in curves]))
    together = np.sort(np.concatenate(curves))
    assert found["median_rank"] == together[(len(together) - 1) // 2]


def test_random_scores_score_as_chance_says():
    generator = np.random.default_rng(2)
    some = candidates(400, 400, [(i, i) for i in range(400)])
    ranks, _ = ranks_both_ways([generator.random((400, 400)).astype(np.float32)], some)
    found = rank_figures(ranks, np.ones((1, 400)))[0]
    chance = chance_figures(np.ones(400, dtype=np.int64), 400)
    assert found[METRICS.index("median_rank")] == pytest.approx(chance["median_rank"], rel=0.15)
    assert chance["recall_at_10"] == pytest.approx(10 / 400)
