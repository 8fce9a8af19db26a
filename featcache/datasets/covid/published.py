"""The split that MGCA made of a train list, recomputed by its recipe.

The lines of the list in their order go through scikit-learn's `train_test_split(train_size=0.8,
random_state=0)`. It cuts by image, so patients with several images are on both sides.

Source: HKU-MedAI/MGCA, its data set of COVIDx: the recipe alone. The hashes are over file names in
the order of the split, recomputed from the list 9A of COVID-Net. The test list of CXR-3A has the
hash of 9A's: it is the same one.
"""

from collections.abc import Sequence
from typing import NamedTuple

from featcache.datasets.challenge.splits import hash_in_order, sklearn_version
from featcache.datasets.covid.lists import Entry
from featcache.errors import ManifestError

HASHES = {"train": "4ddfcb9549383248", "validate": "e7bdabc0366e408c", "test": "5181d79f849179d2"}
HASHED_VERSION = "9A"


class ImageSplit(NamedTuple):
    """A split by image.

    Attributes:
        split_of: Split by key of an image.
        policy: How it came about.
        note: What it shares between train and validation, in a sentence.
    """

    split_of: dict[str, str]
    policy: str
    note: str


def split_as_mgca(
    entries: Sequence[Entry], version: str, *, is_whole: bool, where: str
) -> ImageSplit:
    """Recompute the split.

    Args:
        entries: Every line of the train and test lists, in their order, files or not.
        version: Version of the lists.
        is_whole: Whether the lists are the published ones, so that the hashes must be met.
        where: The lists, for a message.

    Raises:
        ManifestError: The published lists give another split than published, there is a
            validation list, or the train list is too short to be cut.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - takes a second

    if any(entry.list_name == "val" for entry in entries):
        raise ManifestError(
            f"MGCA's split is made of a train list and a test list, version {version} has a third",
            where=where,
            fix="--set split=ours, which keeps the published validation list",
        )
    listed = [entry for entry in entries if entry.list_name == "train"]
    if len(listed) < 2:
        raise ManifestError(
            "the train list is too short to be split", where=where, fix="use the whole list"
        )
    train, validate = train_test_split(listed, train_size=0.8, random_state=0)
    test = [entry for entry in entries if entry.list_name == "test"]
    parts: dict[str, list[Entry]] = {"train": train, "validate": validate, "test": test}
    hashes = {name: hash_in_order([entry.file for entry in part]) for name, part in parts.items()}
    verdict = "not comparable with the published one"
    if is_whole and version == HASHED_VERSION:
        wrong = [name for name in HASHES if hashes[name] != HASHES[name]]
        if wrong:
            raise ManifestError(
                f"MGCA's split comes out otherwise than published in {', '.join(wrong)}: "
                + ", ".join(f"{hashes[name]} instead of {HASHES[name]}" for name in wrong),
                where=where,
                fix="lists in their published order, or --set split=ours; "
                f"scikit-learn here is {sklearn_version()}",
            )
        verdict = "equal to the published one by its hashes"
    policy = (
        f"MGCA's, by image, recomputed with scikit-learn {sklearn_version()}, {verdict}: "
        + ", ".join(f"{name} {hashes[name]}" for name in parts)
    )
    split_of = {entry.key: name for name, part in parts.items() for entry in part}
    return ImageSplit(split_of, policy, _sharing(train, validate))


def _sharing(train: Sequence[Entry], validate: Sequence[Entry]) -> str:
    """How many patients are on both sides."""
    known = {entry.patient for entry in train}
    shared = [entry for entry in validate if entry.patient in known]
    patients = len({entry.patient for entry in shared})
    return (
        f"The split is MGCA's, by image: {patients:,} patients are in train and validation, with "
        f"{len(shared) / max(len(validate), 1):.1%} of the validation images."
    )
