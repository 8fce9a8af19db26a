"""A batch of pairs, and how the tokens of an int8 set become numbers again.

An int8 set stays int8 until its tokens are where they are needed: half the bytes to read, to hold
and to send to a GPU. `Batch.to` dequantises there, in one go with the cast.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int8, Int64
from torch import Tensor

from featcache.cache.format import FLOAT16_MAX
from featcache.errors import CacheError

CPU_PIECE = 2**18
"""Numbers that one thread dequantises at a time: their float32 stays in the processor's cache."""
GPU_PIECE = 2**24


@dataclass(frozen=True)
class Int8Tokens:
    """Tokens as an int8 set stores them: `values * scale_token * scale_channel`.

    Attributes:
        values: Whole numbers in [-127, 127]; zeros where a row is padded.
        scale_token: Scale of each token.
        scale_channel: Scale of each channel, the same for the whole set.
        may_overflow: Whether a product may exceed what float16 holds.
        title: The set they are from, for messages.
    """

    values: Int8[Tensor, "B T D"]
    scale_token: Float16[Tensor, "B T"]
    scale_channel: Float32[Tensor, " D"]
    may_overflow: bool
    title: str

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "B T D"]:
        """Move the stored bytes, then dequantise them there: in float32, rounded to `dtype`.

        Args:
            device: Where to.
            dtype: Of the result; None gives float16.

        Raises:
            CacheError: A product is beyond float16, and that was wanted.
        """
        values, scale_token, scale_channel = (
            tensor.to(device, non_blocking=tensor.is_pinned())
            for tensor in (self.values, self.scale_token, self.scale_channel)
        )
        tokens = dequantise(values, scale_token, scale_channel, dtype or torch.float16)
        if self.may_overflow and tokens.dtype == torch.float16 and tokens.isinf().any():
            raise CacheError(
                f"a token of this int8 set is larger than {FLOAT16_MAX:.0f}, which float16 "
                "cannot hold",
                where=self.title,
                fix="ask for them in float32 or bfloat16 (`Batch.to(device, torch.float32)`), or "
                "extract the set with --dtype float32",
            )
        return tokens


def may_overflow(
    scale_token: Float16[Tensor, "*rows"], scale_channel: Float32[Tensor, " D"]
) -> bool:
    """Whether tokens of these scales can exceed float16 at all; a look at the scales alone.

    Args:
        scale_token: In main memory.
        scale_channel: In main memory.
    """
    if not scale_token.numel():
        return False
    return 127 * float(scale_token.max()) * float(scale_channel.max()) > FLOAT16_MAX


