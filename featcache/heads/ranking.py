"""Ranks of the right candidate, their figures, and what a random order would give."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from featcache.errors import TrainingError
from featcache.heads.judge import Judgement, estimates, subtract
from featcache.heads.protocol import Estimate, patient_bootstrap

METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mrr")
LARGEST_IN_MEMORY = 2**27  # scores: 512 MiB
ROWS_AT_ONCE = 64  # under 256: rows are counted in bytes


@dataclass(frozen=True)
class Candidates:
    """Images and texts of one split, each once, with what belongs together.

    Attributes:
        image_rows: Rows in the image set, ascending.
        text_rows: Rows in the text set, ascending.
        image_of: Image number of each pair.
        text_of: Text number of each pair.
        image_subjects: Patient of each image.
        text_subjects: Patient of each text; of a text that several share, the first.
    """

    image_rows: Int64[np.ndarray, " I"]
    text_rows: Int64[np.ndarray, " J"]
    image_of: Int64[np.ndarray, " M"]
    text_of: Int64[np.ndarray, " M"]
    image_subjects: Sequence[str]
    text_subjects: Sequence[str]

    def positives(self, images: slice) -> Bool[np.ndarray, "I J"]:
        """Which texts belong to some of the images."""
        start, stop, _ = images.indices(len(self.image_rows))
        found = np.zeros((stop - start, len(self.text_rows)), dtype=bool)
        at, texts = self.pairs_within(start, stop)
        found[at, texts] = True
        return found

    def pairs_within(
        self, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """Pairs of consecutive images, each once: their place among these, and their text.

        Args:
            start: First image.
            stop: The one after the last.
        """
        first, last = np.searchsorted(self._pairs[0], (start, stop))
        at, texts = self._pairs[:, first:last]
        return at - start, texts

    @cached_property
    def _pairs(self) -> Int64[np.ndarray, "2 M"]:
        """Images and texts of all pairs, each once, by image and text."""
        return np.unique(np.stack([self.image_of, self.text_of]).astype(np.int64), axis=1)


def ranks_both_ways(
    score: Callable[[], Iterable[Float32[np.ndarray, "_ J"]]], candidates: Candidates
) -> tuple[Int64[np.ndarray, " I"], Int64[np.ndarray, " J"]]:
    """Rank of the best right text for each image, and of the best right image for each text.

    Ranks count from 1 among the wrong candidates; what ties with the right one stands before it,
    and so does what has no score (NaN). Up to 512 MiB all scores are kept; beyond it they are made
    a second time, block by block, so that memory does not grow with images times texts.

    Args:
        score: Gives the scores of consecutive images with all texts; together all images, in order.
            Called twice it gives the same.
        candidates: Images and texts, in the order of the scores.

    Raises:
        TrainingError: An image or a text belongs to nothing.
    """
    shape = (len(candidates.image_rows), len(candidates.text_rows))
    for of, count in zip((candidates.image_of, candidates.text_of), shape, strict=True):
        without = count - len(np.unique(of))
        if without:
            raise TrainingError(f"{without} of {count} queries have no right candidate")
    kept = list(score()) if shape[0] * shape[1] <= LARGEST_IN_MEMORY else None
    best = np.full(shape[1], -np.inf, np.float32)
    to_text = np.zeros(shape[0], np.int64)
    for start, block in _placed(score() if kept is None else kept):
        at, texts = candidates.pairs_within(start, start + len(block))
        right = _best_last(block[at, texts])
        np.maximum.at(best, texts, right)
        own = np.full(len(block), -np.inf, np.float32)
        np.maximum.at(own, at, right)
        behind = block < own[:, None]  # neither ties nor NaN are
        wrong = shape[1] - np.array([np.count_nonzero(line) for line in behind])
        wrong -= np.bincount(at[~behind[at, texts]], minlength=len(block))
        to_text[start : start + len(block)] = 1 + wrong
    to_image = np.ones(shape[1], np.int64)
    for start, block in _placed(score() if kept is None else kept):
        at, texts = candidates.pairs_within(start, start + len(block))
        behind = block < best
        to_image += len(block) - np.add.reduce(behind.view(np.uint8), axis=0, dtype=np.uint8)
        to_image -= np.bincount(texts[~behind[at, texts]], minlength=shape[1])
    return to_text, to_image


def _placed(
    blocks: Iterable[Float32[np.ndarray, "_ J"]],
) -> Iterator[tuple[int, Float32[np.ndarray, "_ J"]]]:
    """Blocks of a few rows, each with the number of its first."""
    start = 0
    for block in blocks:
        for within in range(0, len(block), ROWS_AT_ONCE):
            some = block[within : within + ROWS_AT_ONCE]
            yield start, some
            start += len(some)


def _best_last(scores: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Scores of right candidates; one without a score comes last."""
    return np.where(np.isnan(scores), np.float32(-np.inf), scores)


