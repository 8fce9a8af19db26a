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
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pydantic import Field

from featcache.config import Config, replace_file
from featcache.console import note
from featcache.datasets.covid.lists import (
    CLASSES,
    PUBLISHED,
    PUBLISHED_CLASSES,
    SPLIT_OF_LIST,
    Entry,
    compare_with_published,
    find_lists,
    parse_line,
    read_list,
)
from featcache.datasets.covid.published import split_as_mgca
from featcache.errors import ManifestError
from featcache.manifest.splits import label_fraction, main_class
from featcache.manifest.table import FunnelStep, Manifest, write_manifest
from featcache.manifest.tree import (
    MISSING_FILE,
    SYNTHETIC_NOTE,
    ZERO_BYTES,
    file_sizes,
    is_synthetic,
)

__all__ = [
    "CLASSES",
    "DESCRIPTION",
    "PUBLISHED",
    "PUBLISHED_CLASSES",
    "Options",
    "find_lists",
    "parse_line",
    "read",
]

DESCRIPTION = "COVIDx: normal, pneumonia and COVID-19 radiographs of several sources."

MISSING_LIST = "missing_files.txt"
NOTE_RSNA = (
    "Patient ids of the rsna images name images, not patients: whether a patient is in more than "
    "one split is unknown for them."
)
NOTE_VALIDATE = (
    "The validation split is ours, by patient: image-level splits of the train list share patients "
    "with it."
)
NOTE_LEAK = (
    "Of the 200 rsna images of the published test list 129 belong to a patient of NIH ChestX-ray14 "
    "who is also in the train list; by the ids of the list nobody is."
)
NOTE_RSNA_TEST = (
    "The rsna images are from the RSNA challenge: 2,066 images of its MGCA test split are in the "
    "train list, so never train on one and test on the other."
)
# Files that were listed and withdrawn later, and those of them with ABDOMEN in their name.
WITHDRAWN = {"9A": (496, 430)}
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
    split: Literal["ours", "mgca"] = Field(
        default="ours",
        description="`ours`: validation by patient and class; `mgca`: MGCA's split by image, "
        "recomputed; each image then counts as a patient.",
    )
    validate_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of the train list that goes to validation, by patient and class.",
    )
    seed: int = Field(default=0, description="Seed of the split into train and validation.")


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Read COVIDx into a manifest.

    Listed files that are not there, or empty, are dropped, counted and named in
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
    lines = [entry for name in lists for entry in read_list(name, lists[name], options.task)]
    num_lines = len(lines)
    completeness = compare_with_published(version, lines)
    entries = _merge_lines(lines, lists)
    funnel = [
        FunnelStep(name="lines in the lists", count=num_lines),
        FunnelStep(
            name="images",
            count=len(entries),
            dropped=_some({"identical line": num_lines - len(entries)}),
        ),
    ]
    where = " and ".join(map(str, lists.values()))
    is_whole = completeness.endswith("as published")
    split_of, split_policy, split_notes = _choose_split(
        lines, entries, version, options, is_whole=is_whole, where=where
    )
    entries, paths, missing = _drop_missing_files(folder, version, entries, funnel)
    notes = [*_notes(folder, version, entries), *split_notes]
    if options.split == "mgca":
        entries = [entry._replace(patient=entry.key) for entry in entries]
    try:
        manifest = write_manifest(
            out,
            _images(entries, [split_of[entry.key] for entry in entries], paths),
            dataset="covidx",
            image_root=folder,
            funnel=funnel,
            notes=notes,
            policies={
                "lists": completeness,
                "split": split_policy,
                "task": f"{options.task} classes",
            },
            synthetic=is_synthetic(folder),
        )
    except ManifestError as error:
        raise ManifestError(error.what, where=where, fix=error.fix) from None
    (out / MISSING_LIST).unlink(missing_ok=True)
    if missing:
        names = "".join(f"{key}\n" for key in sorted(missing))
        replace_file(out / MISSING_LIST, names.encode())
    return manifest


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


