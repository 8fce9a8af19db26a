"""Many linear probes trained at once.

A probe is a multinomial logistic regression on fixed vectors with an L2 penalty on its weights. Its
loss is convex and has one optimum, so the solver (L-BFGS on all rows) goes there and says whether
it arrived. There is no learning rate to choose: at the optimum it leaves no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from featcache.errors import TrainingError

MEMORY = 10  # steps that the curvature estimate remembers
SD_FLOOR = 0.01  # of the median standard deviation of the channels that move at all
HALVINGS = 25  # of the step length, before a probe counts as stalled


@dataclass(frozen=True)
class Probes:
    """Trained probes, numbered subset by subset, in it decay by decay, in it seed by seed.

    Attributes:
        weight: Acts on vectors as they are: the standardisation is folded in.
        bias: One value per class.
        converged: Whether the largest entry of the gradient fell below the tolerance.
        steps: Steps that the solver took.
        subset: Number of the subset each probe was trained on.
        decay: Its weight decay.
        seed: Its seed.
    """

    weight: Float[Tensor, "K C D"]
    bias: Float[Tensor, "K C"]
    converged: Bool[np.ndarray, " K"]
    steps: Int64[np.ndarray, " K"]
    subset: Int64[np.ndarray, " K"]
    decay: Float[np.ndarray, " K"]
    seed: Int64[np.ndarray, " K"]

    def probabilities(
        self, vectors: Float32[np.ndarray, "N D"], numbers: Sequence[int] | None = None
    ) -> Float[np.ndarray, "K N C"]:
        """Class probabilities of some probes.

        Args:
            vectors: Not standardised.
            numbers: Which probes; None is all.
        """
        chosen = slice(None) if numbers is None else list(numbers)
        weight, bias = self.weight[chosen], self.bias[chosen]
        inputs = torch.from_numpy(vectors).to(weight.dtype)
        logits = torch.einsum("nd,kcd->knc", inputs, weight) + bias[:, None]
        return logits.softmax(dim=-1).numpy()


def _softened(spread: Float64[Tensor, " D"]) -> Float64[Tensor, " D"]:
    """What each channel is divided by: its standard deviation, never far below the others'.

    In a subset of a few images many channels hardly move, or not at all. Their own deviation would
    blow up rounding errors of the stored tokens to the size of a finding.
    """
    if not (spread > 0).any():
        return torch.ones_like(spread)
    usual = spread[spread > 0].median()
    return (spread.square() + (SD_FLOOR * usual).square()).sqrt()


class _Problem:
    """Loss of J probes on each of S subsets, every subset standardised by itself."""

    def __init__(
        self,
        vectors: Float32[np.ndarray, "N D"],
        targets: Int64[np.ndarray, " N"],
        subsets: Sequence[Int64[np.ndarray, " _"]],
        num_classes: int,
    ):
        longest = max(len(rows) for rows in subsets)
        shape = (len(subsets), longest)
        self.inputs = torch.zeros(*shape, vectors.shape[1] + 1, dtype=torch.float64)
        self.targets = torch.zeros(shape, dtype=torch.int64)
        self.share = torch.zeros(shape, dtype=torch.float64)  # 1 / rows of the subset; 0: padding
        self.mean = torch.zeros(len(subsets), vectors.shape[1], dtype=torch.float64)
        self.sd = torch.ones_like(self.mean)
        self.num_classes = num_classes
        for number, rows in enumerate(subsets):
            own = torch.from_numpy(vectors[rows]).double()
            self.mean[number] = own.mean(dim=0)
            spread = own.std(dim=0, correction=0)
            self.sd[number] = _softened(spread)
            size = len(rows)
            self.inputs[number, :size, :-1] = (own - self.mean[number]) / self.sd[number]
            self.inputs[number, :size, -1] = 1.0
            self.targets[number, :size] = torch.from_numpy(targets[rows])
            self.share[number, :size] = 1.0 / size

    def loss(
        self, theta: Float[Tensor, "S J P"], decay: Float[Tensor, " J"]
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S J P"]]:
        """Mean cross-entropy plus penalty, with its gradient."""
        subsets, probes, _ = theta.shape
        shape = (subsets, probes, self.num_classes, -1)
        flat = theta.reshape(subsets, probes * self.num_classes, -1)
        logits = torch.bmm(self.inputs, flat.mT)  # S n J*C
        logits = logits.reshape(subsets, -1, probes, self.num_classes)
        log_p = logits.log_softmax(dim=-1)
        hit = self.targets[:, :, None, None].expand(-1, -1, probes, 1)  # S n J 1
        loss = -(log_p.gather(-1, hit)[..., 0] * self.share[..., None]).sum(dim=1)  # S J
        error = log_p.exp_()
        error.scatter_add_(-1, hit, torch.full_like(hit, -1, dtype=error.dtype))
        error *= self.share[..., None, None]
        slope = torch.bmm(error.flatten(2).mT, self.inputs).reshape(shape)  # S J C D+1
        weights = theta.reshape(shape).clone()
        weights[..., -1] = 0.0  # the bias is not penalised
        loss = loss + 0.5 * decay * weights.square().sum(dim=(-2, -1))
        return loss, (slope + decay[:, None, None] * weights).flatten(2)

    def unfold(
        self, theta: Float[Tensor, "S J P"]
    ) -> tuple[Float[Tensor, "K C D"], Float[Tensor, "K C"]]:
        """Weights and biases for vectors that are not standardised."""
        subsets, probes, _ = theta.shape
        parts = theta.reshape(subsets, probes, self.num_classes, -1)
        weight = parts[..., :-1] / self.sd[:, None, None]
        bias = parts[..., -1] - (weight * self.mean[:, None, None]).sum(dim=-1)
        return weight.flatten(0, 1), bias.flatten(0, 1)


class _Lbfgs:
    """L-BFGS for S x J independent problems, each with its own curvature and step length."""

    def __init__(self, problem: _Problem, theta: Tensor, decay: Tensor, tolerance: float):
        self.problem, self.decay, self.tolerance = problem, decay, tolerance
        self.theta = theta  # S J P
        self.loss, self.slope = problem.loss(theta, decay)
        self.stalled = torch.zeros_like(self.loss, dtype=torch.bool)  # S J
        self.taken = torch.zeros_like(self.loss, dtype=torch.int64)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def arrived(self) -> Bool[Tensor, "S J"]:
        """Which problems are at their optimum, within the tolerance."""
        return self.slope.abs().amax(dim=-1) <= self.tolerance

    def keep(self, numbers: Int64[Tensor, " j"]) -> None:
        """Go on with some of the J columns."""
        self.decay = self.decay[numbers]
        for name in ("theta", "loss", "slope", "stalled", "taken"):
            setattr(self, name, getattr(self, name)[:, numbers])
        self.pairs = [(s[:, numbers], y[:, numbers], rho[:, numbers]) for s, y, rho in self.pairs]

    def _direction(self) -> Float[Tensor, "S J P"]:
        """Minus the inverse curvature times the slope, by the two-loop recursion."""
        if not self.pairs:
            length = self.slope.square().sum(dim=-1, keepdim=True).sqrt()  # S J 1
            return -self.slope / length.clamp(min=1.0)
        q = self.slope.clone()
        factors = []
        for moved, turned, rho in reversed(self.pairs):
            factor = rho * (moved * q).sum(dim=-1)  # S J
            q -= factor[..., None] * turned
            factors.append(factor)
        moved, turned, rho = self.pairs[-1]
        length = turned.square().sum(dim=-1)
        # rho is 0 where the last step was refused: there the plain slope is followed.
        scale = torch.where(rho > 0, 1.0 / (rho * length).clamp(min=1e-300), 1.0)
        q *= scale[..., None]
        for (moved, turned, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            q += (factor - rho * (turned * q).sum(dim=-1))[..., None] * moved
        return -q

    def step(self) -> None:
        """One step of every problem that has neither arrived nor stalled."""
        resting = self.arrived | self.stalled
        way = self._direction()
        fall = (way * self.slope).sum(dim=-1)  # S J
        uphill = fall >= 0
        way = torch.where(uphill[..., None], -self.slope, way)
        fall = torch.where(uphill, -self.slope.square().sum(dim=-1), fall)
        size = torch.where(resting, 0.0, 1.0)
        for _ in range(HALVINGS):
            theta = self.theta + size[..., None] * way
            loss, slope = self.problem.loss(theta, self.decay)
            bad = ~(loss <= self.loss + 1e-4 * size * fall) & ~resting
            if not bad.any():
                break
            size = torch.where(bad, size / 2, size)
        accepted = ~bad & ~resting
        self.stalled |= bad
        self._remember(accepted, theta, loss, slope)

    def _remember(self, accepted: Tensor, theta: Tensor, loss: Tensor, slope: Tensor) -> None:
        """Take over the accepted steps with the curvature they showed."""
        chosen = accepted[..., None]
        moved = torch.where(chosen, theta - self.theta, 0.0)
        turned = torch.where(chosen, slope - self.slope, 0.0)
        curve = (moved * turned).sum(dim=-1)  # S J
        rho = torch.where(curve > 1e-300, 1.0 / curve.clamp(min=1e-300), 0.0)
        self.pairs = [*self.pairs[-(MEMORY - 1) :], (moved, turned, rho)]
        self.theta = torch.where(chosen, theta, self.theta)
        self.slope = torch.where(chosen, slope, self.slope)
        self.loss = torch.where(accepted, loss, self.loss)
        self.taken += accepted


def _solve(
    problem: _Problem, theta: Tensor, decay: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimum, arrival and steps of every problem; finished columns are put aside on the way."""
    solver = _Lbfgs(problem, theta, decay, tolerance)
    columns = torch.arange(theta.shape[1])
    arrived = torch.zeros(theta.shape[:2], dtype=torch.bool)
    taken = torch.zeros(theta.shape[:2], dtype=torch.int64)
    theta = theta.clone()
    for number in range(max_steps + 1):
        busy = ~(solver.arrived | solver.stalled).all(dim=0)  # J
        last = number == max_steps or not busy.any()
        if last or busy.sum() <= 0.7 * len(columns):
            done = torch.ones_like(busy) if last else ~busy
            theta[:, columns[done]] = solver.theta[:, done]
            arrived[:, columns[done]] = solver.arrived[:, done]
            taken[:, columns[done]] = solver.taken[:, done]
            if last:
                break
            solver.keep(busy.nonzero()[:, 0])
            columns = columns[busy]
        solver.step()
    return theta, arrived, taken


