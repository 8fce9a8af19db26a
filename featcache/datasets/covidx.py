"""COVIDx: the lists of COVID-Net, and the images that they name.

    train/, test/ (and val/ from CXR-4 on)      images
    train_COVIDx9A.txt, test_COVIDx9A.txt       lists, in the folder or in `labels/`; `train.txt`
                                                with `test.txt` is the version `plain`

A line is `patient file class source`; old lists leave the source out and some patients hold a
blank, so lines are read from their end. The published test list stays the test split; validation
images are taken from the train list, by patient.

Source: lists and documentation of COVID-Net (Wang, Lin, Wong 2020), versions 5 to CXR-4.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from featcache.config import Config, replace_file
from featcache.console import note
from featcache.errors import ManifestError, UsageError, nearest
from featcache.manifest.checks import rows_text
from featcache.manifest.splits import label_fraction, main_class
from featcache.manifest.table import FunnelStep, Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, files_present, is_synthetic

DESCRIPTION = "COVIDx: normal, pneumonia and COVID-19 radiographs of several sources."

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
MISSING_LIST = "missing_files.txt"
NO_SOURCE = "unknown"
NOTE_RSNA = (
    "Patient ids of the rsna images name images, not patients: whether a patient is in more than "
    "one split is unknown for them."
)
NOTE_VALIDATE = (
    "The validation split is ours, by patient: image-level splits of the train list share patients "
    "with it."
)
_LIST_NAME = re.compile(r"(train|val|test)(?:_COVIDx)?[_-]?(.*)\.txt", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*)\((\d+)\)(\.\w+)")


class Options(Config):
    """How to read COVIDx."""

    version: str | None = Field(
        default=None,
        description="Which lists, e.g. 9A or CXR-3A; needed when there are several.",
        coerce_numbers_to_str=True,
    )
    task: Literal["three", "two"] = Field(
        default="three",
        description="`three`: normal, pneumonia, COVID-19; `two`: negative, positive.",
    )
    validate_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of the train list that goes to validation, by patient and class.",
    )
    seed: int = Field(default=0, description="Seed of the split into train and validation.")


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


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Read COVIDx into a manifest.

    Listed files that are not there are dropped, counted by source and named in
    `missing_files.txt` beside the tables.

    Args:
        folder: Where the lists and image folders lie.
        out: The manifest's folder.
        options: How to read it.

    Raises:
        ManifestError: Lists are missing, contradict themselves, are of another task, share
            patients, or none of their files is there.
        UsageError: Several versions are there and none was chosen, or the chosen one is not.
    """
    version, lists = find_lists(folder, options.version)
    entries = [entry for name in lists for entry in _read_list(name, lists[name], options.task)]
    num_lines = len(entries)
    completeness = _compare_with_published(version, entries)
    entries = _merge_lines(entries, lists)
    funnel = [
        FunnelStep(name="lines in the lists", count=num_lines),
        FunnelStep(
            name="images",
            count=len(entries),
            dropped=_some({"identical line": num_lines - len(entries)}),
        ),
    ]
    paths = _find_files(folder, entries)
    missing = [entry for entry, path in zip(entries, paths, strict=True) if path is None]
    entries = [entry for entry, path in zip(entries, paths, strict=True) if path is not None]
    _report_missing(folder, version, missing, len(entries))
    by_source = Counter(f"file missing, source {entry.source}" for entry in missing)
    funnel.append(FunnelStep(name="images with a file", count=len(entries), dropped=by_source))
    splits, split_policy = _split(entries, "val" in lists, options)
    try:
        manifest = write_manifest(
            out,
            _images(entries, splits, [path for path in paths if path is not None]),
            dataset="covidx",
            image_root=folder,
            funnel=funnel,
            notes=_notes(folder, entries, "val" in lists),
            policies={
                "lists": completeness,
                "split": split_policy,
                "task": f"{options.task} classes",
            },
            synthetic=is_synthetic(folder),
        )
    except ManifestError as error:
        where = " and ".join(str(path) for path in lists.values())
        raise ManifestError(error.what, where=where, fix=error.fix) from None
    (out / MISSING_LIST).unlink(missing_ok=True)
    if missing:
        names = "".join(f"{key}\n" for key in sorted(entry.key for entry in missing))
        replace_file(out / MISSING_LIST, names.encode())
    return manifest


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


