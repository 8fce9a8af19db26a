"""How good predicted masks are: Dice in its several meanings, presence AUROC, intervals.

A head gives a number for each pixel. What is kept of it are counts: for each picture and each of
many levels, how many pixels reach the level, and how many of these lie inside the true mask. Every
figure and every choice of a threshold follows from those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int32, Int64
from pydantic import JsonValue
from torch import Tensor

from featcache.heads import scores
from featcache.heads.judge import FEWEST_PATIENTS, Judgement, estimates, subtract
from featcache.heads.protocol import patient_bootstrap
from featcache.heads.table import DIGITS

METRICS = (
    "dice",
    "dice_positive",
    "pixel_dice",
    "presence_auroc",
    "dice_positive_own",
    "pointing",
)
TITLES = {
    "dice": "Dice, all",
    "dice_positive": "Dice, positive",
    "pixel_dice": "pixel Dice",
    "presence_auroc": "presence AUROC",
    "dice_positive_own": "positive, own t",
    "pointing": "pointing game",
}


@dataclass(frozen=True)
class Levels:
    """Evenly spaced thresholds; above the last one lies a level that nothing reaches.

    Attributes:
        low: The first.
        high: The last.
        count: How many, at least 2.
    """

    low: float = -6.3
    high: float = 6.3
    count: int = 127

    def value(self, level: int) -> float | None:
        """The threshold of a level; None for the one that nothing reaches."""
        if level >= self.count:
            return None
        return self.low + (self.high - self.low) * level / (self.count - 1)

    def reached(self, values: Float[Tensor, "*any"]) -> Int64[Tensor, "*any"]:
        """How many levels each value reaches, 0 to `count`; NaN reaches none."""
        step = (self.high - self.low) / (self.count - 1)
        # A value that equals a level up to rounding reaches it.
        place = torch.floor((values.float() - self.low) / step + 1e-4) + 1
        return place.nan_to_num(nan=0.0).clamp(0, self.count).long()


@dataclass(frozen=True)
class Counts:
    """Pixels of each picture that reach each level, the unreachable one included.

    Attributes:
        predicted: Pixels that reach the level.
        overlap: Those of them that lie inside the true mask.
        target: Pixels of the true mask.
        hit: Share of each picture's highest pixels that lies inside: where a finger points.
        highest: Each picture's highest value, its score for having a mask; no level rounds it.
    """

    predicted: Int32[np.ndarray, "N T"]
    overlap: Int32[np.ndarray, "N T"]
    target: Int64[np.ndarray, " N"]
    hit: Float64[np.ndarray, " N"]
    highest: Float64[np.ndarray, " N"]

    @property
    def dice(self) -> Float64[np.ndarray, "N T"]:
        """Dice of each picture at each level; empty on empty is 1."""
        total = self.predicted + self.target[:, None]
        dice: Float64[np.ndarray, "N T"] = np.where(
            total == 0, 1.0, 2 * self.overlap / np.maximum(total, 1)
        )
        return dice


def count_pixels(
    values: Float[Tensor, "B H W"], masks: Bool[Tensor, "B H W"], levels: Levels
) -> Counts:
    """Count the pixels that reach each level.

    Args:
        values: Higher is more likely inside.
        masks: True inside.
        levels: The thresholds.
    """
    bins = levels.count + 1
    first = torch.arange(len(values), device=values.device).view(-1, 1, 1) * bins
    place = levels.reached(values) + first  # B H W, its picture's bins in a row

    def at_least(places: Int64[Tensor, " n"]) -> Int32[np.ndarray, "B T"]:
        counts = torch.bincount(places, minlength=len(values) * bins).view(len(values), bins)
        above = counts.flip(1).cumsum(1).flip(1)[:, 1:].cpu().numpy()  # B count
        return np.pad(above, ((0, 0), (0, 1))).astype(np.int32)

    inside = masks.sum(dim=(1, 2)).cpu().numpy().astype(np.int64)
    top = values.amax(dim=(1, 2), keepdim=True)
    highest = values == top
    hit = (highest & masks).sum(dim=(1, 2)) / highest.sum(dim=(1, 2)).clamp_min(1)
    return Counts(
        at_least(place.flatten()),
        at_least(place[masks]),
        inside,
        hit.double().cpu().numpy(),
        top.flatten().double().nan_to_num(nan=-torch.inf, posinf=torch.inf).cpu().numpy(),
    )


def join_counts(parts: Sequence[Counts]) -> Counts:
    """Counts of consecutive batches as one."""
    return Counts(
        np.concatenate([one.predicted for one in parts]),
        np.concatenate([one.overlap for one in parts]),
        np.concatenate([one.target for one in parts]),
        np.concatenate([one.hit for one in parts]),
        np.concatenate([one.highest for one in parts]),
    )


def empty_counts(target: Int64[np.ndarray, " N"], pixels: int, levels: Levels) -> Counts:
    """What predicting nothing gives; who has to point nevertheless points anywhere.

    Args:
        target: Pixels of each true mask.
        pixels: Of a whole picture.
        levels: The thresholds.
    """
    nothing = np.zeros((len(target), levels.count + 1), dtype=np.int32)
    return Counts(nothing, nothing, target, target / pixels, np.zeros(len(target)))


@dataclass(frozen=True)
class Operating:
    """Where values become masks: chosen on validate, used on test.

    Attributes:
        mask: Level from which a pixel is inside.
        presence: Level that a picture's highest value must reach, or its mask is empty.
        own: Level that is best for Dice over positives, without a presence rule.
    """

    mask: int
    presence: int
    own: int


def choose_operating(counts: Counts, select_by: str) -> tuple[Operating, float]:
    """The levels with the best figure, and that figure.

    Args:
        counts: Of the validate split.
        select_by: `dice`, `dice_positive` or `pixel_dice`.

    Returns:
        The lowest levels among equals; the figure is NaN where it does not exist.
    """
    figure = _figure_grid(counts, select_by)
    exists = np.nan_to_num(np.round(figure, DIGITS), nan=-1.0)
    # A presence level below the mask's says no more than the mask's own.
    exists[np.tril_indices(len(exists), -1)] = -2.0
    mask, presence = (int(place) for place in np.unravel_index(exists.argmax(), exists.shape))
    positive = counts.target > 0
    own = int(np.round(counts.dice[positive].mean(axis=0), DIGITS).argmax()) if any(positive) else 0
    return Operating(mask, presence, own), float(figure[mask, presence])


def _figure_grid(counts: Counts, select_by: str) -> Float64[np.ndarray, "T T"]:
    """A figure for each mask level (rows) and presence level (columns)."""
    if select_by == "dice_positive":
        some = counts.target > 0
        counts = Counts(
            counts.predicted[some],
            counts.overlap[some],
            counts.target[some],
            counts.hit[some],
            counts.highest[some],
        )
    if not len(counts.target):
        width = counts.predicted.shape[1]
        return np.full((width, width), np.nan)
    kept = (counts.predicted > 0).astype(np.float64)  # N T: not emptied at this presence level
    if select_by == "pixel_dice":
        overlap = counts.overlap.T.astype(np.float64) @ kept
        total = counts.predicted.T.astype(np.float64) @ kept + counts.target.sum()
        figure = np.full(total.shape, np.nan)
        np.divide(2 * overlap, total, out=figure, where=total > 0)
        return figure
    empty = (counts.target == 0).astype(np.float64)  # Dice of an emptied picture
    gain = (counts.dice - empty[:, None]).T @ kept
    return np.asarray(gain / len(empty) + empty.mean())


@dataclass(frozen=True)
class MaskAnswer:
    """One run's masks on the test pictures, at the levels that validate chose.

    Attributes:
        dice: Of each picture, empty on empty = 1.
        own: Of each picture at the level that suits positives best.
        predicted: Pixels of each predicted mask.
        overlap: Of these, pixels inside the true mask.
        target: Pixels of each true mask.
        presence: Each picture's score for having a mask at all.
        hit: Whether the highest pixel lies inside, as a share of equals.
    """

    dice: Float64[np.ndarray, " N"]
    own: Float64[np.ndarray, " N"]
    predicted: Int32[np.ndarray, " N"]
    overlap: Int32[np.ndarray, " N"]
    target: Int64[np.ndarray, " N"]
    presence: Float64[np.ndarray, " N"]
    hit: Float64[np.ndarray, " N"]


def answer(counts: Counts, operating: Operating) -> MaskAnswer:
    """Masks at chosen levels.

    Args:
        counts: Of the test split.
        operating: From `choose_operating` on validate.
    """
    kept = counts.predicted[:, operating.presence] > 0
    at_levels = Counts(
        (counts.predicted[:, operating.mask] * kept)[:, None],
        (counts.overlap[:, operating.mask] * kept)[:, None],
        counts.target,
        counts.hit,
        counts.highest,
    )
    return MaskAnswer(
        dice=at_levels.dice[:, 0],
        own=counts.dice[:, operating.own],
        predicted=at_levels.predicted[:, 0],
        overlap=at_levels.overlap[:, 0],
        target=counts.target,
        presence=counts.highest,
        hit=counts.hit,
    )


def _share(
    values: Float[np.ndarray, " N"], counted: Float[np.ndarray, " N"], weights: np.ndarray
) -> Float64[np.ndarray, " W"]:
    """Weighted sum of values over that of what is counted; NaN over nothing."""
    below = weights @ counted
    share = np.full(len(weights), np.nan)
    np.divide(weights @ values, below, out=share, where=below > 0)
    return share


def weighted_figures(
    given: MaskAnswer, weights: Float64[np.ndarray, "W N"]
) -> Float64[np.ndarray, "W 6"]:
    """The figures of `METRICS` under many weightings of the pictures, NaN where one does not exist.

    Dice over all pictures counts an empty mask on an empty truth as 1; Dice over positives leaves
    pictures without a mask out; pixel Dice pools the pixels of all pictures; the pointing game asks
    of pictures with a mask whether their highest pixel lies inside.

    Args:
        given: Masks of one run.
        weights: How often each picture counts, >= 0.
    """
    positive = (given.target > 0).astype(np.float64)
    present = (given.target > 0).astype(np.int64)
    area = np.full(len(weights), np.nan)
    if 0 < present.sum() < len(present):
        # Two columns that rank alike: the macro mean of both classes is the one AUROC there is.
        ranked = np.stack([-given.presence, given.presence], axis=1)
        area = scores.weighted_scores(ranked, present, weights)[:, 2]
    both = (given.predicted + given.target).astype(np.float64)
    return np.stack(
        [
            _share(given.dice, np.ones(len(positive)), weights),
            _share(given.dice * positive, positive, weights),
            _share(2.0 * given.overlap, both, weights),
            area,
            _share(given.own * positive, positive, weights),
            _share(given.hit * positive, positive, weights),
        ],
        axis=1,
    )


@dataclass(frozen=True)
class MaskJudge:
    """The rule by which figures of masks get intervals.

    Attributes:
        subject_ids: Patient of each test picture.
        positive: Whether it has a mask.
        draws: Bootstrap draws.
        seed: Seed of the draws: every method sees the same ones.
    """

    subject_ids: Sequence[str]
    positive: Bool[np.ndarray, " N"]
    draws: int
    seed: int

    def has_interval(self) -> dict[str, bool]:
        """Which figures get one: each needs two patients of every kind that it is made of."""

        def enough(chosen: Bool[np.ndarray, " N"]) -> bool:
            found = {s for s, taken in zip(self.subject_ids, chosen, strict=True) if taken}
            return len(found) >= FEWEST_PATIENTS

        anyone, with_mask = enough(np.ones_like(self.positive)), enough(self.positive)
        both = with_mask and enough(~self.positive)
        return {
            "dice": anyone,
            "dice_positive": with_mask,
            "pixel_dice": with_mask,
            "presence_auroc": both,
            "dice_positive_own": with_mask,
            "pointing": with_mask,
        }

    def judge(self, runs: Sequence[MaskAnswer]) -> Judgement:
        """Figures of a method's runs; the interval is of their mean.

        Args:
            runs: At least one.
        """

        def mean_figures(weights: Float64[np.ndarray, "W N"]) -> Float64[np.ndarray, "W 6"]:
            return np.mean([weighted_figures(run, weights) for run in runs], axis=0)  # type: ignore[no-any-return]

        even = np.ones((1, len(self.positive)))
        each = np.concatenate([weighted_figures(run, even) for run in runs])  # runs 6
        drawn = patient_bootstrap(mean_figures, self.subject_ids, draws=self.draws, seed=self.seed)
        empty: list[JsonValue] = [int((run.predicted == 0).sum()) for run in runs]
        figures = estimates(METRICS, each, drawn, self.has_interval())
        return Judgement(figures, drawn, {"empty_predictions": empty})

    def difference(self, first: Judgement, second: Judgement) -> Judgement:
        """First minus second; see `subtract`."""
        return subtract(first, second, self.has_interval())
