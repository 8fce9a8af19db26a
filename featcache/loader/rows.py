"""How rows of one feature set get from their shards into a reused buffer."""

import contextlib
import os
import resource
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, Num

from featcache.cache.format import FLOAT16_MAX
from featcache.cache.header import REPAIR_HINT
from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError, ShardError, UsageError

TOKENS_PATTERN = r"^(all|prefix|grid|pooled|random:[1-9][0-9]*)$"
TORCH_GRAIN = 32_767
"""Numbers in a tensor up to which torch works in the calling thread alone."""


class MappedShard:
    """Tokens of a shard through its memory map: from memory where they are there, else from disk.

    Args:
        tokens: N L D or S D, as `FeatureSet.tokens_map` gives it.
    """

    def __init__(self, tokens: Num[np.ndarray, "*shape"]):
        self._tokens = tokens.reshape(-1, tokens.shape[-1])

    def read(self, first: int, out: Num[np.ndarray, "T D"]) -> None:
        """Copy a run of tokens; numpy lets other threads run meanwhile."""
        out[...] = self._tokens[first : first + len(out)]


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

    def read(self, first: int, out: Num[np.ndarray, "T D"]) -> None:
        """Read a run of tokens at its place in the file."""
        if not out.size:
            return
        place = self._place
        start = place.offset + first * place.shape[-1] * place.dtype.itemsize
        target = out.data.cast("B")
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
        sources: The shards that hold these rows.
    """

    rows: Int64[np.ndarray, " B"]
    shards: Int64[np.ndarray, " B"]
    first: Int64[np.ndarray, " B"]
    counts: Int64[np.ndarray, " B"]
    runs: tuple[tuple[int, int], ...] | None
    width: int
    valid: Bool[np.ndarray, "B T"]
    sources: Mapping[int, MappedShard | ReadShard]


class RowReader:
    """Rows of one feature set, under a token budget, for one process.

    Args:
        features: The set.
        io: `mmap` or `pread`, from `choose_io`.
        tokens: `all`; `pooled`, the encoder's own vector as the only token; and for image sets
            `prefix`, `grid` (patch tokens alone), or `random:N` (prefix tokens and N patch tokens,
            drawn anew for each batch). Text sets give all their tokens under an image's budget.
            Only the bytes that are needed are read.
        seed: Of the random budget.
        populate: Whether to bring maps into memory in the background; worth it for rows that are
            read again and again, since the first touch of each page costs a page fault.

    Raises:
        UsageError: The set does not have what the budget asks for.
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        io: Literal["mmap", "pread"],
        tokens: str,
        seed: int = 0,
        populate: bool = False,
    ):
        self.features = features
        self._io = io
        self._seed = seed
        budget, _, count = tokens.partition(":")
        self._budget = "all" if features.spec.modality == "text" and budget != "pooled" else budget
        self._count = int(count or 0)
        self._check_budget()
        self._files: dict[int, ReadShard] = {}
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_files = soft_limit // 4 if soft_limit > 0 else 1024
        if populate and io == "mmap" and self._budget in ("all", "grid"):
            self._populate()

    @property
    def _patches(self) -> int:
        grid = self.features.spec.grid
        return 0 if grid is None else grid[0] * grid[1]

    def _check_budget(self) -> None:
        spec = self.features.spec
        lacking = {
            "prefix": "" if spec.num_prefix_tokens else "no prefix tokens",
            "grid": "" if self._patches else "no grid of patch tokens",
            "random": "" if self._count <= self._patches else f"only {self._patches} patch tokens",
            "pooled": "" if spec.pooled_dim else "no pooled vectors",
        }.get(self._budget)
        if lacking:
            raise UsageError(
                f"the token budget is `{self._budget}`, but {spec.title} has {lacking}",
                where=self.features.folder,
                fix="the budget `all`",
            )

    def _populate(self) -> None:
        """Start the thread that populates the maps; it ends with this reader."""
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        threading.Thread(
            target=_populate, args=(self.features, stop), name="featcache-populate", daemon=True
        ).start()

    @property
    def dim(self) -> int:
        """Width of a token."""
        spec = self.features.spec
        return spec.pooled_dim or 0 if self._budget == "pooled" else spec.dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the buffer holds: float32 for float32 sets, else float16 (int8 is dequantised)."""
        is_wide = self.features.spec.dtype == "float32" and self._budget != "pooled"
        return np.dtype(np.float32 if is_wide else np.float16)

    def width(self, rows: Int64[np.ndarray, " N"]) -> int:
        """Tokens of the longest of these rows, as far as the budget allows."""
        spec = self.features.spec
        if self._budget == "all" and spec.num_tokens is None:
            return int(self.features.lengths[rows].max(initial=0))
        return {
            "all": spec.num_tokens or 0,
            "prefix": spec.num_prefix_tokens,
            "grid": self._patches,
            "random": spec.num_prefix_tokens + self._count,
            "pooled": 1,
        }[self._budget]

    def plan(self, rows: Int64[np.ndarray, " B"], *, position: int = 0) -> RowPlan:
        """Check rows and look up where they lie; in the consumer's thread.

        Args:
            rows: Row numbers in the set, any order, repeats allowed.
            position: Of the batch in the run; with the seed it decides a random budget.

        Raises:
            CacheError: A row lies outside the set, or was quarantined.
        """
        spec = self.features.spec
        shards, local = self.features.shard_of(rows)
        self._refuse_quarantined(rows)
        width = self.width(rows)
        first, counts = local * (spec.num_tokens or 0), np.full_like(rows, width)
        if self._budget == "grid":
            first += spec.num_prefix_tokens
        elif spec.num_tokens is None and self._budget == "all":
            first, counts = self.features.offsets[rows], self.features.lengths[rows]
        valid = np.arange(width) < counts[:, None]  # B T
        runs = self._draw_runs(position) if self._budget == "random" else None
        sources = {number: self._open(number) for number in np.unique(shards).tolist()}
        return RowPlan(rows, shards, first, counts, runs, width, valid, sources)

    def _refuse_quarantined(self, rows: Int64[np.ndarray, " B"]) -> None:
        bad = rows[~self.features.valid[rows]]
        if bad.size:
            raise CacheError(
                f"{bad.size} of these rows have no features, since their input could not be read; "
                f"the first is row {bad[0]}, key {self.features.keys[bad[0]]}",
                where=self.features.folder,
                fix="leave out the rows whose `valid` is False",
            )

    def _draw_runs(self, position: int) -> tuple[tuple[int, int], ...]:
        """All prefix tokens and this batch's patch tokens, in ascending order, as runs."""
        prefix = self.features.spec.num_prefix_tokens
        generator = np.random.Philox(key=np.array([self._seed, position], dtype=np.uint64))
        drawn = np.argsort(generator.random_raw(self._patches), kind="stable")[: self._count]
        columns = np.concatenate([np.arange(prefix), prefix + np.sort(drawn)])
        pieces = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
        return tuple((int(piece[0]), len(piece)) for piece in pieces)

    def _open(self, number: int) -> MappedShard | ReadShard:
        """One shard's tokens; the set itself bounds how many maps there are, we the open files."""
        if self._io == "mmap":
            return MappedShard(self.features.tokens_map(number))
        if number not in self._files:
            keep_open = len(self._files) < self._max_files
            self._files[number] = ReadShard(self.features, number, keep_open=keep_open)
        return self._files[number]

    def fill(self, plan: RowPlan, part: slice, out: Float[np.ndarray, "B T D"]) -> None:
        """Copy some rows of a plan into a buffer, padded with zeros; in any thread.

        Args:
            plan: From `plan`.
            part: Which of the plan's rows.
            out: Their places in the buffer, of `self.dtype`; the old content is lost.

        Raises:
            CacheError: A dequantised value exceeds float16.
        """
        if self._budget == "pooled":
            out[:, 0] = self.features.pooled(plan.rows[part])
        elif self.features.spec.dtype == "int8":
            self._fill_dequantised(plan, part, out)
        else:
            places = _places(plan, part)
            for target, (shard, first, count) in zip(out, places, strict=True):
                _read_row(plan, shard, first, target[:count])
                target[count:] = 0

    def _fill_dequantised(
        self, plan: RowPlan, part: slice, out: Float16[np.ndarray, "B T D"]
    ) -> None:
        """`fill` for int8 sets, a few tokens at a time, in scratch that stays in the CPU cache.

        torch casts to float16 thirty times faster than numpy, but shares larger pieces among
        threads of its own, which this thread must not start.
        """
        raw = np.empty(out.shape[1:], dtype=np.int8)  # T D
        channels = torch.from_numpy(np.array(self.features.scale_channel))  # D
        step = max(1, TORCH_GRAIN // self.dim)
        wide = torch.empty(step, self.dim)
        places = _places(plan, part)
        for target, (shard, first, count) in zip(out, places, strict=True):
            _read_row(plan, shard, first, raw[:count])
            scales = self._scales(plan, shard, first, count)
            for start in range(0, count, step):
                here = slice(start, min(start + step, count))
                piece = wide[: here.stop - start].copy_(torch.from_numpy(raw[here]))
                piece.mul_(torch.from_numpy(scales[here])).mul_(channels)
                torch.from_numpy(target[here]).copy_(piece)
            target[count:] = 0
            largest = 127 * float(scales.max(initial=0)) * float(channels.max())
            if largest > FLOAT16_MAX and np.isinf(target).any():
                raise CacheError(
                    f"a token of this int8 set is larger than {FLOAT16_MAX:.0f}, which float16 "
                    "cannot hold",
                    where=self.features.shards[shard].path,
                    fix="extract the set with --dtype float32",
                )

    def _scales(
        self, plan: RowPlan, shard: int, first: int, count: int
    ) -> Float32[np.ndarray, "T 1"]:
        """The token scales of one row, as a column."""
        scales = self.features.scale_map(shard).reshape(-1)
        runs = plan.runs or ((0, count),)
        picked = [scales[first + start : first + start + length] for start, length in runs]
        column: Float32[np.ndarray, "T 1"] = np.concatenate(picked).astype(np.float32)[:, None]
        return column


def _places(plan: RowPlan, part: slice) -> Iterator[tuple[int, int, int]]:
    """Shard, first token and number of tokens of each row, as Python's numbers."""
    columns = (plan.shards[part], plan.first[part], plan.counts[part])
    return zip(*(column.tolist() for column in columns), strict=True)


def _read_row(plan: RowPlan, shard: int, first: int, out: Num[np.ndarray, "T D"]) -> None:
    """Read one row: its only run of tokens, or all runs of the budget."""
    source = plan.sources[shard]
    if plan.runs is None:
        source.read(first, out)
        return
    done = 0
    for start, length in plan.runs:
        source.read(first + start, out[done : done + length])
        done += length


def _populate(features: FeatureSet, stop: threading.Event) -> None:
    """Populate map after map until told to stop; whoever reads a damaged shard reports it."""
    for number in range(features.num_shards):
        with contextlib.suppress(CacheError):
            if stop.is_set() or not features.populate(number):
                return
