"""Objective `dual`: one vector per modality, which only meet in the loss.

Shapes: `B` batch, `I` images, `J` texts, `L` image tokens, `T` text tokens, `dim` Adaptor width.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from featcache.adaptor.contrast import Contrast
from featcache.adaptor.losses import Ids
from featcache.adaptor.matching import Matching
from featcache.adaptor.model import Adaptor, AdaptorConfig, masked_mean, unit
from featcache.adaptor.objective import Objective
from featcache.loader.batch import Batch


class Dual(Objective):
    """Each modality through the shared blocks alone; cosine of the mean adapted tokens.

    Args:
        contrast: The loss; None = symmetric InfoNCE.
        matching: A second loss on fused pairs, and what it needs; None = without.
    """

    has_vectors = True

    def __init__(self, contrast: Contrast | None = None, matching: Matching | None = None):
        super().__init__(contrast)
        self.matching = matching

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Dual":
        """Build it as a config says."""
        matching = Matching(config.dim, config.matching) if config.matching > 0 else None
        return cls(Contrast.from_config(config), matching)

    def loss_beside(
        self,
        adaptor: Adaptor,
        batch: Batch,
        images: Float[Tensor, "B dim"],
        texts: Float[Tensor, "B dim"],
        ids: Ids,
        chunk: int | None,
    ) -> Float[Tensor, ""] | None:
        """The matching loss, if there is one, with negatives of this process."""
        if self.matching is None:
            return None
        found: Tensor = self.matching(adaptor, batch, images, texts, adaptor.scale, ids, chunk)
        return found

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each image, with norm 1."""
        return unit(self.image_vector(adaptor, tokens))

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each text, with norm 1."""
        return unit(masked_mean(adaptor.encode_texts(tokens, valid), valid))

    def score(
        self,
        images: Float[Tensor, "I dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled cosines."""
        return scale * images @ texts.T

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each image."""
        return adaptor.encode_images(tokens).mean(dim=1)
