"""Pooling of every image's tokens by every text, without a tensor of all pairs and tokens.

Shapes: `I` images, `J` texts, `L` image tokens, `b` images of a block, `dim` width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from featcache.adaptor.model import widen

# Numbers of a block in tensors over tokens or over widths, of which the backward pass holds about
# four. On a CPU larger blocks are no faster, since they leave its caches.
CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**21, 2**25
MIN_NORM = 1e-6


class _PooledCosine(torch.autograd.Function):
    """`pooled_cosine` that keeps nothing of a pair but its score: a block is computed anew.

    Two large products forward, those two again and four more backward. The pooled vectors of a
    block are there, since the norm through the Gram matrix would need a product more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "I L dim"],
        queries: Float[Tensor, "J dim"],
        targets: Float[Tensor, "J dim"],
    ) -> Float[Tensor, "I J"]:
        ctx.save_for_backward(images, queries, targets)
        # One tensor made beforehand: small results between large temporaries would keep the
        # allocator from giving those back.
        scores = images.new_empty(len(images), len(queries), dtype=widen(images[:0]).dtype)
        for rows in _blocks(images, queries, images.shape[1] + images.shape[2]):
            _, pooled, inverse_norm = _pool(images[rows], queries)
            scores[rows] = pooled.mul_(targets).sum(dim=2).mul_(inverse_norm)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "I J"]) -> tuple[Tensor, Tensor, Tensor]:
        images, queries, targets = ctx.saved_tensors
        grad_images = torch.empty_like(images)
        grad_queries, grad_targets = (torch.zeros_like(widen(x)) for x in (queries, targets))
        for rows in _blocks(images, queries, images.shape[1] + images.shape[2]):
            x, outer = images[rows], grad[rows]  # (b, L, dim), (b, J)
            weights, pooled, inverse_norm = _pool(x, queries)
            pooled.mul_(inverse_norm.unsqueeze(2))  # (b, J, dim), norm 1
            for one, share in zip(pooled, outer, strict=True):
                grad_targets.addcmul_(one, share.unsqueeze(1))
            scores = (pooled * targets).sum(dim=2, keepdim=True)  # (b, J, 1)
            grad_pooled = pooled.mul_(-scores).add_(targets)
            grad_pooled = grad_pooled.mul_((outer * inverse_norm).unsqueeze(2)).to(x.dtype)
            # The softmax's own gradient would subtract sum(weights * grad_weights), which is
            # <pooled, grad_pooled> and therefore 0: a cosine has no gradient along its vector.
            grad_weights = widen(x @ grad_pooled.transpose(1, 2))  # (b, L, J)
            grad_logits = grad_weights.mul_(weights).to(x.dtype)
            grad_images[rows] = (grad_logits @ queries).baddbmm_(weights.to(x.dtype), grad_pooled)
            _add_product(grad_queries, grad_logits.flatten(0, 1).T, x.flatten(0, 1))
        return grad_images, grad_queries.to(queries.dtype), grad_targets.to(targets.dtype)


def _pool(images: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (b, L, J), pooled vectors (b, J, dim) and one over their norm (b, J), or 0."""
    # The order (b, L, J) makes one large matrix product of each with all images of the block.
    weights = widen(functional.linear(images, queries)).softmax(dim=1)
    pooled = widen(weights.to(images.dtype).transpose(1, 2) @ images)
    norm = torch.linalg.vector_norm(pooled, dim=2)
    return weights, pooled, norm.reciprocal().masked_fill_(norm < MIN_NORM, 0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a sum that is kept in at least float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _PooledLogSumExp(torch.autograd.Function):
    """`pooled_logsumexp` that keeps nothing of size I x J x L."""

    @staticmethod
    def forward(
        ctx: Any, images: Float[Tensor, "I L dim"], queries: Float[Tensor, "J dim"]
    ) -> Float[Tensor, "I J"]:
        pooled = images.new_empty(len(images), len(queries), dtype=widen(images[:0]).dtype)
        for rows in _blocks(images, queries, 2 * images.shape[1]):
            logits = widen(functional.linear(images[rows], queries))  # (b, L, J)
            pooled[rows] = logits.logsumexp(dim=1)
        ctx.save_for_backward(images, queries, pooled)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "I J"]) -> tuple[Tensor, Tensor]:
        images, queries, pooled = ctx.saved_tensors
        grad_images, grad_queries = torch.empty_like(images), torch.zeros_like(widen(queries))
        for rows in _blocks(images, queries, 2 * images.shape[1]):
            x = images[rows]
            logits = widen(functional.linear(x, queries))  # (b, L, J)
            weights = logits.sub_(pooled[rows].unsqueeze(1)).exp_()
            grad_logits = weights.mul_(grad[rows].unsqueeze(1)).to(x.dtype)
            grad_images[rows] = grad_logits @ queries
            _add_product(grad_queries, grad_logits.flatten(0, 1).T, x.flatten(0, 1))
        return grad_images, grad_queries.to(queries.dtype)


def _blocks(images: Tensor, queries: Tensor, width: int) -> Iterator[slice]:
    """Rows of one block of images after the other; `width` numbers are held for each pair."""
    numbers = CPU_BLOCK_NUMBERS if images.device.type == "cpu" else GPU_BLOCK_NUMBERS
    size = max(1, numbers // max(1, len(queries) * width))
    for start in range(0, len(images), size):
        yield slice(start, start + size)


def pooled_cosine(
    images: Float[Tensor, "I L dim"],
    queries: Float[Tensor, "J dim"],
    targets: Float[Tensor, "J dim"],
) -> Float[Tensor, "I J"]:
    """Pool each image's tokens by each query's attention; cosine of the result with its target.

    With a = softmax(X q) over an image's tokens X it is <X' a, t> / |X' a|. Neither pass keeps
    more than a block of images. Under autocast the products run in its type, softmax and sums in
    float32.

    Args:
        images: Tokens, all real.
        queries: What the softmax sees is the plain dot product: scale them before.
        targets: With norm 1; zeros give the score 0.
    """
    device = images.device.type
    dtype = torch.promote_types(images.dtype, torch.promote_types(queries.dtype, targets.dtype))
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        scores: Tensor = _PooledCosine.apply(images.to(dtype), queries.to(dtype), targets.to(dtype))
    return scores


def pooled_logsumexp(
    images: Float[Tensor, "I L dim"], queries: Float[Tensor, "J dim"]
) -> Float[Tensor, "I J"]:
    """The log-sum-exp, over each image's tokens, of their dot products with each query.

    It needs one product forward and three backward, half of what `pooled_cosine` needs. Under
    autocast the products run in its type, the sum in float32.

    Args:
        images: Tokens, all real.
        queries: Scale them before.
    """
    device = images.device.type
    dtype = torch.promote_types(images.dtype, queries.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        scores: Tensor = _PooledLogSumExp.apply(images.to(dtype), queries.to(dtype))
    return scores
