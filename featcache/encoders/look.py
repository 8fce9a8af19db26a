"""Every picture of a manifest decoded once: which can be read, how large it is, what it looks like.

What stage one finds out for each encoder anew, before it is started. Nothing is kept of a picture
but its size and the 256 bits of `manifest.similar`; at a time there is one picture for each
processor in memory.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from featcache.console import task
from featcache.encoders.decode import decode_with_size
from featcache.encoders.preprocessing import Preprocessing
from featcache.errors import ImageError
from featcache.manifest.decoded import Decoded, write_decoded
from featcache.manifest.similar import SIDE, signature
from featcache.manifest.table import Manifest

_THUMBNAIL = Preprocessing(
    image_size=(SIDE, SIDE), fit="squash", interpolation="bilinear", mean=(0.0,), std=(1.0,)
)
_BLOCK = 32  # pictures for each thread between two reports of progress


class Look(NamedTuple):
    """One decoded file.

    Attributes:
        reason: Why it cannot be decoded; empty where it can.
        shape: Height and width as stored, in pixels; -1 where unknown.
        signature: Of `similar.signature`; all zero where there is none.
    """

    reason: str
    shape: tuple[int, int]
    signature: UInt64[np.ndarray, " 4"]


def look_at_pictures(manifest: Manifest, *, workers: int | None = None) -> Decoded:
    """Decode every picture of a manifest, and keep what was found in `decoded.parquet`.

    Args:
        manifest: Whose `image_root` is at hand.
        workers: Threads; by default one for each processor that this process may use.

    Returns:
        For each row what was found. A file that cannot be decoded is no error.
    """
    paths = manifest.images["image_path"].to_pylist()
    once = sorted(set(paths))
    root = Path(manifest.meta.image_root)
    workers = workers or len(os.sched_getaffinity(0))
    reasons: list[str] = []
    shape = np.empty((len(once), 2), dtype=np.int32)
    signatures = np.empty((len(once), 4), dtype=np.uint64)
    num_bad = 0
    with (
        ThreadPoolExecutor(workers) as pool,
        task("decode every picture", len(once)) as progress,
    ):
        for start in range(0, len(once), _BLOCK * workers):
            block = [root / path for path in once[start : start + _BLOCK * workers]]
            for index, look in enumerate(pool.map(_look, block), start):
                reasons.append(sys.intern(look.reason))
                shape[index], signatures[index] = look.shape, look.signature
                num_bad += bool(look.reason)
            progress.update(len(reasons), note=f"{num_bad:,} unreadable")
    place = {path: index for index, path in enumerate(once)}
    rows = np.array([place[path] for path in paths], dtype=np.int64)
    decoded = Decoded(manifest.keys, [reasons[row] for row in rows], shape[rows], signatures[rows])
    write_decoded(manifest, decoded)
    return decoded


def _look(path: Path) -> Look:
    """Decode one file, or say why it cannot be."""
    try:
        (thumbnail,), shape = decode_with_size(path, [_THUMBNAIL])
    except ImageError as error:
        return Look(error.what, (-1, -1), np.zeros(4, np.uint64))
    return Look("", shape, signature(thumbnail))
