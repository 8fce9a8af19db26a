"""Attention pooling of every image by every text, without a tensor of all pairs and tokens.

Shapes: `I` images, `J` texts, `L` image tokens, `b` images of a block, `dim` width.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from featcache.adaptor.model import HALF, widen

# Numbers in one (images, L, J) tensor of the all-pairs score, of which the backward pass holds
# about eight. On a CPU larger blocks are no faster, but the allocator then keeps 0.6 GiB more.
CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**20, 2**24
MIN_SQUARED_NORM = 1e-12


class _Pooling(NamedTuple):
    """A block's intermediate values, (b, L, J) unless noted."""

    weights: Tensor
    projections: Tensor  # <token, target>
    gram: Tensor  # (b, L, L)
    mixed: Tensor  # gram @ weights
    dot: Tensor  # (b, 1, J) <pooled, target>
    inverse_norm: Tensor  # (b, 1, J) 1 / |pooled|


def _pool(images: Tensor, queries: Tensor, targets: Tensor) -> _Pooling:
    # (b, L, dim) x (J, dim): the order (b, L, J) keeps every product one large matrix product.
    weights = widen(functional.linear(images, queries)).softmax(dim=1)
    projections = widen(functional.linear(images, targets))
    gram = images @ images.transpose(1, 2)
    mixed = widen(gram @ weights.to(images.dtype))
    dot = (weights * projections).sum(dim=1, keepdim=True)
    squared = (weights * mixed).sum(dim=1, keepdim=True)  # |sum a x|^2 = a' (X X') a
    return _Pooling(
        weights, projections, gram, mixed, dot, squared.clamp(min=MIN_SQUARED_NORM).rsqrt()
    )


class _PooledCosine(torch.autograd.Function):
    """`pooled_cosine` that keeps nothing of size I x J x L: the backward pass computes it anew."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "I L dim"],
        queries: Float[Tensor, "J dim"],
        targets: Float[Tensor, "J dim"],
    ) -> Float[Tensor, "I J"]:
        ctx.save_for_backward(images, queries, targets)
        numbers = CPU_BLOCK_NUMBERS if images.device.type == "cpu" else GPU_BLOCK_NUMBERS
        ctx.size = max(1, numbers // max(1, len(queries) * images.shape[1]))
        dtype = torch.float32 if images.dtype in HALF else images.dtype
        # One tensor made beforehand: small results between large temporaries would keep the
        # allocator from giving those back.
        scores = images.new_empty(len(images), len(queries), dtype=dtype)
        for start in range(0, len(images), ctx.size):
            rows = slice(start, start + ctx.size)
            pooling = _pool(images[rows], queries, targets)
            scores[rows] = (pooling.dot * pooling.inverse_norm).squeeze(1)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "I J"]) -> tuple[Tensor, Tensor, Tensor]:
        images, queries, targets = ctx.saved_tensors
        grad_images = torch.empty_like(images)
        dtype = torch.float32 if images.dtype in HALF else images.dtype
        grad_queries, grad_targets = (torch.zeros_like(x, dtype=dtype) for x in (queries, targets))
        for start in range(0, len(images), ctx.size):
            rows = slice(start, start + ctx.size)
            x = images[rows]  # (b, L, dim)
            p = _pool(x, queries, targets)
            grad_dot = grad[rows].unsqueeze(1) * p.inverse_norm  # (b, 1, J)
            grad_squared = -0.5 * grad_dot * p.dot * p.inverse_norm.square()
            grad_weights = grad_dot * p.projections + (2 * grad_squared) * p.mixed
            inner = (p.weights * grad_weights).sum(dim=1, keepdim=True)
            grad_logits = (p.weights * (grad_weights - inner)).to(x.dtype)
            grad_projections = (p.weights * grad_dot).to(x.dtype)
            # The Gram matrix enters as A diag(g) A', which is symmetric: hence 2 x.
            grad_gram = (p.weights * (2 * grad_squared)).to(x.dtype) @ p.weights.to(
                x.dtype
            ).transpose(1, 2)
            grad_images[rows] = grad_logits @ queries + grad_projections @ targets + grad_gram @ x
            flat = x.flatten(0, 1)  # (b * L, dim)
            grad_queries += grad_logits.flatten(0, 1).T @ flat
            grad_targets += grad_projections.flatten(0, 1).T @ flat
        return grad_images, grad_queries.to(queries.dtype), grad_targets.to(targets.dtype)


def pooled_cosine(
    images: Float[Tensor, "I L dim"],
    queries: Float[Tensor, "J dim"],
    targets: Float[Tensor, "J dim"],
) -> Float[Tensor, "I J"]:
    """Pool each image's tokens by each query's attention; cosine of the result with its target.

    With a = softmax(X q) over an image's tokens X it is <X' a, t> / |X' a|. The norm comes from
    the image's Gram matrix, so no pooled vector of a pair exists; neither pass keeps more than
    a block of images. Under autocast the products run in its type, softmax and sums in float32.

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
