"""Many small MLP heads trained at once: one hidden layer, AdamW, every row once an epoch.

A head has no optimum to arrive at, so unlike a linear probe it has a learning rate, a number of
epochs and a seed that matter. Letters: `K` heads, `N` rows, `D` width of a vector, `H` hidden
units, `C` classes or findings, `b` rows of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from featcache.heads.probe import refuse_untrainable
from featcache.heads.problem import Standardised

BETAS, TINY = (0.9, 0.999), 1e-8  # AdamW's


@dataclass(frozen=True)
class Schedule:
    """How large MLP heads are, and how long they train.

    Attributes:
        hidden: Hidden units.
        epochs: Times that every row is seen, more if that is under `fewest_steps` steps.
        batch_size: Most rows of a step.
        device: Where they train.
        fewest_steps: So that a subset of a few images gets more epochs.
    """

    hidden: int = 128
    epochs: int = 50
    batch_size: int = 128
    device: str = "cpu"
    fewest_steps: int = 200


@dataclass(frozen=True)
class Mlps:
    """Trained heads, numbered subset by subset, in it setting by setting, in it seed by seed.

    Attributes:
        mean: Over the head's training subset.
        sd: See above; softened as for linear probes.
        parameters: Weight and bias of the hidden layer, weight and bias of the last.
        subset: Number of the subset each head was trained on.
        decay: Its weight decay.
        rate: Its learning rate.
        seed: Its seed.
        steps: Steps that it took.
        of_findings: Whether an image may have several.
    """

    mean: Float[Tensor, "K D"]
    sd: Float[Tensor, "K D"]
    parameters: tuple[
        Float[Tensor, "K D H"],
        Float[Tensor, "K 1 H"],
        Float[Tensor, "K H C"],
        Float[Tensor, "K 1 C"],
    ]
    subset: Int64[np.ndarray, " K"]
    decay: Float[np.ndarray, " K"]
    rate: Float[np.ndarray, " K"]
    seed: Int64[np.ndarray, " K"]
    steps: Int64[np.ndarray, " K"]
    of_findings: bool

    @torch.inference_mode()
    def probabilities(
        self, vectors: Float32[np.ndarray, "N D"], numbers: Sequence[int] | None = None
    ) -> Float[np.ndarray, "K N C"]:
        """Probabilities of some heads; see `Probes.probabilities`.

        Args:
            vectors: Not standardised.
            numbers: Which heads; None is all.
        """
        chosen = range(len(self.subset)) if numbers is None else numbers
        rows, found = torch.from_numpy(vectors), []
        for number in chosen:  # one at a time: the hidden units of all heads would be large
            some = slice(number, number + 1)
            own = ((rows - self.mean[some]) / self.sd[some])[None]
            # In float32 a sure head says 1.0 of many images, and AUROC would see ties.
            logits = _forward(own, [one[some] for one in self.parameters])[0].double()
            found.append(logits.sigmoid() if self.of_findings else logits.softmax(dim=-1))
        return torch.stack(found).numpy()


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Sizes of the batches that share out rows evenly: none is dropped, none is tiny.

    Args:
        rows: At least 1.
        batch_size: Most rows of a batch; 33 rows at 32 make batches of 17 and 16.
    """
    count = -(-rows // batch_size)
    return [rows // count + (number < rows % count) for number in range(count)]


def _forward(
    inputs: Float[Tensor, "K b D"], parameters: Sequence[Tensor]
) -> Float[Tensor, "K b C"]:
    """Logits of each head on rows of its own."""
    first, first_bias, last, last_bias = parameters
    hidden = functional.gelu(torch.baddbmm(first_bias, inputs, first))
    return torch.baddbmm(last_bias, hidden, last)


def summed_loss(
    logits: Float[Tensor, "K b C"], targets: Shaped[Tensor, "K b *C"]
) -> Float[Tensor, ""]:
    """Sum over the heads of the mean loss of a batch, so that no head feels another.

    Args:
        logits: Of each head for its rows.
        targets: Classes, K b; or for each finding 1, 0 or -1 = unknown, K b C.
    """
    if targets.ndim == 2:  # K b
        flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape).mean(dim=1).sum()
    known = (targets >= 0).to(logits.dtype)
    flat = functional.binary_cross_entropy_with_logits(
        logits, (targets == 1).to(logits.dtype), weight=known, reduction="none"
    )
    return (flat.sum(dim=1) / known.sum(dim=1).clamp(min=1.0)).sum()


def _fresh(width: int, hidden: int, outputs: int, seed: int) -> list[Tensor]:
    """First weights of one head: He's scale inside, small outside."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(width, hidden, generator=generator) * (2.0 / width) ** 0.5
    outer = torch.randn(hidden, outputs, generator=generator) * 0.01
    return [inner, torch.zeros(1, hidden), outer, torch.zeros(1, outputs)]


def row_orders(rows: int, epochs: int, seeds: Sequence[int]) -> Iterator[Int64[Tensor, "s n"]]:
    """The order of the rows in each epoch, for every seed: it depends on nothing but the seed.

    Args:
        rows: How many.
        epochs: Orders that are drawn.
        seeds: One for each order of an epoch.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(epochs):
        yield torch.stack([torch.randperm(rows, generator=one) for one in generators])


class AdamWs:
    """AdamW for K heads, each with its own rate and decay; both fall along half a cosine.

    Args:
        parameters: Weights and biases in turn, one of each for every head.
        rates: Of the heads.
        decays: Of the heads.
        steps: That will be taken.
    """

    def __init__(self, parameters: list[Tensor], rates: Tensor, decays: Tensor, steps: int):
        self.parameters, self.steps, self.taken = parameters, steps, 0
        self.rates, self.decays = rates[:, None, None], decays[:, None, None]
        self.first = [torch.zeros_like(one) for one in parameters]
        self.second = [torch.zeros_like(one) for one in parameters]

    @torch.no_grad()
    def step(self, slopes: Sequence[Float[Tensor, "K ..."]]) -> None:
        """One step; biases do not decay: every second one of the parameters.

        Args:
            slopes: Of the parameters, in their order.
        """
        rate = self.rates * 0.5 * (1.0 + np.cos(np.pi * self.taken / self.steps))
        self.taken += 1
        for number, (one, slope) in enumerate(zip(self.parameters, slopes, strict=True)):
            self.first[number].lerp_(slope, 1.0 - BETAS[0])
            self.second[number].mul_(BETAS[1]).addcmul_(slope, slope, value=1.0 - BETAS[1])
            mean = self.first[number] / (1.0 - BETAS[0] ** self.taken)
            size = (self.second[number] / (1.0 - BETAS[1] ** self.taken)).sqrt_().add_(TINY)
            if number % 2 == 0:
                one.mul_(1.0 - rate * self.decays)
            one.sub_(rate * mean / size)


def train_mlps(
    vectors: Float32[np.ndarray, "N D"],
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"],
    subsets: Sequence[Int64[np.ndarray, " _"]],
    *,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    schedule: Schedule | None = None,
) -> Mlps:
    """Train a head for every subset, setting and seed; those of a subset train side by side.

    A head is what it would be alone: its first weights and the order of its rows depend on its
    seed, and losses are added up. There is no batch norm and no dropout, so no image's answer
    depends on its batch, and a batch of one row is like any other.

    Args:
        vectors: One per image.
        targets: Class numbers in `[0, num_classes)`; or for each finding 1, 0, or -1 = unknown.
        subsets: Row numbers of each training subset, at least one row each.
        num_classes: Of classes or findings.
        settings: Learning rate and weight decay of each.
        seeds: Seeds of first weights and orders.
        schedule: Size and length; None: as they are by default.

    Raises:
        TrainingError: A subset is empty, or a vector is not finite.
    """
    refuse_untrainable(vectors, subsets)
    plan = Schedule() if schedule is None else schedule
    grid = [(rate, decay, seed) for rate, decay in settings for seed in seeds]
    means, spreads, trained, steps = [], [], [], []
    for rows in subsets:
        own = Standardised(vectors, rows)
        inputs = torch.cat([block.float() for _, block in own.blocks()]).to(plan.device)
        answers = torch.from_numpy(targets[rows]).to(plan.device)
        parameters, taken = _train(inputs, answers, num_classes, grid, len(settings), plan)
        trained.append([one.cpu() for one in parameters])
        means += [own.mean.float()] * len(grid)
        spreads += [own.sd.float()] * len(grid)
        steps += [taken] * len(grid)
    joined = [torch.cat([one[number] for one in trained]) for number in range(4)]
    values = np.tile(np.array([one[:2] for one in grid], dtype=np.float64), (len(subsets), 1))
    return Mlps(
        mean=torch.stack(means),
        sd=torch.stack(spreads),
        parameters=(joined[0], joined[1], joined[2], joined[3]),
        subset=np.repeat(np.arange(len(subsets)), len(grid)),
        decay=values[:, 1],
        rate=values[:, 0],
        seed=np.tile(np.array([one[2] for one in grid], dtype=np.int64), len(subsets)),
        steps=np.array(steps, dtype=np.int64),
        of_findings=targets.ndim == 2,
    )


def _train(
    inputs: Float[Tensor, "n D"],
    targets: Tensor,
    num_classes: int,
    grid: Sequence[tuple[float, float, int]],
    num_settings: int,
    plan: Schedule,
) -> tuple[list[Tensor], int]:
    """All heads of one subset; their parameters and the steps that each took."""
    seeds = [seed for _, _, seed in grid[: len(grid) // num_settings]]
    sizes = batch_sizes(len(inputs), plan.batch_size)
    epochs = max(plan.epochs, -(-plan.fewest_steps // len(sizes)))
    fresh = [_fresh(inputs.shape[1], plan.hidden, num_classes, seed) for _, _, seed in grid]
    parameters = [torch.stack(some).to(inputs.device) for some in zip(*fresh, strict=True)]
    for one in parameters:
        one.requires_grad_(True)
    rates, decays = (
        torch.tensor([one[place] for one in grid], device=inputs.device) for place in (0, 1)
    )
    optimizer = AdamWs(parameters, rates, decays, epochs * len(sizes))
    for order in row_orders(len(inputs), epochs, seeds):
        for rows in torch.split(
            order.repeat(num_settings, 1).to(inputs.device), sizes, dim=1
        ):  # K b
            loss = summed_loss(_forward(inputs[rows], parameters), targets[rows])
            optimizer.step(torch.autograd.grad(loss, parameters))
    return [one.detach() for one in parameters], optimizer.taken
