"""A file of vectors that grows batch by batch and is then mapped, so that memory does not grow."""

import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float32

from featcache.config import explained_refusals
from featcache.partial import partial_path, remove_dead_partials

_KIND = {"descr": "<f4", "fortran_order": False}


class VectorFile:
    """Float32 vectors, written in order; a context manager that closes the file.

    Args:
        folder: Where the file goes.
        count: Vectors that will be written.
        name: Its name there once all of them are; None: it never gets one, and is gone when nothing
            maps it any more, even if the process was killed.

    Raises:
        CacheError: The folder or the file cannot be made.
    """

    def __init__(self, folder: Path, count: int, name: str | None = None):
        self.folder, self.count, self.path = folder, count, folder / (name or "vectors")
        self._partial = None if name is None else partial_path(folder / name)
        self._shape: tuple[int, int] | None = None
        with explained_refusals(self.path):  # e.g. of a set in a workspace that is read-only
            folder.mkdir(parents=True, exist_ok=True)
            if name is not None:
                remove_dead_partials(folder, name)
            self._file = self._open()

    def __enter__(self) -> "VectorFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; one that was not finished is removed."""
        with suppress(OSError):  # what does not fit the disk any more has been told
            self._file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def _open(self) -> IO[bytes]:
        """A new file, to be written and mapped."""
        if self._partial is None:
            return tempfile.TemporaryFile(dir=self.folder)
        return self._partial.open("w+b")

    def add(self, vectors: Float32[np.ndarray, "_ W"]) -> None:
        """Append some.

        Raises:
            CacheError: The disk is full, or the file cannot be written.
        """
        with explained_refusals(self.path):  # a map would die of a full disk without a word
            if self._shape is None:
                self._shape = (self.count, vectors.shape[1])
                np.lib.format.write_array_header_1_0(self._file, {**_KIND, "shape": self._shape})
            self._file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
            self._file.flush()

    def finish(self) -> Float32[np.ndarray, "N W"]:
        """Map what was written; changes of the array do not reach the file."""
        if self._shape is None:
            raise ValueError("no vector was written")
        start = self._file.tell() - 4 * math.prod(self._shape)
        mapped = np.memmap(self._file, "<f4", "c", start, self._shape)
        if self._partial is not None:
            self._partial.replace(self.path)
        return np.asarray(mapped)


def read_vectors(path: Path, count: int) -> Float32[np.ndarray, "N W"] | None:
    """Map vectors that were written earlier; None when there are none, or they are damaged.

    Args:
        path: Of the file.
        count: How many there must be.
    """
    with suppress(OSError, ValueError, EOFError):
        found = np.load(path, mmap_mode="c", allow_pickle=False)
        if found.ndim == 2 and len(found) == count and found.dtype == np.float32:
            return np.asarray(found)
    return None
