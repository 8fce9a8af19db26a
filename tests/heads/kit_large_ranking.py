"""Ranks 100,000 images against 100,000 texts and says what it took; its own process, so that the
peak of memory is its own. Prints one JSON object.
"""

import json
import resource
import sys
import time

import numpy as np
import torch

from featcache.heads.ranking import Candidates, RankJudge, ranks_both_ways

DIM, ROWS, CHECKED = 64, 256, 40


def candidates_of(count: int) -> Candidates:
    """Image i with text i; every tenth has its neighbour's text too, as equal texts make it."""
    image_of = np.arange(count)
    twice = np.arange(0, count - 1, 10)
    return Candidates(
        np.arange(count),
        np.arange(count),
        np.concatenate([image_of, twice]),
        np.concatenate([image_of, twice + 1]),
        [f"p{i // 2}" for i in range(count)],
        [f"p{i // 2}" for i in range(count)],
    )


def vectors_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images and texts; those that belong together resemble each other."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(count, DIM, generator=generator)
    images = 0.35 * texts + torch.randn(count, DIM, generator=generator)
    return images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)


def plain_rank(scores: np.ndarray, right: set[int]) -> int:
    """Rank of the best right candidate among the wrong ones, by sorting nothing."""
    best = max(scores[number] for number in right)
    return 1 + sum(int(n) not in right for n in np.flatnonzero(scores >= best))


def measure(count: int) -> dict[str, float]:
    images, texts = vectors_of(count)
    candidates = candidates_of(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()

    def score():
        for some in torch.split(images, ROWS):
            yield (some @ texts.T).numpy()

    ranks = ranks_both_ways(score, candidates)
    took = time.perf_counter() - started
    judged = RankJudge(candidates.image_subjects, draws=100, seed=0).judge(ranks[0])
    texts_of = [{i, i + 1} if i % 10 == 0 and i + 1 < count else {i} for i in range(count)]
    images_of = [{i, i - 1} if i % 10 == 1 else {i} for i in range(count)]
    wrong = 0
    for number in [*np.linspace(0, count - 1, CHECKED).astype(int).tolist(), 0, 1, 10, 11]:
        # The very blocks that were ranked: other shapes may round differently.
        block = (images[number // ROWS * ROWS :][:ROWS] @ texts.T).numpy()
        wrong += plain_rank(block[number % ROWS], texts_of[number]) != ranks[0][number]
    columns = [0, 1, 11, count // 2 + 1]
    table = np.concatenate([block[:, columns] for block in score()])
    for place, number in enumerate(columns):
        wrong += plain_rank(table[:, place], images_of[number]) != ranks[1][number]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "images": count,
        "seconds": round(took, 1),
        "peak_mb": round(peak / 1024),
        "peak_mb_before": round(before / 1024),
        "table_mb": round(4 * count * count / 2**20),
        "wrong_ranks": int(wrong),
        "mrr": round(judged.figures["mrr"].mean, 4),
        "recall_at_10": round(judged.figures["recall_at_10"].mean, 4),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]))))
