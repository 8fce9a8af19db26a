"""Training of decoders on a subset, and what they see on a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from featcache.config import Config
from featcache.heads.segment_decoder import Decoder, DecoderName, build_decoder, mask_loss, upsample
from featcache.heads.segment_masks import Masks
from featcache.heads.segment_scores import Counts, Levels, count_pixels, join_counts
from featcache.heads.segment_tokens import GridTokens

SPREAD = 0.01
"""Floor of a channel's standard deviation, in medians: a constant channel stays small."""
IMAGES_FOR_STATISTICS = 512
WARM_UP = 0.1


class SegmentConfig(Config):
    """How decoders are trained, chosen and measured."""

    decoder: DecoderName = Field("linear", description="linear, or conv (light convolutions).")
    fractions: tuple[PositiveFloat, ...] = Field(
        (1, 10, 100), min_length=1, description="Shares of the training images, in percent."
    )
    subsets: PositiveInt = Field(3, description="Subsets drawn of each share below 100 %.")
    seeds: PositiveInt = Field(
        3, description="Decoders per subset: other first weights, another order."
    )
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        min_length=1,
        description="Validation chooses one for each subset.",
    )
    steps: PositiveInt = Field(200, description="Updates of each decoder, at least.")
    epochs: PositiveInt = Field(3, description="Passes over the subset, at least.")
    batch_size: PositiveInt = Field(32, description="Images of an update.")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's, on all weights.")
    focal_weight: float = Field(10.0, ge=0, description="Of the focal loss beside 1 - Dice.")
    loss_scale: PositiveInt = Field(
        4, description="Masks that train have this many pixels per token, each way."
    )
    size: PositiveInt = Field(224, description="Longer side of the masks that count, in pixels.")
    select_by: Literal["dice", "dice_positive", "pixel_dice"] = Field(
        "dice", description="Validation figure that chooses learning rate and thresholds."
    )
    random_encoder: bool = Field(True, description="Whether to compute the random encoder's row.")
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the test patients.")
    seed: int = Field(0, ge=0, description="Seed of subsets, weights, order and bootstrap.")


@dataclass(frozen=True)
class Statistics:
    """What decoders know of the training subset before they are trained.

    Attributes:
        mean: Of each channel.
        sd: Of each channel, with a floor.
        share: Of the training pixels that are inside a mask.
    """

    mean: Float32[Tensor, " D"]
    sd: Float32[Tensor, " D"]
    share: float


