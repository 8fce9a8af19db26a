"""Answers held against the test labels: figures, their spread, intervals, paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
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
        figures: By name, in the order of the columns of `drawn`.
        drawn: The same figures, mean over the runs, in every bootstrap draw.
        details: Facts for `results.json`.
    """

    figures: Mapping[str, Estimate]
    drawn: Float64[np.ndarray, "draws M"]
    details: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """How many runs the figures are means over."""
        return len(next(iter(self.figures.values())).values)


@runtime_checkable
class Subtracts(Protocol):
    """A judge of any head: it knows which figures get an interval."""

    def difference(self, first: Judgement, second: Judgement) -> Judgement:
        """First minus second, on the same draws."""
        ...


def estimates(
    names: Sequence[str],
    values: Float64[np.ndarray, "R M"],
    drawn: Float64[np.ndarray, "draws M"],
    allowed: Mapping[str, bool],
) -> dict[str, Estimate]:
    """Figures with their runs and intervals.

    Args:
        names: Of the figures.
        values: Of each run.
        drawn: Mean over the runs, in every draw.
        allowed: Which figures get an interval; one that does not exist in a run gets none.
    """
    found = {}
    for column, name in enumerate(names):
        own = values[:, column]
        has = allowed[name] and not np.isnan(own).any()
        found[name] = Estimate(tuple(own.tolist()), interval_of(drawn[:, column]) if has else None)
    return found


def subtract(first: Judgement, second: Judgement, allowed: Mapping[str, bool]) -> Judgement:
    """First minus second, draw by draw, and run by run as far as they have runs in common.

    A method may have fewer runs than another: a trivial row has one for each subset where probes
    have one for each subset and seed, or a single one for all. Each of the fewer then stands beside
    as many of the others, in their order. Where the numbers do not fit, the means alone are
    subtracted.

    Args:
        first: Figures of a method.
        second: The same figures of another, on the same draws.
        allowed: Which figures get an interval.
    """
    names = list(first.figures)
    ours, theirs = (
        np.array([one.figures[name].values for name in names], dtype=np.float64).T  # R M
        for one in (first, second)
    )
    most = max(len(ours), len(theirs))
    if most % len(ours) or most % len(theirs):
        ours, theirs = ours.mean(axis=0, keepdims=True), theirs.mean(axis=0, keepdims=True)
        most = 1
    gaps = np.repeat(ours, most // len(ours), axis=0) - np.repeat(
        theirs, most // len(theirs), axis=0
    )
    drawn = first.drawn - second.drawn
    return Judgement(estimates(names, gaps, drawn, allowed), drawn)


def differences(
    judged: Mapping[str, Judgement], judge: Subtracts
) -> Iterator[dict[str, JsonValue]]:
    """Every method minus every one before it, on the same draws of patients.

    Args:
        judged: By method, the trivial ones first.
        judge: Held them against the test answers.
    """
    for second, first in combinations(judged, 2):
        found = judge.difference(judged[first], judged[second])
        figures: dict[str, JsonValue] = {
            name: one.to_plain() for name, one in found.figures.items()
        }
        yield {"first": first, "second": second, "figures": figures}


