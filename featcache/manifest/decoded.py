"""What a full decode found out about a manifest's pictures, in `decoded.parquet` beside its tables.

The file is bound to the manifest by its hash: of another manifest it counts as missing. So is
`stated_sizes.parquet`, in which a reader writes what its table says of the size of each picture.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32, Int64, UInt64

from featcache.config import replace_file
from featcache.manifest.table import Manifest

FILE_NAME = "decoded.parquet"
SIZES_NAME = "stated_sizes.parquet"
_HASH = b"featcache.manifest"


@dataclass(frozen=True)
class Decoded:
    """The pictures of a manifest after a full decode, in the order of its rows.

    Attributes:
        keys: Key of each row.
        reasons: Why a file cannot be decoded; empty where it can.
        shape: Height and width as stored, in pixels; -1 where unknown.
        signatures: Of `similar.signature`; all zero where there is none.
    """

    keys: Sequence[str]
    reasons: Sequence[str]
    shape: Int32[np.ndarray, "N 2"]
    signatures: UInt64[np.ndarray, "N 4"]

    @property
    def is_readable(self) -> Bool[np.ndarray, " N"]:
        """Which files could be decoded."""
        return np.array([not reason for reason in self.reasons], dtype=np.bool_)

    def nodes(self) -> tuple[UInt64[np.ndarray, "U 4"], Int64[np.ndarray, " N"]]:
        """Each signature once, and its number for each row; -1 for a row without one."""
        known = (self.signatures != 0).any(axis=1)
        once, number = np.unique(self.signatures[known], axis=0, return_inverse=True)
        node = np.full(len(self.signatures), -1, np.int64)
        node[known] = number.reshape(-1)
        return once, node


def write_decoded(manifest: Manifest, decoded: Decoded) -> None:
    """Keep it beside the tables of its manifest."""
    table = pa.table(
        {
            "key": pa.array(decoded.keys, pa.string()),
            "reason": pa.array(decoded.reasons, pa.string()),
            "height": pa.array(decoded.shape[:, 0]),
            "width": pa.array(decoded.shape[:, 1]),
            **{f"signature_{n}": pa.array(decoded.signatures[:, n].copy()) for n in range(4)},
        }
    )
    _write(table, manifest.folder / FILE_NAME, manifest.meta.hash)


def read_decoded(folder: Path, manifest_hash: str) -> Decoded | None:
    """What `write_decoded` kept; None where it is missing, damaged, or of another manifest.

    Args:
        folder: The manifest's folder.
        manifest_hash: Of its `manifest.json`.
    """
    table = _read(folder / FILE_NAME, manifest_hash)
    if table is None:
        return None
    numbers = [table[f"signature_{n}"].to_numpy() for n in range(4)]
    shape = [table[name].to_numpy() for name in ("height", "width")]
    return Decoded(
        table["key"].to_pylist(),
        table["reason"].to_pylist(),
        np.stack(shape, axis=1),
        np.stack(numbers, axis=1),
    )


def write_stated_sizes(manifest: Manifest, sizes: pa.Table) -> None:
    """Keep what a data set's own table says of the size of its pictures.

    Args:
        manifest: That the pictures are in.
        sizes: `key`, `height` and `width` (int64), those that are known.
    """
    _write(sizes, manifest.folder / SIZES_NAME, manifest.meta.hash)


def read_stated_sizes(manifest: Manifest) -> Int64[np.ndarray, "N 2"] | None:
    """Height and width of each row as the data set's table has them, 0 where it says nothing.

    Returns:
        None where the data set has no such table.
    """
    table = _read(manifest.folder / SIZES_NAME, manifest.meta.hash)
    if table is None:
        return None
    sizes = np.stack([table[name].to_numpy() for name in ("height", "width")], axis=1)
    row = {key: number for number, key in enumerate(table["key"].to_pylist())}
    at = np.array([row.get(key, -1) for key in manifest.keys], dtype=np.int64)
    found: Int64[np.ndarray, "N 2"] = np.where((at >= 0)[:, None], sizes[at], 0)
    return found


def _write(table: pa.Table, path: Path, manifest_hash: str) -> None:
    """Write a table with the manifest that it is about, under its name when it is whole."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_HASH: manifest_hash.encode()}), sink)
    replace_file(path, sink.getvalue())


def _read(path: Path, manifest_hash: str) -> pa.Table | None:
    """A table, if it is about this manifest."""
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError):
        return None
    is_of_it = (table.schema.metadata or {}).get(_HASH) == manifest_hash.encode()
    return table if is_of_it else None
