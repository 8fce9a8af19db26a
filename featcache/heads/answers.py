"""What each method answers for the test images: class probabilities, made without their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64
from pydantic import JsonValue

from featcache.errors import TrainingError
from featcache.heads import scores
from featcache.heads.attention import AttentionHeads, TokenRows, train_attention
from featcache.heads.labels import LabelledImages
from featcache.heads.mlp import Mlps, Schedule, train_mlps
from featcache.heads.probe import Probes, train_probes
from featcache.heads.problem import BLOCK_VALUES
from featcache.heads.table import DIGITS

Heads = Probes | Mlps | AttentionHeads


@dataclass(frozen=True)
class Answers:
    """Class probabilities of a method's runs, or scores that order images and classes like them.

    Attributes:
        probabilities: Of each run (subset by subset, in it seed by seed), test image and class;
            no run when the method could not be computed.
        details: Facts for `results.json`.
        remark: For the table.
    """

    probabilities: Float[np.ndarray, "R n C"]
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    remark: str = ""


def no_answers(reason: str, num_classes: int) -> Answers:
    """A method that could not be computed, with the reason."""
    return Answers(np.zeros((0, 0, num_classes)), remark=reason)


@dataclass(frozen=True)
class ProbeGrid:
    """Which heads are trained, and how one is chosen.

    Attributes:
        decays: Weight decays, ascending.
        seeds: Seeds of the first weights.
        select_by: Figure of `scores.METRICS` that chooses on validate; of findings, `auroc`.
        tolerance: Of linear probes, see `train_probes`.
        max_steps: See `train_probes`.
        rates: Learning rates of MLP and attention heads; empty: linear probes, which have none.
        schedule: Size and length of MLP and attention heads.
    """

    decays: Sequence[float]
    seeds: Sequence[int]
    select_by: str = "auroc"
    tolerance: float = 1e-5
    max_steps: int = 1000
    rates: Sequence[float] = ()
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def settings(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each, in the order in which heads are numbered."""
        return [(rate, decay) for rate in self.rates or (0.0,) for decay in self.decays]

    def train(
        self,
        labelled: LabelledImages,
        members: Sequence[Int64[np.ndarray, " _"]],
        vectors: Float32[np.ndarray, "N F"] | TokenRows,
    ) -> Heads:
        """All heads of all subsets, in one pass.

        Args:
            labelled: All labelled images.
            members: Numbers of the images of each training subset.
            vectors: One per labelled image; or the tokens of each, for attention heads.
        """
        trained: dict[str, Any] = {
            "num_classes": len(labelled.classes),
            "settings": self.settings,
            "seeds": self.seeds,
            "schedule": self.schedule,
        }
        if isinstance(vectors, TokenRows):
            return train_attention(vectors, labelled.targets, members, **trained)
        if self.rates:
            return train_mlps(vectors, labelled.targets, members, **trained)
        return train_probes(
            vectors,
            labelled.targets,
            members,
            num_classes=len(labelled.classes),
            decays=self.decays,
            seeds=self.seeds,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )


def majority_answers(
    labelled: LabelledImages, members: Sequence[Int64[np.ndarray, " _"]]
) -> Answers:
    """Always the most frequent class of the training subset, the first of equals.

    Of findings: for every image the share of the subset's images that have them.

    Args:
        labelled: All labelled images.
        members: Numbers of the images of each training subset.
    """
    if labelled.of_findings:
        rates = np.stack([_finding_rates(labelled.targets[some]) for some in members])  # R T
        return Answers(np.repeat(rates[:, None], len(labelled.of("test")), axis=1))
    num_classes = len(labelled.classes)
    counts = [np.bincount(labelled.targets[some], minlength=num_classes) for some in members]
    hits = np.eye(num_classes)[[int(count.argmax()) for count in counts]]  # R C
    return Answers(np.repeat(hits[:, None], len(labelled.of("test")), axis=1))


