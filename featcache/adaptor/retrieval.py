"""Retrieval among unpaired candidates: scores, ranks, and what chance would give.

Shapes: `I` images, `J` texts, `Q` queries, `N` candidates, `L` image tokens.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featcache.adaptor.model import Adaptor
from featcache.adaptor.objective import Objective
from featcache.errors import TrainingError

TEXTS_AT_ONCE = 4096


@torch.no_grad()
def unpaired_scores(
    objective: Objective,
    adaptor: Adaptor,
    image_batches: Iterable[Float[Tensor, "_ L D"]],
    text_batches: Iterable[tuple[Float[Tensor, "_ _ E"], Bool[Tensor, "_ _"]]],
) -> Float[Tensor, "I J"]:
    """Score every image against every text, none of them knowing a partner.

    Holds all text vectors, the adapted tokens of one batch of images, and the result.

    Args:
        objective: What scores.
        adaptor: Its modules should be in eval mode.
        image_batches: Tokens, on the Adaptor's device.
        text_batches: Tokens with their validity, on the Adaptor's device.

    Returns:
        Logits in float32 on the CPU, rows and columns in the order of the batches.
    """
    texts = torch.cat([objective.encode_texts(adaptor, *batch) for batch in text_batches])
    rows = []
    for tokens in image_batches:
        images = objective.encode_images(adaptor, tokens)
        parts = (
            objective.score(images, some, adaptor.scale)
            for some in torch.split(texts, TEXTS_AT_ONCE)
        )
        rows.append(torch.cat([part.float().cpu() for part in parts], dim=1))
    return torch.cat(rows)


def retrieval_ranks(
    scores: Float[Tensor, "Q N"], positives: Bool[Tensor, "Q N"]
) -> Int64[Tensor, " Q"]:
    """Rank, from 1, of each query's best positive among the candidates that are not positive.

    Ties count against us: a negative that scores the same stands before the positive, and so
    does one whose score is NaN; a positive that is NaN comes last. A constant scorer is
    therefore never above chance.

    Args:
        scores: Higher is better; one row per query.
        positives: At least one True per row.

    Raises:
        TrainingError: A query has no positive.
    """
    without = int((~positives.any(dim=1)).sum())
    if without:
        raise TrainingError(f"{without} of {len(scores)} queries have no positive candidate")
    best = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    best = best.masked_fill(~positives, -math.inf).amax(dim=1, keepdim=True)
    before = (scores >= best) | scores.isnan()
    return 1 + (before & ~positives).sum(dim=1)


def retrieval_metrics(ranks: Int64[Tensor, " Q"]) -> dict[str, float]:
    """Recall at 1, 5 and 10 in [0, 1], mean reciprocal rank, and median rank, of `ranks`."""
    metrics = {f"recall_at_{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    metrics["mrr"] = ranks.double().reciprocal().mean().item()
    metrics["median_rank"] = ranks.double().quantile(0.5).item()
    return metrics


def chance_recall(positives: Bool[Tensor, "Q N"], k: int) -> float:
    """Expected recall at k of a random order, given how many positives each query has."""
    candidates = positives.shape[1]
    negatives = candidates - positives.sum(dim=1).double()
    miss = torch.ones_like(negatives)
    for drawn in range(min(k, candidates)):
        miss = miss * ((negatives - drawn).clamp(min=0) / (candidates - drawn))
    return (1 - miss).mean().item()
