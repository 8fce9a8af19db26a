"""Convex problems solved side by side: L-BFGS on all rows.

The way is found in float32; the last steps, and the verdict that a problem has arrived, are
float64. Letters as in `problem.py`: `S` subsets, `J` probes of each, `P` values of one probe.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from featcache.heads.problem import Problem

MEMORY = 10  # steps that the curvature estimate remembers
HALVINGS = 25  # of the step length, before a probe counts as stalled
ROUGH = 1e-6  # largest entry of a slope down to which float32 shows the way (its noise: 2e-7)


class _Lbfgs:
    """L-BFGS for S x J independent problems, each with its own curvature and step length.

    It works in the float type of `theta`. In float32 a problem counts as stalled, too, when its
    slope has not become smaller for `MEMORY` steps: rounding errors are then all that is left.
    """

    def __init__(
        self, problem: Problem, theta: Tensor, decay: Tensor, tolerance: float, budget: Tensor
    ):
        self.problem, self.decay, self.tolerance = problem, decay.to(theta.dtype), tolerance
        self.theta = theta  # S J P
        self.budget = budget  # S J, steps
        self.columns = torch.arange(theta.shape[1])
        self.loss, self.slope = problem.loss(theta, self.decay, self.columns)
        self.stalled = torch.zeros_like(self.loss, dtype=torch.bool)  # S J
        self.taken = torch.zeros_like(self.loss, dtype=torch.int64)
        self.lowest, self.at = self.steepest, self.taken
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.noise = 10 * torch.finfo(theta.dtype).eps  # of a loss, relative
        self.tiny = torch.finfo(theta.dtype).tiny

    @property
    def steepest(self) -> Float[Tensor, "S J"]:
        """Largest entry of each slope."""
        return self.slope.abs().amax(dim=-1)

    @property
    def arrived(self) -> Bool[Tensor, "S J"]:
        """Which problems are at their optimum, within the tolerance."""
        return self.steepest <= self.tolerance

    @property
    def resting(self) -> Bool[Tensor, "S J"]:
        """Which problems take no step any more."""
        return self.arrived | self.stalled | (self.taken >= self.budget)

    def keep(self, numbers: Int64[Tensor, " j"]) -> None:
        """Go on with some of the J columns."""
        self.decay, self.columns = self.decay[numbers], self.columns[numbers]
        for name in ("theta", "loss", "slope", "stalled", "taken", "budget", "lowest", "at"):
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
            scale = torch.where(rho > 0, 1.0 / (rho * length).clamp(min=self.tiny), 1.0)
            q *= scale[..., None]
        for (moved, turned, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            q += (factor - rho * (turned * q).sum(dim=-1))[..., None] * moved
        return q.neg_()

    def step(self) -> None:
        """One step of every problem that does not rest."""
        resting = self.resting
        way = self._direction()
        fall = (way * self.slope).sum(dim=-1)  # S J
        uphill = fall >= 0
        way = torch.where(uphill[..., None], -self.slope, way)
        fall = torch.where(uphill, -self.slope.square().sum(dim=-1), fall)
        size = torch.where(resting, 0.0, torch.ones_like(fall))
        theta = self.theta + size[..., None] * way
        loss, slope = self.problem.loss(theta, self.decay, self.columns)
        for _ in range(HALVINGS):
            bad = ~self._is_lower(loss, size * fall, (slope * way).sum(dim=-1), fall) & ~resting
            if not bad.any():
                break
            size = torch.where(bad, size / 2, size)
            some = bad.any(dim=0).nonzero()[:, 0]
            theta[:, some] = self.theta[:, some] + size[:, some, None] * way[:, some]
            loss[:, some], slope[:, some] = self.problem.loss(
                theta[:, some], self.decay[some], self.columns[some]
            )
        self.stalled |= bad
        self._remember(~bad & ~resting, theta, loss, slope)

    def _is_lower(
        self, loss: Tensor, expected: Tensor, rise: Tensor, fall: Tensor
    ) -> Bool[Tensor, "S J"]:
        """Whether steps lowered the loss enough.

        Where a step changes less than rounding errors do, the slope along it decides (Hager and
        Zhang 2005): it must not point up more steeply than it pointed down.
        """
        is_flat = loss <= self.loss + self.noise * self.loss.abs()
        return (loss <= self.loss + 1e-4 * expected) | (is_flat & (rise <= -0.9998 * fall))

    def _remember(self, accepted: Tensor, theta: Tensor, loss: Tensor, slope: Tensor) -> None:
        """Take over the accepted steps with the curvature they showed."""
        chosen = accepted[..., None]
        moved = torch.where(chosen, theta - self.theta, 0.0)
        turned = torch.where(chosen, slope - self.slope, 0.0)
        curve = (moved * turned).sum(dim=-1)  # S J
        rho = torch.where(curve > self.tiny, 1.0 / curve.clamp(min=self.tiny), 0.0)
        self.pairs = [*self.pairs[-(MEMORY - 1) :], (moved, turned, rho)]
        self.theta = torch.where(chosen, theta, self.theta)
        self.slope = torch.where(chosen, slope, self.slope)
        self.loss = torch.where(accepted, loss, self.loss)
        self.taken = self.taken + accepted
        is_better = self.steepest < self.lowest
        self.lowest = torch.where(is_better, self.steepest, self.lowest)
        self.at = torch.where(is_better, self.taken, self.at)
        if theta.dtype == torch.float32:
            self.stalled |= self.taken - self.at >= MEMORY


def _descend(
    solver: _Lbfgs,
) -> tuple[Float[Tensor, "S J P"], Bool[Tensor, "S J"], Int64[Tensor, "S J"]]:
    """Where each problem comes to, whether it has arrived, and its steps.

    Finished columns are put aside on the way.
    """
    theta, arrived, taken = solver.theta.clone(), solver.arrived, solver.taken
    while True:
        busy = ~solver.resting.all(dim=0)  # J
        last = not busy.any()
        if last or busy.sum() <= 0.85 * len(busy):
            done = torch.ones_like(busy) if last else ~busy
            columns = solver.columns[done]
            theta[:, columns] = solver.theta[:, done]
            arrived[:, columns] = solver.arrived[:, done]
            taken[:, columns] = solver.taken[:, done]
            if last:
                return theta, arrived, taken
            solver.keep(busy.nonzero()[:, 0])
        solver.step()


def solve(
    problem: Problem,
    theta: Float64[Tensor, "S J P"],
    decay: Float64[Tensor, " J"],
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[Float64[Tensor, "S J P"], Bool[Tensor, "S J"], Int64[Tensor, "S J"]]:
    """Optimum, arrival and steps of every problem: first roughly in float32, then in float64.

    Args:
        problem: Gives losses and slopes.
        theta: Where each starts, in the solver's coordinates.
        decay: Weight decay of each column.
        tolerance: Largest entry of a slope, in float64, at which a problem counts as solved.
        max_steps: Steps after which a problem is left as it is.
    """
    budget = torch.full(theta.shape[:2], max_steps)
    aim = max(0.8 * tolerance, ROUGH)  # a little beyond: what float64 then sees is below
    near, _, first = _descend(_Lbfgs(problem, theta.float(), decay, aim, budget))
    found, arrived, then = _descend(
        _Lbfgs(problem, near.double(), decay, tolerance, budget - first)
    )
    return found, arrived, first + then
