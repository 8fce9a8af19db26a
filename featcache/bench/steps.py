"""The step of stage two in a plain loop, for benches that hold what feeds it against each other."""

import time
from collections.abc import Iterable

import numpy as np
import torch

from featcache.adaptor.memory import return_freed_blocks
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.optimizer import parameter_groups
from featcache.adaptor.saved import build_adaptor
from featcache.loader.batch import Batch


class Training:
    """An Adaptor with its objective and AdamW, and what a step costs.

    On a GPU the arithmetic is bfloat16 under autocast, as stage two has it; on a CPU float32.

    Args:
        config: Size and objective.
        image_dim: Width of the image tokens.
        text_dim: Width of the text tokens.
        device: `cpu` or `cuda`.
        chunk: Pairs of a chunk of the gradient cache; None: without one.
    """

    def __init__(
        self,
        config: AdaptorConfig,
        image_dim: int,
        text_dim: int,
        device: str,
        *,
        chunk: int | None = None,
    ):
        if chunk is not None:
            return_freed_blocks()  # as a training with a gradient cache does
        torch.manual_seed(0)
        adaptor, objective = build_adaptor(config, image_dim, text_dim)
        self.adaptor, self.objective = adaptor.to(device), objective.to(device)
        groups = parameter_groups((self.adaptor, self.objective), 0.01)
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self._device = device
        self._options = {} if chunk is None else {"chunk": chunk}

    def step(self, batch: Batch) -> None:
        """Forward, backward, and the weights' update."""
        batch = batch.to(self._device)
        with mixed_precision(self._device):
            loss = self.objective(self.adaptor, batch, **self._options).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.adaptor.clamp_logit_scale()

    def run(self, batches: Iterable[Batch]) -> float:
        """Seconds of a step on each batch, the waiting for batches included."""
        started = time.perf_counter()
        for batch in batches:
            self.step(batch)
        synchronise(self._device)
        return time.perf_counter() - started


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 under autocast on a GPU; nothing on a CPU."""
    kind = device.partition(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def random_batch(
    size: int, image_shape: tuple[int, int], text_shape: tuple[int, int], *, seed: int = 0
) -> Batch:
    """Random float16 tokens of distinct pairs, all real.

    Args:
        size: Pairs.
        image_shape: Tokens and width of an image.
        text_shape: Tokens and width of a text.
        seed: Of the numbers.
    """
    generator = np.random.default_rng(seed)
    images, texts = (
        torch.from_numpy(generator.standard_normal((size, *shape), dtype=np.float32)).half()
        for shape in (image_shape, text_shape)
    )
    rows = torch.arange(size)
    valid = torch.ones(size, text_shape[0], dtype=torch.bool)
    return Batch(images, texts, valid, rows, rows.clone(), rows.clone())


def copy_batch(batch: Batch) -> Batch:
    """The batch in memory of its own, where the loader does not write."""
    return Batch(
        batch.image_tokens.clone(),
        batch.text_tokens.clone(),
        batch.text_valid.clone(),
        batch.pairs.clone(),
        batch.image_rows.clone(),
        batch.text_rows.clone(),
    )
