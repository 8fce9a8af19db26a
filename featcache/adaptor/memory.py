"""How large a batch could be, from what one step needs."""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from featcache.loader.ring import available_memory

BYTES_PER_LOGIT = 16
"""Logits, their two softmaxes and the positives: what grows with the square of the batch."""

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_freed_blocks() -> None:
    """Have freed blocks of 4 MiB and more return to the system at once, in this process.

    glibc raises that bound to 32 MiB as large blocks come and go, and then keeps the freed chunks
    of a gradient cache, which can add more than a GiB. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


class StepMemory:
    """Measures the first step of a training.

    On CUDA it is the highest use of memory; on a CPU the tensors that are kept for the backward
    pass, counted as they are kept, which is most of it.

    Args:
        pairs: Of this process's share of the batch.
        world_size: Number of processes; on a CPU they share the memory.
        module: What is trained.
    """

    def __init__(self, pairs: int, world_size: int, module: nn.Module):
        self._pairs, self._world_size = pairs, world_size
        self._module = module
        self._needed: float | None = None
        self._free = 0.0

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Around the first forward pass."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield
            return
        known = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = sum(p.nbytes for p in self._module.parameters())
        # Each process also needs the gradient and AdamW's two moments.
        self._free = available_memory() / self._world_size - 3 * weights
        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            yield
        self._needed = float(sum(kept.values()))

    def largest_batch(self, device: torch.device) -> int | None:
        """Pairs, over all processes, that would fit, about; to be asked after the first step.

        Returns:
            Two significant digits, rounded down; None where nothing could be measured.
        """
        if device.type == "cuda":
            always = torch.cuda.memory_allocated(device)
            self._needed = float(torch.cuda.max_memory_allocated(device) - always)
            free, _ = torch.cuda.mem_get_info(device)
            self._free = float(free + torch.cuda.memory_reserved(device) - always)
        if not self._needed or self._free <= 0:
            return None
        number = largest(self._needed, self._free, self._pairs, self._world_size)
        grain = int(10 ** max(0, len(str(number)) - 2))
        return number // grain * grain


def largest(needed: float, free: float, pairs: int, world_size: int) -> int:
    """Pairs, over all processes, whose step takes `free` bytes.

    Args:
        needed: Bytes of a step of `pairs` pairs in each process.
        free: Bytes that each process has.
        pairs: See `needed`.
        world_size: Number of processes.
    """
    square = BYTES_PER_LOGIT * world_size  # a process scores its images against all texts
    line = max(needed / pairs - square * pairs, needed / pairs / 10)
    share = (math.sqrt(line**2 + 4 * square * free) - line) / (2 * square)
    return int(share) * world_size


def remedy(batch_size: int, share: int, gradient_cache: int | None) -> str:
    """The setting that makes a step smaller, after it did not fit.

    Args:
        batch_size: Pairs of the batch over all processes.
        share: Pairs of it for this process.
        gradient_cache: What is set now.
    """
    if gradient_cache is None and share > 1:
        return f"--set gradient_cache={-(-share // 4)} keeps the batch and takes more time"
    if gradient_cache is not None and min(gradient_cache, share) > 1:
        return f"--set gradient_cache={min(gradient_cache, share) // 2}"
    return f"--set batch_size={max(2, batch_size // 2)}"


def _same(tensor: Any) -> Any:
    return tensor
