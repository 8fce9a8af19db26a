"""Scores of images with sentences, and what they make of classes: log-odds, never probabilities.

A logit scale of 100 puts softmax and sigmoid at exactly 1.0 for many images at once; what ties
there is still in order as log-odds, and AUROC is about nothing but the order.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from scipy.special import logsumexp
from torch import Tensor

from featcache.adaptor.saved import TrainedAdaptor, build_adaptor
from featcache.cache.reader import FeatureSet
from featcache.console import task
from featcache.loader.gather import iterate_rows


def untrained_adaptor(trained: TrainedAdaptor, seed: int, device: str) -> TrainedAdaptor:
    """The same architecture with random weights.

    Args:
        trained: Whose architecture, features and facts it takes.
        seed: Of the weights; the global generator is left as it was.
        device: Where it goes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adaptor, objective = build_adaptor(
            trained.config, trained.facts.image.dim, trained.facts.text.dim
        )
    for module in (adaptor, objective):
        module.to(device).eval().requires_grad_(False)
    return replace(trained, adaptor=adaptor, objective=objective)


@torch.inference_mode()
def sentence_logits(
    adaptors: Sequence[TrainedAdaptor],
    texts: Sequence[Float[Tensor, "J dim"]],
    images: FeatureSet,
    rows: Int64[np.ndarray, " n"],
    *,
    device: str,
    batch_size: int,
) -> list[Float32[np.ndarray, "n J"]]:
    """Scores of images with sentences by several Adaptors, in one pass over the cache.

    Args:
        adaptors: At least one, all made for the same features.
        texts: What each makes of the sentences.
        images: Features of the images.
        rows: Their rows.
        device: Where the Adaptors are.
        batch_size: Images at a time.
    """
    made: list[list[np.ndarray]] = [[] for _ in adaptors]
    done = 0
    with task(f"score {images.spec.title}", len(rows)) as progress:
        for some, tokens, _ in iterate_rows(images, rows, batch_size, **adaptors[0].reading):
            moved = tokens.to(device, torch.float32)
            for one, asked, parts in zip(adaptors, texts, made, strict=True):
                encoded = one.objective.encode_images(one.adaptor, moved)
                found = one.objective.score(encoded, asked, one.adaptor.scale)
                parts.append(found.float().cpu().numpy())
            done += len(some)
            progress.update(done)
    return [np.concatenate(parts) for parts in made]


def class_scores(
    logits: Float[np.ndarray, "n J"], groups: Sequence[Sequence[int]], *, of_findings: bool
) -> Float64[np.ndarray, "n C"]:
    """Log-odds of classes from the scores of sentences.

    The logit of a class is the mean over its sentences. Its score is the log-odds of softmax, the
    class against the rest: its logit minus the log of the summed exponentials of the others'. A
    finding's score is the logit of its presence minus that of its absence.

    Args:
        logits: Score of each image with each sentence.
        groups: Numbers of the sentences of each class, or of present and absent by turns.
        of_findings: Whether groups come in such pairs.

    Returns:
        The largest of an image is the class that softmax would choose; within a class images are
        in the order of their probabilities, without the ties of a saturated softmax.
    """
    wide = logits.astype(np.float64)
    means = np.stack([wide[:, list(some)].mean(axis=1) for some in groups], axis=1)
    if of_findings:
        return np.asarray(means[:, ::2] - means[:, 1::2])
    # Sorted, so that classes with equal logits get equal sums of the others, to the last digit.
    rest = [np.sort(np.delete(means, number, axis=1), axis=1) for number in range(len(groups))]
    return np.asarray(means - np.stack([logsumexp(one, axis=1) for one in rest], axis=1))
