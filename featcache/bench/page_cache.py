"""Files out of the page cache, and a look whether they really are."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.errors import FeatcacheError, UsageError

STILL_CACHED = 0.01
"""Share of the pages up to which files count as not cached: the kernel may keep a few."""


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Write files to the disk, take them out of the page cache, and see that they are gone.

    Pages that a process has mapped stay: close all maps before.

    Raises:
        UsageError: The system has no `posix_fadvise`.
        FeatcacheError: More than 1 % of the pages are still cached, as on a file system in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UsageError(
            "this system cannot take files out of the page cache (posix_fadvise)",
            fix="measure on Linux",
        )
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    share = cached_share(paths)
    if share > STILL_CACHED:
        raise FeatcacheError(
            f"the files stay in the page cache: {100 * share:.0f} % of them after posix_fadvise",
            where=paths[0].parent,
            fix="TMPDIR=FOLDER featcache bench, with a folder on a disk instead of in memory",
        )


def cached_share(paths: Sequence[Path]) -> float:
    """Share of the pages of files that are in the page cache, as `mincore` says; Linux."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = cached = 0
    for path in paths:
        size_bytes = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            found = np.zeros(-(-size_bytes // mmap.PAGESIZE), dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            code = libc.mincore(view.ctypes.data, size_bytes, found.ctypes.data)
            del view  # or the map could not be closed
            if code:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        pages += len(found)
        cached += int((found & 1).sum())
    return cached / max(1, pages)