def _read_list(name: str, path: Path, task: str) -> list[Entry]:
    """Read one list.

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


def _compare_with_published(version: str, entries: Sequence[Entry]) -> str:
    """Say whether the lists are as long as those that were published."""
    counts = dict(Counter(entry.list_name for entry in entries))
    have = " + ".join(f"{count:,}" for count in counts.values())
    published = PUBLISHED.get(version)
    if counts == published:
        return f"version {version}, {have} lines as published"
    if published is None:
        verdict = f"version {version} of unknown length, {have} lines"
    else:
        want = " + ".join(f"{count:,}" for count in published.values())
        verdict = f"version {version}, {have} lines of the published {want}"
    note(f"covidx: {verdict}")
    return verdict


def _merge_lines(entries: Sequence[Entry], lists: Mapping[str, Path]) -> list[Entry]:
    """Each image once.

    Raises:
        ManifestError: Two lines of one file contradict each other.
    """
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.key, entry)
        if other[2:] != entry[2:]:
            raise ManifestError(
                f"lines {other.line} and {entry.line} name the same file and contradict each other",
                where=lists[entry.list_name],
            )
    return list(first.values())


def _find_files(folder: Path, entries: Sequence[Entry]) -> list[str | None]:
    """Path of each image below the folder; None when it is not there.

    Some copies spell `COVID(1).png` as `COVID-1.png`; both are looked for.
    """
    other_names = [_NUMBERED.sub(r"\1-\2\3", entry.key) for entry in entries]
    listed = files_present(folder, [entry.key for entry in entries])
    renamed = files_present(folder, other_names)
    count = int((renamed & ~listed).sum())
    if count:
        note(f"covidx: {count:,} files have the form NAME-1.png instead of NAME(1).png")
    return [
        entry.key if as_listed else other if as_renamed else None
        for entry, other, as_listed, as_renamed in zip(
            entries, other_names, listed, renamed, strict=True
        )
    ]


def _report_missing(folder: Path, version: str, missing: Sequence[Entry], left: int) -> None:
    """Say that files are missing, and what is known about it.

    Raises:
        ManifestError: All of them are.
    """
    if missing and not left:
        raise ManifestError(
            f"none of the {len(missing):,} listed files is there",
            where=folder,
            fix="the images belong into train/ and test/ of this folder",
        )
    if missing:
        note(f"covidx: {len(missing):,} listed files are missing; named in {MISSING_LIST}")
    if version == "9A" and any(entry.source == "stonybrook" for entry in missing):
        note(
            "covidx: 496 Stony Brook files that 9A names were withdrawn later; "
            "CXR-3A is that list without them"
        )


def _split(entries: Sequence[Entry], has_validate: bool, options: Options) -> tuple[list[str], str]:
    """Split of each image, and how it came about."""
    splits = [SPLIT_OF_LIST[entry.list_name] for entry in entries]
    if has_validate:
        return splits, "as published"
    train = [entry for entry in entries if entry.list_name == "train"]
    drawn = label_fraction(
        [entry.key for entry in train],
        [entry.patient for entry in train],
        [entry.finding for entry in train],
        fraction=options.validate_fraction,
        seed=options.seed,
    )
    held_out = set(drawn)
    splits = [
        "validate" if entry.key in held_out else split
        for entry, split in zip(entries, splits, strict=True)
    ]
    return splits, (
        f"test as published; {options.validate_fraction:g} of the train list to validation, by "
        f"patient and class, seed {options.seed}"
    )


def _images(entries: Sequence[Entry], splits: Sequence[str], paths: Sequence[str]) -> pa.Table:
    """The image table."""
    nothing = pa.nulls(len(entries), pa.string())
    columns = {
        "key": [entry.key for entry in entries],
        "subject_id": [entry.patient for entry in entries],
        "split": splits,
        "source": [entry.source for entry in entries],
        "image_path": paths,
        "label:class": [entry.finding for entry in entries],
    }
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return pa.table({**table, "study_id": nothing, "view_position": nothing})


def _notes(folder: Path, entries: Sequence[Entry], has_validate: bool) -> list[str]:
    """What every table of results has to say."""
    notes = [SYNTHETIC_NOTE] if is_synthetic(folder) else []
    notes += _source_note(entries)
    if any(entry.source == "rsna" for entry in entries):
        notes.append(NOTE_RSNA)
    return notes if has_validate else [*notes, NOTE_VALIDATE]


def _source_note(entries: Iterable[Entry]) -> list[str]:
    """How well the source alone tells the class in the test list.

    For each source the commonest class of its train images is guessed, for a source without any
    the commonest of all.
    """
    by_source: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    tests = []
    for entry in entries:
        if entry.list_name == "test":
            tests.append(entry)
        elif entry.list_name == "train":
            by_source[entry.source][entry.finding] += 1
            overall[entry.finding] += 1
    if not tests or not overall:
        return []
    guesses = [main_class(by_source.get(entry.source, overall)) for entry in tests]
    pairs = [(guess, entry.finding) for guess, entry in zip(guesses, tests, strict=True)]
    covid = {"COVID-19", "positive"}
    right = sum(guess == finding for guess, finding in pairs) / len(pairs)
    apart = sum((guess in covid) == (finding in covid) for guess, finding in pairs) / len(pairs)
    return [
        "The source predicts the class: guessed from the source alone, "
        f"{right:.1%} of the test images get the right class, and {apart:.1%} are told apart into "
        "COVID-19 and the rest."
    ]


def _some(dropped: Mapping[str, int]) -> dict[str, int]:
    """Reasons that occurred."""
    return {reason: number for reason, number in dropped.items() if number}
