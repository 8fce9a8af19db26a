"""How good class probabilities are: accuracy, balanced accuracy, macro AUROC.

Two ways to the same figures: scikit-learn on plain rows for what is reported, and array arithmetic
on many weightings of the rows at once for the bootstrap (a patient drawn twice weighs two). A test
holds them equal. A figure that does not exist is NaN, never 0 or 0.5.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

METRICS = ("accuracy", "balanced_accuracy", "auroc")
TITLES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "macro AUROC"}


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
