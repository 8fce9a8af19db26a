"""What each method answers for the test images: class probabilities, made without their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from pydantic import JsonValue

from featcache.heads import scores
from featcache.heads.labels import LabelledImages
from featcache.heads.probe import Probes, train_probes
from featcache.heads.table import DIGITS


@dataclass(frozen=True)
class Answers:
    """Class probabilities of a method's runs.

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


def majority_answers(
    labelled: LabelledImages, members: Sequence[Int64[np.ndarray, " _"]]
) -> Answers:
    """Always the most frequent class of the training subset, the first of equals.

    Args:
        labelled: All labelled images.
        members: Numbers of the images of each training subset.
    """
    num_classes = len(labelled.classes)
    counts = [np.bincount(labelled.targets[some], minlength=num_classes) for some in members]
    hits = np.eye(num_classes)[[int(count.argmax()) for count in counts]]  # R C
    return Answers(np.repeat(hits[:, None], len(labelled.of("test")), axis=1))


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
        table = np.zeros((len(names), len(labelled.classes)))
        np.add.at(table, (source_of[some], labelled.targets[some]), 1.0)
        table[table.sum(axis=1) == 0] = table.sum(axis=0)
        runs.append((table / table.sum(axis=1, keepdims=True))[source_of[test]])
    return Answers(np.stack(runs), remark="knows an image's source, sees no pixel")


def probe_answers(
    labelled: LabelledImages,
    members: Sequence[Int64[np.ndarray, " _"]],
    inputs: Float32[np.ndarray, "N F"],
    *,
    decays: Sequence[float],
    seeds: Sequence[int],
    select_by: str,
    tolerance: float,
    max_steps: int,
) -> Answers:
    """Train a probe for every subset, decay and seed at once; validation chooses the decay.

    Args:
        labelled: All labelled images.
        members: Numbers of the images of each training subset.
        inputs: Vector of each labelled image.
        decays: Weight decays, ascending.
        seeds: Seeds of the first weights.
        select_by: Figure of `scores.METRICS` that chooses for each subset, as the mean over its
            seeds; the smaller decay of equals.
        tolerance: See `train_probes`.
        max_steps: See `train_probes`.
    """
    probes = train_probes(
        inputs,
        labelled.targets,
        members,
        num_classes=len(labelled.classes),
        decays=decays,
        seeds=seeds,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    validate = labelled.of("validate")
    figures = _figures(probes, inputs[validate], labelled.targets[validate], select_by)
    grid = figures.reshape(len(members), len(decays), len(seeds))
    # One decay for all seeds of a subset: else a difference in the last digits between seeds
    # chooses between near-equal decays, and that is all the seeds' spread would show.
    best = np.round(grid.mean(axis=2), DIGITS).argmax(axis=1)
    numbers = np.arange(len(figures)).reshape(grid.shape)
    chosen = numbers[np.arange(len(members)), best].flatten()
    late = int((~probes.converged[chosen]).sum())
    details: dict[str, JsonValue] = {
        "width": inputs.shape[1],
        "configurations_tried": len(figures),
        "converged": probes.converged[chosen].tolist(),
        "steps": probes.steps[chosen].tolist(),
        "weight_decays": probes.decay[chosen].tolist(),
        "validation": np.round(figures[chosen], DIGITS).tolist(),
    }
    remark = f"{late} of {len(chosen)} probes not converged" if late else ""
    return Answers(
        probes.probabilities(inputs[labelled.of("test")], chosen.tolist()), details, remark
    )


def _figures(
    probes: Probes,
    inputs: Float32[np.ndarray, "n F"],
    targets: Int64[np.ndarray, " n"],
    select_by: str,
) -> Float64[np.ndarray, " K"]:
    """The figure that chooses, of every probe."""
    even = np.ones((1, len(targets)))
    column = scores.METRICS.index(select_by)
    figures = [
        scores.weighted_scores(probes.probabilities(inputs, [number])[0], targets, even)[0, column]
        for number in range(len(probes.subset))
    ]
    return np.array(figures)
