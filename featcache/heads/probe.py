"""Many linear probes trained at once.

A probe is a logistic regression on fixed vectors with an L2 penalty on its weights: multinomial
where every image is of one class, one for each finding where it may have several. The loss is
convex and has one optimum, so the solver goes there and says whether it arrived. There is no
learning rate to choose: at the optimum it leaves no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from featcache.errors import TrainingError
from featcache.heads.problem import ClassProblem, FindingProblem, Problem, row_blocks
from featcache.heads.solver import solve


@dataclass(frozen=True)
class Probes:
    """Trained probes, numbered subset by subset, in it decay by decay, in it seed by seed.

    Attributes:
        weight: Acts on vectors as they are: the standardisation is folded in.
        bias: One value per class or finding.
        converged: Whether the largest entry of the gradient fell below the tolerance.
        steps: Steps that the solver took.
        subset: Number of the subset each probe was trained on.
        decay: Its weight decay.
        seed: Its seed.
        of_findings: Whether an image may have several: each probability is then of its own.
    """

    weight: Float[Tensor, "K C D"]
    bias: Float[Tensor, "K C"]
    converged: Bool[np.ndarray, " K"]
    steps: Int64[np.ndarray, " K"]
    subset: Int64[np.ndarray, " K"]
    decay: Float[np.ndarray, " K"]
    seed: Int64[np.ndarray, " K"]
    of_findings: bool = False

    def probabilities(
        self, vectors: Float32[np.ndarray, "N D"], numbers: Sequence[int] | None = None
    ) -> Float[np.ndarray, "K N C"]:
        """Class probabilities of some probes; of findings, each in [0, 1] by itself.

        Args:
            vectors: Not standardised.
            numbers: Which probes; None is all.
        """
        chosen = slice(None) if numbers is None else list(numbers)
        weight, bias = self.weight[chosen], self.bias[chosen]
        found = torch.empty(len(weight), len(vectors), weight.shape[1], dtype=weight.dtype)
        for place in row_blocks(*vectors.shape):
            inputs = torch.from_numpy(vectors[place]).to(weight.dtype)
            logits = torch.einsum("nd,kcd->knc", inputs, weight) + bias[:, None]
            found[:, place] = logits.sigmoid() if self.of_findings else logits.softmax(dim=-1)
        return found.numpy()


def refuse_untrainable(
    vectors: Float32[np.ndarray, "N D"], subsets: Sequence[Int64[np.ndarray, " _"]]
) -> None:
    """Every subset holds an image, and every vector is finite.

    Args:
        vectors: One per image.
        subsets: Row numbers of each training subset.

    Raises:
        TrainingError: One of them does not hold.
    """
    if any(len(rows) == 0 for rows in subsets):
        raise TrainingError("a training subset holds no image", fix="a larger fraction")
    bad = sum(
        int((~np.isfinite(vectors[place]).all(axis=1)).sum())
        for place in row_blocks(*vectors.shape)
    )
    if bad:
        raise TrainingError(
            f"{bad} of {len(vectors)} vectors hold values that are not finite",
            fix="featcache verify --deep",
        )


def _first_weights(size: int, seed: int) -> Float64[Tensor, " P"]:
    """Small random weights of one probe."""
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(size, generator=generator, dtype=torch.float64)


def train_probes(
    vectors: Float32[np.ndarray, "N D"],
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"],
    subsets: Sequence[Int64[np.ndarray, " _"]],
    *,
    num_classes: int,
    decays: Sequence[float],
    seeds: Sequence[int],
    tolerance: float = 1e-5,
    max_steps: int = 1000,
) -> Probes:
    """Train a probe for every subset, weight decay and seed in one pass.

    Each subset is standardised by its own mean and standard deviation, the latter softened by a
    hundredth of what is usual among the channels (docs/protocol.md). The loss of a probe is the
    mean cross-entropy over its subset plus `decay / 2` times the squared weights (bias excepted);
    of findings it is that of each finding over the images where it is known. A seed sets the
    weights a probe starts from; probes that converged differ between seeds by no more than the
    tolerance allows, which is a check of the solver. Runs on the CPU. Beside `vectors`, which
    may be a memory map, it needs memory for one float32 copy of the largest subset.

    Args:
        vectors: One per image.
        targets: Class numbers in `[0, num_classes)`; or for each finding 1, 0, or -1 = unknown.
        subsets: Row numbers of each training subset, at least one row each, in any order.
        num_classes: Of classes or findings. A class without a row in a subset only ever loses
            probability there.
        decays: Weight decays, each > 0.
        seeds: Seeds of the initial weights.
        tolerance: Largest entry of the gradient at which a probe counts as converged.
        max_steps: Steps after which a probe is left as it is, with `converged` False.

    Raises:
        TrainingError: A subset is empty, or a vector is not finite.
    """
    refuse_untrainable(vectors, subsets)
    of_findings = targets.ndim == 2
    kind: type[Problem] = FindingProblem if of_findings else ClassProblem
    problem = kind(vectors, targets, subsets)
    grid = [(decay, seed) for decay in decays for seed in seeds]
    size = num_classes * (vectors.shape[1] + 1)
    first = torch.stack([_first_weights(size, seed) for _, seed in grid])
    decay = torch.tensor([decay for decay, _ in grid], dtype=torch.float64)
    if of_findings:  # each finding is a problem of its own
        first = first.reshape(len(grid) * num_classes, -1)
        decay = decay.repeat_interleave(num_classes)
    theta, arrived, taken = solve(
        problem, problem.first(first), decay, tolerance=tolerance, max_steps=max_steps
    )
    weight, bias = problem.unfold(theta)
    shape = (len(subsets) * len(grid), -1)
    return Probes(
        weight=weight.reshape(shape[0], num_classes, -1),
        bias=bias.reshape(shape[0], num_classes),
        converged=arrived.reshape(shape).all(dim=1).numpy(),
        steps=taken.reshape(shape).amax(dim=1).numpy(),
        subset=np.repeat(np.arange(len(subsets)), len(grid)),
        decay=np.tile([decay for decay, _ in grid], len(subsets)),
        seed=np.tile(np.array([seed for _, seed in grid], dtype=np.int64), len(subsets)),
        of_findings=of_findings,
    )
