"""The lists of COVID-Net: which versions there are, and what a line says.

Source: lists and documentation of COVID-Net (Wang, Lin, Wong 2020), versions 5 to CXR-4.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from featcache.console import note
from featcache.errors import ManifestError, UsageError, nearest
from featcache.manifest.checks import rows_text

CLASSES: dict[str, tuple[str, ...]] = {
    "three": ("normal", "pneumonia", "COVID-19"),
    "two": ("negative", "positive"),
}
SPLIT_OF_LIST = {"train": "train", "val": "validate", "test": "test"}
# Lines of each list, to tell a complete version from a part of it.
PUBLISHED: dict[str, dict[str, int]] = {
    "5": {"train": 13_958, "test": 300},
    "8A": {"train": 15_599, "test": 400},
    "8B": {"train": 15_952, "test": 400},
    "9A": {"train": 30_130, "test": 400},
    "9B": {"train": 30_482, "test": 400},
    "CXR-3A": {"train": 29_634, "test": 400},
    "CXR-3B": {"train": 29_986, "test": 400},
    "CXR-4": {"train": 67_863, "val": 8_473, "test": 8_482},
}
# Images of each class in the train list.
PUBLISHED_CLASSES: dict[str, dict[str, int]] = {
    "5": {"normal": 7_966, "pneumonia": 5_475, "COVID-19": 517},
    "8A": {"normal": 7_966, "pneumonia": 5_475, "COVID-19": 2_158},
    "8B": {"negative": 13_794, "positive": 2_158},
    "9A": {"normal": 8_085, "pneumonia": 5_555, "COVID-19": 16_490},
    "9B": {"negative": 13_992, "positive": 16_490},
    "CXR-3A": {"normal": 8_085, "pneumonia": 5_555, "COVID-19": 15_994},
}
NO_SOURCE = "unknown"
_LIST_NAME = re.compile(r"(train|val|test)(?:_COVIDx)?[_-]?(.*)\.txt", re.IGNORECASE)


class Entry(NamedTuple):
    """One line of a list."""

    list_name: str
    line: int
    patient: str
    file: str
    finding: str
    source: str

    @property
    def key(self) -> str:
        """Identity of the image: folder and file name, as the list spells it."""
        return f"{self.list_name}/{self.file}"


def find_lists(folder: Path, version: str | None) -> tuple[str, dict[str, Path]]:
    """Find the lists of one version, in a folder or its `labels/`.

    Args:
        folder: The data set's folder; of two lists of one name, the one that lies here is taken.
        version: As the file names spell it, `CXR-` and case left open; None for the only one.

    Returns:
        The version, `plain` for `train.txt`; and the path of each list: train, test, perhaps val.

    Raises:
        ManifestError: There is no train list with a test list of its version.
        UsageError: The version is not there, or one has to be chosen.
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for place in (folder / "labels", folder):
        for path in sorted(place.glob("*.txt")):
            if match := _LIST_NAME.fullmatch(path.name):
                found[match[2].upper() or "plain"][match[1].lower()] = path
    complete = {name: lists for name, lists in found.items() if {"train", "test"} <= set(lists)}
    if not complete:
        raise ManifestError(
            "no train list with a test list of the same version",
            where=f"{folder} and {folder / 'labels'}",
            fix="put e.g. train_COVIDx9A.txt and test_COVIDx9A.txt of COVID-Net there",
        )
    chosen = sorted(complete)
    if version is not None:
        spellings = (version.casefold(), f"cxr-{version}".casefold())
        chosen = [name for name in chosen if name.casefold() in spellings]
    if len(chosen) != 1:
        known = sorted(complete)
        raise UsageError(
            f"there are lists of {len(known)} versions: {', '.join(known)}"
            if version is None
            else f"there are no lists of version `{version}`; {nearest(version, known)}",
            where=folder,
            fix=f"--set version={known[0]}",
        )
    lists = complete[chosen[0]]
    return chosen[0], {name: lists[name] for name in SPLIT_OF_LIST if name in lists}


def parse_line(text: str) -> tuple[str, str, str, str] | None:
    """Read one line of a list from its end.

    Args:
        text: `patient file class`, or with the source behind; the patient may hold blanks.

    Returns:
        Patient, file, class and source (`unknown` where the line has none); None when it is no
        such line.
    """
    fields = text.split()
    known = {name for names in CLASSES.values() for name in names}
    source = fields.pop().lower() if fields and fields[-1] not in known else NO_SOURCE
    if len(fields) < 3 or fields[-1] not in known:
        return None
    *patient, file, finding = fields
    return " ".join(patient), file, finding, {"rnsa": "rsna"}.get(source, source)


def read_list(name: str, path: Path, task: str) -> list[Entry]:
    """Read one list.

    Args:
        name: `train`, `val` or `test`.
        path: The list.
        task: A key of `CLASSES`.

    Raises:
        ManifestError: A line cannot be read, or names a class of the other task.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ManifestError("the list is no UTF-8 text", where=path) from None
    entries, unread = [], []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        fields = parse_line(text)
        if fields is None:
            unread.append(number)
        else:
            entries.append(Entry(name, number, *fields))
    if unread:
        raise ManifestError(
            f"{len(unread):,} lines are not `patient file class source`, with one of the classes "
            f"{', '.join(n for names in CLASSES.values() for n in names)}: {rows_text(unread)}",
            where=path,
        )
    classes = {entry.finding for entry in entries}
    if not classes <= set(CLASSES[task]):
        other = "two" if task == "three" else "three"
        raise ManifestError(
            f"the task has the classes {', '.join(CLASSES[task])}, the list has "
            f"{', '.join(sorted(classes))}",
            where=path,
            fix=f"--set task={other}, or lists of another version",
        )
    return entries


def compare_with_published(version: str, entries: Sequence[Entry]) -> str:
    """Say whether the lists are as long as those that were published, with as many of each class.

    Args:
        version: As the file names spell it.
        entries: Lines of all lists.
    """
    counts = dict(Counter(entry.list_name for entry in entries))
    have = " + ".join(f"{count:,}" for count in counts.values())
    published = PUBLISHED.get(version)
    classes = dict(Counter(entry.finding for entry in entries if entry.list_name == "train"))
    if counts == published and classes == PUBLISHED_CLASSES.get(version, classes):
        return f"version {version}, {have} lines as published"
    if counts == published:
        verdict = f"version {version}, {have} lines as published, but other numbers of each class"
        note(f"covidx: {verdict}")
        return verdict
    if published is None:
        verdict = f"version {version} of unknown length, {have} lines"
    else:
        want = " + ".join(f"{count:,}" for count in published.values())
        verdict = f"version {version}, {have} lines of the published {want}"
    note(f"covidx: {verdict}")
    return verdict
