"""The Adaptor: one projection per modality, then a few transformer blocks that both share.

Shapes: `B` batch, `L` image tokens, `T` text tokens, `D` an encoder's width, `dim` the Adaptor's
own width, `Q` tokens that ask, `K` tokens that are asked, `A` attention heads.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from featcache.config import Config
from featcache.errors import ConfigError

INITIAL_LOGIT_SCALE = 2.6592  # log of 1 / 0.07, the usual start of a contrastive temperature
SIGMOID_LOGIT_SCALE = 2.302585092994046  # log of 10, the start for the sigmoid loss
WIDEST = 2**24  # the square of much more overflows 64 bits
HALF = (torch.float16, torch.bfloat16)
MAX_LOGIT_SCALE = 4.605169773101807  # the largest float32 below ln 100


def _heads_fit(dim: int, heads: int) -> str | None:
    """The sentence to show when a width cannot be shared out among the heads, else None."""
    if dim % heads == 0:
        return None
    return f"`dim` {dim} cannot be shared out equally among `heads` {heads}"


class AdaptorConfig(Config):
    """The Adaptor's size and the objective it is trained on."""

    dim: int = Field(default=768, ge=1, le=WIDEST, description="Width of the Adaptor's tokens.")
    layers: int = Field(default=2, ge=0, le=1_000, description="Blocks, shared by both modalities.")
    heads: int = Field(
        default=12, ge=1, description="Attention heads of a block; must divide `dim`."
    )
    feedforward: int = Field(
        default=2048, ge=1, le=WIDEST, description="Hidden width of a block's feed-forward part."
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Dropout, on the attention weights too, while training.",
    )
    objective: str = Field(
        default="allpairs",
        description="Name in featcache/adaptor/objectives.py: allpairs, dual or paper.",
    )
    pooling: Literal["cosine", "logsumexp", "heads"] = Field(
        default="cosine",
        description="Objective `allpairs` only: how the image's tokens become a score. cosine of "
        "the text with what it pooled by attention, logsumexp of its cosines with the tokens, or "
        "heads: attention with `heads` heads and an output for each pair, for small batches only.",
    )
    loss: Literal["infonce", "sigmoid"] = Field(
        default="infonce",
        description="The contrastive loss: infonce compares within a batch, sigmoid judges each "
        "pair alone.",
    )
    text_to_image_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the loss that ranks images for a text; the rest ranks texts for an "
        "image. 0.5 is symmetric, the paper's code has 0.75. Loss `infonce` only.",
    )
    matching: float = Field(
        default=0.0,
        ge=0,
        description="Objective `dual` only. Weight of a second loss: does a text, fused with an "
        "image, belong to it? Asked of pairs and of the negatives that score highest.",
    )
    fusion: Literal["none", "own-pair"] = Field(
        default="none",
        description="Objective `paper` only. none: one vector per modality, which never meet "
        "before the loss. own-pair: tokens attend to their own partner first, which leaks.",
    )
    paper_vector: Literal["mean", "first"] = Field(
        default="mean",
        description="Objective `paper` without fusion: one vector per row, the mean of its tokens "
        "or the first (a transformer's class token).",
    )

    @model_validator(mode="after")
    def _check(self) -> "AdaptorConfig":
        problem = _heads_fit(self.dim, self.heads)
        if problem is None:
            for name, objective in (
                ("fusion", "paper"),
                ("pooling", "allpairs"),
                ("matching", "dual"),
            ):
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default and self.objective != objective:
                    problem = f"`{name}` {value} belongs to the objective `{objective}`"
        if problem is None and self.loss == "sigmoid" and self.text_to_image_weight != 0.5:
            problem = "the loss `sigmoid` has no directions: leave `text_to_image_weight` at 0.5"
        if problem is not None:
            raise ValueError(problem)
        return self


