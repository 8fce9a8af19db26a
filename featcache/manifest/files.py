"""What image files look like from outside: their size, first bytes, and which of them are equal.

Nothing is decoded. A file is opened once and its first and last few kilobytes are read.
"""

import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int32, Int64, UInt64

from featcache.manifest.tree import each_file

_END_BYTES = 4_096
MISSING, EMPTY, UNKNOWN, NO_PICTURE = "missing", "empty", "unknown", "no picture"
_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_SUFFIXES = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".png": "png",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".gif": "gif",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
}
KINDS = (MISSING, EMPTY, UNKNOWN, NO_PICTURE, *sorted(set(_SUFFIXES.values())))
IMAGE_SUFFIXES = tuple(_SUFFIXES)
_NO_SIZE = (-1, -1)


class Glance(NamedTuple):
    """One file from outside.

    Attributes:
        size_bytes: -1 where there is no file.
        kind: One of `KINDS`, told by the first bytes.
        height: In pixels; -1 where the first bytes do not say.
        width: In pixels; -1 where the first bytes do not say.
        ends: Hash of the size and of the first and last bytes: equal files have equal ones.
    """

    size_bytes: int
    kind: str
    height: int
    width: int
    ends: int


def glance(path: str) -> Glance:
    """Look at one file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return Glance(-1, MISSING, *_NO_SIZE, 0)
    try:
        size_bytes = os.fstat(file).st_size
        head = os.pread(file, _END_BYTES, 0)
        tail = os.pread(file, _END_BYTES, max(size_bytes - _END_BYTES, 0))
    except OSError:  # a folder, or a file that cannot be read
        return Glance(-1, MISSING, *_NO_SIZE, 0)
    finally:
        os.close(file)
    kind = kind_of(head)
    ends = xxhash.xxh3_64_intdigest(head + tail, seed=size_bytes & 0xFFFFFFFF)
    return Glance(size_bytes, kind, *picture_size(head, kind), ends)


def kind_of(head: bytes) -> str:
    """What a file is, by its first bytes.

    Args:
        head: The first kilobytes, or the whole file.

    Returns:
        One of `KINDS`; a DICOM file without its mark is `unknown`.
    """
    if not head:
        return EMPTY
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    start = head.lstrip()[:15].lower()
    is_page = start.startswith((b"<!doctype", b"<html", b"<?xml", b"version https:"))
    return NO_PICTURE if is_page else UNKNOWN


def picture_size(head: bytes, kind: str) -> tuple[int, int]:
    """Height and width in pixels where the first bytes of a PNG or JPEG say them, else -1, -1."""
    if kind == "png" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        return height, width
    if kind != "jpeg":
        return _NO_SIZE
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], struct.unpack(">H", head[at + 2 : at + 4])[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return height, width
        at += 2 + length
    return _NO_SIZE


def is_misnamed(path: str, kind: str) -> bool:
    """Whether a file's first bytes are those of another kind than its name says."""
    wanted = _SUFFIXES.get(os.path.splitext(path)[1].lower())  # noqa: PTH122 - a million calls
    return wanted is not None and kind not in (wanted, MISSING, EMPTY, UNKNOWN)


@dataclass(frozen=True)
class Glances:
    """Many files from outside, in the order of their paths.

    Attributes:
        paths: As they were given, each once.
        size_bytes: -1 where there is no file.
        kinds: Places in `KINDS`.
        ends: See `Glance`.
        shape: Height and width in pixels; -1 where unknown.
    """

    paths: list[str]
    size_bytes: Int64[np.ndarray, " N"]
    kinds: Int64[np.ndarray, " N"]
    ends: UInt64[np.ndarray, " N"]
    shape: Int32[np.ndarray, "N 2"]

    def count(self, kind: str) -> int:
        """How many files are of a kind."""
        return int(np.count_nonzero(self.kinds == KINDS.index(kind)))

    def misnamed(self) -> list[str]:
        """Paths whose first bytes are those of another kind than the name says."""
        return [
            path
            for path, kind in zip(self.paths, self.kinds.tolist(), strict=True)
            if is_misnamed(path, KINDS[kind])
        ]

    def copies(self, root: Path) -> list[list[str]]:
        """Groups of paths whose files are equal byte for byte.

        Only files that are equally long and begin and end alike are read as a whole.

        Args:
            root: Folder that relative paths start from.
        """
        order = np.argsort(self.ends, kind="stable")
        order = order[self.size_bytes[order] > 0]
        ends = self.ends[order]
        starts = np.flatnonzero(np.diff(ends, prepend=ends[:1] + np.uint64(1)))
        groups: list[list[str]] = []
        for part in np.split(order, starts[1:]):
            if len(part) > 1:
                by_hash: dict[bytes, list[str]] = defaultdict(list)
                for index in part.tolist():
                    content = (root / self.paths[index]).read_bytes()
                    by_hash[xxhash.xxh3_128_digest(content)].append(self.paths[index])
                groups += [sorted(paths) for paths in by_hash.values() if len(paths) > 1]
        return sorted(groups)


def glance_at(root: Path, paths: Sequence[str]) -> Glances:
    """Look at many files.

    Args:
        root: Folder that relative paths start from; absolute paths ignore it.
        paths: Each is looked at once, however often it stands there.
    """
    once = list(dict.fromkeys(paths))
    prefix = f"{root}/"
    full = [path if path.startswith("/") else prefix + path for path in once]
    number = {kind: index for index, kind in enumerate(KINDS)}
    size_bytes = np.empty(len(once), dtype=np.int64)
    kinds = np.empty(len(once), dtype=np.int64)
    ends = np.empty(len(once), dtype=np.uint64)
    shape = np.empty((len(once), 2), dtype=np.int32)
    found = each_file(glance, full, title="look at the files", unit="images")
    for index, one in enumerate(found):
        size_bytes[index], kinds[index], ends[index] = one.size_bytes, number[one.kind], one.ends
        shape[index] = one.height, one.width
    return Glances(once, size_bytes, kinds, ends, shape)
