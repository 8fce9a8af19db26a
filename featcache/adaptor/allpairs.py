"""Objective `allpairs`: every text looks at the tokens of every image.

Shapes: `B` batch, `I` images, `J` texts, `L` image tokens, `T` text tokens, `A` attention heads,
`dim` Adaptor width.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from featcache.adaptor.contrast import Contrast
from featcache.adaptor.model import Adaptor, AdaptorConfig, masked_mean, unit
from featcache.adaptor.objective import Objective
from featcache.adaptor.pooling import pooled_cosine, pooled_logsumexp

MIN_SHARPNESS, MAX_SHARPNESS = 1.0, 100.0


class AllPairs(Objective):
    """Attention pooling of each image by each text, then a cosine with that text.

    A text's vector t asks with `query(t)`, which stands for key and query projection at once
    (<Wk x, Wq t> = <x, Wk' Wq t>), so there is no tensor of keys. It starts as the identity: a
    text first looks at the tokens that resemble it.

    **Source:** one text attending over one image for every pair, as in CARZero (Lai et al.,
    CVPR 2024); the single head without keys is docs/objectives.md, "allpairs".

    Args:
        dim: Adaptor width.
        contrast: The loss; None = symmetric InfoNCE.
    """

    def __init__(self, dim: int, contrast: Contrast | None = None):
        super().__init__(contrast)
        self.query = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> Objective:
        """Build the kind that `config.pooling` names."""
        contrast = Contrast.from_config(config)
        if config.pooling == "logsumexp":
            return LogSumExp(contrast)
        if config.pooling == "heads":
            return ManyHeads(config.dim, config.heads, contrast)
        return AllPairs(config.dim, contrast)

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L dim"]:
        """All adapted tokens of each image."""
        return adaptor.encode_images(tokens)

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each text."""
        return masked_mean(adaptor.encode_texts(tokens, valid), valid)

    def score(
        self,
        images: Float[Tensor, "I L dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled cosines of each text with what it pooled from each image."""
        queries = self.query(texts) / math.sqrt(texts.shape[1])
        return scale * pooled_cosine(images, queries, unit(texts))

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token: what a text pools that looks nowhere in particular."""
        return adaptor.encode_images(tokens).mean(dim=1)

    def looks_for(self, texts: Float[Tensor, "B dim"]) -> Float[Tensor, "B dim"]:
        """The query, by which attention is shared out among the tokens."""
        found: Tensor = self.query(texts)
        return found


class LogSumExp(Objective):
    """A soft maximum, over an image's tokens, of their cosines with a text.

    It lies between the mean cosine (sharpness 0) and the largest one (sharpness infinite), so it
    is a number in [-1, 1]. The sharpness is learnt, from 10 on, and stays between 1 and 100.

    Args:
        contrast: The loss; None = symmetric InfoNCE.
    """

    def __init__(self, contrast: Contrast | None = None):
        super().__init__(contrast)
        self.sharpness_logit = nn.Parameter(torch.tensor(-math.log(10.0)))

    @property
    def sharpness(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by inside the sum of exponentials."""
        return MIN_SHARPNESS + (MAX_SHARPNESS - MIN_SHARPNESS) * self.sharpness_logit.sigmoid()

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L dim"]:
        """All adapted tokens of each image, each with norm 1."""
        return unit(adaptor.encode_images(tokens))

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each text, with norm 1."""
        return unit(masked_mean(adaptor.encode_texts(tokens, valid), valid))

    def score(
        self,
        images: Float[Tensor, "I L dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled soft maxima."""
        pooled = pooled_logsumexp(images, self.sharpness * texts)
        return scale * (pooled - math.log(images.shape[1])) / self.sharpness

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token."""
        return adaptor.encode_images(tokens).mean(dim=1)


class ManyHeads(AllPairs):
    """Attention as a block has it: keys, values, several heads, an output for each pair.

    A reference to measure the cheaper kinds against. It holds several tensors over all pairs and
    tokens, so it is for small batches.

    Args:
        dim: Adaptor width.
        heads: Attention heads; must divide `dim`.
        contrast: The loss; None = symmetric InfoNCE.
    """

    def __init__(self, dim: int, heads: int, contrast: Contrast | None = None):
        super().__init__(dim, contrast)
        self.heads = heads
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.query.weight)

    def score(
        self,
        images: Float[Tensor, "I L dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled cosines of each text with what its heads drew from each image."""
        query = self.query(texts).unflatten(1, (self.heads, -1))  # (J, A, dim/A)
        key, value = (
            part.unflatten(2, (self.heads, -1))  # (I, L, A, dim/A)
            for part in self.key_value(images).chunk(2, dim=2)
        )
        logits = torch.einsum("ilad,jad->ijal", key, query) / math.sqrt(query.shape[2])
        mixed = torch.einsum("ijal,ilad->ijad", logits.softmax(dim=3).to(value.dtype), value)
        drawn = self.out(mixed.flatten(2))  # (I, J, dim)
        return scale * functional.cosine_similarity(unit(drawn), unit(texts), dim=2)

    def looks_for(self, texts: Float[Tensor, "B dim"]) -> Float[Tensor, "B dim"]:
        """The text's own vector: each head has a space of its own."""
        return texts
