"""Image-text matching: does a text, fused with an image, belong to it?

Shapes: `B` pairs, `M` fused pairs, `L` image tokens, `T` text tokens, `dim` Adaptor width.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from featcache.adaptor.losses import Ids, positives
from featcache.adaptor.model import Adaptor, masked_mean, widen
from featcache.loader.batch import Batch

ROWS_AT_ONCE = 1024


class Matching(nn.Module):
    """Binary cross entropy on fused pairs: right ones, and one hard negative per image and text.

    Each image gets a wrong text and each text a wrong image, drawn from this process's batch with
    the probability that the contrast gives it. Fusing what belongs together does not leak here,
    since what is asked is whether it does. It costs about three times the tokens of the batch.

    **Source:** Li et al. 2021 (ALBEF), sec. 3.2.

    Args:
        dim: Adaptor width.
        weight: Of this loss beside the contrastive one.
    """

    def __init__(self, dim: int, weight: float):
        super().__init__()
        self.weight = weight
        self.judge = nn.Linear(2 * dim, 1)

    def forward(
        self,
        adaptor: Adaptor,
        batch: Batch,
        images: Float[Tensor, "B dim"],
        texts: Float[Tensor, "B dim"],
        scale: Float[Tensor, ""],
        ids: Ids,
        chunk: int | None = None,
    ) -> Float[Tensor, ""]:
        """The weighted loss.

        Args:
            adaptor: What fuses.
            batch: The pairs.
            images: Their vectors with norm 1, by which negatives are drawn.
            texts: Their vectors with norm 1.
            scale: What cosines are multiplied by.
            ids: Of the pairs: what belongs together is no negative.
            chunk: Fused pairs whose activations are held at once; None = all.
        """
        own = torch.arange(len(batch), device=images.device)
        wrong_texts, has_text = hard_negatives(images, texts, scale, ids)
        wrong_images, has_image = hard_negatives(texts, images, scale, ids, of_texts=True)
        rows = torch.cat([own, own[has_text], wrong_images[has_image]])
        columns = torch.cat([own, wrong_texts[has_text], own[has_image]])
        size = max(1, len(rows)) if chunk is None else chunk
        logits = torch.cat(
            [
                self._judge(adaptor, batch, *part)
                if chunk is None
                else checkpoint(self._judge, adaptor, batch, *part, use_reentrant=False)
                for part in zip(torch.split(rows, size), torch.split(columns, size), strict=True)
            ]
        )
        fits = torch.zeros_like(logits)
        fits[: len(own)] = 1
        return self.weight * functional.binary_cross_entropy_with_logits(logits, fits)

    def _judge(
        self,
        adaptor: Adaptor,
        batch: Batch,
        rows: Int64[Tensor, " M"],
        columns: Int64[Tensor, " M"],
    ) -> Float[Tensor, " M"]:
        """A logit for each image with its text: do they fit?"""
        valid = batch.text_valid[columns]
        images, texts = adaptor.fuse(batch.image_tokens[rows], batch.text_tokens[columns], valid)
        both = torch.cat([images.mean(dim=1), masked_mean(texts, valid)], dim=1)  # (M, 2 dim)
        return widen(self.judge(both).squeeze(1))


@torch.no_grad()
def hard_negatives(
    queries: Float[Tensor, "B dim"],
    candidates: Float[Tensor, "B dim"],
    scale: Float[Tensor, ""],
    ids: Ids,
    *,
    of_texts: bool = False,
) -> tuple[Int64[Tensor, " B"], Bool[Tensor, " B"]]:
    """A wrong candidate for each query, drawn with the probability that a softmax gives it.

    Args:
        queries: With norm 1.
        candidates: With norm 1.
        scale: What cosines are multiplied by.
        ids: Of both; those that belong together are never drawn.
        of_texts: Whether the queries are texts and the candidates images.

    Returns:
        Row of the candidate, and whether there was a wrong one at all.
    """
    drawn, exists = [], []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        wrong = ~(positives(ids, ids[part]).T if of_texts else positives(ids[part], ids))
        some = wrong.any(dim=1)
        logits = widen(scale * queries[part] @ candidates.T)
        # A row without a wrong candidate draws any of its own, which the caller leaves out.
        chances = logits.masked_fill(~wrong & some.unsqueeze(1), -torch.inf).softmax(dim=1)
        drawn.append(torch.multinomial(chances, 1).squeeze(1))
        exists.append(some)
    return torch.cat(drawn), torch.cat(exists)
