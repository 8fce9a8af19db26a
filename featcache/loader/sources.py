"""Where the tokens of rows lie, and how they are copied from there into a buffer."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int64, Num

from featcache.cache.header import REPAIR_HINT
from featcache.cache.reader import FeatureSet
from featcache.cache.row_table import RowTable
from featcache.errors import ShardError


class MappedShard:
    """Tokens of a shard through its memory map: from memory where they are there, else from disk.

    Args:
        tokens: N L D or S D, as `FeatureSet.tokens_map` gives it.
    """

    def __init__(self, tokens: Num[np.ndarray, "*shape"]):
        self._tokens = tokens.reshape(-1, tokens.shape[-1])

    def read(self, first: int, count: int, out: Num[np.ndarray, "S D"], at: int) -> None:
        """Copy a run of tokens; numpy lets other threads run meanwhile.

        Args:
            first: First token of the run.
            count: Its length.
            out: Where it goes.
            at: First token there.
        """
        out[at : at + count] = self._tokens[first : first + count]


class ReadShard:
    """Tokens of a shard through `preadv` straight into the buffer, for sets larger than memory.

    Args:
        features: The set.
        number: Position of the shard in the set.
        keep_open: Whether the file stays open, or is opened for each read.
    """

    def __init__(self, features: FeatureSet, number: int, *, keep_open: bool):
        self._shard = features.shards[number]
        self._place = features.token_place(number)
        self._descriptor: int | None = None
        if keep_open:
            with self._shard.descriptor() as descriptor:
                self._descriptor = os.dup(descriptor)
            weakref.finalize(self, os.close, self._descriptor)

    def read(self, first: int, count: int, out: Num[np.ndarray, "S D"], at: int) -> None:
        """Read a run of tokens at its place in the file; arguments as for `MappedShard`."""
        if not count:
            return
        place = self._place
        start = place.offset + first * place.shape[-1] * place.dtype.itemsize
        target = out[at : at + count].data.cast("B")
        if self._descriptor is not None:
            self._read(self._descriptor, target, start)
        else:
            with self._shard.descriptor() as descriptor:
                self._read(descriptor, target, start)

    def _read(self, descriptor: int, target: memoryview, start: int) -> None:
        """`preadv` until the target is full; the system may stop short of it."""
        while len(target):
            done = os.preadv(descriptor, [target], start)
            if done == 0:
                raise ShardError(
                    f"the file ends at byte {start}, in the middle of its tokens",
                    where=self._place.path,
                    fix=REPAIR_HINT,
                )
            target, start = target[done:], start + done


@dataclass(frozen=True)
class TableRows:
    """A batch's rows in a table over a whole set, copied by one call.

    Attributes:
        table: Of the set's rows, or of its tokens.
        places: Of each row of the batch, or of each of its tokens, padding included.
    """

    table: RowTable
    places: Int64[np.ndarray, "B ..."]


Sources = Mapping[int, MappedShard | ReadShard] | Mapping[int, MappedShard] | TableRows


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of one batch lie, checked against the set.

    Attributes:
        rows: Row numbers in the set.
        shards: Shard of each row.
        first: First token to read of each row, within its shard's tokens.
        counts: Tokens of each row that the batch holds.
        runs: (offset from `first`, length) of each run of tokens to read, the same for all rows;
            None when each row is one run of `counts` tokens.
        width: Length of the batch's token axis.
        valid: True at real tokens, False where a shorter row is padded.
        sources: The shards that hold these rows, or the table of all rows.
        scales: The same for token scales, as tokens of one number; empty unless int8.
    """

    rows: Int64[np.ndarray, " B"]
    shards: Int64[np.ndarray, " B"]
    first: Int64[np.ndarray, " B"]
    counts: Int64[np.ndarray, " B"]
    runs: tuple[tuple[int, int], ...] | None
    width: int
    valid: Bool[np.ndarray, "B T"]
    sources: Sources = field(default_factory=dict)
    scales: Sources = field(default_factory=dict)


def fill_rows(
    plan: RowPlan,
    part: slice,
    sources: Sources,
    out: Num[np.ndarray, "B T D"],
) -> None:
    """Copy some rows of a plan into a buffer, padded with zeros; in any thread.

    Args:
        plan: Where they lie.
        part: Which of the plan's rows.
        sources: Of tokens, or of their scales.
        out: Their places in the buffer, of the dtype that is stored; the old content is lost.
    """
    if isinstance(sources, TableRows):
        sources.table.take(sources.places[part].ravel(), out)
        return
    flat, at = out.reshape(-1, out.shape[-1], copy=False), 0
    read = {number: source.read for number, source in sources.items()}
    columns = (plan.shards[part], plan.first[part], plan.counts[part])
    # Python's share of a row: 1 us, as long as copying 4 kB takes.
    for shard, first, count in zip(*(column.tolist() for column in columns), strict=True):
        if plan.runs is not None:
            done = at
            for start, length in plan.runs:
                read[shard](first + start, length, flat, done)
                done += length
        else:
            read[shard](first, count, flat, at)
            if count < plan.width:
                flat[at + count : at + plan.width] = 0
        at += plan.width