def _first_weights(size: int, seed: int) -> Float64[Tensor, " P"]:
    """Small random weights of one probe."""
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(size, generator=generator, dtype=torch.float64)


def train_probes(
    vectors: Float32[np.ndarray, "N D"],
    targets: Int64[np.ndarray, " N"],
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
    mean cross-entropy over its subset plus `decay / 2` times the squared weights (bias excepted).
    A seed sets the weights a probe starts from; probes that converged differ between seeds by no
    more than the tolerance allows, which is a check of the solver. Runs on the CPU in float64.

    Args:
        vectors: One per image.
        targets: Class numbers in `[0, num_classes)`.
        subsets: Row numbers of each training subset, at least one row each, in any order.
        num_classes: A class without a row in a subset only ever loses probability there.
        decays: Weight decays, each > 0.
        seeds: Seeds of the initial weights.
        tolerance: Largest entry of the gradient at which a probe counts as converged.
        max_steps: Steps after which a probe is left as it is, with `converged` False.

    Raises:
        TrainingError: A subset is empty, or a vector is not finite.
    """
    if any(len(rows) == 0 for rows in subsets):
        raise TrainingError("a training subset holds no image", fix="a larger fraction")
    if not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        raise TrainingError(
            f"{bad} of {len(vectors)} vectors hold values that are not finite",
            fix="featcache verify --deep",
        )
    problem = _Problem(vectors, targets, subsets, num_classes)
    grid = [(decay, seed) for decay in decays for seed in seeds]
    size = num_classes * (vectors.shape[1] + 1)
    theta = torch.stack([_first_weights(size, seed) for _, seed in grid])
    theta = theta.expand(len(subsets), -1, -1).clone()  # S J P
    decay = torch.tensor([decay for decay, _ in grid], dtype=torch.float64)
    theta, arrived, taken = _solve(problem, theta, decay, tolerance, max_steps)
    weight, bias = problem.unfold(theta)
    return Probes(
        weight=weight,
        bias=bias,
        converged=arrived.flatten().numpy(),
        steps=taken.flatten().numpy(),
        subset=np.repeat(np.arange(len(subsets)), len(grid)),
        decay=np.tile([decay for decay, _ in grid], len(subsets)),
        seed=np.tile(np.array([seed for _, seed in grid], dtype=np.int64), len(subsets)),
    )
