"""The contrastive loss of a batch: over all ranks, with a queue, in blocks where logits are many.

Shapes: `I` images of a tile, `J` its texts, `b` pairs of this rank, `B` pairs of all ranks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcache.adaptor.blocks import (
    Comparison,
    Shares,
    compare_logits,
    compare_vectors,
    sigmoid_logits,
    sigmoid_vectors,
)
from featcache.adaptor.losses import (
    INITIAL_LOGIT_BIAS,
    Ids,
    image_counts,
    infonce,
    positives,
    text_counts,
)
from featcache.adaptor.model import AdaptorConfig, widen
from featcache.adaptor.ranks import Ranks


@dataclass(frozen=True)
class LogitTile:
    """Some images against some texts, as logits.

    Attributes:
        rows: Ids of the images.
        columns: Ids of the texts.
        logits: Scaled scores.
    """

    rows: Ids
    columns: Ids
    logits: Float[Tensor, "I J"]

    def compare(self, shares: Shares) -> Comparison:
        """What InfoNCE needs."""
        return compare_logits(widen(self.logits), self.rows, self.columns, shares)

    def judge(self, bias: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What the sigmoid loss needs: the sum over all pairs."""
        return sigmoid_logits(widen(self.logits), self.rows, self.columns, bias)


@dataclass(frozen=True)
class VectorTile:
    """Some images against some texts, as the vectors whose products are the logits.

    Attributes:
        rows: Ids of the images.
        columns: Ids of the texts.
        images: Times the scale.
        texts: With norm 1.
    """

    rows: Ids
    columns: Ids
    images: Float[Tensor, "I dim"]
    texts: Float[Tensor, "J dim"]

    def compare(self, shares: Shares) -> Comparison:
        """What InfoNCE needs."""
        return compare_vectors(self.images, self.texts, self.rows, self.columns, shares)

    def judge(self, bias: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What the sigmoid loss needs: the sum over all pairs."""
        return sigmoid_vectors(self.images, self.texts, self.rows, self.columns, bias)


Tile = LogitTile | VectorTile


class Contrast(nn.Module):
    """InfoNCE, or the sigmoid loss with its bias.

    Args:
        loss: `infonce` or `sigmoid`.
        text_to_image_weight: See `losses.infonce`.
    """

    def __init__(self, loss: str = "infonce", text_to_image_weight: float = 0.5):
        super().__init__()
        self.text_to_image_weight = text_to_image_weight
        self.bias = None
        if loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(INITIAL_LOGIT_BIAS))

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Contrast":
        """Build it as a config says."""
        return cls(config.loss, config.text_to_image_weight)

    def forward(
        self,
        own: Tile,
        queued: Tile | None = None,
        images: Ids | None = None,
        num_pairs: int | None = None,
        ranks: Ranks | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the whole batch, the same number on every rank.

        Args:
            own: This rank's images against the texts of all ranks, and the queue's after them.
            queued: This rank's share of the queue's images against the texts of all ranks.
            images: Ids of all images that take part: of all ranks, then the queue's; None = own.
            num_pairs: Pairs of all ranks; None = own.
            ranks: The others; None = this process is alone.
        """
        num_pairs = len(own.rows) if num_pairs is None else num_pairs
        images = own.rows if images is None else images
        if self.bias is not None:
            tiles = [own] if queued is None else [own, queued]
            total = torch.stack([tile.judge(self.bias) for tile in tiles]).sum()
            return (total if ranks is None else ranks.gather(total[None]).sum()) / num_pairs
        alone = queued is None and ranks is None and len(own.columns) == num_pairs
        if alone and isinstance(own, LogitTile):
            targets = positives(own.rows, own.columns)
            return infonce(own.logits, targets, self.text_to_image_weight)
        return self._infonce(own, queued, images, num_pairs, ranks)

    def _infonce(
        self, own: Tile, queued: Tile | None, images: Ids, num_pairs: int, ranks: Ranks | None
    ) -> Tensor:
        """A rank knows whole rows; what it knows of a text's column is joined with the rest."""
        w, batch = self.text_to_image_weight, own.columns[:num_pairs]
        of_rows = (1 - w) / num_pairs / text_counts(own.rows, own.columns).double()
        of_columns = w / num_pairs / image_counts(images, batch).double()
        further = len(own.columns) - num_pairs
        ours = own.compare(Shares(of_rows, nn.functional.pad(of_columns, (0, further))))
        loss = (1 - w) / num_pairs * ours.over_texts.sum() - ours.positive
        over_images = ours.over_images[:num_pairs]
        if queued is not None:
            theirs = queued.compare(Shares(of_rows.new_zeros(len(queued.rows)), of_columns))
            loss = loss - theirs.positive
            over_images = torch.logaddexp(over_images, theirs.over_images)
        if ranks is not None:
            everyone = ranks.gather(torch.cat([over_images, loss[None]])[None])  # (ranks, B + 1)
            over_images, loss = everyone[:, :-1].logsumexp(dim=0), everyone[:, -1].sum()
        return loss + w / num_pairs * over_images.sum()
