"""Ranks of the right candidate, their figures, and what a random order would give."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from featcache.adaptor.retrieval import retrieval_ranks

METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mrr")
LARGEST_IN_MEMORY = 2**27  # scores: 512 MiB; a larger table lies in a temporary file
ROWS_AT_ONCE = 512


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
        inside = (self.image_of >= start) & (self.image_of < stop)
        found[self.image_of[inside] - start, self.text_of[inside]] = True
        return found


def ranks_both_ways(
    blocks: Iterable[Float32[np.ndarray, "_ J"]], candidates: Candidates
) -> tuple[Int64[np.ndarray, " I"], Int64[np.ndarray, " J"]]:
    """Rank of the best right text for each image, and of the best right image for each text.

    Ranks count from 1 among the wrong candidates; what ties with the right one stands before it.
    The table of all scores lies in memory up to 512 MiB, else in a temporary file.

    Args:
        blocks: Scores of consecutive images with all texts; together all images, in order.
        candidates: Images and texts, in the order of the scores.
    """
    shape = (len(candidates.image_rows), len(candidates.text_rows))
    with TemporaryFile() as file:
        if shape[0] * shape[1] <= LARGEST_IN_MEMORY:
            table = np.empty(shape, dtype=np.float32)
        else:
            table = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        to_text, start = [], 0
        for block in blocks:
            rows = slice(start, start + len(block))
            table[rows] = block
            to_text.append(_ranks(block, candidates.positives(rows)))
            start = rows.stop
        turned = _turned(candidates)
        to_image = []
        for start in range(0, shape[1], ROWS_AT_ONCE):
            columns = slice(start, start + ROWS_AT_ONCE)
            block = np.ascontiguousarray(table[:, columns].T)
            to_image.append(_ranks(block, turned.positives(columns)))
        del table
    return np.concatenate(to_text), np.concatenate(to_image)


def _turned(candidates: Candidates) -> Candidates:
    """The same with images and texts exchanged."""
    return Candidates(
        candidates.text_rows,
        candidates.image_rows,
        candidates.text_of,
        candidates.image_of,
        candidates.text_subjects,
        candidates.image_subjects,
    )


def _ranks(
    scores: Float32[np.ndarray, "Q N"], positives: Bool[np.ndarray, "Q N"]
) -> Int64[np.ndarray, " Q"]:
    """Ranks of one block of queries."""
    return retrieval_ranks(torch.from_numpy(scores), torch.from_numpy(positives)).numpy()


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


def chance_figures(positives: Int64[np.ndarray, " Q"], num_candidates: int) -> dict[str, float]:
    """The figures of `METRICS` that a random order of the candidates has, computed exactly.

    A query with m right ones among N has its first right one after rank r with probability
    (N-m over r) / (N over r). The mean over the queries of that curve gives recall and median, its
    steps weighted by 1 / r the mean reciprocal rank.

    Args:
        positives: How many right candidates each query has, at least 1.
        num_candidates: N.
    """
    ranks = np.arange(1, num_candidates + 1)
    beyond = np.zeros(num_candidates + 1)  # probability that the first right one stands after r
    sizes, counts = np.unique(positives, return_counts=True)
    for size, count in zip(sizes, counts, strict=True):
        left = (num_candidates - ranks + 1 - size).clip(min=0) / (num_candidates - ranks + 1)
        beyond += np.r_[1.0, np.cumprod(left)] * count / len(positives)
    at = beyond[:-1] - beyond[1:]  # probability that it stands at r
    recalls = [1.0 - beyond[min(k, num_candidates)] for k in (1, 5, 10)]
    median = float(ranks[np.argmax(beyond[1:] <= 0.5 + 1e-12)])
    return dict(zip(METRICS, [*recalls, median, float((at / ranks).sum())], strict=True))
