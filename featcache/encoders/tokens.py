"""The tokens of a network that are stored: those of which layers, and how finely."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from pydantic import JsonValue
from torch import Tensor, nn

from featcache.encoders.interface import EncoderConfig
from featcache.errors import UsageError


def choose_blocks(
    layers: Sequence[int] | None, depth: int | None, *, encoder: str, network: str
) -> tuple[int, ...]:
    """Numbers of blocks from 1 for what was asked, which may count backwards from -1.

    Args:
        layers: As asked for; None: the last.
        depth: How many blocks the network has; None: no row of blocks of one kind.
        encoder: Short name, for the message.
        network: What the network is, for the message.

    Returns:
        The blocks in the order asked; empty where the last layer alone is meant.

    Raises:
        UsageError: The network has not these layers.
    """
    if layers is None or tuple(layers) == (-1,):
        return ()
    if depth is None:
        raise no_layers(encoder, network)
    if any(layer == 0 or abs(layer) > depth for layer in layers):
        raise UsageError(
            f"`{encoder}` has {depth} layers, {', '.join(map(str, layers))} were asked for",
            where="--layers",
            fix=f"--layers takes 1 to {depth}, or -1 to -{depth} backwards",
        )
    blocks = tuple(layer if layer > 0 else depth + 1 + layer for layer in layers)
    return () if blocks == (depth,) else blocks


def no_layers(encoder: str, network: str) -> UsageError:
    """The refusal of layers for a network whose inner tokens are not of one kind."""
    return UsageError(
        f"`{encoder}` ({network}) has no row of equal blocks, so only its last layer can be stored",
        where="--layers",
        fix="--layers -1, or leave it out",
    )


def pooled_grid(grid: tuple[int, int], size: int, *, encoder: str) -> tuple[int, int]:
    """Height, width of a grid after windows of `size` x `size` became one token each.

    Raises:
        UsageError: The window is larger than the grid.
    """
    if size > max(grid):
        raise UsageError(
            f"`{encoder}` has a grid of {grid[0]} x {grid[1]} tokens, windows of {size} x {size} "
            "were asked for",
            where="--pool-grid",
            fix=f"--pool-grid {max(grid)} at most",
        )
    return -(-grid[0] // size), -(-grid[1] // size)


def pool_tokens(
    tokens: Float[Tensor, "B L D"], num_prefix_tokens: int, grid: tuple[int, int], size: int
) -> Float32[Tensor, "B L1 D"]:
    """Average the grid over windows, in float32 even under autocast; prefix tokens are kept.

    Windows that reach over the right or lower edge average what is there.

    Args:
        tokens: Prefix tokens, then the grid row by row.
        num_prefix_tokens: How many stand before the grid.
        grid: Its height, width.
        size: Places of a window along each side.

    Returns:
        Prefix tokens, then the smaller grid row by row.
    """
    prefix = tokens[:, :num_prefix_tokens].float()
    patches = tokens[:, num_prefix_tokens:].float()
    grids = patches.transpose(1, 2).reshape(len(patches), -1, *grid)  # B D H W
    pooled = nn.functional.avg_pool2d(grids, size, ceil_mode=True, count_include_pad=False)
    return torch.cat([prefix, pooled.flatten(2).transpose(1, 2)], 1)


def token_record(config: EncoderConfig, depth: int | None) -> dict[str, JsonValue]:
    """What a feature set says of layers and pooling: nothing, where nothing was asked for."""
    record: dict[str, JsonValue] = {}
    if config.layers is not None:
        backwards = 0 if depth is None else depth + 1
        record["layers"] = [layer if layer > 0 else backwards + layer for layer in config.layers]
    if config.pool_grid != 1:
        record["pool_grid"] = config.pool_grid
    return record
