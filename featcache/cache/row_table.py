"""Rows, or tokens, of many shards as one array in memory."""

import mmap
import threading
from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import numpy as np
from jaxtyping import Int64, Num, Shaped

from featcache.cache.mapping import AddressRange, populate
from featcache.cache.shard import Shard
from featcache.errors import ShardError

MAX_SHARDS = 4_096
"""Shards of a table; each takes two of the 65,530 maps that Linux gives a process."""


class RowTable:
    """The rows of one array of all shards, at multiples of a row from one address on.

    Any rows of any shards are then copied by one call that holds no lock of Python's. Copied one by
    one, threads wait for each other, and for the thread that uses the rows, after each of them.
    Shards are mapped when first asked for, and stay mapped.

    Args:
        shards: Of one set; at least one.
        name: Array of the same type in all shards.
        by_token: Whether single tokens are the rows of this table, or whole rows of the set, which
            are equally long then.

    Attributes:
        zero: Place of a row of zeros, for padding.

    Raises:
        ShardError: There are too many shards, rows cannot be brought to multiples of a row, or the
            system refuses so many addresses.
    """

    def __init__(self, shards: Sequence[Shard], name: str, *, by_token: bool):
        self._shards, self._name = shards, name
        self._places = [shard.header.places[name] for shard in shards]
        tokens = shards[0].header.places["tokens"].shape
        axes = len(tokens) - 1 if by_token else 1  # axes that number the rows of this table
        first = self._places[0]
        self._row_bytes = prod(first.shape[axes:]) * first.numpy_type.itemsize
        offsets = [place.offset for place in self._places]
        counts = [prod(place.shape[:axes]) for place in self._places]
        starts = aligned_starts(self._row_bytes, offsets, counts)
        folder = shards[0].path.parent
        if starts is None or len(shards) > MAX_SHARDS:
            raise ShardError("its rows do not fit into one table", where=folder)
        self._starts = np.array(starts[:-1], dtype=np.int64)
        self.zero = starts[-1]
        size = (self.zero + 1) * self._row_bytes
        self._range = AddressRange(size, folder)
        self._range.zero(self.zero * self._row_bytes, self._row_bytes, folder)
        stored: Any = self._range.content.view(first.numpy_type)
        self._rows: Shaped[np.ndarray, "V W"] = stored.reshape(self.zero + 1, -1)
        self._mapped = np.zeros(len(shards), dtype=bool)
        self._lock = threading.Lock()

    def locate(
        self, shards: Int64[np.ndarray, " B"], local: Int64[np.ndarray, " B"]
    ) -> Int64[np.ndarray, " B"]:
        """Places of rows in the table; their shards are mapped. In any thread.

        Args:
            shards: Position of each row's shard.
            local: Its row of this table within the shard.

        Raises:
            ShardError: A file was replaced, its array is damaged, or the system refuses the map.
        """
        for shard in np.unique(shards[~self._mapped[shards]]).tolist():
            self._map(shard)
        places: Int64[np.ndarray, " B"] = self._starts[shards] + local
        return places

    def take(self, places: Int64[np.ndarray, " B"], out: Num[np.ndarray, "..."]) -> None:
        """Copy rows; in any thread, without Python's lock.

        Args:
            places: From `locate`, or `zero`.
            out: Where they go, of the array's type, end to end.
        """
        flat = out.reshape(len(places), self._rows.shape[1], copy=False)
        np.take(self._rows, places, axis=0, out=flat, mode="clip")  # `raise` would copy twice

    def populate(self, shard: int) -> bool:
        """Read a shard's rows into the page cache and this process's page table.

        Args:
            shard: Position of the shard.

        Returns:
            False where the system does not know the call.
        """
        self._map(shard)
        start = int(self._starts[shard]) * self._row_bytes
        return populate(self._range.content[start : start + self._places[shard].size_bytes])

    def _map(self, shard: int) -> None:
        """Map a shard to its place unless it is there; compare its checksum, except of tokens."""
        place = self._places[shard]
        with self._lock:
            if self._mapped[shard]:
                return
            at = int(self._starts[shard]) * self._row_bytes
            one = self._shards[shard]
            if self._name != "tokens":
                one.map(self._name, check=True)
            with one.descriptor() as descriptor:  # refuses a file that was replaced
                self._range.map(at, descriptor, place.offset, place.size_bytes, one.path)
            self._mapped[shard] = True


def aligned_starts(
    row_bytes: int, offsets: Sequence[int], counts: Sequence[int], *, page: int = mmap.PAGESIZE
) -> list[int] | None:
    """Where shards begin in a table of rows, so that each keeps its place within a page.

    Args:
        row_bytes: Bytes of a row.
        offsets: First byte of each shard's rows in its file.
        counts: Rows of each shard.
        page: Bytes of a memory page.

    Returns:
        The row at which each shard begins and, last, the first row behind them all; no two of them
        share a page. None where no multiple of a row has the place within a page that is needed.
    """
    if row_bytes <= 0:
        return None
    common = gcd(row_bytes, page)
    step = page // common  # rows after which places within a page repeat
    starts, free = [], 0  # `free` is the first byte of a page that nothing is in
    for offset, count in zip(offsets, counts, strict=True):
        lead = offset % page
        if lead % common:
            return None
        first = lead // common * pow(row_bytes // common, -1, step) % step if step > 1 else 0
        short = free + lead - first * row_bytes  # bytes that it would begin too early
        start = first + max(0, -(-short // (row_bytes * step))) * step
        starts.append(start)
        free = -(-(start + count) * row_bytes // page) * page
    return [*starts, -(-free // row_bytes)]