@dataclass(frozen=True)
class Judge:
    """The test labels, with the rule by which figures get intervals.

    Attributes:
        targets: Class of each test image; or for each finding 1, 0, or -1 = unknown.
        subject_ids: Patient of each test image.
        classes: Names of the classes or findings.
        draws: Bootstrap draws.
        seed: Seed of the draws: every method sees the same ones.
    """

    targets: Int64[np.ndarray, " n"] | Int64[np.ndarray, "n C"]
    subject_ids: Sequence[str]
    classes: Sequence[str]
    draws: int
    seed: int

    @property
    def of_findings(self) -> bool:
        """Whether an image may have several of the classes."""
        return self.targets.ndim == 2

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures."""
        return scores.metric_names(self.classes, of_findings=self.of_findings)

    def _sides(self, number: int) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Images that are known to be of a class (to have a finding), and those known not to."""
        if self.of_findings:
            return self.targets[:, number] == 1, self.targets[:, number] == 0
        return self.targets == number, self.targets != number

    def _patients(self, chosen: Bool[np.ndarray, " n"]) -> int:
        """Distinct patients among some of the test images."""
        return len({s for s, taken in zip(self.subject_ids, chosen, strict=True) if taken})

    def rare_classes(self) -> list[str]:
        """Classes that occur, or whose rest occurs, in a single patient."""
        rare = []
        for number, name in enumerate(self.classes):
            has, lacks = self._sides(number)
            # Of findings that do not exist on both sides there is no figure to speak of.
            if not has.any() or (self.of_findings and not lacks.any()):
                continue
            sides = [self._patients(side) for side in (has, lacks)]
            if min(side for side in sides if side) < FEWEST_PATIENTS:
                rare.append(name)
        return rare

    def undefined_classes(self) -> dict[str, tuple[int, int]]:
        """Classes without an AUROC here: how many images have them, of how many that are known."""
        sides = [self._sides(number) for number in range(len(self.classes))]
        return {
            name: (int(has.sum()), int(has.sum() + lacks.sum()))
            for name, (has, lacks) in zip(self.classes, sides, strict=True)
            if not (has.any() and lacks.any())
        }

    def has_interval(self) -> dict[str, bool]:
        """Which figures get one: accuracy needs two patients, the others two of every class."""
        enough = self._patients(np.ones(len(self.targets), dtype=bool)) >= FEWEST_PATIENTS
        rare = self.rare_classes()
        allowed = dict.fromkeys(self.metrics, enough and not rare)
        if self.of_findings:
            own = {scores.OF_FINDING + name: enough and name not in rare for name in self.classes}
            return allowed | own
        return allowed | {"accuracy": enough}

    def judge(self, answers: Answers) -> Judgement:
        """Figures of a method's runs.

        The interval is of their mean: each draw of patients scores all runs and averages them.

        Args:
            answers: At least one run.
        """
        runs = np.array([scores.figures(run, self.targets) for run in answers.probabilities])
        drawn = self._draw(answers.probabilities)
        figures = estimates(self.metrics, runs, drawn, self.has_interval())
        return Judgement(figures, drawn, {**answers.details, **self._per_class(answers)})

    def difference(self, first: Judgement, second: Judgement) -> Judgement:
        """First minus second; see `subtract`."""
        return subtract(first, second, self.has_interval())

    def _draw(self, probabilities: Float[np.ndarray, "R n C"]) -> Float64[np.ndarray, "draws M"]:
        """The mean figures of all runs in every draw."""

        def mean_figures(weights: Float64[np.ndarray, "W n"]) -> Float64[np.ndarray, "W M"]:
            runs = [scores.weighted_figures(run, self.targets, weights) for run in probabilities]
            return np.mean(runs, axis=0)  # type: ignore[no-any-return]

        return patient_bootstrap(mean_figures, self.subject_ids, draws=self.draws, seed=self.seed)

    def _per_class(self, answers: Answers) -> dict[str, Any]:
        """AUROC of each class and the confusion matrix, both as means over the runs."""
        runs = answers.probabilities
        if self.of_findings:
            areas = np.mean([scores.figures(run, self.targets)[1:] for run in runs], axis=0)
        else:
            areas = np.mean([scores.class_auroc(run, self.targets) for run in runs], axis=0)
        named = {
            name: None if np.isnan(area) else round(float(area), DIGITS)
            for name, area in zip(self.classes, areas, strict=True)
        }
        return {"class_auroc": named, **({} if self.of_findings else self._confusion(runs))}

    def _confusion(self, runs: Float[np.ndarray, "R n C"]) -> dict[str, Any]:
        """How many images of each class are taken for each, by name: mean over the runs."""
        counts = np.zeros((len(self.classes), len(self.classes)))
        for run in runs:
            np.add.at(counts, (self.targets, run.argmax(axis=1)), 1 / len(runs))
        rows = {
            name: dict(zip(self.classes, row, strict=True))
            for name, row in zip(self.classes, np.round(counts, DIGITS).tolist(), strict=True)
        }
        return {"confusion": rows}
