"""Which weights decay, and how the learning rate moves."""

from collections.abc import Sequence
from math import cos, pi
from typing import Any

from torch import nn


def learning_rate_factor(step: int, *, total: int, warmup: float, schedule: str) -> float:
    """Share of the highest learning rate at a step.

    It rises in a straight line over the first `warmup * total` steps, the last of which has all of
    it, then falls towards 0, which the step after the last would have.

    Args:
        step: From 0.
        total: Steps of the run.
        warmup: Share of them in [0, 1).
        schedule: `cosine` or `linear`.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    left = (total - step) / (total - rising)
    return left if schedule == "linear" else (1 - cos(pi * min(1.0, max(0.0, left)))) / 2


def parameter_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: matrices are decayed; norms, biases and the logit scale are not."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
