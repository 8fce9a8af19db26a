"""Feature sets held in memory, of the GPU where they fit, and gathered by index from there.

A set is held as it is stored, int8 as int8, and no more of it than the run's rows and token budget
need. In main memory the ring reads it like any shard; on a GPU batches are gathered on the GPU.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64, Num
from torch import Tensor

from featcache.cache.reader import FeatureSet
from featcache.console import size
from featcache.device import resolve_device
from featcache.errors import UsageError
from featcache.loader.batch import Int8Tokens, may_overflow
from featcache.loader.ring import (
    FITS_SHARE,
    Filled,
    Reading,
    Request,
    Ring,
    available_memory,
    open_readers,
)
from featcache.loader.rows import RowReader
from featcache.loader.sources import MappedShard, RowPlan, Sources, fill_rows

GPU_SHARE = 0.5
"""Share of a GPU's free memory that sets may take; the rest is the training's."""
PIECE_BYTES = 16 * 2**20
"""Bytes that are brought into memory at a time."""

_log = logging.getLogger("featcache.loader")


@dataclass(frozen=True)
class Held:
    """Rows of one set in memory, cut to the token budget.

    Attributes:
        rows: Which rows of the set, ascending.
        starts: First token of each and, last, the number of tokens.
        tokens: As stored, end to end, and a last one of zeros for padding.
        scales: Token scales of an int8 set, in the same places; None for others.
        channels: Channel scales of an int8 set.
        may_overflow: Whether its tokens may exceed float16.
    """

    rows: Int64[np.ndarray, " N"]
    starts: Int64[np.ndarray, " starts"]
    tokens: Num[Tensor, "S D"]
    scales: Float16[Tensor, " S"] | None
    channels: Float32[Tensor, " D"] | None
    may_overflow: bool

    def first(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """First token of each row.

        Args:
            rows: Rows of the set that are held.
        """
        first: Int64[np.ndarray, " B"] = self.starts[np.searchsorted(self.rows, rows)]
        return first


class HeldReader(RowReader):
    """Rows of a set that is held in memory, as its only shard.

    It fills buffers from main memory alone; from a GPU's it plans rows for `gather`.

    Args:
        features: The set.
        held: Its tokens, cut to the budget; with a random one all of them.
        reading: Token budgets.
        seed: Of a random budget.
    """

    def __init__(self, features: FeatureSet, held: Held, reading: Reading, *, seed: int):
        super().__init__(
            features,
            io="mmap",
            tokens=reading.tokens,
            text_tokens=reading.text_tokens,
            seed=seed,
        )
        self._held = held
        in_reach = held.tokens.device.type == "cpu"
        nothing = np.zeros((0, self.dim), self.dtype)
        self._source = MappedShard(held.tokens.numpy() if in_reach else nothing)
        scales = held.scales if in_reach else None
        column = np.zeros((0, 1), np.float16) if scales is None else scales.numpy()[:, None]
        self._token_scales = MappedShard(column)

    def _locate(
        self,
        rows: Int64[np.ndarray, " B"],
        shards: Int64[np.ndarray, " B"],
        local: Int64[np.ndarray, " B"],
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        return np.zeros_like(shards), self._held.first(rows)

    def _sources(self, name: str, plan: RowPlan) -> Sources:
        return {0: self._source if name == "tokens" else self._token_scales}

    def _fill_pooled(self, plan: RowPlan, part: slice, out: Float16[np.ndarray, "B 1 E"]) -> None:
        fill_rows(plan, part, plan.sources, out)


class OnDevice:
    """Sets in a GPU's memory, gathered there batch by batch; nothing runs ahead of the consumer.

    Tokens and masks of a batch lie on the GPU and stay as long as they are used.

    Args:
        readers: Plan rows; one for each set.
        held: What they plan rows of.
    """

    def __init__(self, readers: Sequence[RowReader], held: Sequence[Held]):
        self._readers, self._held = readers, held

    def run(
        self, requests: Iterator[Request]
    ) -> Generator[tuple[Request, list[Filled]], None, None]:
        """Gather batches in order.

        Args:
            requests: Asked for one by one.

        Yields:
            Each request and what its rows became, per feature set.

        Raises:
            CacheError: A row was quarantined.
        """
        for request in requests:
            sets = zip(self._readers, self._held, request.rows, strict=True)
            yield (
                request,
                [
                    gather(reader.plan(rows, position=request.position), held, reader)
                    for reader, held, rows in sets
                ],
            )


def gather(plan: RowPlan, held: Held, reader: RowReader) -> Filled:
    """The rows of a plan, gathered where the set is held.

    Args:
        plan: Of a `HeldReader`.
        held: The set.
        reader: The reader, for its name.
    """
    columns = np.arange(plan.width)
    if plan.runs is not None:
        columns = np.concatenate([np.arange(start, start + length) for start, length in plan.runs])
    padding = len(held.tokens) - 1
    where = np.where(plan.valid, plan.first[:, None] + columns, padding)
    places = torch.from_numpy(where.ravel()).to(held.tokens.device)
    shape = (*where.shape, held.tokens.shape[1])
    valid = torch.from_numpy(plan.valid).to(held.tokens.device)
    stored = held.tokens.index_select(0, places).view(shape)
    if held.scales is None or held.channels is None:
        return Filled(stored, valid)
    scales = held.scales.index_select(0, places).view(where.shape)
    title = str(reader.features.folder)
    return Filled(Int8Tokens(stored, scales, held.channels, held.may_overflow, title), valid)


def open_resident(
    sets: Sequence[FeatureSet],
    rows: Sequence[Int64[np.ndarray, " N"]],
    batch_size: int,
    reading: Reading,
    *,
    seed: int = 0,
) -> Ring | OnDevice:
    """Bring sets into memory, and open what gathers batches from there.

    Args:
        sets: The feature sets.
        rows: All rows that will be asked for, of each set; no others are held.
        batch_size: Rows of the largest batch.
        reading: `resident` names the device; budgets, threads and bounds as for files.
        seed: Of a random token budget.

    Raises:
        UsageError: There is no such device, or the sets fit in no memory.
        CacheError: A row was quarantined.
    """
    wanted = resolve_device(reading.resident or "cpu")
    # Every step draws other tokens of a random budget, so all are held.
    whole = {"tokens": "all"} if reading.tokens.startswith("random") else {}
    loading = reading.model_copy(update={**whole, "io": "pread", "prefetch": 1})
    readers = open_readers(sets, loading)
    distinct = [np.unique(some) for some in rows]
    needed = sum(
        int(reader.counts(some).sum()) * reader.token_bytes
        for reader, some in zip(readers, distinct, strict=True)
    )
    device = choose_memory(needed, wanted)
    title = " and ".join(features.spec.title for features in sets)
    name = "main memory" if device == "cpu" else f"the memory of {device}"
    _log.info("tokens of %s: %s, held in %s", title, size(needed), name)
    held = [
        hold(reader, some, loading, device) for reader, some in zip(readers, distinct, strict=True)
    ]
    holders = [
        HeldReader(one, some, reading, seed=seed) for one, some in zip(sets, held, strict=True)
    ]
    if device == "cpu":
        return Ring(holders, rows, batch_size, reading)
    return OnDevice(holders, held)


def choose_memory(needed: int, device: str) -> str:
    """Whose memory holds so many bytes: that of the device where they fit, else the main memory.

    Args:
        needed: Bytes.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: They fit in neither.
    """
    free = {"main memory": available_memory()}
    if device != "cpu":
        free[device] = torch.cuda.mem_get_info(device)[0]
        if needed <= GPU_SHARE * free[device]:
            return device
        _log.info(
            "%s are too much for %s, which has %s free: they go to main memory",
            size(needed),
            device,
            size(free[device]),
        )
    if needed <= FITS_SHARE * free["main memory"]:
        return "cpu"
    have = ", ".join(f"{name} has {size(value)} free" for name, value in free.items())
    raise UsageError(
        f"the tokens of this run are {size(needed)}, too much to be held in memory: {have}",
        where="resident",
        fix="read them from the files (no `resident`), extract with --dtype int8, or take fewer "
        "tokens (`tokens`, `text_tokens`)",
    )


def hold(reader: RowReader, rows: Int64[np.ndarray, " N"], reading: Reading, device: str) -> Held:
    """Read rows of one set into memory, once, a few at a time.

    Args:
        reader: Of the files.
        rows: Which rows, ascending, each once.
        reading: Threads and bounds.
        device: Whose memory.

    Raises:
        CacheError: A row was quarantined.
    """
    counts = reader.counts(rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    some = torch.from_numpy(np.empty(0, reader.dtype))
    tokens = torch.zeros(int(starts[-1]) + 1, reader.dim, dtype=some.dtype, device=device)
    scales = None
    if reader.is_int8:
        scales = torch.zeros(len(tokens), dtype=torch.float16, device=device)
    longest = max(1, int(counts.max(initial=0))) * reader.token_bytes
    step = max(1, min(len(rows), PIECE_BYTES // longest))
    ring = Ring([reader], [rows], step, reading)
    cuts = range(0, len(rows), step)
    requests = (Request(part, (part,), at) for at in cuts for part in [rows[at : at + step]])
    done, channels, overflow = 0, None, False
    with closing(ring.run(requests)) as results:
        for _, (filled,) in results:
            here = slice(done, done + int(filled.valid.sum()))
            stored = filled.tokens
            if isinstance(stored, Int8Tokens):
                if scales is not None:
                    scales[here] = stored.scale_token[filled.valid].to(device)
                channels = stored.scale_channel
                overflow |= may_overflow(stored.scale_token, channels)
                stored = stored.values
            tokens[here] = stored[filled.valid].to(device)
            done = here.stop
    channels = None if channels is None else channels.to(device)
    return Held(rows, starts, tokens, scales, channels, overflow)