def widen(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half precision as float32; anything else as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def unit(vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Vectors with norm 1; zeros stay zeros.

    Half precision is widened first: in float16 the small number that guards the division is 0.
    """
    return functional.normalize(widen(vectors), dim=-1)


def masked_mean(
    tokens: Float[Tensor, "B T dim"], valid: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B dim"]:
    """Average the real tokens of each row.

    Args:
        tokens: What padding holds has no influence.
        valid: True = real; None = all of them.

    Returns:
        One vector per row; zeros for a row without any real token.
    """
    if valid is None:
        return tokens.mean(dim=1)
    real = tokens.masked_fill(~valid.unsqueeze(-1), 0)
    return real.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)


class Block(nn.Module):
    """A post-norm transformer block whose keys may come from another sequence.

    The residual lies on the tokens that ask, so the output has their length; with
    `context = tokens` it is self-attention. 3 dim^2 + 3 dim weights make queries, keys and values.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.expand = nn.Linear(dim, feedforward)
        self.contract = nn.Linear(feedforward, dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_feedforward = nn.LayerNorm(dim)
        # Query, key and value count as one 3 dim x dim matrix for the bound, as in PyTorch's
        # own attention; each alone would start 41 % larger.
        bound = math.sqrt(6 / (4 * dim))
        for projection in (self.query, self.key_value):
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        tokens: Float[Tensor, "B Q dim"],
        context: Float[Tensor, "B K dim"],
        context_valid: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B Q dim"]:
        """Let `tokens` attend to `context`, then pass each through the feed-forward part.

        Args:
            tokens: The sequence that asks.
            context: The sequence that is asked.
            context_valid: True = real; None = all. A row without any gets nothing from attention.
        """
        rate = self.dropout if self.training else 0.0
        attended = functional.dropout(self._attend(tokens, context, context_valid), rate)
        tokens = self.norm_attention(tokens + attended)
        hidden = functional.dropout(functional.relu(self.expand(tokens)), rate)
        out: Tensor = self.norm_feedforward(
            tokens + functional.dropout(self.contract(hidden), rate)
        )
        return out

    def _attend(
        self, tokens: Tensor, context: Tensor, context_valid: Bool[Tensor, "B K"] | None
    ) -> Tensor:
        B, Q, dim = tokens.shape
        query = self.query(tokens).view(B, Q, self.heads, -1).transpose(1, 2)  # (B, A, Q, dim/A)
        key, value = (
            part.view(B, context.shape[1], self.heads, -1).transpose(1, 2)  # (B, A, K, dim/A)
            for part in self.key_value(context).chunk(2, dim=-1)
        )
        mask = None
        if context_valid is not None:
            has_any = context_valid.any(dim=1, keepdim=True)  # (B, 1)
            # A softmax over no key at all is NaN in some kernels: such a row attends to its
            # padding here and gets zeros below.
            mask = (context_valid | ~has_any)[:, None, None, :]  # (B, 1, 1, K)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(B, Q, dim))
        if context_valid is not None:
            out = out * has_any.unsqueeze(-1).to(out.dtype)
        return out


class Adaptor(nn.Module):
    """Two projections without bias, blocks shared by both modalities, and a logit scale.

    With the defaults it has 12,207,617 parameters for image tokens of width 768, 11,912,705 for
    384 and 12,011,009 for 512 (text width 768).

    **Source:** docs/replication.md, "The model".

    Args:
        image_dim: Width of the image encoder's tokens.
        text_dim: Width of the text encoder's tokens.
        dim: Own width.
        layers: Number of blocks.
        heads: Attention heads of a block; must divide `dim`.
        feedforward: Hidden width of a block's feed-forward part.
        dropout: Dropout while training.

    Raises:
        ConfigError: `dim` is no multiple of `heads`.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        dim: int = 768,
        layers: int = 2,
        heads: int = 12,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        problem = _heads_fit(dim, heads)
        if problem is not None:
            raise ConfigError(problem, where="adaptor", fix="choose `heads` that divides `dim`")
        self.image_dim, self.text_dim, self.dim = image_dim, text_dim, dim
        self.image_projection = nn.Linear(image_dim, dim, bias=False)
        self.text_projection = nn.Linear(text_dim, dim, bias=False)
        self.blocks = nn.ModuleList(Block(dim, heads, feedforward, dropout) for _ in range(layers))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by: the exponential of `logit_scale`, at most 100."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the parameter itself back, a hair below the bound that `scale` has.

        At the bound and beyond, the clamp in `scale` has no gradient: the parameter would stay
        there for ever.
        """
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE - 1e-6)

    def project_images(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L dim"]:
        """Bring image tokens of any float type to the Adaptor's width, each with norm 1."""
        return self._project(self.image_projection, tokens)

    def project_texts(
        self, tokens: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T dim"]:
        """Bring text tokens to the Adaptor's width, each with norm 1; padding becomes zeros."""
        real = tokens.masked_fill(~valid.unsqueeze(-1), 0)  # even NaN in padding stays outside
        return self._project(self.text_projection, real)

    def encode_images(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L dim"]:
        """Adapt image tokens by self-attention; no other row and no text has any influence."""
        adapted = self.project_images(tokens)
        for block in self.blocks:
            adapted = block(adapted, adapted)
        return adapted

    def encode_texts(
        self, tokens: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T dim"]:
        """Adapt text tokens by self-attention among the real ones.

        Args:
            tokens: Any float type.
            valid: True = real.

        Returns:
            Adapted tokens; those in padded places mean nothing, but are finite.
        """
        adapted = self.project_texts(tokens, valid)
        for block in self.blocks:
            adapted = block(adapted, adapted, valid)
        return adapted

    def fuse(
        self,
        image_tokens: Float[Tensor, "B L D"],
        text_tokens: Float[Tensor, "B T E"],
        text_valid: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B L dim"], Float[Tensor, "B T dim"]]:
        """Let each image attend to the text of its own row, and that text to the image.

        Whatever is contrasted afterwards has already seen its partner: docs/objectives.md shows
        how that solves a contrastive task without learning anything.
        """
        images = self.project_images(image_tokens)
        texts = self.project_texts(text_tokens, text_valid)
        for block in self.blocks:
            images, texts = block(images, texts, text_valid), block(texts, images)
        return images, texts

    @staticmethod
    def _project(projection: nn.Linear, tokens: Tensor) -> Tensor:
        return unit(projection(tokens.to(projection.weight.dtype)))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