def _drop_missing_files(
    folder: Path, version: str, entries: Sequence[Entry], funnel: list[FunnelStep]
) -> tuple[list[Entry], list[str], list[str]]:
    """Images with a file and their paths, and the keys of the others; appends to the funnel.

    Raises:
        ManifestError: No file is there.
    """
    paths, sizes = _find_files(folder, entries)
    is_kept = (sizes > 0).tolist()
    missing = [entry for entry, size in zip(entries, sizes.tolist(), strict=True) if size < 0]
    dropped = Counter(f"{MISSING_FILE}, source {entry.source}" for entry in missing)
    dropped[ZERO_BYTES] = int((sizes == 0).sum())
    count = sum(is_kept)
    funnel.append(FunnelStep(name="images with a file", count=count, dropped=_some(dropped)))
    if entries and not count:
        raise ManifestError(
            f"none of the {len(entries):,} listed files is there",
            where=folder,
            fix="the images belong into train/ and test/ of this folder",
        )
    _report_missing(version, missing)
    return (
        list(compress(entries, is_kept)),
        list(compress(paths, is_kept)),
        [entry.key for entry, there in zip(entries, is_kept, strict=True) if not there],
    )


def _find_files(
    folder: Path, entries: Sequence[Entry]
) -> tuple[list[str], Int64[np.ndarray, " N"]]:
    """Path of each image below the folder, and its size in bytes; -1 when it is not there.

    Some copies spell `COVID(1).png` as `COVID-1.png`; both are looked for, unless the second is an
    image of its own.
    """
    keys = [entry.key for entry in entries]
    spelled, taken = [_NUMBERED.sub(r"\1-\2\3", key) for key in keys], set(keys)
    other_names = [
        key if other in taken else other for key, other in zip(keys, spelled, strict=True)
    ]
    listed = file_sizes(folder, keys)
    renamed = file_sizes(folder, other_names)
    is_other = (listed <= 0) & (renamed > listed)
    count = int(is_other.sum())
    if count:
        note(f"covidx: {count:,} files have the form NAME-1.png instead of NAME(1).png")
    paths = [
        other if takes_other else entry.key
        for entry, other, takes_other in zip(entries, other_names, is_other, strict=True)
    ]
    return paths, np.where(is_other, renamed, listed)


def _report_missing(version: str, missing: Sequence[Entry]) -> None:
    """Say that files are missing, and what is known about it."""
    if missing:
        note(f"covidx: {len(missing):,} listed files are missing; named in {MISSING_LIST}")
    if version in WITHDRAWN and any(entry.source == "stonybrook" for entry in missing):
        count, abdomen = WITHDRAWN[version]
        gone = [entry for entry in missing if entry.source == "stonybrook"]
        named = sum("ABDOMEN" in entry.file.upper() for entry in gone)
        have = f"{len(gone):,} Stony Brook files are missing, {named:,} with ABDOMEN in the name"
        is_all = (len(gone), named) == (count, abdomen)
        note(
            f"covidx: {have}; {count:,} and {abdomen:,} were withdrawn"
            + (", so it is these: CXR-3A is the list without them" if is_all else "")
            + ("" if is_all else " later; CXR-3A is the list without them")
        )


def _choose_split(
    lines: Sequence[Entry],
    entries: Sequence[Entry],
    version: str,
    options: Options,
    *,
    is_whole: bool,
    where: str,
) -> tuple[dict[str, str], str, list[str]]:
    """Split of each image by key, how it came about, and what tables must say of it.

    Over all that is listed: a missing file must not move others to another split.
    """
    if options.split == "mgca":
        made = split_as_mgca(lines, version, is_whole=is_whole, where=where)
        return {entry.key: made.split_of[entry.key] for entry in entries}, made.policy, [made.note]
    has_validate = any(entry.list_name == "val" for entry in lines)
    splits, policy = _split(entries, has_validate, options)
    split_of = {entry.key: split for entry, split in zip(entries, splits, strict=True)}
    return split_of, policy, [] if has_validate else [NOTE_VALIDATE]


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


def _notes(folder: Path, version: str, entries: Sequence[Entry]) -> list[str]:
    """What every table of results has to say."""
    notes = [SYNTHETIC_NOTE] if is_synthetic(folder) else []
    notes += _source_note(entries)
    if any(entry.source == "rsna" for entry in entries):
        notes.append(NOTE_RSNA)
        if version in ("9A", "CXR-3A") and not is_synthetic(folder):
            notes += [NOTE_LEAK, NOTE_RSNA_TEST]
    return notes


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
