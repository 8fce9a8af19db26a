"""What all objectives share: how representations are made, compared, and made into a loss.

Shapes: `B` batch, `I` images, `J` texts, `L` image tokens, `T` text tokens, `dim` Adaptor width.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featcache.adaptor.contrast import Contrast, LogitTile, Tile, VectorTile
from featcache.adaptor.known import KnownPairs
from featcache.adaptor.losses import Ids
from featcache.adaptor.model import Adaptor, AdaptorConfig, unit
from featcache.adaptor.queue import Queue
from featcache.adaptor.ranks import Ranks
from featcache.errors import UsageError
from featcache.loader.batch import Batch

# More logits than these are never all in memory, where image and text are one vector each.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class ObjectiveOutput:
    """One batch's loss, with the logits it was made of.

    Attributes:
        loss: Of the whole batch, over all ranks.
        logits_per_image: This process's images against the texts of all; None where there were
            too many to hold.
    """

    loss: Float[Tensor, ""]
    logits_per_image: Float[Tensor, "I J"] | None


class Objective(nn.Module):
    """How images and texts are scored, and what a head gets of an image.

    A new objective says what it makes of an image and of a text, how it scores them, and gets a
    line in `OBJECTIVES`. Nothing in here may let an image see its own text before the score.

    Args:
        contrast: The loss; None = symmetric InfoNCE.

    Attributes:
        notice: What every run of it must say about itself, or None.
        has_vectors: An image is one vector, and a score the scaled product of two vectors.
    """

    notice: str | None = None
    has_vectors: bool = False

    def __init__(self, contrast: Contrast | None = None):
        super().__init__()
        self.contrast = Contrast() if contrast is None else contrast

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Objective":
        """Build it as a config says."""
        return cls(Contrast.from_config(config))

    def forward(
        self,
        adaptor: Adaptor,
        batch: Batch,
        *,
        chunk: int | None = None,
        ranks: Ranks | None = None,
        queue: Queue | None = None,
        known: KnownPairs | None = None,
    ) -> ObjectiveOutput:
        """Encode both sides apart, score all pairs, compare with the positives.

        Args:
            adaptor: What encodes.
            batch: This process's pairs.
            chunk: Pairs to encode at once; their activations are forgotten and made anew in the
                backward pass, so that only representations of the whole batch are held. The result
                is the same. None = all at once, everything kept.
            ranks: Processes whose texts are negatives too; None = none.
            queue: Earlier pairs that are negatives too; this batch joins it when training.
            known: Pairs of the training set that the batch alone does not show; None = it shows
                all of them.
        """
        encode_texts = partial(self.encode_texts, adaptor)
        texts = torch.cat([*_in_chunks(encode_texts, chunk, batch.text_tokens, batch.text_valid)])
        # Chunks of tokens are scored as they come: the backward pass, which goes the other way
        # round, then holds the gradient of one chunk's tokens only.
        images: Iterable[Tensor] = _in_chunks(
            partial(self.encode_images, adaptor), chunk, batch.image_tokens
        )
        vectors = None
        if self.has_vectors:
            vectors = torch.cat([*images])
            images = [vectors]
        ids = self.ids(batch, known)
        loss, logits = self._contrast(images, vectors, texts, adaptor.scale, ids, ranks, queue)
        beside = None
        if vectors is not None:
            beside = self.loss_beside(adaptor, batch, vectors, texts, ids, chunk)
        return ObjectiveOutput(loss if beside is None else loss + beside, logits)

    def _contrast(
        self,
        images: Iterable[Tensor],
        vectors: Tensor | None,
        texts: Tensor,
        scale: Tensor,
        own: Ids,
        ranks: Ranks | None,
        queue: Queue | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits of this process's images and the texts of all ranks."""
        ids = own
        if ranks is not None:
            texts, ids = ranks.gather(texts), ranks.gather_ids(own)
        candidates, columns, rows, queued = texts, ids, ids, None
        if queue is not None and len(queue) > 0:
            earlier_images, earlier_texts, earlier_ids = queue.content(own.known)
            candidates = torch.cat([texts, earlier_texts.to(texts.dtype)])
            columns = ids + earlier_ids
            if vectors is not None:
                rows = columns
                first, step = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
                part = slice(first, None, step)
                if first < len(earlier_ids):
                    some = [earlier_images[part].to(texts.dtype)]
                    queued = self._tile(some, texts, scale, earlier_ids[part], ids)
        tile = self._tile(images, candidates, scale, own, columns)
        loss = self.contrast(tile, queued, rows, len(ids), ranks)
        if queue is not None and self.training:
            if vectors is not None:
                vectors = vectors.detach() if ranks is None else ranks.gather(vectors.detach())
            queue.push(vectors, texts, ids)
        return loss, tile.logits[:, : len(ids)] if isinstance(tile, LogitTile) else None

    def _tile(
        self, images: Iterable[Tensor], texts: Tensor, scale: Tensor, rows: Ids, columns: Ids
    ) -> Tile:
        """Images against texts: as logits, or as vectors where those would be too many."""
        if self.has_vectors and len(rows) * len(columns) > LOGITS_AT_ONCE:
            vectors = torch.cat([*images])
            return VectorTile(rows, columns, scale * vectors, texts)
        logits = torch.cat([self.score(some, texts, scale) for some in images])
        return LogitTile(rows, columns, logits)

    def ids(self, batch: Batch, known: KnownPairs | None = None) -> Ids:
        """What makes an image and a text belong together: see `losses.positives`."""
        return Ids.of(batch, known)

    def loss_beside(
        self,
        adaptor: Adaptor,
        batch: Batch,
        images: Float[Tensor, "B dim"],
        texts: Float[Tensor, "B dim"],
        ids: Ids,
        chunk: int | None,
    ) -> Float[Tensor, ""] | None:
        """What is added to the contrastive loss where `has_vectors`; None = nothing.

        Args:
            adaptor: What encodes.
            batch: This process's pairs.
            images: What `encode_images` made of them.
            texts: What `encode_texts` made of them.
            ids: Of the pairs.
            chunk: See `forward`.
        """
        return None

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B ..."]:
        """What `score` takes of each image, a function of this image alone."""
        raise NotImplementedError

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """What `score` takes of each text, a function of this text alone."""
        raise NotImplementedError

    def score(
        self,
        images: Float[Tensor, "I ..."],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Logits of every image with every text, the same function for each pair."""
        raise NotImplementedError

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B F"]:
        """One vector per image for a linear probe, a function of this image alone."""
        raise NotImplementedError

    def similarity_map(
        self,
        adaptor: Adaptor,
        image_tokens: Float[Tensor, "B L D"],
        text_tokens: Float[Tensor, "B T E"],
        text_valid: Bool[Tensor, "B T"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B H W"]:
        """Where in each image its text is found: a similarity for each place of the grid.

        Args:
            adaptor: Its modules should be in eval mode.
            image_tokens: Prefix tokens first, then the grid, row-major.
            text_tokens: One text per image, any text: here an image may see one.
            text_valid: True = real.
            grid: Height and width in tokens.

        Returns:
            Cosines in [-1, 1] of the adapted patch tokens with what the text looks for.

        Raises:
            UsageError: There are fewer tokens than places.
        """
        places = grid[0] * grid[1]
        if image_tokens.shape[1] < places:
            raise UsageError(
                f"{image_tokens.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}",
                fix="the set's `grid` says how many places its tokens have",
            )
        adapted = adaptor.encode_images(image_tokens)[:, -places:]  # B L dim -> B H*W dim
        asked = self.looks_for(self.encode_texts(adaptor, text_tokens, text_valid))
        cosines: Tensor = torch.einsum("bld,bd->bl", unit(adapted), unit(asked))
        return cosines.view(len(cosines), *grid)

    def looks_for(self, texts: Float[Tensor, "B dim"]) -> Float[Tensor, "B dim"]:
        """What image tokens are compared with on behalf of a text; here the text's own vector."""
        return texts


def _in_chunks(
    encode: Callable[..., Tensor], chunk: int | None, *tensors: Tensor
) -> Iterator[Tensor]:
    """Encode rows `chunk` at a time, keeping no activations; dropout is the same in both passes."""
    if chunk is None:
        yield encode(*tensors)
        return
    parts = zip(*(torch.split(tensor, chunk) for tensor in tensors), strict=True)
    for part in parts:
        yield checkpoint(encode, *part, use_reentrant=False)
