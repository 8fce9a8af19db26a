"""The published splits of RSNA's images, recomputed by their recipes and compared by hash.

All of them cut the sorted ids twice, by image. On the complete set they give the lists that were
published, which the hashes below prove; on any other set they only follow the same recipe.

Source: recipes of MGCA (Wang et al. 2022; classification and detection) and BenchX (Zhou et al.
2024). The shares of patients were found by matching the images with NIH ChestX-ray14.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from featcache.console import note
from featcache.datasets.challenge.splits import cut_twice, hash_in_order, sklearn_version
from featcache.errors import ManifestError

# `hash_in_order` of the 26,684 ids of stage_2_train_labels.csv, sorted. It and the hashes of the
# lists are recomputed from the table itself by tests/datasets/test_published_tables.py.
ALL_IDS = "ed6232e8db81ba14"
NUM_IDS = 26_684


class Recipe(NamedTuple):
    """How a published split is made.

    Attributes:
        held_out: Images that are not for training: a share, or a number of the complete set.
        seed: Of both cuts.
        by_class: Whether positives are shared out evenly.
        halves: What the two halves of the rest are.
        hashes: Of the complete set's lists for train, validate and test, in their order.
        shared: Share of the complete set's test images whose patient is in train.
    """

    held_out: int | float
    seed: int
    by_class: bool
    halves: tuple[str, str]
    hashes: Mapping[str, str]
    shared: str


RECIPES = {
    "mgca-cls": Recipe(
        0.15 * 2,
        0,
        False,
        ("test", "validate"),
        {
            "train": "09d865a230b3e4de",
            "validate": "c8870a96a424f764",
            "test": "999d4155e7b7e0b4",
        },
        "68.4 %",
    ),
    "mgca-seg": Recipe(
        5_337 * 2,
        0,
        False,
        ("test", "validate"),
        {
            "train": "c7e99d633d48c377",
            "validate": "003795670e3a96ba",
            "test": "528f7bf41c480b1d",
        },
        "66.9 %",
    ),
    "benchx": Recipe(
        0.3,
        42,
        True,
        ("validate", "test"),
        {
            "train": "887236661d0044be",
            "validate": "f21237e5f2546b33",
            "test": "48394d681ab052ec",
        },
        "67.8 %",
    ),
}


def is_complete(keys: Sequence[str]) -> bool:
    """Whether sorted ids are those of the complete set."""
    return len(keys) == NUM_IDS and hash_in_order(keys) == ALL_IDS


def recompute(
    name: str, keys: Sequence[str], targets: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Make a published split again.

    Args:
        name: A key of `RECIPES`.
        keys: Ids of all labelled images, sorted.
        targets: Label of each.

    Returns:
        Split by id, and a sentence on how it came about.

    Raises:
        ManifestError: The set is complete, and yet another split came out.
    """
    recipe = RECIPES[name]
    held_out = recipe.held_out
    if isinstance(held_out, int) and len(keys) != NUM_IDS:
        held_out = held_out / NUM_IDS
    classes = targets if recipe.by_class else None
    train, first, second = cut_twice(keys, size=held_out, seed=recipe.seed, classes=classes)
    lists = {"train": train, recipe.halves[0]: first, recipe.halves[1]: second}
    splits = {key: split for split, members in lists.items() for key in members}
    how = f"{name}, recomputed over sorted ids with scikit-learn {sklearn_version()}"
    if not is_complete(keys):
        note(
            f"rsna: {name} was recomputed for other images than the {NUM_IDS:,} published ones: "
            "the recipe is the same, the lists are not"
        )
        return splits, f"{how}; not the published lists, for other images"
    wrong = [split for split, members in lists.items() if hash_in_order(members) !=
             recipe.hashes[split]]  # fmt: skip
    if wrong:
        raise ManifestError(
            f"the split {name} came out otherwise than published ({', '.join(wrong)})",
            where=f"scikit-learn {sklearn_version()}",
            fix="use scikit-learn 1.9, with which it was checked, or --set split=ours",
        )
    return splits, f"{how}; the published lists, by their hashes"


def known_sharing(name: str, splits: Mapping[str, str]) -> list[str]:
    """What is known of the patients of a published split where no mapping is at hand.

    Args:
        name: A key of `RECIPES`.
        splits: What `recompute` gave.
    """
    if not is_complete(sorted(splits)):
        return [f"The split {name} is by image, so that patients have to be assumed in both parts."]
    return [
        f"The split {name} is by image: matched by their pixels with NIH ChestX-ray14, "
        f"{RECIPES[name].shared} of its test images show a patient who is also in train."
    ]
