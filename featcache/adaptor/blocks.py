"""Sums over all pairs of two lists of vectors, in blocks, without a tensor of all pairs.

Both passes walk through blocks of images; the backward pass makes a block's logits anew. Logits
are the plain dot products, so scale the images first. Shapes: `I` images, `J` texts, `b` images of
a block, `dim` width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from featcache.adaptor.losses import Ids, positives
from featcache.adaptor.model import widen

CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**22, 2**26  # logits of one block


class Comparison(NamedTuple):
    """What InfoNCE needs to know of the logits of all pairs.

    Attributes:
        over_texts: Log-sum-exp of each image's logits.
        over_images: Log-sum-exp of each text's logits.
        positive: Sum of the positives' logits, each times its image's and its text's share.
    """

    over_texts: Float[Tensor, " I"]
    over_images: Float[Tensor, " J"]
    positive: Float[Tensor, ""]


class Shares(NamedTuple):
    """Weight of a positive: that of its image plus that of its text.

    Attributes:
        images: One per image.
        texts: One per text.
    """

    images: Float[Tensor, " I"]
    texts: Float[Tensor, " J"]

    def to(self, dtype: torch.dtype) -> "Shares":
        """In another float type."""
        return Shares(self.images.to(dtype), self.texts.to(dtype))


def compare_logits(
    logits: Float[Tensor, "I J"], rows: Ids, columns: Ids, shares: Shares
) -> Comparison:
    """`Comparison` of logits that are there.

    Args:
        logits: Scaled scores in float32 or wider.
        rows: Of the images.
        columns: Of the texts.
        shares: Weights of the positives.
    """
    shares = shares.to(logits.dtype)
    weights = positives(rows, columns) * (shares.images.unsqueeze(1) + shares.texts)
    return Comparison(logits.logsumexp(dim=1), logits.logsumexp(dim=0), (logits * weights).sum())


def compare_vectors(
    images: Float[Tensor, "I dim"],
    texts: Float[Tensor, "J dim"],
    rows: Ids,
    columns: Ids,
    shares: Shares,
) -> Comparison:
    """`Comparison` of the dot products of vectors, which are never all in memory.

    Args:
        images: Times the scale. Under autocast the products run in its type.
        texts: With norm 1.
        rows: Of the images.
        columns: Of the texts.
        shares: Weights of the positives.
    """
    shares = shares.to(widen(images[:0]).dtype)
    return Comparison(*_apply(_Compare, images, texts, rows, columns, *shares))


def sigmoid_logits(
    logits: Float[Tensor, "I J"], rows: Ids, columns: Ids, bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Sum of all pairs' binary cross entropy, of logits that are there.

    Args:
        logits: Scaled scores in float32 or wider.
        rows: Of the images.
        columns: Of the texts.
        bias: Added to all logits.
    """
    shifted = logits + bias
    return (functional.softplus(shifted) - shifted * positives(rows, columns)).sum()


