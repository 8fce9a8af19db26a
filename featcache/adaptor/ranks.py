"""The processes of a training, and what they tell each other inside a loss.

Every rank computes the loss of the whole batch, the same number. The backward pass of a gather
adds up what all ranks have to say about a part; averaging the ranks' gradients afterwards, as DDP
does, therefore gives those of one process that holds the whole batch.

Shapes: `b` rows of one rank, `B` of all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from featcache.adaptor.losses import Ids


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; every rank has equally many rows.

    Attributes:
        rank: From 0.
        world_size: How many there are.
    """

    rank: int
    world_size: int

    @classmethod
    def current(cls) -> "Ranks | None":
        """Those of torch's default process group; None when this process trains alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        size = distributed.get_world_size()
        return cls(distributed.get_rank(), size) if size > 1 else None

    def gather(self, rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
        """The rows of all ranks, in the order of the ranks, with gradient.

        Args:
            rows: Of this rank; the same shape and dtype on every rank.
        """
        gathered: Tensor = _Gather.apply(rows, self.rank, self.world_size)
        return gathered

    def gather_ids(self, ids: Ids) -> Ids:
        """The ids of all ranks, in the order of the ranks."""
        both: Int64[Tensor, "B 2"] = self.gather(torch.stack([ids.images, ids.texts], dim=1))
        return Ids(both[:, 0].contiguous(), both[:, 1].contiguous(), ids.known)


class _Gather(torch.autograd.Function):
    """All ranks' rows; each gets back the sum of all ranks' gradients of its own."""

    @staticmethod
    def forward(
        ctx: Any, rows: Shaped[Tensor, "b ..."], rank: int, world_size: int
    ) -> Shaped[Tensor, "B ..."]:
        ctx.rank, ctx.size = rank, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Shaped[Tensor, "B ..."]) -> tuple[Tensor, None, None]:
        # gloo has no reduce-scatter; what is sent are vectors, so the rest of the sum is cheap.
        whole = grad.contiguous().clone()
        distributed.all_reduce(whole)
        return whole[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size], None, None
