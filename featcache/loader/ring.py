"""A ring of reused buffers that threads fill ahead of the consumer."""

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, Num
from pydantic import Field, PositiveInt
from torch import Tensor

from featcache.cache.reader import FeatureSet
from featcache.config import Config
from featcache.console import size
from featcache.errors import UsageError
from featcache.loader.batch import Int8Tokens, may_overflow
from featcache.loader.rows import TOKENS_PATTERN, RowReader
from featcache.loader.sources import RowPlan

MIN_READ_THREADS = 8
"""Threads that read by `pread` at least: one request at a time leaves a disk idle."""
MIN_PART_BYTES = 256 * 2**10
"""Below this it costs more to share a piece of work among threads than to do it."""
FITS_SHARE = 0.8
"""Share of the available memory up to which tokens are mapped instead of read."""

_log = logging.getLogger("featcache.loader")


class Reading(Config):
    """How tokens get from disk to the consumer, and which tokens of a row."""

    threads: int = Field(2, ge=1, le=256, description="Threads that fill buffers.")
    prefetch: int = Field(2, ge=0, le=64, description="Batches that are filled ahead.")
    buffer_mb: PositiveInt = Field(
        512, description="Bound of all buffers, in 2**20 bytes; two batches are held at least."
    )
    io: Literal["auto", "mmap", "pread"] = Field(
        "auto", description="Memory maps, `pread`, or maps as long as the tokens fit in memory."
    )
    tokens: str = Field(
        "all",
        pattern=TOKENS_PATTERN,
        description="all | prefix | grid | pooled | random:N; see `RowReader`.",
    )
    text_tokens: PositiveInt | None = Field(
        None, description="Read the first tokens of each text alone, at most so many."
    )
    locality_block: PositiveInt | None = Field(
        None, description="Shuffle blocks of that many pairs, for disks slow at random access."
    )
    length_window: PositiveInt | None = Field(
        None,
        description="Batches that are sorted by text length together, so that less is padding.",
    )
    resident: str | None = Field(
        None,
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="Device whose memory holds the sets; main memory where they do not fit.",
    )


def available_memory() -> int:
    """Bytes that this process can still use: the machine's, or less in a container.

    The page cache counts as available, so tokens that are cached already do not speak against
    mapping them.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return min(int(found[1]) * 1024, _container_memory())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _container_memory() -> int:
    """What a control group (version 2) leaves; more than any machine has where there is none."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # the limit may read `max`
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        return max(0, limit - used + (int(cached[1]) if cached else 0))
    return 2**63


def choose_io(
    sets: Sequence[FeatureSet],
    io: Literal["auto", "mmap", "pread"],
    *,
    aloud: bool = False,
) -> Literal["mmap", "pread"]:
    """Decide how tokens are read, and log it.

    Args:
        sets: All sets that are read together.
        io: `auto` maps when the tokens of all sets fit in the available memory.
        aloud: Log it at level INFO; else only where it is not the fast way.
    """
    if io != "auto":
        return io
    places = [features.token_place(n) for features in sets for n in range(features.num_shards)]
    wanted = sum(int(np.prod(place.shape)) * place.dtype.itemsize for place in places)
    available = available_memory()
    fits = wanted <= FITS_SHARE * available
    _log.log(
        logging.DEBUG if fits and not aloud else logging.INFO,
        "tokens of %s: %s, available memory: %s; %s",
        " and ".join(features.spec.title for features in sets),
        size(wanted),
        size(available),
        "they are mapped" if fits else "they would not stay in memory, so they are read by pread",
    )
    return "mmap" if fits else "pread"


def open_readers(
    sets: Sequence[FeatureSet], reading: Reading, *, seed: int = 0, is_training: bool = False
) -> list[RowReader]:
    """A reader for each set, all with the same way of reading.

    Args:
        sets: Sets that are read together.
        reading: Way of reading and token budgets.
        seed: Of a random token budget.
        is_training: Whether rows are read again and again: maps are then brought into memory in
            the background, and the way of reading is logged aloud.

    Raises:
        UsageError: A set does not have what the budget asks for.
    """
    io = choose_io(sets, reading.io, aloud=is_training)
    return [
        RowReader(
            one,
            io=io,
            tokens=reading.tokens,
            text_tokens=reading.text_tokens,
            seed=seed,
            populate=is_training,
        )
        for one in sets
    ]


@dataclass(frozen=True)
class Request:
    """One batch to fill.

    Attributes:
        numbers: What the consumer calls these rows: pair numbers, or the rows themselves.
        rows: Rows to read, for each feature set.
        position: Of the batch in the run; decides a random token budget.
    """

    numbers: Int64[np.ndarray, " B"]
    rows: tuple[Int64[np.ndarray, " B"], ...]
    position: int


