"""The random generators that a training draws from: seeded, saved, given back."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from featcache.errors import TrainingError

SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of two ranks: their dropout must differ, their first weights must not."""


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Draw from a seed inside, and leave every global generator as it was.

    Args:
        seed: Of torch, CUDA, numpy and Python.
        device: `cpu`, `cuda` or `cuda:N`.
    """
    devices = [torch.device(device)] if device.startswith("cuda") else []
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Give a rank other dropout than the others; rank 0 at step 0 goes on with what it has."""
    if rank or step:
        torch.manual_seed((seed + rank * SEED_STEP + step) % 2**63)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Where the generators stand; every rank must call it.

    Args:
        device: The rank's own.

    Returns:
        `torch` and `cuda`, a tensor for each rank (`cuda` is empty on a CPU), and this rank's
        `numpy` and `python`, as tensors and plain values.
    """
    name, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, next_gauss = random.getstate()
    is_cuda = device.type == "cuda"
    return {
        "torch": _of_all_ranks(torch.get_rng_state(), device),
        "cuda": _of_all_ranks(torch.cuda.get_rng_state(device), device) if is_cuda else [],
        "numpy": [name, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest],
        "python": [version, torch.tensor(internal, dtype=torch.int64), next_gauss],
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device, rank: int) -> None:
    """Let the generators go on where `generator_states` took them.

    Raises:
        TrainingError: These are no such states, or not of so many ranks.
    """
    try:
        name, words, position, has_gauss, gauss = states["numpy"]
        version, internal, next_gauss = states["python"]
        torch.set_rng_state(states["torch"][rank])
        if device.type == "cuda" and states["cuda"]:
            torch.cuda.set_rng_state(states["cuda"][rank], device)
        whole = (name, words.numpy().astype(np.uint32), position, has_gauss, gauss)
        np.random.set_state(whole)  # noqa: NPY002
        random.setstate((version, tuple(internal.tolist()), next_gauss))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TrainingError(
            "the states of the random generators in the checkpoint cannot be used "
            f"({type(error).__name__})",
            fix="delete the last checkpoint of the run: the one before is used",
        ) from None


def _of_all_ranks(state: UInt8[Tensor, " N"], device: torch.device) -> list[Tensor]:
    """One state per rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    mine = state.to(device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [one.cpu() for one in found]
