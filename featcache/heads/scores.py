"""How good class probabilities are: accuracy, balanced accuracy, macro AUROC; AUROC of findings.

Two ways to the same figures: scikit-learn on plain rows for what is reported, and array arithmetic
on many weightings of the rows at once for the bootstrap (a patient drawn twice weighs two). A test
holds them equal. A figure that does not exist is NaN, never 0 or 0.5.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

METRICS = ("accuracy", "balanced_accuracy", "auroc")
TITLES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "macro AUROC"}
OF_FINDING = "auroc of "
"""Begins the name of a single finding's figure."""


def metric_names(classes: Sequence[str], *, of_findings: bool) -> tuple[str, ...]:
    """Names of the figures, in the order of the columns of `weighted_figures`.

    Args:
        classes: Or findings.
        of_findings: Whether an image may have several: then there is the macro AUROC, and the
            AUROC of each, since accuracy means little where most findings are rare.
    """
    return ("auroc", *(OF_FINDING + name for name in classes)) if of_findings else METRICS


def defined_findings(targets: Int64[np.ndarray, "N T"]) -> Bool[np.ndarray, " T"]:
    """Findings whose AUROC exists: some rows are known to have them, and some to lack them."""
    return (targets == 1).any(axis=0) & (targets == 0).any(axis=0)  # type: ignore[no-any-return]


def defined_classes(targets: Int64[np.ndarray, " N"], num_classes: int) -> Bool[np.ndarray, " C"]:
    """Classes whose AUROC exists: some rows belong to them and some do not."""
    counts = np.bincount(targets, minlength=num_classes)
    return (counts > 0) & (counts < len(targets))


def class_auroc(
    probabilities: Float[np.ndarray, "N C"], targets: Int64[np.ndarray, " N"]
) -> Float64[np.ndarray, " C"]:
    """Area under the ROC curve of each class against the rest; NaN where it does not exist."""
    areas = np.full(probabilities.shape[1], np.nan)
    for number in np.flatnonzero(defined_classes(targets, probabilities.shape[1])):
        areas[number] = roc_auc_score(targets == number, probabilities[:, number])
    return areas


def figures(
    probabilities: Float[np.ndarray, "N C"],
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N C"],
) -> Float64[np.ndarray, " M"]:
    """All figures of one set of predictions, by scikit-learn, in the order of `metric_names`.

    Of findings, each counts the rows where it is known; the macro AUROC is the mean over those that
    exist.

    Args:
        probabilities: Each row is one image.
        targets: Class numbers; or for each finding 1, 0, or -1 = unknown.
    """
    if targets.ndim == 1:
        return np.array([score(probabilities, targets)[name] for name in METRICS])
    areas = np.full(targets.shape[1], np.nan)
    for number in np.flatnonzero(defined_findings(targets)):
        known = targets[:, number] >= 0
        areas[number] = roc_auc_score(targets[known, number], probabilities[known, number])
    macro = np.nan if np.isnan(areas).all() else np.nanmean(areas)
    return np.concatenate([[macro], areas])


def score(
    probabilities: Float[np.ndarray, "N C"], targets: Int64[np.ndarray, " N"]
) -> dict[str, float]:
    """The figures of `METRICS` for one set of predictions.

    Balanced accuracy is the mean recall over the classes that occur, macro AUROC the mean over the
    classes that some rows have and others lack.

    Args:
        probabilities: Each row is one image; its largest is the prediction, the first of equals.
        targets: True class numbers.
    """
    predicted = probabilities.argmax(axis=1)
    present = np.unique(targets)
    areas = class_auroc(probabilities, targets)
    recalls = recall_score(targets, predicted, labels=present, average="macro")
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "balanced_accuracy": float(recalls),
        "auroc": float("nan") if np.isnan(areas).all() else float(np.nanmean(areas)),
    }


def _weighted_auroc(
    scores: Float[np.ndarray, " N"],
    positive: Bool[np.ndarray, " N"],
    weights: Float64[np.ndarray, "W N"],
) -> Float64[np.ndarray, " W"]:
    """Share of (positive, negative) pairs in the right order, ties half, under each weighting."""
    order = np.argsort(scores, kind="stable")
    ranked, hits = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # first row of each tied group
    sorted_weights = weights[:, order]
    above = np.add.reduceat(sorted_weights * hits, starts, axis=1)  # W groups
    below = np.add.reduceat(sorted_weights * ~hits, starts, axis=1)
    passed = np.cumsum(below, axis=1) - 0.5 * below
    pairs = above.sum(axis=1) * below.sum(axis=1)
    wins = (above * passed).sum(axis=1)
    area = np.full(len(weights), np.nan)
    np.divide(wins, pairs, out=area, where=pairs > 0)
    return area


def weighted_figures(
    probabilities: Float[np.ndarray, "N C"],
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N C"],
    weights: Float64[np.ndarray, "W N"],
) -> Float64[np.ndarray, "W M"]:
    """All figures under many weightings of the rows, in the order of `metric_names`.

    The findings that count are those of the unweighted rows; a weighting that leaves one of them
    without a positive or a negative gives NaN for it and for the macro AUROC.

    Args:
        probabilities: Each row is one image.
        targets: Class numbers; or for each finding 1, 0, or -1 = unknown.
        weights: How often each row counts, >= 0.
    """
    if targets.ndim == 1:
        return weighted_scores(probabilities, targets, weights)
    areas = np.full((len(weights), targets.shape[1]), np.nan)
    defined = defined_findings(targets)
    for number in np.flatnonzero(defined):
        known = targets[:, number] >= 0
        areas[:, number] = _weighted_auroc(
            probabilities[known, number], targets[known, number] == 1, weights[:, known]
        )
    macro = areas[:, defined].mean(axis=1) if defined.any() else np.full(len(weights), np.nan)
    return np.concatenate([macro[:, None], areas], axis=1)


def weighted_scores(
    probabilities: Float[np.ndarray, "N C"],
    targets: Int64[np.ndarray, " N"],
    weights: Float64[np.ndarray, "W N"],
) -> Float64[np.ndarray, "W 3"]:
    """The figures of `METRICS` under many weightings of the rows.

    The classes that count are those of the unweighted rows; a weighting that leaves one of them
    without a positive or a negative gives NaN, so that all weightings average the same classes.

    Args:
        probabilities: Each row is one image.
        targets: True class numbers.
        weights: How often each row counts, >= 0.
    """
    num_classes = probabilities.shape[1]
    right = probabilities.argmax(axis=1) == targets
    accuracy = weights @ right / weights.sum(axis=1)
    members = np.eye(num_classes)[targets][:, np.unique(targets)]  # N present
    sizes = weights @ members
    hits = weights @ (members * right[:, None])
    recall = np.divide(hits, sizes, out=np.full(sizes.shape, np.nan), where=sizes > 0)
    areas = [
        _weighted_auroc(probabilities[:, number], targets == number, weights)
        for number in np.flatnonzero(defined_classes(targets, num_classes))
    ]
    auroc = np.mean(areas, axis=0) if areas else np.full(len(weights), np.nan)
    return np.stack([accuracy, recall.mean(axis=1), auroc], axis=1)
