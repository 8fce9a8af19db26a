"""Objective `paper`: the reference's function, kept to compare with.

Shapes: `B` batch, `L` image tokens, `T` text tokens, `dim` Adaptor width.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from featcache.adaptor.contrast import Contrast, LogitTile
from featcache.adaptor.dual import Dual
from featcache.adaptor.known import KnownPairs
from featcache.adaptor.losses import Ids
from featcache.adaptor.model import Adaptor, AdaptorConfig, masked_mean, unit
from featcache.adaptor.objective import ObjectiveOutput
from featcache.adaptor.queue import Queue
from featcache.adaptor.ranks import Ranks
from featcache.errors import UsageError
from featcache.loader.batch import Batch

PAPER_NOTICES = {
    "none": "objective `paper` without fusion: one vector per modality, attention over one key, so "
    "the modalities never meet before the loss and query and key weights are never trained",
    "own-pair": "objective `paper` with own-pair fusion LEAKS: each image has seen its own text "
    "before it is compared, so the training loss says nothing about what was learnt",
}


class Paper(Dual):
    """The reference's function, kept to compare with; see the notices for what is wrong with it.

    Its targets are the diagonal: a text that two images share counts as a negative of each.
    Unpaired candidates and probes see the image without any text, as downstream in the paper.
    """

    def __init__(
        self, contrast: Contrast | None = None, fusion: str = "none", vector: str = "mean"
    ):
        super().__init__(contrast)
        self.fusion = fusion
        self.vector = vector
        self.notice = PAPER_NOTICES[fusion]

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Paper":
        """Build it as a config says."""
        return cls(Contrast.from_config(config), config.fusion, config.paper_vector)

    def ids(self, batch: Batch, known: KnownPairs | None = None) -> Ids:
        """A pair belongs to nothing but itself, whatever is known."""
        return Ids(batch.pairs, batch.pairs)

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
        """Score a batch; with own-pair fusion the logits have seen which text is whose.

        Args:
            adaptor: What encodes.
            batch: This process's pairs.
            chunk: See `Objective.forward`.
            ranks: See `Objective.forward`.
            queue: See `Objective.forward`.
            known: Has no effect.

        Raises:
            UsageError: One of the three was asked for with own-pair fusion.
        """
        if self.fusion == "none":
            return super().forward(adaptor, batch, chunk=chunk, ranks=ranks, queue=queue)
        if chunk is not None or ranks is not None or queue is not None:
            raise UsageError(
                "own-pair fusion knows no gradient cache, no ranks and no queue",
                where="adaptor.fusion",
                fix="--set adaptor.fusion=none",
            )
        image_tokens, text_tokens = adaptor.fuse(
            batch.image_tokens, batch.text_tokens, batch.text_valid
        )
        images = unit(image_tokens.mean(dim=1))
        texts = unit(masked_mean(text_tokens, batch.text_valid))
        logits, ids = self.score(images, texts, adaptor.scale), self.ids(batch)
        return ObjectiveOutput(self.contrast(LogitTile(ids, ids, logits)), logits)

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """One vector per text, with norm 1."""
        if self.fusion == "none":
            tokens = tokens.to(adaptor.logit_scale.dtype)
            pooled = tokens[:, 0] if self.vector == "first" else masked_mean(tokens, valid)
            tokens, valid = pooled.unsqueeze(1), valid.any(dim=1, keepdim=True)  # (B, 1, E)
        return super().encode_texts(adaptor, tokens, valid)

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Without fusion one adapted vector made of one token, else the mean adapted token."""
        if self.fusion == "none":
            tokens = tokens.to(adaptor.logit_scale.dtype)
            pooled = tokens[:, 0] if self.vector == "first" else tokens.mean(dim=1)
            tokens = pooled.unsqueeze(1)  # (B, 1, D)
        return super().image_vector(adaptor, tokens)

    def similarity_map(
        self,
        adaptor: Adaptor,
        image_tokens: Float[Tensor, "B L D"],
        text_tokens: Float[Tensor, "B T E"],
        text_valid: Bool[Tensor, "B T"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B H W"]:
        """There is none: the blocks were trained on one vector per image.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "the objective `paper` knows one vector per image, no places",
            where="adaptor.objective",
            fix="--set adaptor.objective=allpairs, and train",
        )
