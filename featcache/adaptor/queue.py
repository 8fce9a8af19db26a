"""Representations of earlier batches, kept as further negatives.

Shapes: `B` pairs of a batch, `N` pairs in the queue, `dim` width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcache.adaptor.known import KnownPairs
from featcache.adaptor.losses import Ids


class Queue(nn.Module):
    """The last pairs that a training has seen, as vectors without gradient.

    Tokens of the encoders never change, but what the Adaptor makes of them does: an entry is as
    old as `size / batch_size` steps. All of it is buffers, so a checkpoint of the module that
    holds the queue has it.

    Args:
        size: Pairs to keep, at least 1.
        dim: Width of the vectors.
    """

    images: Float[Tensor, "N dim"]
    texts: Float[Tensor, "N dim"]
    image_ids: Tensor
    text_ids: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, dim))
        self.register_buffer("texts", torch.zeros(size, dim))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("text_ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Pairs in it."""
        return min(self.size, int(self.pushed))

    def content(
        self, known: KnownPairs | None = None
    ) -> tuple[Float[Tensor, "N dim"], Float[Tensor, "N dim"], Ids]:
        """Copies of the images, the texts and the ids in it, which a later push leaves alone.

        Args:
            known: What the ids are to know.
        """
        part = slice(0, len(self))
        ids = Ids(self.image_ids[part].clone(), self.text_ids[part].clone(), known)
        return self.images[part].clone(), self.texts[part].clone(), ids

    @torch.no_grad()
    def push(
        self, images: Float[Tensor, "B dim"] | None, texts: Float[Tensor, "B dim"], ids: Ids
    ) -> None:
        """Put a batch in the place of the oldest; of one larger than the queue, its last pairs.

        Args:
            images: None where an image is not one vector: then only texts are kept.
            texts: One vector each.
            ids: Of the pairs.
        """
        texts, ids = texts[-self.size :], ids[-self.size :]
        places = (torch.arange(len(texts), device=texts.device) + self.pushed) % self.size
        self.texts[places] = texts.detach().to(self.texts.dtype)
        if images is not None:
            self.images[places] = images[-self.size :].detach().to(self.images.dtype)
        self.image_ids[places], self.text_ids[places] = ids.images, ids.texts
        self.pushed += len(texts)
