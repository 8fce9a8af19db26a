"""Contrastive losses with any number of positives per row.

Shapes: `I` images along the first axis of logits, `J` texts along the second, `N` either.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from featcache.adaptor.known import KnownPairs
from featcache.adaptor.model import widen
from featcache.loader.batch import Batch

INITIAL_LOGIT_BIAS = -10.0  # start of the sigmoid loss: nearly all pairs are negatives


@dataclass(frozen=True)
class Ids:
    """Who is who among images, or among texts: each carries the ids of its own pair.

    Attributes:
        images: Of the pair's image, at least 0.
        texts: Of the pair's text, at least 0.
        known: Pairs that belong together beside those that are here; None = there are none.
    """

    images: Int64[Tensor, " N"]
    texts: Int64[Tensor, " N"]
    known: KnownPairs | None = None

    @classmethod
    def of(cls, batch: Batch, known: KnownPairs | None = None) -> "Ids":
        """Rows in the feature sets: an image or a text that stands twice has one id."""
        return cls(batch.image_rows, batch.text_rows, known)

    def __getitem__(self, part: slice) -> "Ids":
        """Some of them."""
        return Ids(self.images[part], self.texts[part], self.known)

    def __add__(self, others: "Ids") -> "Ids":
        """These, then others; what is known stays what these know."""
        images = torch.cat([self.images, others.images])
        return Ids(images, torch.cat([self.texts, others.texts]), self.known)

    def __len__(self) -> int:
        return len(self.images)


def positives(rows: Ids, columns: Ids) -> Bool[Tensor, "I J"]:
    """Which texts (columns) belong to which images (rows): those of their pair, and their equals.

    An image that stands twice belongs to the texts of both places, and a text that is shared by
    several images belongs to each of them. So do an image and a text that are a pair of the
    training set, if the rows know it, whether or not that pair is here.
    """
    same_image = rows.images.unsqueeze(1) == columns.images
    same_text = rows.texts.unsqueeze(1) == columns.texts
    both: Tensor = same_image | same_text
    return both if rows.known is None else both | rows.known.belong(rows.images, columns.texts)


def batch_positives(batch: Batch, known: KnownPairs | None = None) -> Bool[Tensor, "B B"]:
    """`positives` of a batch with itself."""
    ids = Ids.of(batch, known)
    return positives(ids, ids)


def text_counts(rows: Ids, columns: Ids) -> Int64[Tensor, " I"]:
    """How many texts belong to each image: the row sums of `positives`, without a matrix."""
    counts = _matches_of_either(rows, columns)
    if rows.known is None:
        return counts
    places, further = _further_texts(rows, rows.known)
    missed = _matches(further.texts, columns.texts) - _matches_of_both(further, columns)
    return counts.index_add(0, places, missed)


def image_counts(rows: Ids, columns: Ids) -> Int64[Tensor, " J"]:
    """How many images belong to each text: the column sums of `positives`, without a matrix."""
    counts = _matches_of_either(columns, rows)
    if rows.known is None:
        return counts
    _, further = _further_texts(rows, rows.known)
    return counts + _matches(columns.texts, further.texts) - _matches_of_both(columns, further)


def _further_texts(rows: Ids, known: KnownPairs) -> tuple[Tensor, Ids]:
    """Each image with each of its known texts but that of its pair, and its place in the rows."""
    places, texts = known.texts_of(rows.images)
    further = texts != rows.texts[places]
    places = places[further]
    return places, Ids(rows.images[places], texts[further])


def _matches_of_either(ids: Ids, among: Ids) -> Tensor:
    """How many have the same image or the same text."""
    images = _matches(ids.images, among.images)
    return images + _matches(ids.texts, among.texts) - _matches_of_both(ids, among)


def _matches_of_both(ids: Ids, among: Ids) -> Tensor:
    """How many have the same image and the same text."""
    step = 1 + torch.cat([ids.texts, among.texts]).max()  # image and text as one number
    return _matches(ids.images * step + ids.texts, among.images * step + among.texts)


def _matches(values: Tensor, among: Tensor) -> Tensor:
    """How often each value stands among others."""
    ordered = among.sort().values
    last = torch.searchsorted(ordered, values, right=True)
    return last - torch.searchsorted(ordered, values)


def infonce(
    logits_per_image: Float[Tensor, "I J"],
    positives: Bool[Tensor, "I J"],
    text_to_image_weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Cross entropy against a target shared equally by all positives, in both directions.

    A row with k positives cannot go below log k, which it reaches when they score equally and
    everything else infinitely lower.

    Args:
        logits_per_image: Scaled scores; half precision is widened first.
        positives: At least one True in each row and column.
        text_to_image_weight: Share, in [0, 1], of the direction that ranks images for a text.
    """
    logits = widen(logits_per_image)
    to_texts, to_images = _one_way(logits, positives), _one_way(logits.T, positives.T)
    return (1 - text_to_image_weight) * to_texts + text_to_image_weight * to_images


def _one_way(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy of each row against a target shared equally by its positives."""
    share = positives.to(logits.dtype)
    return functional.cross_entropy(logits, share / share.sum(dim=1, keepdim=True))


def sigmoid(
    logits_per_image: Float[Tensor, "I J"],
    positives: Bool[Tensor, "I J"],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Is this pair one? Binary cross entropy of every pair, summed over texts, mean over images.

    No pair is compared with another, so positives may be many and negatives need no whole row.

    **Source:** Zhai et al. 2023 (SigLIP), sec. 3.2: the scale starts at 10 and the bias at -10.

    Args:
        logits_per_image: Scaled scores; half precision is widened first.
        positives: True where an image and a text belong together.
        bias: Added to all logits.
    """
    logits = widen(logits_per_image) + bias
    # log(1 + exp(-z)) of a positive is log(1 + exp(z)) - z.
    return (functional.softplus(logits) - logits * positives).sum() / len(logits)