def rank_figures(
    ranks: Int64[np.ndarray, " Q"], weights: Float64[np.ndarray, "W Q"]
) -> Float64[np.ndarray, "W 5"]:
    """The figures of `METRICS` under weightings of the queries.

    Args:
        ranks: From 1.
        weights: How often each query counts. The median is the smallest rank that at least half
            of the weight reaches.
    """
    share = weights / weights.sum(axis=1, keepdims=True)
    order = np.argsort(ranks, kind="stable")
    reached = np.cumsum(share[:, order], axis=1)
    median = ranks[order][(reached < 0.5 - 1e-12).sum(axis=1)]
    recalls = [share @ (ranks <= k) for k in (1, 5, 10)]
    return np.stack([*recalls, median.astype(np.float64), share @ (1.0 / ranks)], axis=1)


def chance_figures(
    positives: Int64[np.ndarray, " Q"],
    num_candidates: int,
    weights: Float64[np.ndarray, "W Q"] | None = None,
) -> Float64[np.ndarray, "W 5"]:
    """The figures of `METRICS` that a random order of the candidates has, computed exactly.

    A query with m right ones among N has its first right one after rank r with probability
    (N-m over r) / (N over r). The mean over the queries of that curve gives recall and median, its
    steps weighted by 1 / r the mean reciprocal rank.

    Args:
        positives: How many right candidates each query has, at least 1.
        num_candidates: N.
        weights: How often each query counts; None: each once.
    """
    if weights is None:
        weights = np.ones((1, len(positives)))
    ranks = np.arange(1, num_candidates + 1)
    sizes, first = np.unique(np.sort(positives), return_index=True)
    share = np.add.reduceat(weights[:, np.argsort(positives, kind="stable")], first, axis=1)
    share /= share.sum(axis=1, keepdims=True)  # W S
    curves = np.ones((len(sizes), num_candidates + 1))  # the first right one stands after r
    for size, curve in zip(sizes, curves, strict=True):
        left = (num_candidates - ranks + 1 - size).clip(min=0) / (num_candidates - ranks + 1)
        np.cumprod(left, out=curve[1:])
    reciprocal = -np.diff(curves, axis=1) @ (1.0 / ranks)
    recalls = [1.0 - share @ curves[:, min(k, num_candidates)] for k in (1, 5, 10)]
    return np.stack([*recalls, _chance_median(share, curves), share @ reciprocal], axis=1)


def _chance_median(
    share: Float64[np.ndarray, "W S"], curves: Float64[np.ndarray, "S R"]
) -> Float64[np.ndarray, " W"]:
    """The smallest rank that at least half of the queries reach, by halving."""
    low, high = np.zeros(len(share), np.int64), np.full(len(share), curves.shape[1] - 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        beyond = np.einsum("ws,sw->w", share, curves[:, middle])
        reached = beyond <= 0.5 + 1e-12
        high, low = np.where(reached, middle, high), np.where(reached, low, middle)
    return high.astype(np.float64)


@dataclass(frozen=True)
class RankJudge:
    """The rule by which ranks of one direction become figures with intervals.

    Attributes:
        askers: Patient of each query.
        draws: Bootstrap draws.
        seed: Seed of the draws: every method sees the same ones.
    """

    askers: Sequence[str]
    draws: int
    seed: int

    def has_interval(self) -> dict[str, bool]:
        """Which figures get one: all, unless a single patient asks."""
        return dict.fromkeys(METRICS, len(set(self.askers)) > 1)

    def judge(self, ranks: Int64[np.ndarray, " Q"]) -> Judgement:
        """Figures of a method.

        Args:
            ranks: Of each query, from 1.
        """
        drawn = self._draw(lambda weights: rank_figures(ranks, weights))
        point = rank_figures(ranks, np.ones((1, len(ranks))))
        return Judgement(estimates(METRICS, point, drawn, self.has_interval()), drawn)

    def chance(self, positives: Int64[np.ndarray, " Q"], num_candidates: int) -> Judgement:
        """Figures of a random order; exact, so without an interval of their own.

        Args:
            positives: How many right candidates each query has.
            num_candidates: Of all.
        """
        drawn = self._draw(lambda weights: chance_figures(positives, num_candidates, weights))
        [point] = chance_figures(positives, num_candidates)
        figures = {name: Estimate((float(one),)) for name, one in zip(METRICS, point, strict=True)}
        return Judgement(figures, drawn)

    def difference(self, first: Judgement, second: Judgement) -> Judgement:
        """First minus second, on the same draws of patients who ask."""
        return subtract(first, second, self.has_interval())

    def _draw(
        self, figures: Callable[[Float64[np.ndarray, "W Q"]], Float64[np.ndarray, "W 5"]]
    ) -> Float64[np.ndarray, "draws 5"]:
        """Figures in every draw."""
        return patient_bootstrap(figures, self.askers, draws=self.draws, seed=self.seed)