def sigmoid_vectors(
    images: Float[Tensor, "I dim"],
    texts: Float[Tensor, "J dim"],
    rows: Ids,
    columns: Ids,
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Sum of all pairs' binary cross entropy, of vectors; the logits are never all in memory.

    Args:
        images: Times the scale. Under autocast the products run in its type.
        texts: With norm 1.
        rows: Of the images.
        columns: Of the texts.
        bias: Added to all logits.
    """
    total: Tensor = _apply(_Sigmoid, images, texts, rows, columns, bias)
    return total


def _apply(function: Any, images: Tensor, texts: Tensor, *rest: Any) -> Any:
    """Run a function of vectors in the type that autocast asks for."""
    device = images.device.type
    dtype = torch.promote_types(images.dtype, texts.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function.apply(images.to(dtype), texts.to(dtype), *rest)


def _blocks(images: Tensor, texts: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, vectors (b, dim) and logits (b, J) of one block of images after the other."""
    numbers = CPU_BLOCK_NUMBERS if images.device.type == "cpu" else GPU_BLOCK_NUMBERS
    size = max(1, numbers // max(1, len(texts)))
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        yield rows, images[rows], widen(images[rows] @ texts.T)


class _Gradients:
    """Gradients of images and texts, gathered from those of blocks of logits."""

    def __init__(self, images: Tensor, texts: Tensor):
        self.texts = texts
        self.of_images = torch.empty_like(images)
        self.of_texts = torch.zeros_like(widen(texts))

    def add(
        self, rows: slice, some: Float[Tensor, "b dim"], of_logits: Float[Tensor, "b J"]
    ) -> None:
        of_logits = of_logits.to(some.dtype)
        self.of_images[rows] = of_logits @ self.texts
        if some.dtype == self.of_texts.dtype:
            self.of_texts.addmm_(of_logits.T, some)
        else:
            self.of_texts += of_logits.T @ some

    def done(self) -> tuple[Tensor, Tensor]:
        return self.of_images, self.of_texts.to(self.texts.dtype)


class _Compare(torch.autograd.Function):
    """`compare_vectors`; keeps the vectors and the two log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "I dim"],
        texts: Float[Tensor, "J dim"],
        rows: Ids,
        columns: Ids,
        image_shares: Float[Tensor, " I"],
        text_shares: Float[Tensor, " J"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = widen(images[:0]).dtype
        over_texts = images.new_empty(len(images), dtype=dtype)
        over_images = images.new_full((len(texts),), -torch.inf, dtype=dtype)
        positive = images.new_zeros((), dtype=dtype)
        for part, _, logits in _blocks(images, texts):
            weights = positives(rows[part], columns) * (
                image_shares[part].unsqueeze(1) + text_shares
            )
            positive += torch.dot(logits.flatten(), weights.flatten())
            over_texts[part] = logits.logsumexp(dim=1)
            over_images = torch.logaddexp(over_images, logits.logsumexp(dim=0))
        ctx.save_for_backward(images, texts, image_shares, text_shares, over_texts, over_images)
        ctx.rows, ctx.columns = rows, columns
        return over_texts, over_images, positive

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_over_texts: Float[Tensor, " I"],
        grad_over_images: Float[Tensor, " J"],
        grad_positive: Float[Tensor, ""],
    ) -> tuple[Tensor | None, ...]:
        images, texts, image_shares, text_shares, over_texts, over_images = ctx.saved_tensors
        gradients = _Gradients(images, texts)
        for part, some, logits in _blocks(images, texts):
            weights = positives(ctx.rows[part], ctx.columns) * (
                image_shares[part].unsqueeze(1) + text_shares
            )
            of_logits = weights.mul_(grad_positive)
            softmax = (logits - over_texts[part].unsqueeze(1)).exp_()
            of_logits.addcmul_(softmax, grad_over_texts[part].unsqueeze(1))
            softmax = logits.sub_(over_images).exp_()
            of_logits.addcmul_(softmax, grad_over_images)
            gradients.add(part, some, of_logits)
        return *gradients.done(), None, None, None, None


class _Sigmoid(torch.autograd.Function):
    """`sigmoid_vectors`; keeps the vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "I dim"],
        texts: Float[Tensor, "J dim"],
        rows: Ids,
        columns: Ids,
        bias: Float[Tensor, ""],
    ) -> Tensor:
        ctx.save_for_backward(images, texts, bias)
        ctx.rows, ctx.columns = rows, columns
        total = torch.zeros_like(bias)
        for part, _, logits in _blocks(images, texts):
            total += sigmoid_logits(logits, rows[part], columns, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        images, texts, bias = ctx.saved_tensors
        gradients, grad_bias = _Gradients(images, texts), torch.zeros_like(bias)
        for part, some, logits in _blocks(images, texts):
            wanted = positives(ctx.rows[part], ctx.columns).to(logits.dtype)
            of_logits = logits.add_(bias).sigmoid_().sub_(wanted).mul_(grad)
            grad_bias += of_logits.sum()
            gradients.add(part, some, of_logits)
        return *gradients.done(), None, None, grad_bias