def _finding_rates(targets: Int64[np.ndarray, "n T"]) -> Float64[np.ndarray, " T"]:
    """Share of the images where each finding is known that have it; 0.5 where none is."""
    known = (targets >= 0).sum(axis=0)
    rates = np.full(targets.shape[1], 0.5)
    np.divide((targets == 1).sum(axis=0), known, out=rates, where=known > 0)
    return rates


def source_answers(labelled: LabelledImages, members: Sequence[Int64[np.ndarray, " _"]]) -> Answers:
    """The class frequencies of the training images from the same source: no pixel is looked at.

    Where this scores high, the classes can be told by where the pictures come from, and a probe
    may do no more than that. A source that a subset does not hold gets the whole subset's
    frequencies.

    Args:
        labelled: All labelled images.
        members: Numbers of the images of each training subset.
    """
    names, source_of = np.unique(np.asarray(labelled.sources, dtype=str), return_inverse=True)
    test = labelled.of("test")
    runs = []
    for some in members:
        table = np.stack(
            [_frequencies(labelled, some[source_of[some] == n], some) for n in range(len(names))]
        )
        runs.append(table[source_of[test]])
    return Answers(np.stack(runs), remark="knows an image's source, sees no pixel")


def _frequencies(
    labelled: LabelledImages, own: Int64[np.ndarray, " _"], whole: Int64[np.ndarray, " _"]
) -> Float64[np.ndarray, " C"]:
    """How common the classes are in some images; in the whole subset where none is known there."""
    some = own if len(own) else whole
    if labelled.of_findings:
        rates, known = _finding_rates(labelled.targets[some]), (labelled.targets[some] >= 0).any(0)
        return np.where(known, rates, _finding_rates(labelled.targets[whole]))
    counts = np.bincount(labelled.targets[some], minlength=len(labelled.classes))
    return np.asarray(counts / len(some), dtype=np.float64)


