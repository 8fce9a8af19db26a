"""A folder of synthetic files, each written once with its hash kept."""

import csv
import gzip
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """What a writer made.

    Attributes:
        images: Image files on disk, the damaged ones included.
        studies: Studies (for COVIDx, listed images).
        truth: What is hidden in the pictures, as JSON values.
    """

    images: int
    studies: int
    truth: dict[str, object]


class Tree:
    """Writes files below one root and remembers the hash of each.

    Args:
        root: Folder that exists.
    """

    def __init__(self, root: Path):
        self.root = root
        self.sha256: dict[str, str] = {}

    def write(self, path: str, content: bytes) -> None:
        """Write one file; `path` is relative to the root."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.sha256[path] = hashlib.sha256(content).hexdigest()

    def write_csv(self, path: str, rows: Iterable[Sequence[object]]) -> None:
        """Write a table with Unix line ends, compressed when the name ends in `.gz`."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        content = text.getvalue().encode()
        if path.endswith(".gz"):
            packed = io.BytesIO()
            # Neither a name nor a time goes into the header: equal rows give equal bytes.
            with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:
                file.write(content)
            content = packed.getvalue()
        self.write(path, content)

    def write_sums(self, path: str) -> None:
        """Write the hashes of all files so far in the layout of `sha256sum`."""
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self.sha256.items()))
        self.write(path, "".join(lines).encode())


def assign(
    rates: Sequence[tuple[str, float]], members: Sequence[int], rng: np.random.Generator
) -> dict[int, str]:
    """Give each odd case to its share of the members, at least to one; nobody gets two.

    Args:
        rates: Names with shares of all members.
        members: Numbers to choose from.
        rng: Chooses.

    Returns:
        The name for each chosen member. The rarest come first where members run out.
    """
    order = [members[i] for i in rng.permutation(len(members))]
    chosen: dict[int, str] = {}
    for name, rate in sorted(rates, key=lambda item: item[1]):
        for _ in range(max(1, round(rate * len(members)))):
            if order:
                chosen[order.pop()] = name
    return chosen
