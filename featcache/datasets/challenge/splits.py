"""Splits of the challenges: ours by patient and class, published ones by their recipes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from featcache.console import note
from featcache.errors import ManifestError
from featcache.manifest.splits import SPLIT_NAMES, label_fraction


def hash_in_order(ids: Sequence[str]) -> str:
    """The first 16 hex digits of SHA-256 over ids, each followed by a newline, in their order."""
    return hashlib.sha256("".join(f"{one}\n" for one in ids).encode()).hexdigest()[:16]


def split_by_patient_and_class(
    keys: Sequence[str],
    subject_ids: Sequence[str],
    classes: Sequence[str],
    *,
    validate: float,
    test: float,
    seed: int,
) -> dict[str, str]:
    """Our own split: whole patients, each class in its share, decided by a hash of the patient.

    Args:
        keys: Key of each image, unique.
        subject_ids: Patient of each image.
        classes: Class of each image.
        validate: Share of the images for validation, above 0.
        test: Share of the images for test, above 0; with `validate` below 1.
        seed: Another seed gives an independent split.

    Returns:
        Split by key.
    """

    def chosen(fraction: float) -> set[str]:
        return set(label_fraction(keys, subject_ids, classes, fraction=fraction, seed=seed))

    # A smaller share of the same seed lies inside of a larger one.
    in_test, held_out = chosen(test), chosen(test + validate)
    return {
        key: "test" if key in in_test else "validate" if key in held_out else "train"
        for key in keys
    }


def cut_twice(
    ids: Sequence[str], *, size: int | float, seed: int, classes: Mapping[str, str] | None = None
) -> tuple[list[str], list[str], list[str]]:
    """What scikit-learn's `train_test_split` gives when it is used twice with one seed.

    Args:
        ids: In the order that the recipe asks for.
        size: Ids cut off for the two smaller lists, as a number or a share.
        seed: Of both cuts.
        classes: Class of each id, to cut by class; None for a plain shuffle.

    Returns:
        The large list, and the first and second half of the rest, each in the order of the split.

    Raises:
        ManifestError: There are too few ids, or too few of a class, to be cut twice.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - takes a second

    def cut(part: Sequence[str], share: int | float) -> tuple[list[str], list[str]]:
        strata = [classes[one] for one in part] if classes is not None else None
        first, second = train_test_split(
            list(part), test_size=share, random_state=seed, stratify=strata
        )
        return first, second

    try:
        large, rest = cut(ids, size)
        return large, *cut(rest, 0.5)
    except ValueError:
        raise ManifestError(
            f"a published split cannot be made of so few: {len(ids):,}",
            where="its recipe, which cuts the list twice",
            fix="--set split=ours",
        ) from None


def sklearn_version() -> str:
    """Version of scikit-learn, on which a recomputed split may depend."""
    import sklearn  # noqa: PLC0415

    return str(sklearn.__version__)


def report_masks(
    dataset: str, splits: Sequence[str | None], is_positive: Sequence[bool], what: str
) -> None:
    """Tell how many images of each split show something, and what an all-empty answer would get.

    Args:
        dataset: Name of the reader.
        splits: Split of each image.
        is_positive: Whether its mask is not empty.
        what: What it shows.
    """
    total: Counter[str | None] = Counter(splits)
    positive = Counter(split for split, is_one in zip(splits, is_positive, strict=True) if is_one)
    for name in SPLIT_NAMES:
        if total[name]:
            share = positive[name] / total[name]
            note(
                f"{dataset}: {name} has {what} in {positive[name]:,} of {total[name]:,} images "
                f"({share:.1%}); no mask at all gets a mean Dice of {1 - share:.1%}"
            )