@dataclass(frozen=True)
class Filled:
    """What one feature set's rows became.

    Attributes:
        tokens: Views of a buffer, valid until the next batch is asked for; as stored.
        valid: True at real tokens, False where a shorter row is padded.
    """

    tokens: Float[Tensor, "B T D"] | Int8Tokens
    valid: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class _Buffer:
    """Memory for one feature set's rows of one batch.

    Attributes:
        tokens: As stored, end to end.
        scales: Token scales of an int8 set, end to end; empty for others.
    """

    tokens: Num[Tensor, " size"]
    scales: Float16[Tensor, " count"]
    dim: int
    is_int8: bool

    @classmethod
    def of(cls, reader: RowReader, num_tokens: int, *, pinned: bool) -> "_Buffer":
        """Room for so many tokens of a set."""
        tokens = _allocate(num_tokens * reader.dim, reader.dtype, pinned=pinned)
        count = num_tokens if reader.is_int8 else 0
        scales = _allocate(count, np.dtype(np.float16), pinned=pinned)
        return cls(tokens, scales, reader.dim, reader.is_int8)

    def tensors(self, plan: RowPlan) -> tuple[Num[Tensor, "B T D"], Float16[Tensor, "B T"] | None]:
        """The part that a batch needs, in its shape; scales of int8 sets alone."""
        rows = (len(plan.rows), plan.width)
        shape = (*rows, self.dim)
        scales = self.scales[: prod(rows)].view(rows) if self.is_int8 else None
        return self.tokens[: prod(shape)].view(shape), scales

    def arrays(
        self, plan: RowPlan
    ) -> tuple[Num[np.ndarray, "B T D"], Float16[np.ndarray, "B T"] | None]:
        """The same, for threads that fill it."""
        tokens, scales = self.tensors(plan)
        return tokens.numpy(), None if scales is None else scales.numpy()


class _Slot:
    """The buffers of one batch, one per feature set."""

    def __init__(self, readers: Sequence[RowReader], counts: Sequence[int], *, pinned: bool):
        self.buffers = [
            _Buffer.of(reader, count, pinned=pinned)
            for reader, count in zip(readers, counts, strict=True)
        ]
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Mark the moment after which the consumer starts no copy from these buffers any more."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Wait until copies to the GPU that were under way at `release` are done."""
        if self._copied is not None:
            self._copied.synchronize()