def probe_answers(
    labelled: LabelledImages,
    members: Sequence[Int64[np.ndarray, " _"]],
    inputs: Mapping[str, Float32[np.ndarray, "N _"] | TokenRows],
    grid: ProbeGrid,
) -> Answers:
    """Train a head for every subset, setting, seed and pooling at once; validation chooses.

    For each subset one pooling and setting is taken for all its seeds, by the mean over them, the
    first of equals: poolings in their order, then learning rates, then the smaller decay. A setting
    of which a head diverged is not taken.

    Args:
        labelled: All labelled images.
        members: Numbers of the images of each training subset.
        inputs: Vectors of all labelled images by pooling; or their tokens.
        grid: What is trained.

    Raises:
        TrainingError: With every setting a head diverged, or a chosen one does on `test`.
    """
    trained = {name: grid.train(labelled, members, given) for name, given in inputs.items()}
    validate = labelled.of("validate")
    shape = (len(members), len(grid.settings), len(grid.seeds))
    tables = [
        _figures(trained[name], given[validate], labelled.targets[validate], grid.select_by)
        for name, given in inputs.items()
    ]
    figures = np.concatenate([table.reshape(shape) for table in tables], axis=1)  # S G seeds
    # One choice for all seeds of a subset: else a difference in the last digits between seeds
    # chooses between near-equal decays, and that is all the seeds' spread would show.
    best = np.round(figures.mean(axis=2), DIGITS).argmax(axis=1)
    picked = figures[np.arange(len(members)), best].flatten()
    _refuse_diverged(np.isfinite(picked).all(), grid)
    names, numbers = list(inputs), np.arange(len(tables[0])).reshape(shape)
    test, chosen = labelled.of("test"), []
    for subset, place in enumerate(best.tolist()):
        name, setting = names[place // shape[1]], place % shape[1]
        chosen.append((name, numbers[subset, setting].tolist()))
    runs = [_asked(trained[name], inputs[name][test], some) for name, some in chosen]
    found = np.concatenate(runs)
    _refuse_diverged(np.isfinite(found).all(), grid)
    details: dict[str, JsonValue] = {
        "width": max(given.shape[1] for given in inputs.values()),
        "configurations_tried": int(figures.size),
        "poolings": [name for name, some in chosen for _ in some],
        "validation": np.round(picked, DIGITS).tolist(),
        **_training_facts([(trained[name], some) for name, some in chosen]),
    }
    remark = _late([(trained[name], some) for name, some in chosen]) or _lost(
        np.isneginf(figures), grid.settings * len(names)
    )
    return Answers(found, details, remark)


def _late(chosen: Sequence[tuple[Heads, list[int]]]) -> str:
    """How many of the chosen probes did not converge; empty when all did."""
    probes = [(heads, some) for heads, some in chosen if isinstance(heads, Probes)]
    late = sum(int((~heads.converged[some]).sum()) for heads, some in probes)
    return f"{late} of {sum(len(some) for _, some in probes)} probes not converged" if late else ""


def _lost(diverged: Bool[np.ndarray, "S G seeds"], settings: Sequence[tuple[float, float]]) -> str:
    """How many heads diverged, and at which learning rates; empty when none did."""
    if not diverged.any():
        return ""
    places: list[int] = np.flatnonzero(diverged.any(axis=(0, 2))).tolist()
    rates = ", ".join(f"{rate:g}" for rate in sorted({settings[place][0] for place in places}))
    return (
        f"{int(diverged.sum())} of {diverged.size} heads diverged, none of them chosen "
        f"(learning rate {rates})"
    )


def _training_facts(chosen: Sequence[tuple[Heads, list[int]]]) -> dict[str, JsonValue]:
    """How the chosen heads were trained, run by run."""
    facts: dict[str, JsonValue] = {
        "steps": [int(heads.steps[n]) for heads, some in chosen for n in some],
        "weight_decays": [float(heads.decay[n]) for heads, some in chosen for n in some],
    }
    converged: list[JsonValue] = []
    rates: list[JsonValue] = []
    for heads, some in chosen:
        if isinstance(heads, Probes):
            converged += [bool(heads.converged[n]) for n in some]
        else:
            rates += [float(heads.rate[n]) for n in some]
    return facts | ({"learning_rates": rates} if rates else {"converged": converged})


def _asked(
    heads: Heads, inputs: Float32[np.ndarray, "n F"] | TokenRows, numbers: Sequence[int]
) -> Float[np.ndarray, "K n C"]:
    """Probabilities of some heads, each of which knows how to read its own kind of input."""
    return heads.probabilities(inputs, numbers)  # type: ignore[arg-type]


def _figures(
    heads: Heads,
    inputs: Float32[np.ndarray, "n F"] | TokenRows,
    targets: Int64[np.ndarray, " n"] | Int64[np.ndarray, "n T"],
    select_by: str,
) -> Float64[np.ndarray, " K"]:
    """The figure that chooses, of every head; minus infinity for one that diverged."""
    even = np.ones((1, len(targets)))
    column = 0 if targets.ndim == 2 else scores.METRICS.index(select_by)
    figures = np.full(len(heads.subset), -np.inf)
    # Several at a time, so that inputs are not read once for each; not all, of which many answers
    # about many images would be.
    step = max(1, BLOCK_VALUES // max(1, len(targets)))
    for start in range(0, len(figures), step):
        some = list(range(start, min(start + step, len(figures))))
        for number, found in zip(some, _asked(heads, inputs, some), strict=True):
            if np.isfinite(found).all():
                figures[number] = scores.weighted_figures(found, targets, even)[0, column]
    return figures


def _refuse_diverged(is_finite: bool | np.bool_, grid: ProbeGrid) -> None:
    """Answers must be numbers.

    Raises:
        TrainingError: They are not.
    """
    if not is_finite:
        rates = ", ".join(f"{rate:g}" for rate in grid.rates) or "none"
        raise TrainingError(
            f"heads diverged: no setting gives answers that are numbers (learning rates {rates})",
            fix=f"--set learning_rates=[{min(grid.rates, default=1e-3) / 10:g}]",
        )
