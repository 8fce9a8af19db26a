"""Which patients belong to which split or label fraction, decided by a hash of their id.

A patient's place depends on the seed and the patient's id alone: never on the order of rows, on
the machine, or on a generator that other code advances too.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from featcache.errors import UsageError

SPLIT_NAMES = ("train", "validate", "test")


def list_hash(ids: Sequence[str]) -> str:
    """The name of a set of ids: equal lists, in whatever order, have equal hashes.

    Args:
        ids: Keys, file names or patients; repeats count.

    Returns:
        The first 16 hex digits of SHA-256 over the sorted ids, each followed by a newline.
    """
    lines = "".join(f"{one}\n" for one in sorted(ids))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def split_by_subject(
    subject_ids: Sequence[str],
    *,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int,
) -> list[str]:
    """Put every patient, with all of their images, into one split.

    A patient's hash is a number in [0, 1), and the fractions cut that interval. So a patient stays
    where they are when others are added, and the shares are met on average, not exactly. A split
    that came out empty gets the patient whose hash lies nearest to it, as long as another split
    can spare one; with fewer patients than splits some stay empty.

    Args:
        subject_ids: Patient of each image.
        fractions: Shares of patients for train, validate and test; they sum to 1. A share of 0
            leaves that split empty.
        seed: Another seed gives an independent split.

    Returns:
        `train`, `validate` or `test` for each image, in the order given.

    Raises:
        UsageError: The fractions are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(
            f"split fractions must not be negative and sum to 1, got {fractions}",
            where="fractions (train, validate, test)",
            fix="for example 0.7, 0.1, 0.2",
        )
    subjects = sorted(set(subject_ids))
    position = _positions("split", subjects, seed)
    edges = np.concatenate([[0.0], np.cumsum(fractions)])
    edges /= edges[-1]  # a last share of 0 then ends exactly where the one before it does
    split = np.searchsorted(edges[1:-1], position, side="right")
    _fill_empty_splits(split, position, edges)
    names = dict(zip(subjects, split.tolist(), strict=True))
    return [SPLIT_NAMES[names[subject]] for subject in subject_ids]


def _positions(purpose: str, subjects: Sequence[str], seed: int) -> Float64[np.ndarray, " S"]:
    """A number in [0, 1) for each patient; independent between purposes and between seeds."""
    digests = (hashlib.sha256(f"{purpose}\n{seed}\n{one}".encode()).digest() for one in subjects)
    numbers = [int.from_bytes(digest[:8], "big") for digest in digests]
    # The upper 53 bits: what a float64 holds exactly, so the largest is still below 1.
    return np.array([number >> 11 for number in numbers], dtype=np.float64) / 2.0**53


def _fill_empty_splits(
    split: Int64[np.ndarray, " S"],
    position: Float64[np.ndarray, " S"],
    edges: Float64[np.ndarray, " 4"],
) -> None:
    """Move the nearest patient into each split that should hold some and holds none, in place."""
    for number in range(3):
        low, high = edges[number], edges[number + 1]
        if high <= low or bool((split == number).any()):
            continue
        spare = np.bincount(split, minlength=3)[split] > 1
        if not spare.any():
            return
        distance = np.where(position < low, low - position, position - high)
        split[np.argmin(np.where(spare, distance, np.inf))] = number


def label_fraction(
    keys: Sequence[str],
    subject_ids: Sequence[str],
    labels: Sequence[str],
    *,
    fraction: float,
    seed: int,
) -> list[str]:
    """Choose a share of the labelled images: by class, whole patients, nested.

    A patient belongs to the class most of their images have. Within each class patients stand in
    the order of their hash, and the shortest prefix whose number of images comes closest to the
    share is taken. The first patient who has a class at all is always in, so no class is missing
    and a class may be over-represented in tiny subsets. A smaller fraction of the same seed is a
    subset of a larger one.

    Args:
        keys: Key of each image, unique.
        subject_ids: Patient of each image.
        labels: Class of each image.
        fraction: Share of the images, in (0, 1].
        seed: Another seed gives an independent subset.

    Returns:
        Keys of the chosen images, sorted. Patients are taken whole, so the share is met up to one
        patient a class.

    Raises:
        UsageError: The fraction is outside (0, 1], or the lists differ in length.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"a label fraction lies in (0, 1], got {fraction}", where="fraction")
    if not len(keys) == len(subject_ids) == len(labels):
        raise UsageError(
            f"{len(keys)} keys, {len(subject_ids)} patients and {len(labels)} labels do not match",
            where="label_fraction",
        )
    if fraction == 1:
        return sorted(keys)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for subject, label in zip(subject_ids, labels, strict=True):
        counts[subject][label] += 1
    chosen = _choose_patients(counts, fraction, seed)
    return sorted(key for key, subject in zip(keys, subject_ids, strict=True) if subject in chosen)


def label_shots(
    keys: Sequence[str], subject_ids: Sequence[str], labels: Sequence[str], *, shots: int, seed: int
) -> list[str]:
    """Choose a few labelled images of each class, from as many patients as possible.

    Within each class patients stand in the order of their hash. The first image by key of each is
    taken, then the second of each, until there are enough; a class with fewer images gives all.
    Fewer shots of the same seed are a subset of more.

    Args:
        keys: Key of each image, unique.
        subject_ids: Patient of each image.
        labels: Class of each image.
        shots: Images of each class.
        seed: Another seed gives an independent choice.

    Returns:
        Keys of the chosen images, sorted.

    Raises:
        UsageError: `shots` is below 1.
    """
    if shots < 1:
        raise UsageError(f"at least one image of each class is needed, got {shots}", where="shots")
    subjects = sorted(set(subject_ids))
    place = dict(zip(subjects, _positions("fraction", subjects, seed).tolist(), strict=True))
    ranked: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    taken: Counter[tuple[str, str]] = Counter()
    for key, subject, label in sorted(zip(keys, subject_ids, labels, strict=True)):
        ranked[label].append((taken[label, subject], place[subject], key))
        taken[label, subject] += 1
    return sorted(key for rows in ranked.values() for _, _, key in sorted(rows)[:shots])


def main_class(counts: Mapping[str, int]) -> str:
    """The class most of a patient's images have; the first by name among equals.

    Args:
        counts: Number of the patient's images by class, not empty.
    """
    return min(counts, key=lambda name: (-counts[name], name))


def _choose_patients(
    counts: Mapping[str, Mapping[str, int]], fraction: float, seed: int
) -> set[str]:
    """Patients of a subset: a prefix of each class's order, and one who has each class."""
    subjects = sorted(counts)
    order = np.argsort(_positions("fraction", subjects, seed), kind="stable")
    strata: dict[str, list[str]] = defaultdict(list)
    chosen: set[str] = set()
    seen: set[str] = set()
    for index in order.tolist():
        subject = subjects[index]
        if not seen.issuperset(counts[subject]):
            seen.update(counts[subject])
            chosen.add(subject)
        strata[main_class(counts[subject])].append(subject)
    for members in strata.values():
        sizes = np.cumsum([sum(counts[subject].values()) for subject in members])
        # argmin takes the shortest of equally close prefixes; a larger share never shortens it.
        length = int(np.argmin(np.abs(sizes - fraction * sizes[-1]))) + 1
        chosen.update(members[:length])
    return chosen