class _Job:
    """A batch that threads work on.

    One thread plans it, hands parts to others where there are more threads than batches in work,
    and fills what is left. The consumer's thread does as little as possible: Python's share of a
    batch is slow right after copies that swept the processor's caches, and it takes a core from
    the threads that copy.
    """

    def __init__(self, readers: Sequence[RowReader], slot: _Slot, request: Request, shares: int):
        self.slot = slot
        self.request = request
        self.plans: list[RowPlan] = []
        self._readers = readers
        self._shares = shares
        self._pieces: list[Future[None]] = []

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Hand it to the threads."""
        self._pieces.append(pool.submit(self._work, pool))

    def wait(self) -> None:
        """Wait until it is filled, or raise what went wrong."""
        for piece in self._pieces:  # the first has added all others when it is done
            piece.result()

    def _work(self, pool: ThreadPoolExecutor) -> None:
        self.slot.wait()
        mine = []
        for reader, buffer, rows in zip(
            self._readers, self.slot.buffers, self.request.rows, strict=True
        ):
            plan = reader.plan(rows, position=self.request.position)
            self.plans.append(plan)
            out, scales = buffer.arrays(plan)
            first, *others = self._parts(len(rows), out.nbytes)
            for part in others:
                self._pieces.append(pool.submit(_fill, reader, plan, part, out, scales))
            mine.append((reader, plan, first, out, scales))
        for piece in mine:
            _fill(*piece)

    def _parts(self, num_rows: int, size_bytes: int) -> list[slice]:
        """Cut a batch's rows into one piece per thread, fewer where they would be tiny."""
        count = max(1, min(self._shares, num_rows, size_bytes // MIN_PART_BYTES))
        return [slice(a, b) for a, b in pairwise(num_rows * n // count for n in range(count + 1))]


class Ring:
    """Buffers for a few batches of rows from one or more feature sets, for one process.

    Memory is bound by `buffer_mb` however large the sets are, and is allocated once. When two
    batches alone exceed the bound, two are held, and `prefetch` shrinks to one.

    Args:
        readers: One for each feature set.
        rows: All rows that will be asked for, of each set; only their longest text matters.
        batch_size: Rows of the largest batch.
        reading: Threads, prefetch, bound on memory.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        rows: Sequence[Int64[np.ndarray, " N"]],
        batch_size: int,
        reading: Reading,
    ):
        self._readers = readers
        reads = any(reader.io == "pread" for reader in readers)
        self._threads = max(reading.threads, MIN_READ_THREADS if reads else 1)
        counts = [
            batch_size * int(reader.counts(some).max(initial=0))
            for reader, some in zip(readers, rows, strict=True)
        ]
        batch_bytes = sum(
            count * reader.token_bytes for count, reader in zip(counts, self._readers, strict=True)
        )
        fitting = max(2, reading.buffer_mb * 2**20 // max(1, batch_bytes))
        # One more than are handed out or filled, so that a copy to a GPU need not be waited for.
        num_slots = min(reading.prefetch + 2, fitting)
        self._ahead = min(reading.prefetch, num_slots - 1)
        self._shares = -(-self._threads // (self._ahead + 1))  # threads for each batch in work
        pinned = _can_pin()
        self._slots = [_Slot(self._readers, counts, pinned=pinned) for _ in range(num_slots)]
        self._channels = [_channels(one, pinned=pinned) for one in readers]

    def run(
        self, requests: Iterator[Request]
    ) -> Generator[tuple[Request, list[Filled]], None, None]:
        """Fill batches in order, a few of them ahead.

        Threads end when this generator does: at its last batch, when it is closed or collected as
        garbage, or at an error.

        Args:
            requests: Asked for one by one in the consumer's thread, ahead of what it gets.

        Yields:
            Each request and what its rows became, per feature set.

        Raises:
            FeatcacheError: What went wrong in a thread, when its batch is due.
            UsageError: The process is a fork of the one that started.
        """
        owner = os.getpid()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="featcache-loader")
        waiting: deque[_Job] = deque()
        started = 0
        try:
            while True:
                for request in islice(requests, self._ahead + 1 - len(waiting)):
                    slot = self._slots[started % len(self._slots)]
                    waiting.append(_Job(self._readers, slot, request, self._shares))
                    waiting[-1].start(pool)
                    started += 1
                if not waiting:
                    return
                job = waiting.popleft()
                job.wait()
                yield job.request, self._filled(job)
                _refuse_fork(owner)
                job.slot.release()
        finally:
            if os.getpid() == owner:
                pool.shutdown(wait=True, cancel_futures=True)

    def _filled(self, job: _Job) -> list[Filled]:
        """What a finished batch's rows became."""
        filled = []
        for reader, buffer, plan, channels in zip(
            self._readers, job.slot.buffers, job.plans, self._channels, strict=True
        ):
            stored, scales = buffer.tensors(plan)
            tokens: Tensor | Int8Tokens = stored
            if scales is not None and channels is not None:
                overflow = may_overflow(scales, channels)
                title = str(reader.features.folder)
                tokens = Int8Tokens(stored, scales, channels, overflow, title)
            filled.append(Filled(tokens, torch.from_numpy(plan.valid)))
        return filled


def _fill(
    reader: RowReader,
    plan: RowPlan,
    part: slice,
    out: Num[np.ndarray, "B T D"],
    scales: Float16[np.ndarray, "B T"] | None,
) -> None:
    """One piece of a thread's work."""
    reader.fill(plan, part, out[part], None if scales is None else scales[part])


def _allocate(count: int, dtype: np.dtype[Any], *, pinned: bool) -> Num[Tensor, " count"]:
    """Memory for so many numbers, in large pages and from a multiple of 64 bytes on.

    numpy asks for large pages, but its large arrays start 16 bytes off: copying rows there takes a
    quarter more time. torch's small pages cost a tenth.
    """
    if pinned:
        some = torch.from_numpy(np.empty(0, dtype))
        return torch.empty(count, dtype=some.dtype, pin_memory=True)
    size_bytes = count * dtype.itemsize
    memory = np.empty(size_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size_bytes].view(dtype))


def _channels(reader: RowReader, *, pinned: bool) -> Float32[Tensor, " D"] | None:
    """The channel scales of an int8 set, ready to be copied to a GPU."""
    channel_scale = reader.features.scale_channel
    if channel_scale is None or not reader.is_int8:
        return None
    channels = torch.from_numpy(channel_scale.copy())
    return channels.pin_memory() if pinned else channels


def _refuse_fork(owner: int) -> None:
    """Raise in a process that inherited a half-done pass, instead of waiting for ever."""
    if os.getpid() != owner:
        raise UsageError(
            "the process was forked in the middle of a pass, whose threads the fork has not",
            fix="start a new pass in the new process: iter(loader)",
        )


def _can_pin() -> bool:
    """Whether there is a GPU whose driver this process may use; a fork of a user may not."""
    return torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()