def dequantise(
    values: Int8[Tensor, "*rows D"],
    scale_token: Float16[Tensor, "*rows"],
    scale_channel: Float32[Tensor, " D"],
    dtype: torch.dtype,
) -> Float[Tensor, "*rows D"]:
    """`values * scale_token * scale_channel` in float32, rounded once to `dtype`.

    It goes piece by piece, so that the float32 is never all there. Multiplying int8 by a float
    straight into an output takes a slow path of torch; a copy and two products in place do not.

    Args:
        values: On any device.
        scale_token: On the same one.
        scale_channel: On the same one.
        dtype: Of the result.
    """
    dim = values.shape[-1]
    out = _empty(values.shape, dtype, values.device)
    stored, flat = values.reshape(-1, dim), out.view(-1, dim)
    scales = scale_token.reshape(-1, 1).float()
    on_cpu = values.device.type == "cpu"
    piece = CPU_PIECE * torch.get_num_threads() if on_cpu else GPU_PIECE
    step = min(max(1, piece // max(1, dim)), len(flat))
    scratch = None
    if dtype != torch.float32:
        scratch = torch.empty(step, dim, dtype=torch.float32, device=values.device)
    for start in range(0, len(flat), max(1, step)):
        target = flat[start : start + step]
        wide = target if scratch is None else scratch[: len(target)]
        wide.copy_(stored[start : start + step])
        wide.mul_(scales[start : start + step]).mul_(scale_channel)
        if scratch is not None:
            target.copy_(wide)
    return out


@dataclass
class Batch:
    """Image-text pairs of one step.

    Attributes:
        image_tokens: Tokens of each pair's image.
        text_tokens: Tokens of each pair's text, zeros where `text_valid` is False.
        text_valid: True at real text tokens.
        pairs: Numbers of the pairs in the cache.
        image_rows: Rows in the image set; equal numbers are the same image.
        text_rows: Rows in the text set; equal numbers are the same text.
    """

    image_tokens: Float[Tensor, "B L D"]
    text_tokens: Float[Tensor, "B T E"]
    text_valid: Bool[Tensor, "B T"]
    pairs: Int64[Tensor, " B"]
    image_rows: Int64[Tensor, " B"]
    text_rows: Int64[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """Move all tensors, and turn tokens into `dtype` once they are there.

        Copies to a GPU from the loader's pinned buffers do not block. The loader waits for them
        before it uses a buffer again, as long as they run in the stream that is current when the
        next batch is asked for. What is already there in that dtype is not copied.

        Args:
            device: Where to.
            dtype: Of the tokens; None keeps theirs.
        """
        return Batch(*(_moved(tensor, device, dtype) for tensor in self._held()))

    def _held(self) -> "list[Tensor | Int8Tokens]":
        """What the batch holds, in the order of its fields."""
        return [getattr(self, item.name) for item in fields(Batch)]


class StoredBatch(Batch):
    """A batch of which one set or both are int8, not dequantised yet.

    `to` gives a plain `Batch`, dequantised after the transfer; None as its dtype means float16 for
    an int8 set. `image_tokens` and `text_tokens` are float16 here as well: dequantised when first
    read, in the memory where they are.

    Args:
        images: Tokens of the image set, as stored.
        texts: Tokens of the text set, as stored.
        text_valid: See `Batch`, like the others.
        pairs: Numbers of the pairs.
        image_rows: Rows of the images.
        text_rows: Rows of the texts.
    """

    def __init__(
        self,
        images: Float[Tensor, "B L D"] | Int8Tokens,
        texts: Float[Tensor, "B T E"] | Int8Tokens,
        text_valid: Bool[Tensor, "B T"],
        pairs: Int64[Tensor, " B"],
        image_rows: Int64[Tensor, " B"],
        text_rows: Int64[Tensor, " B"],
    ):
        self.images, self.texts, self.text_valid = images, texts, text_valid
        self.pairs, self.image_rows, self.text_rows = pairs, image_rows, text_rows

    @cached_property
    def image_tokens(self) -> Float[Tensor, "B L D"]:  # type: ignore[override]
        """Tokens of each pair's image."""
        return as_float(self.images)

    @cached_property
    def text_tokens(self) -> Float[Tensor, "B T E"]:  # type: ignore[override]
        """Tokens of each pair's text."""
        return as_float(self.texts)

    def _held(self) -> list[Tensor | Int8Tokens]:
        rows = (self.pairs, self.image_rows, self.text_rows)
        return [self.images, self.texts, self.text_valid, *rows]


def as_float(tokens: Float[Tensor, "B T D"] | Int8Tokens) -> Float[Tensor, "B T D"]:
    """Tokens in a float type where they are: float16 for int8 sets, else the very same.

    Args:
        tokens: As stored.

    Raises:
        CacheError: A token of an int8 set is beyond float16.
    """
    return tokens if isinstance(tokens, Tensor) else tokens.to(tokens.values.device)


def _moved(
    tensor: Tensor | Int8Tokens, device: torch.device | str, dtype: torch.dtype | None
) -> Tensor:
    """One tensor elsewhere; only floats take the dtype."""
    if isinstance(tensor, Int8Tokens):
        return tensor.to(device, dtype)
    moved = tensor.to(device, non_blocking=tensor.is_pinned())
    if dtype is None or moved.dtype == dtype or not moved.is_floating_point():
        return moved
    return _empty(moved.shape, dtype, moved.device).copy_(moved)


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result.

    In main memory it is numpy's, which asks the system for large pages: the first touch of each
    small one takes longer than dequantising what is on it (30 ms against 11 for 58 MB).
    """
    if device.type != "cpu" or not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    size_bytes = shape.numel() * dtype.itemsize
    return torch.from_numpy(np.empty(size_bytes, np.uint8)).view(dtype).view(shape)
