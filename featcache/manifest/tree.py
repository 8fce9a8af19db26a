"""What lies in a data set's folder: image files, and the mark of a synthetic tree."""

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from featcache.console import task
from featcache.errors import ManifestError

SYNTHETIC_MARK = "SYNTHETIC.txt"
SYNTHETIC_NOTE = (
    "synthetic stand-in: the images and texts were drawn by a program; they show no patient, and "
    "no figure measured on them says anything about real data."
)
MISSING_FILE, ZERO_BYTES = "missing file", "file of zero bytes"
"""Why a row has no picture, in the words of every reader's funnel."""
_THREADS = 16  # what waits is the file system, not the processor
_BLOCK = 4_096
_SLICE = 64

_Result = TypeVar("_Result")


def is_synthetic(folder: Path) -> bool:
    """Whether a tree says of itself that a program drew it (`SYNTHETIC.txt` at its root)."""
    return (folder / SYNTHETIC_MARK).is_file()


def files_present(root: Path, paths: Sequence[str]) -> Bool[np.ndarray, " N"]:
    """Which paths are files, without opening any and without a system call for each.

    Every folder is listed once, so a million rows cost as many calls as there are folders. Links
    are followed. Names are compared byte for byte, on every file system.

    Args:
        root: Folder that relative paths start from; absolute paths ignore it.
        paths: Paths with forward slashes.

    Returns:
        True where a file is there, in the order given.

    Raises:
        ManifestError: A folder is there but cannot be listed.
    """
    present = np.zeros(len(paths), dtype=np.bool_)
    for names, entries in _wanted_entries(root, paths):
        for name in names.keys() & {entry.name for entry in entries if _is_file(entry)}:
            present[names[name]] = True
    return present


def file_sizes(root: Path, paths: Sequence[str]) -> Int64[np.ndarray, " N"]:
    """Size of each file in bytes, and -1 where there is none.

    Folders are listed as in `files_present`, and each file that is wanted costs one call more.

    Args:
        root: Folder that relative paths start from; absolute paths ignore it.
        paths: Paths with forward slashes.

    Raises:
        ManifestError: A folder is there but cannot be listed.
    """
    sizes = np.full(len(paths), -1, dtype=np.int64)
    for names, entries in _wanted_entries(root, paths):
        for entry in entries:
            if entry.name in names and _is_file(entry):
                sizes[names[entry.name]] = _size_bytes(entry)
    return sizes


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether there is a file; not at the end of links that lead in a circle or are barred."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _size_bytes(entry: os.DirEntry[str]) -> int:
    """Size of a file; -1 where it has gone meanwhile."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def file_faults(sizes: Int64[np.ndarray, " N"]) -> dict[str, Bool[np.ndarray, " N"]]:
    """Which rows have no picture, by reason, as `Funnel.keep` takes them.

    Args:
        sizes: Of `file_sizes`.
    """
    return {MISSING_FILE: sizes < 0, ZERO_BYTES: sizes == 0}


def _wanted_entries(
    root: Path, paths: Sequence[str]
) -> Iterator[tuple[dict[str, list[int]], list[os.DirEntry[str]]]]:
    """For each folder the places of its names among the paths, and what is in it."""
    by_folder: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, path in enumerate(paths):
        folder, slash, name = path.rpartition("/")
        by_folder[folder or slash][name].append(index)
    for folder, names in by_folder.items():
        yield names, _entries(root, folder)


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    """What is in one folder; nothing when there can be no such folder."""
    if "\0" in folder:
        return []
    try:
        with os.scandir(root / folder) as entries:
            return list(entries)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        raise ManifestError(
            f"a folder of images cannot be listed: {error.strerror}",
            where=root,  # a folder below it may carry a patient's identifier
            fix="check the permissions below it",
        ) from None


def each_file(
    function: Callable[[str], _Result], paths: Sequence[str], *, title: str, unit: str
) -> Iterator[_Result]:
    """Call a function for each path, in many threads, and yield the results in order.

    Args:
        function: Reads or looks at one file; what it raises ends the run.
        paths: Any number of them.
        title: What the progress display calls it.
        unit: What is counted, in the plural.
    """
    with ThreadPoolExecutor(_THREADS) as pool, task(title, len(paths), unit) as progress:
        for start in range(0, len(paths), _BLOCK):
            block = paths[start : start + _BLOCK]
            # A future for each file would cost more than reading it.
            slices = [block[at : at + _SLICE] for at in range(0, len(block), _SLICE)]
            for results in pool.map(lambda names: [function(name) for name in names], slices):
                yield from results
            progress.update(start + len(block))
