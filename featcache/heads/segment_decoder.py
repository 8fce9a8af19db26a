"""Decoders from a grid of tokens to a mask, with the loss they are trained by."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss  # type: ignore[import-untyped]

GAMMA = 2.0
WIDTHS = (64, 32, 16)
"""Channels of the convolutional decoder, on the grid, twice and four times as fine."""
GROUPS = 8

DecoderName = Literal["linear", "conv"]


def upsample(logits: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """Bilinear, pixel centres aligned as a resized picture has them.

    Args:
        logits: On a coarse grid.
        size: Height, width wanted.
    """
    if logits.shape[1:] == size:
        return logits
    resized = functional.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)
    return resized[:, 0]


class Decoder(nn.Module):
    """Logits of a mask from the tokens of one picture's grid; no picture sees another.

    Tokens are standardised by the mean and standard deviation of the training subset's, which are
    kept as buffers, so that a saved decoder is all that it takes.

    Args:
        dim: Width of a token.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("sd", torch.ones(dim))

    def forward(
        self, tokens: Float[Tensor, "B H W D"], size: tuple[int, int]
    ) -> Float[Tensor, "B h w"]:
        """Logits of being inside, at the size wanted.

        Args:
            tokens: Row-major grid, as the encoder or the Adaptor gave it.
            size: Height, width in pixels.
        """
        return upsample(self.places(self.standardise(tokens)), size)

    def standardise(self, tokens: Float[Tensor, "B H W D"]) -> Float32[Tensor, "B H W D"]:
        """Tokens as the weights read them; decoders of one subset share the result.

        Args:
            tokens: As the encoder or the Adaptor gave them.
        """
        return (tokens.float() - self.mean) / self.sd

    def places(self, tokens: Float[Tensor, "B H W D"]) -> Float[Tensor, "B h w"]:
        """Logits on the grid, or on one that is finer by a whole factor."""
        raise NotImplementedError

    def set_prior(self, share: float) -> None:
        """Let an untrained decoder answer with a share of pixels: training starts from there.

        Args:
            share: Of the training pixels that are inside; kept within 0.001 and 0.5.
        """
        share = min(max(share, 1e-3), 0.5)
        nn.init.constant_(self.last_bias, math.log(share / (1 - share)))

    @property
    def last_bias(self) -> Tensor:
        """What is added to every logit."""
        raise NotImplementedError


class LinearDecoder(Decoder):
    """One weight per channel, the same at every place: a linear probe of the patch tokens.

    Args:
        dim: Width of a token.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.head = nn.Linear(dim, 1)
        nn.init.normal_(self.head.weight, std=0.01 / math.sqrt(dim))

    def places(self, tokens: Float[Tensor, "B H W D"]) -> Float[Tensor, "B H W"]:
        """A logit for each place of the grid."""
        logits: Tensor = self.head(tokens)
        return logits.squeeze(3)

    @property
    def last_bias(self) -> Tensor:
        """The one bias."""
        return self.head.bias


class ConvDecoder(Decoder):
    """A few 3 x 3 convolutions while the grid becomes four times as fine; about 0.1 M parameters.

    Args:
        dim: Width of a token.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        first, second, third = WIDTHS
        self.reduce = nn.Conv2d(dim, first, 1)
        self.stages = nn.ModuleList(
            [_stage(first, first), _stage(first, second), _stage(second, third)]
        )
        self.last = nn.Conv2d(third, 1, 1)
        nn.init.normal_(self.last.weight, std=0.01)

    def places(self, tokens: Float[Tensor, "B H W D"]) -> Float[Tensor, "B 4*H 4*W"]:
        """Logits on a grid that is four times as fine."""
        maps = self.reduce(tokens.permute(0, 3, 1, 2))  # B C H W
        for number, stage in enumerate(self.stages):
            if number:
                maps = functional.interpolate(
                    maps, scale_factor=2.0, mode="bilinear", align_corners=False
                )
            maps = stage(maps)
        logits: Tensor = self.last(maps)
        return logits.squeeze(1)

    @property
    def last_bias(self) -> Tensor:
        """Of the last convolution."""
        bias = self.last.bias
        if bias is None:
            raise AttributeError("the last convolution has no bias")
        return bias


def _stage(channels: int, out: int) -> nn.Sequential:
    """One convolution; the norm is over each picture alone."""
    conv = nn.Conv2d(channels, out, 3, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out), nn.GELU())


def build_decoder(name: DecoderName, dim: int, seed: int) -> Decoder:
    """A decoder with fresh weights.

    Args:
        name: `linear` or `conv`.
        dim: Width of a token.
        seed: Of the weights; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearDecoder(dim) if name == "linear" else ConvDecoder(dim)


def mask_loss(
    logits: Float[Tensor, "B h w"],
    masks: Float[Tensor, "B h w"],
    *,
    focal_weight: float = 10.0,
    smooth: float = 1.0,
) -> Float[Tensor, ""]:
    """Focal loss (gamma 2, mean over pixels) times a weight, and one minus soft Dice.

    Dice is of probabilities, with its factor 2, over all pixels of the batch: a picture without a
    mask then costs what its false pixels cost, and no more. `smooth` pixels above and below the
    bar keep it and its gradient finite where the batch holds no mask.

    Args:
        logits: Before the sigmoid.
        masks: 0 or 1.
        focal_weight: Of the focal part.
        smooth: In pixels.
    """
    focal = sigmoid_focal_loss(logits, masks, alpha=-1.0, gamma=GAMMA, reduction="mean")
    inside = logits.sigmoid()
    overlap = 2.0 * (inside * masks).sum() + smooth
    dice = overlap / (inside.sum() + masks.sum() + smooth)
    loss: Tensor = focal_weight * focal + 1.0 - dice
    return loss
