"""Convex problems of probes: the loss of every row, in coordinates that make the way short.

Rows are held once, in float32, and read in blocks, so that memory grows by one float32 copy of the
vectors and by nothing else.

Letters: `S` subsets, `n` rows of the longest, `J` probes of each, `C` classes, `T` findings,
`D` width of a vector, `Q` coordinates of the solver with the bias last, `P` values of one probe,
`b` rows of a block, `O` values that a row gets from all probes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

SD_FLOOR = 0.01  # of the median standard deviation of the channels that move at all
FLAT = 1e-10  # of the largest variance: directions below it are left out
BLOCK_VALUES = 2**20  # of a block of rows: 8 MB in float64


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


def row_blocks(count: int, width: int) -> Iterator[slice]:
    """Slices that cover some rows, each of about `BLOCK_VALUES` values.

    Args:
        count: Rows.
        width: Values of a row.
    """
    size = max(64, BLOCK_VALUES // max(width, 1))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class Standardised:
    """Some rows of vectors, standardised by their own mean and softened deviation, in blocks."""

    def __init__(self, vectors: Float32[np.ndarray, "N D"], rows: Int64[np.ndarray, " n"]):
        self.vectors, self.rows = vectors, rows
        self.mean, self.sd = (torch.zeros(vectors.shape[1], dtype=torch.float64) for _ in range(2))
        for _, block in self._raw():
            self.mean += block.sum(dim=0)
        self.mean /= len(rows)
        for _, block in self._raw():
            self.sd += block.sub_(self.mean).square_().sum(dim=0)
        self.sd = softened((self.sd / len(rows)).sqrt())

    def _raw(self) -> Iterator[tuple[slice, Float64[Tensor, "b D"]]]:
        """Rows as they are, with their places, in one buffer that is used again."""
        places = list(row_blocks(len(self.rows), self.vectors.shape[1]))
        buffer = torch.empty(places[0].stop, self.vectors.shape[1], dtype=torch.float64)
        for place in places:
            block = buffer[: place.stop - place.start]
            yield place, block.copy_(torch.from_numpy(self.vectors[self.rows[place]]))

    def blocks(self) -> Iterator[tuple[slice, Float64[Tensor, "b D"]]]:
        """Standardised rows, with their places; each block is valid until the next."""
        for place, block in self._raw():
            yield place, block.sub_(self.mean).div_(self.sd)

    def axes(self) -> tuple[Float64[Tensor, "D Q"], Float64[Tensor, " Q"]]:
        """Principal axes, and the variance along each.

        An optimum under an L2 penalty has no part outside the rows' span, so where there are fewer
        rows than channels the problem shrinks to as many coordinates as rows.
        """
        size, width = len(self.rows), self.vectors.shape[1]
        tall = size >= width
        if tall:
            product = torch.zeros(width, width, dtype=torch.float64)
            for _, block in self.blocks():
                product.addmm_(block.mT, block)
        else:
            rows = torch.cat([block.clone() for _, block in self.blocks()])
            product = rows @ rows.mT
        variance, basis = torch.linalg.eigh(product / size)
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
        self,
        vectors: Float32[np.ndarray, "N D"],
        targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"],
        subsets: Sequence[Int64[np.ndarray, " _"]],
    ):
        width, count = vectors.shape[1], len(subsets)
        given = [Standardised(vectors, rows) for rows in subsets]
        self.mean = torch.stack([one.mean for one in given])  # S D
        self.sd = torch.stack([one.sd for one in given])  # S D
        found = [one.axes() for one in given]
        longest, most = max(map(len, subsets)), max(len(variance) for _, variance in found)
        self.inputs = torch.zeros(count, longest, most + 1)  # S n Q, float32
        self.axes = torch.zeros(count, width, most, dtype=torch.float64)  # S D Q-1
        self.variance = torch.ones(count, most + 1, dtype=torch.float64)  # S Q
        for number, (one, (basis, variance)) in enumerate(zip(given, found, strict=True)):
            axes = len(variance)
            for place, block in one.blocks():
                self.inputs[number, place, :axes] = block @ basis
            self.inputs[number, : len(one.rows), -1] = 1.0
            self.axes[number, :, :axes] = basis
            self.variance[number, :axes] = variance

    def errors(
        self, logits: Float[Tensor, "S b O"], place: slice, columns: Int64[Tensor, " J"]
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S b O"]]:
        """What a block of rows adds to the loss of each probe, and its slope by the logits.

        Args:
            logits: Of the block's rows; may be overwritten.
            place: Of the rows.
            columns: Which of all probes these are.
        """
        raise NotImplementedError

    def loss(
        self,
        theta: Float[Tensor, "S J P"],
        decay: Float[Tensor, " J"],
        columns: Int64[Tensor, " J"],
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S J P"]]:
        """Mean loss plus penalty, with its gradient, in the float type of `theta`.

        Args:
            theta: Values of each probe, in the solver's coordinates.
            decay: Weight decay of each.
            columns: Which of all probes these are.
        """
        subsets, longest, coordinates = self.inputs.shape
        flat = theta.reshape(subsets, -1, coordinates)  # S O Q
        loss = theta.new_zeros(theta.shape[:2])
        slope = torch.zeros_like(flat)
        for place in row_blocks(longest, subsets * max(coordinates, flat.shape[1])):
            rows = self.inputs[:, place].to(theta.dtype)
            part, error = self.errors(torch.bmm(rows, flat.mT), place, columns)
            loss += part
            slope.baddbmm_(error.mT, rows)
        weights = theta.reshape(subsets, len(columns), -1, coordinates).clone()
        weights[..., -1] = 0.0  # the bias is not penalised
        loss += 0.5 * decay * weights.square().sum(dim=(-2, -1))
        slope = slope.view(weights.shape).add_(decay[:, None, None] * weights)
        return loss, slope.flatten(2)

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
        variance = self.variance.to(slope.dtype)
        curvature = self.steepness * variance[:, None] + decay[:, None]  # S J Q
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
    ):
        super().__init__(vectors, targets, subsets)
        shape = self.inputs.shape[:2]
        self.targets = torch.zeros(shape, dtype=torch.int64)
        self.share = torch.zeros(shape, dtype=torch.float64)  # 1 / rows of the subset; 0: padding
        for number, rows in enumerate(subsets):
            self.targets[number, : len(rows)] = torch.from_numpy(targets[rows])
            self.share[number, : len(rows)] = 1.0 / len(rows)

    def errors(
        self, logits: Float[Tensor, "S b O"], place: slice, columns: Int64[Tensor, " J"]
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S b O"]]:
        """See `Problem`."""
        probes, share = len(columns), self.share[:, place].to(logits.dtype)  # S b
        log_p = logits.view(*logits.shape[:2], probes, -1).log_softmax(dim=-1)  # S b J C
        hit = self.targets[:, place, None, None].expand(-1, -1, probes, 1)  # S b J 1
        loss = -(log_p.gather(-1, hit)[..., 0] * share[..., None]).sum(dim=1)  # S J
        error = log_p.exp_()
        error.scatter_add_(-1, hit, torch.full_like(hit, -1, dtype=error.dtype))
        return loss, error.mul_(share[..., None, None]).flatten(2)


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
        super().__init__(vectors, targets, subsets)
        shape = (*self.inputs.shape[:2], targets.shape[1])
        self.answers = torch.zeros(shape, dtype=torch.float64)  # S n T
        self.share = torch.zeros(shape, dtype=torch.float64)  # 1 / known rows; 0: unknown, padding
        for number, rows in enumerate(subsets):
            own = torch.from_numpy(targets[rows])
            known = (own >= 0).double()
            self.answers[number, : len(rows)] = (own == 1).double()
            self.share[number, : len(rows)] = known / known.sum(dim=0).clamp(min=1.0)

    def errors(
        self, logits: Float[Tensor, "S b O"], place: slice, columns: Int64[Tensor, " J"]
    ) -> tuple[Float[Tensor, "S J"], Float[Tensor, "S b O"]]:
        """See `Problem`."""
        finding = columns % self.answers.shape[-1]
        answers = self.answers[:, place, finding].to(logits.dtype)  # S b J
        share = self.share[:, place, finding].to(logits.dtype)
        loss = ((softplus(logits) - answers * logits) * share).sum(dim=1)  # S J
        return loss, (logits.sigmoid() - answers) * share