def token_statistics(
    tokens: GridTokens, members: Int64[np.ndarray, " n"], masks: Masks
) -> Statistics:
    """Mean and deviation of each channel over the grids of a training subset.

    Args:
        tokens: Of all labelled images.
        members: The subset; of more than 512 images, evenly spaced ones are looked at.
        masks: Of the subset at least.
    """
    step = max(1, len(members) // IMAGES_FOR_STATISTICS)
    total = torch.zeros(tokens.dim, dtype=torch.float64)
    squares, places = torch.zeros_like(total), 0
    for batch in tokens.batches(members[::step], 32):
        flat = batch.flatten(0, 2).double()
        total += flat.sum(0)
        squares += flat.square().sum(0)
        places += len(flat)
    mean = total / places
    sd = (squares / places - mean.square()).clamp_min(0).sqrt()
    moving = sd[sd > 0]
    floor = SPREAD * float(moving.median()) if len(moving) else 1.0
    found = (masks.bits[number] for number in members.tolist() if number in masks.bits)
    inside = sum(int(np.bitwise_count(bits).sum()) for bits in found)
    share = inside / (len(members) * masks.size[0] * masks.size[1])
    return Statistics(mean.float(), (sd.square() + floor**2).sqrt().float(), share)


def batch_order(
    members: Int64[np.ndarray, " n"], *, steps: int, batch_size: int, seed: int
) -> Int64[np.ndarray, "steps b"]:
    """Which images each update reads: permutations of the subset, one after the other.

    Args:
        members: The subset.
        steps: Updates.
        batch_size: Images of one; no more than there are.
        seed: Of the permutations.
    """
    generator = np.random.default_rng([seed, 20])
    each = min(batch_size, len(members))
    passes = -(-steps * each // len(members))
    order = np.concatenate([generator.permutation(members) for _ in range(passes)])
    return order[: steps * each].reshape(steps, each)


def train_decoders(
    tokens: GridTokens,
    masks: Masks,
    members: Int64[np.ndarray, " n"],
    config: SegmentConfig,
    *,
    seed: int,
    device: str,
) -> list[Decoder]:
    """Train one decoder for each learning rate, all on the same batches in one pass.

    Args:
        tokens: Of all labelled images.
        masks: Of the subset at least, at the size that trains.
        members: The subset.
        config: Its learning rates, ascending, decide how many.
        seed: Of first weights and order.
        device: Where they are trained.

    Returns:
        Decoders in eval mode, in the order of the learning rates.
    """
    known = token_statistics(tokens, members, masks)
    decoders = [build_decoder(config.decoder, tokens.dim, seed) for _ in learning_rates(config)]
    for decoder in decoders:
        decoder.mean.copy_(known.mean)
        decoder.sd.copy_(known.sd)
        decoder.set_prior(known.share)
        decoder.to(device).train()
    optimizer = AdamW(
        [
            {"params": list(decoder.parameters()), "lr": rate}
            for decoder, rate in zip(decoders, learning_rates(config), strict=True)
        ],
        weight_decay=config.weight_decay,
    )
    steps = max(config.steps, -(-config.epochs * len(members) // config.batch_size))
    schedule = LambdaLR(optimizer, lambda step: _pace(step, steps))
    order = batch_order(members, steps=steps, batch_size=config.batch_size, seed=seed)
    batches = tokens.batches(order.ravel(), order.shape[1])
    for numbers, batch in zip(order.tolist(), batches, strict=True):
        given = decoders[0].standardise(batch.to(device, torch.float32))
        wanted = torch.from_numpy(masks.of(numbers)).to(device, torch.float32)
        losses = [
            mask_loss(
                upsample(decoder.places(given), masks.size),
                wanted,
                focal_weight=config.focal_weight,
            )
            for decoder in decoders
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        schedule.step()
    return [decoder.eval().requires_grad_(False) for decoder in decoders]


def learning_rates(config: SegmentConfig) -> list[float]:
    """Those to try, each once, ascending."""
    return sorted(set(config.learning_rates))


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then down along a half cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


@torch.inference_mode()
def count_masks(
    tokens: GridTokens,
    masks: Masks,
    numbers: Int64[np.ndarray, " n"],
    decoders: Sequence[Decoder],
    *,
    device: str,
    batch_size: int = 32,
) -> list[Counts]:
    """What each decoder predicts for some images, held against their masks, in one pass.

    Args:
        tokens: Of all labelled images.
        masks: Of these images, at the size that counts.
        numbers: Of the images.
        decoders: At least one.
        device: Where they are.
        batch_size: Images at a time.
    """
    levels, done = Levels(), 0
    parts: list[list[Counts]] = [[] for _ in decoders]
    for batch in tokens.batches(numbers, batch_size):
        given = batch.to(device, torch.float32)
        some = numbers[done : done + len(batch)].tolist()
        wanted = torch.from_numpy(masks.of(some)).to(device)
        for part, decoder in zip(parts, decoders, strict=True):
            part.append(count_pixels(decoder(given, masks.size), wanted, levels))
        done += len(batch)
    return [join_counts(part) for part in parts]


def mean_mask(masks: Masks, members: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "H W"]:
    """How often each pixel is inside a mask of the training subset.

    Args:
        masks: Of the subset at least.
        members: The subset.
    """
    total = np.zeros(masks.size, np.float32)
    for number in members.tolist():
        if number in masks.bits:
            total += masks.of([number])[0]
    return total / np.float32(len(members))


def count_constant(
    share: Float32[np.ndarray, "h w"],
    masks: Masks,
    numbers: Int64[np.ndarray, " n"],
    *,
    batch_size: int = 64,
) -> Counts:
    """What the same map for every image gives: it sees no pixel of them.

    Args:
        share: In [0, 1], at the size that trains.
        masks: Of these images, at the size that counts.
        numbers: Of the images.
        batch_size: Images at a time.
    """
    logits = torch.logit(upsample(torch.from_numpy(share)[None], masks.size), eps=1e-3)
    parts = []
    for start in range(0, len(numbers), batch_size):
        wanted = torch.from_numpy(masks.of(numbers[start : start + batch_size].tolist()))
        parts.append(count_pixels(logits.expand(len(wanted), -1, -1), wanted, Levels()))
    return join_counts(parts)
