"""Convex problems solved side by side: L-BFGS on all rows, in coordinates that make it short.

Letters: `S` subsets, `n` rows of the longest, `J` probes of each, `C` classes, `T` findings,
`D` width of a vector, `Q` coordinates of the solver with the bias last, `P` values of one probe.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

MEMORY = 10  # steps that the curvature estimate remembers
SD_FLOOR = 0.01  # of the median standard deviation of the channels that move at all
HALVINGS = 25  # of the step length, before a probe counts as stalled
FLAT = 1e-10  # of the largest variance: directions below it are left out


def softened(spread: Float64[Tensor, " D"]) -> Float64[Tensor, " D"]:
    """What each channel is divided by: its standard deviation, never far below the others'.

    In a subset of a few images many channels hardly move, or not at all. Their own deviation would
    blow up rounding errors of the stored tokens to the size of a finding.

    Args:
        spread: Standard deviation of each channel.
    """
    if not (spread > 0).any():
        return torch.ones_like(spread)
    usual = spread[spread > 0].median()
    return (spread.square() + (SD_FLOOR * usual).square()).sqrt()


def _axes(rows: Float64[Tensor, "n D"]) -> tuple[Float64[Tensor, "D Q"], Float64[Tensor, " Q"]]:
    """Principal axes of standardised rows, and the variance along each.

    An optimum under an L2 penalty has no part outside the rows' span, so where there are fewer
    rows than channels the problem shrinks to as many coordinates as rows.
    """
    size, width = rows.shape
    tall = size >= width
    variance, basis = torch.linalg.eigh((rows.mT @ rows if tall else rows @ rows.mT) / size)
    kept = variance > FLAT * variance[-1].clamp(min=1e-300)
    variance, basis = variance[kept], basis[:, kept]
    if not tall:
        basis = rows.mT @ basis / (variance * size).sqrt()
    return basis, variance


class Problem:
    """Losses of J probes on each of S subsets, every subset standardised by itself.

    Rows are turned to the principal axes of their subset. A penalty does not notice that, and the
    curvature along an axis is then known beforehand: about `steepness` times its variance, plus
    the weight decay.
    """

    steepness: float  # bounds the second derivative of a row's loss by its logits

    def __init__(
        self, vectors: Float32[np.ndarray, "N D"], subsets: Sequence[Int64[np.ndarray, " _"]]
    ):
        width = vectors.shape[1]
        self.mean = torch.zeros(len(subsets), width, dtype=torch.float64)
        self.sd = torch.ones_like(self.mean)
        found = []
        for number, rows in enumerate(subsets):
            own = torch.from_numpy(vectors[rows]).double()
            self.mean[number] = own.mean(dim=0)
            self.sd[number] = softened(own.std(dim=0, correction=0))
            found.append(_axes(self._scaled(own, number)))
        longest, most = max(map(len, subsets)), max(len(variance) for _, variance in found)
        self.inputs = torch.zeros(len(subsets), longest, most + 1, dtype=torch.float64)  # S n Q
        self.axes = torch.zeros(len(subsets), width, most, dtype=torch.float64)  # S D Q-1
        self.variance = torch.ones(len(subsets), most + 1, dtype=torch.float64)  # S Q
        for number, (rows, (basis, variance)) in enumerate(zip(subsets, found, strict=True)):
            # Scaled anew: rows of a large set are held once, not twice, beside the inputs.
            own = self._scaled(torch.from_numpy(vectors[rows]).double(), number)
            size, count = len(rows), len(variance)
            self.inputs[number, :size, :count] = own @ basis
            self.inputs[number, :size, -1] = 1.0
            self.axes[number, :, :count] = basis
            self.variance[number, :count] = variance

    def _scaled(self, own: Float64[Tensor, "n D"], number: int) -> Float64[Tensor, "n D"]:
        """Rows of a subset, standardised in place."""
        return own.sub_(self.mean[number]).div_(self.sd[number])

    def loss(
        self,
        theta: Float[Tensor, "S J P"],
        decay: Float[Tensor, " J"],
        columns: Int64[Tensor, " J"],
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S J P"]]:
        """Mean loss plus penalty, with its gradient.

        Args:
            theta: Values of each probe, in the solver's coordinates.
            decay: Weight decay of each.
            columns: Which of all probes these are.
        """
        raise NotImplementedError

    def first(self, weights: Float64[Tensor, "J W"]) -> Float64[Tensor, "S J P"]:
        """Starting values in the solver's coordinates.

        Args:
            weights: Rows of `D + 1` values, the bias last, for vectors that are standardised.
        """
        parts = weights.reshape(len(weights), -1, self.mean.shape[1] + 1)  # J C D+1
        turned = torch.einsum("jcd,sdq->sjcq", parts[..., :-1], self.axes)
        bias = parts[..., -1:].expand(len(self.mean), -1, -1, -1)
        return torch.cat([turned, bias], dim=-1).flatten(2)

    def unfold(
        self, theta: Float[Tensor, "S J P"]
    ) -> tuple[Float[Tensor, "S J C D"], Float[Tensor, "S J C"]]:
        """Weights and biases for vectors as they are.

        Args:
            theta: In the solver's coordinates.
        """
        parts = theta.reshape(*theta.shape[:2], -1, self.inputs.shape[-1])  # S J C Q
        weight = torch.einsum("sjcq,sdq->sjcd", parts[..., :-1], self.axes)
        weight = weight / self.sd[:, None, None]
        return weight, parts[..., -1] - (weight * self.mean[:, None, None]).sum(dim=-1)

    def smooth(
        self, slope: Float[Tensor, "S J P"], decay: Float[Tensor, " J"]
    ) -> Float[Tensor, "S J P"]:
        """A slope divided by the curvature that is known beforehand.

        Args:
            slope: In the solver's coordinates.
            decay: Weight decay of each probe.
        """
        curvature = self.steepness * self.variance[:, None] + decay[:, None]  # S J Q
        curvature[..., -1] -= decay  # the bias is not penalised
        parts = slope.reshape(*slope.shape[:2], -1, curvature.shape[-1])  # S J C Q
        return torch.flatten(parts / curvature[:, :, None], start_dim=2)


class ClassProblem(Problem):
    """Every row is of one class: softmax and cross-entropy."""

    steepness = 0.5

    def __init__(
        self,
        vectors: Float32[np.ndarray, "N D"],
        targets: Int64[np.ndarray, " N"],
        subsets: Sequence[Int64[np.ndarray, " _"]],
        num_classes: int,
    ):
        super().__init__(vectors, subsets)
        self.num_classes = num_classes
        shape = self.inputs.shape[:2]
        self.targets = torch.zeros(shape, dtype=torch.int64)
        self.share = torch.zeros(shape, dtype=torch.float64)  # 1 / rows of the subset; 0: padding
        for number, rows in enumerate(subsets):
            self.targets[number, : len(rows)] = torch.from_numpy(targets[rows])
            self.share[number, : len(rows)] = 1.0 / len(rows)

    def loss(
        self,
        theta: Float[Tensor, "S J P"],
        decay: Float[Tensor, " J"],
        columns: Int64[Tensor, " J"],
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S J P"]]:
        """See `Problem`."""
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
        slope = torch.bmm(error.flatten(2).mT, self.inputs).reshape(shape)  # S J C Q
        weights = theta.reshape(shape).clone()
        weights[..., -1] = 0.0  # the bias is not penalised
        loss = loss + 0.5 * decay * weights.square().sum(dim=(-2, -1))
        return loss, (slope + decay[:, None, None] * weights).flatten(2)


class FindingProblem(Problem):
    """Every row has or lacks each of T findings, or it is unknown: sigmoid, finding by finding.

    A probe is of one finding, and probes go round the findings: column j is of finding j mod T.
    """

    steepness = 0.25

    def __init__(
        self,
        vectors: Float32[np.ndarray, "N D"],
        targets: Int64[np.ndarray, "N T"],
        subsets: Sequence[Int64[np.ndarray, " _"]],
    ):
        super().__init__(vectors, subsets)
        shape = (*self.inputs.shape[:2], targets.shape[1])
        self.answers = torch.zeros(shape, dtype=torch.float64)  # S n T
        self.share = torch.zeros(shape, dtype=torch.float64)  # 1 / known rows; 0: unknown, padding
        for number, rows in enumerate(subsets):
            own = torch.from_numpy(targets[rows])
            known = (own >= 0).double()
            self.answers[number, : len(rows)] = (own == 1).double()
            self.share[number, : len(rows)] = known / known.sum(dim=0).clamp(min=1.0)

    def loss(
        self,
        theta: Float[Tensor, "S J P"],
        decay: Float[Tensor, " J"],
        columns: Int64[Tensor, " J"],
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S J P"]]:
        """See `Problem`."""
        finding = columns % self.answers.shape[-1]
        answers, share = self.answers[..., finding], self.share[..., finding]  # S n J
        logits = torch.bmm(self.inputs, theta.mT)  # S n J
        loss = ((softplus(logits) - answers * logits) * share).sum(dim=1)  # S J
        slope = torch.bmm(((logits.sigmoid() - answers) * share).mT, self.inputs)  # S J Q
        weights = theta.clone()
        weights[..., -1] = 0.0  # the bias is not penalised
        loss = loss + 0.5 * decay * weights.square().sum(dim=-1)
        return loss, slope + decay[:, None] * weights


class _Lbfgs:
    """L-BFGS for S x J independent problems, each with its own curvature and step length."""

    def __init__(self, problem: Problem, theta: Tensor, decay: Tensor, tolerance: float):
        self.problem, self.decay, self.tolerance = problem, decay, tolerance
        self.theta = theta  # S J P
        self.columns = torch.arange(theta.shape[1])
        self.loss, self.slope = problem.loss(theta, decay, self.columns)
        self.stalled = torch.zeros_like(self.loss, dtype=torch.bool)  # S J
        self.taken = torch.zeros_like(self.loss, dtype=torch.int64)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def arrived(self) -> Bool[Tensor, "S J"]:
        """Which problems are at their optimum, within the tolerance."""
        return self.slope.abs().amax(dim=-1) <= self.tolerance

    def keep(self, numbers: Int64[Tensor, " j"]) -> None:
        """Go on with some of the J columns."""
        self.decay, self.columns = self.decay[numbers], self.columns[numbers]
        for name in ("theta", "loss", "slope", "stalled", "taken"):
            setattr(self, name, getattr(self, name)[:, numbers])
        self.pairs = [(s[:, numbers], y[:, numbers], rho[:, numbers]) for s, y, rho in self.pairs]

    def _direction(self) -> Float[Tensor, "S J P"]:
        """Minus the inverse curvature times the slope, by the two-loop recursion."""
        q = self.slope.clone()
        factors = []
        for moved, turned, rho in reversed(self.pairs):
            factor = rho * (moved * q).sum(dim=-1)  # S J
            q -= factor[..., None] * turned
            factors.append(factor)
        q = self.problem.smooth(q, self.decay)
        if self.pairs:
            _, turned, rho = self.pairs[-1]
            length = (turned * self.problem.smooth(turned, self.decay)).sum(dim=-1)
            # rho is 0 where the last step was refused: there the slope is followed as it is.
            q *= torch.where(rho > 0, 1.0 / (rho * length).clamp(min=1e-300), 1.0)[..., None]
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
            loss, slope = self.problem.loss(theta, self.decay, self.columns)
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


def solve(
    problem: Problem,
    theta: Float64[Tensor, "S J P"],
    decay: Float64[Tensor, " J"],
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[Float64[Tensor, "S J P"], Bool[Tensor, "S J"], Int64[Tensor, "S J"]]:
    """Optimum, arrival and steps of every problem; finished columns are put aside on the way.

    Args:
        problem: Gives losses and slopes.
        theta: Where each starts, in the solver's coordinates.
        decay: Weight decay of each column.
        tolerance: Largest entry of a slope at which a problem counts as solved.
        max_steps: Steps after which a problem is left as it is.
    """
    solver = _Lbfgs(problem, theta, decay, tolerance)
    arrived = torch.zeros(theta.shape[:2], dtype=torch.bool)
    taken = torch.zeros(theta.shape[:2], dtype=torch.int64)
    theta = theta.clone()
    for number in range(max_steps + 1):
        busy = ~(solver.arrived | solver.stalled).all(dim=0)  # J
        last = number == max_steps or not busy.any()
        if last or busy.sum() <= 0.7 * len(busy):
            done = torch.ones_like(busy) if last else ~busy
            columns = solver.columns[done]
            theta[:, columns] = solver.theta[:, done]
            arrived[:, columns] = solver.arrived[:, done]
            taken[:, columns] = solver.taken[:, done]
            if last:
                break
            solver.keep(busy.nonzero()[:, 0])
        solver.step()
    return theta, arrived, taken
