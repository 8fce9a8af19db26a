"""Answers held against the test labels: figures, their spread, intervals, paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int64
from pydantic import JsonValue

from featcache.heads import scores
from featcache.heads.answers import Answers
from featcache.heads.protocol import Estimate, interval_of, patient_bootstrap
from featcache.heads.table import DIGITS

FEWEST_PATIENTS = 2


@dataclass(frozen=True)
class Judgement:
    """The figures of one method on one share of the labels.

    Attributes:
        figures: By name in `scores.METRICS`.
        drawn: The same figures, mean over the runs, in every bootstrap draw.
        details: Facts for `results.json`.
    """

    figures: Mapping[str, Estimate]
    drawn: Float64[np.ndarray, "draws 3"]
    details: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """The test labels, with the rule by which figures get intervals.

    Attributes:
        targets: Class of each test image.
        subject_ids: Patient of each test image.
        classes: Names of the classes.
        draws: Bootstrap draws.
        seed: Seed of the draws: every method sees the same ones.
    """

    targets: Int64[np.ndarray, " n"]
    subject_ids: Sequence[str]
    classes: Sequence[str]
    draws: int
    seed: int

    def _patients(self, chosen: Sequence[bool]) -> int:
        """Distinct patients among some of the test images."""
        return len({s for s, taken in zip(self.subject_ids, chosen, strict=True) if taken})

    def rare_classes(self) -> list[str]:
        """Classes that occur, or whose rest occurs, in a single patient."""
        rare = []
        for number in np.unique(self.targets).tolist():
            members = self.targets == number
            sides = [self._patients(side.tolist()) for side in (members, ~members)]
            if min(side for side in sides if side) < FEWEST_PATIENTS:
                rare.append(self.classes[number])
        return rare

    def undefined_classes(self) -> dict[str, int]:
        """Classes without an AUROC in this split, and how many images they have in it."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        defined = scores.defined_classes(self.targets, len(self.classes))
        return {self.classes[i]: int(counts[i]) for i in np.flatnonzero(~defined).tolist()}

    def has_interval(self) -> dict[str, bool]:
        """Which figures get one: accuracy needs two patients, the others two of every class."""
        enough = self._patients([True] * len(self.targets)) >= FEWEST_PATIENTS
        every_class = enough and not self.rare_classes()
        return {name: enough if name == "accuracy" else every_class for name in scores.METRICS}

    def judge(self, answers: Answers) -> Judgement:
        """Figures of a method's runs.

        The interval is of their mean: each draw of patients scores all runs and averages them.

        Args:
            answers: At least one run.
        """
        runs = [scores.score(run, self.targets) for run in answers.probabilities]
        drawn = self._draw(answers.probabilities)
        allowed = self.has_interval()
        figures = {}
        for column, name in enumerate(scores.METRICS):
            values = tuple(run[name] for run in runs)
            interval = interval_of(drawn[:, column]) if allowed[name] else None
            figures[name] = Estimate(values, None if np.isnan(values).any() else interval)
        return Judgement(figures, drawn, {**answers.details, **self._per_class(answers)})

    def difference(self, first: Judgement, second: Judgement) -> Judgement:
        """First minus second, run by run and draw by draw."""
        drawn = first.drawn - second.drawn
        figures = {}
        for column, name in enumerate(scores.METRICS):
            pairs = zip(first.figures[name].values, second.figures[name].values, strict=True)
            values = tuple(one - other for one, other in pairs)
            has = first.figures[name].interval is not None
            figures[name] = Estimate(values, interval_of(drawn[:, column]) if has else None)
        return Judgement(figures, drawn)

    def _draw(self, probabilities: Float[np.ndarray, "R n C"]) -> Float64[np.ndarray, "draws 3"]:
        """The mean figures of all runs in every draw."""

        def mean_figures(weights: Float64[np.ndarray, "W n"]) -> Float64[np.ndarray, "W 3"]:
            runs = [scores.weighted_scores(run, self.targets, weights) for run in probabilities]
            return np.mean(runs, axis=0)  # type: ignore[no-any-return]

        return patient_bootstrap(mean_figures, self.subject_ids, draws=self.draws, seed=self.seed)

    def _per_class(self, answers: Answers) -> dict[str, JsonValue]:
        """AUROC of each class and the confusion matrix, both as means over the runs."""
        areas = np.mean([scores.class_auroc(run, self.targets) for run in answers.probabilities], 0)
        confusion = np.zeros((len(self.classes), len(self.classes)))
        for run in answers.probabilities:
            np.add.at(confusion, (self.targets, run.argmax(axis=1)), 1 / len(answers.probabilities))
        named: dict[str, JsonValue] = {
            name: None if np.isnan(area) else round(float(area), DIGITS)
            for name, area in zip(self.classes, areas, strict=True)
        }
        return {"class_auroc": named, "confusion": np.round(confusion, DIGITS).tolist()}
