"""Rivals that gather whole batches: each is told the rows, and gives their tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64

from featcache.bench.sample_peers import (
    COLUMN,
    ROWS_AT_ONCE,
    missing_packages,
    shape_of,
    write_npy,
)
from featcache.cache.reader import FeatureSet

Gather = Callable[[Int64[np.ndarray, " B"]], Any]
"""From row numbers to an array or tensor B L D, float16."""


@dataclass(frozen=True)
class BatchPeer:
    """A rival's format and its way to gather.

    Attributes:
        name: As printed.
        packages: What it needs to import.
        write: Puts all rows of a set into an empty folder.
        open: Its gathering over that folder, for batches of at most so many rows.
    """

    name: str
    packages: tuple[str, ...]
    write: Callable[[Path, FeatureSet], None]
    open: Callable[[Path, int], Gather]

    def missing(self) -> list[str]:
        """Packages that are not installed here."""
        return missing_packages(self.packages)


def _open_index_select(folder: Path, batch_size: int) -> Gather:
    # Opened for writing: torch warns about arrays that may not be written.
    stored = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="r+"))
    buffer = torch.empty(batch_size, *stored.shape[1:], dtype=stored.dtype)

    def gather(rows: Int64[np.ndarray, " B"]) -> torch.Tensor:
        return torch.index_select(stored, 0, torch.from_numpy(rows), out=buffer[: len(rows)])

    return gather


def _open_fancy(folder: Path, batch_size: int) -> Gather:
    stored = np.load(folder / "rows.npy", mmap_mode="r")
    return lambda rows: stored[rows]


def _write_tensordict(folder: Path, features: FeatureSet) -> None:
    shape = shape_of(features)
    like = torch.empty(shape, dtype=torch.float16)  # never touched, so it takes no memory
    made = import_module("tensordict").TensorDict({COLUMN: like}, [shape[0]])
    stored = made.memmap_like(str(folder / "set"))[COLUMN]
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, shape[0]))
        stored[start : start + len(rows)] = torch.from_numpy(features.read_tokens(rows))


def _open_tensordict(folder: Path, batch_size: int) -> Gather:
    stored = import_module("tensordict").TensorDict.load_memmap(str(folder / "set"))
    return lambda rows: stored[torch.from_numpy(rows)][COLUMN]


def _write_lance(folder: Path, features: FeatureSet) -> None:
    width = features.spec.dim * (features.spec.num_tokens or 0)
    schema = pa.schema([pa.field(COLUMN, pa.list_(pa.float16(), width))])

    def batches() -> Any:
        for start in range(0, features.num_rows, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, features.num_rows))
            flat = pa.array(features.read_tokens(rows).reshape(-1))
            yield pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, width)], schema)

    import_module("lance").write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches()), str(folder / "rows.lance")
    )


def _open_lance(folder: Path, batch_size: int) -> Gather:
    stored = import_module("lance").dataset(str(folder / "rows.lance"))

    def gather(rows: Int64[np.ndarray, " B"]) -> np.ndarray:
        column = stored.take(rows.tolist(), columns=[COLUMN]).column(COLUMN).combine_chunks()
        flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(rows), -1)

    return gather


BATCH_PEERS = (
    BatchPeer("index_select on npy", (), write_npy, _open_index_select),
    BatchPeer("npy fancy index", (), write_npy, _open_fancy),
    BatchPeer("tensordict", ("tensordict",), _write_tensordict, _open_tensordict),
    BatchPeer("lance", ("lance",), _write_lance, _open_lance),
)
