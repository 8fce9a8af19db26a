"""Which tokens of one feature set's rows are read, and where they lie."""

import contextlib
import resource
import threading
import weakref
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float16, Int64, Num

from featcache.cache.reader import FeatureSet
from featcache.cache.row_table import RowTable
from featcache.errors import CacheError, UsageError
from featcache.loader.sources import MappedShard, ReadShard, RowPlan, Sources, TableRows, fill_rows

TOKENS_PATTERN = r"^(all|prefix|grid|pooled|random:[1-9][0-9]*)$"


class RowReader:
    """Rows of one feature set, under a token budget, for one process.

    Args:
        features: The set.
        io: `mmap` or `pread`, from `choose_io`.
        tokens: `all`; `pooled`, the encoder's own vector as the only token; and for image sets
            `prefix`, `grid` (patch tokens alone), or `random:N` (prefix tokens and N patch tokens,
            drawn anew for each batch). Text sets give all their tokens under an image's budget.
            Only the bytes that are needed are read.
        text_tokens: The first tokens of each text that are read at most; None reads all.
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
        text_tokens: int | None = None,
        seed: int = 0,
        populate: bool = False,
    ):
        self.features = features
        self.io = io
        self._seed = seed
        budget, _, count = tokens.partition(":")
        self._budget = "all" if features.spec.modality == "text" and budget != "pooled" else budget
        self._count = int(count or 0)
        self._limit = text_tokens if features.spec.modality == "text" else None
        self._check_budget()
        self._files: dict[int, ReadShard] = {}
        self._lock = threading.Lock()
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
            target=_populate,
            args=(self._table("tokens") or self.features, self.features.num_shards, stop),
            name="featcache-populate",
            daemon=True,
        ).start()

    @property
    def dim(self) -> int:
        """Width of a token."""
        spec = self.features.spec
        return spec.pooled_dim or 0 if self._budget == "pooled" else spec.dim

    @property
    def is_int8(self) -> bool:
        """Whether the buffer holds int8, to be dequantised; pooled vectors are always floats."""
        return self.features.spec.dtype == "int8" and self._budget != "pooled"

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the buffer holds: tokens as they are stored, float16 for pooled vectors."""
        return np.dtype("float16" if self._budget == "pooled" else self.features.spec.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the buffer, its scale included."""
        return self.dim * self.dtype.itemsize + (2 if self.is_int8 else 0)

    def counts(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Tokens of each row, as far as the budget allows.

        Args:
            rows: Row numbers in the set.
        """
        spec = self.features.spec
        counts: Int64[np.ndarray, " B"]
        if self._budget == "all" and spec.num_tokens is None:
            counts = self.features.lengths[rows]
        else:
            each = {
                "all": spec.num_tokens or 0,
                "prefix": spec.num_prefix_tokens,
                "grid": self._patches,
                "random": spec.num_prefix_tokens + self._count,
                "pooled": 1,
            }[self._budget]
            counts = np.full(len(rows), each, dtype=np.int64)
        if self._limit is not None and self._budget == "all":
            counts = np.minimum(counts, self._limit)
        return counts

    def plan(self, rows: Int64[np.ndarray, " B"], *, position: int = 0) -> RowPlan:
        """Check rows and look up where they lie; in any thread.

        Args:
            rows: Row numbers in the set, any order, repeats allowed.
            position: Of the batch in the run; with the seed it decides a random budget.

        Raises:
            CacheError: A row lies outside the set, or was quarantined.
        """
        shards, local = self.features.shard_of(rows)
        self._refuse_quarantined(rows)
        shards, first = self._locate(rows, shards, local)
        counts = self.counts(rows)
        width = int(counts.max(initial=0))
        valid = np.arange(width) < counts[:, None]  # B T
        plan = RowPlan(rows, shards, first, counts, self.draw_runs(position), width, valid)
        scales = self._sources("scale_token", plan) if self.is_int8 else {}
        return replace(plan, sources=self._sources("tokens", plan), scales=scales)

    def _locate(
        self,
        rows: Int64[np.ndarray, " B"],
        shards: Int64[np.ndarray, " B"],
        local: Int64[np.ndarray, " B"],
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Source of each row, and its first token there."""
        spec = self.features.spec
        if spec.num_tokens is None:
            return shards, self.features.offsets[rows]
        skipped = spec.num_prefix_tokens if self._budget == "grid" else 0
        return shards, local * spec.num_tokens + skipped

    def _refuse_quarantined(self, rows: Int64[np.ndarray, " B"]) -> None:
        bad = rows[~self.features.valid[rows]]
        if bad.size:
            raise CacheError(
                f"{bad.size} of these rows have no features, since their input could not be read; "
                f"the first is row {bad[0]}, key {self.features.keys[bad[0]]}",
                where=self.features.folder,
                fix="leave out the rows whose `valid` is False",
            )

    def draw_runs(self, position: int) -> tuple[tuple[int, int], ...] | None:
        """All prefix tokens and this batch's patch tokens, in ascending order, as runs.

        Args:
            position: Of the batch in the run.

        Returns:
            First token and length of each run; None unless the budget is random.
        """
        if self._budget != "random":
            return None
        prefix = self.features.spec.num_prefix_tokens
        generator = np.random.Philox(key=np.array([self._seed, position], dtype=np.uint64))
        drawn = np.argsort(generator.random_raw(self._patches), kind="stable")[: self._count]
        columns = np.concatenate([np.arange(prefix), prefix + np.sort(drawn)])
        pieces = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
        return tuple((int(piece[0]), len(piece)) for piece in pieces)

    def _sources(self, name: str, plan: RowPlan) -> Sources:
        """What `tokens` or `scale_token` are copied from."""
        table = self._table(name)
        if table is None:
            opened = self._open if name == "tokens" else self._scales
            return {number: opened(number) for number in set(plan.shards.tolist())}
        if self._is_whole:
            rows = plan.first // (self.features.spec.num_tokens or 1)
            return TableRows(table, table.locate(plan.shards, rows))
        runs = plan.runs or ((0, plan.width),)
        columns = np.concatenate([np.arange(start, start + length) for start, length in runs])
        places = table.locate(plan.shards, plan.first)[:, None] + columns
        return TableRows(table, np.where(plan.valid, places, table.zero))

    @property
    def _is_whole(self) -> bool:
        """Whether all tokens of rows are read that have equally many."""
        return self._budget == "all" and self._limit is None and bool(self.features.spec.num_tokens)

    def _table(self, name: str) -> RowTable | None:
        """The whole set's rows, or tokens, as one array; None where it is read another way."""
        if self.io != "mmap" or self._budget == "pooled":
            return None
        return self.features.row_table(name, by_token=not self._is_whole)

    def _open(self, number: int) -> MappedShard | ReadShard:
        """One shard's tokens; the set itself bounds how many maps there are, we the open files."""
        if self.io == "mmap":
            return MappedShard(self.features.tokens_map(number))
        with self._lock:
            if number not in self._files:
                keep_open = len(self._files) < self._max_files
                self._files[number] = ReadShard(self.features, number, keep_open=keep_open)
            return self._files[number]

    def _scales(self, number: int) -> MappedShard:
        """Token scales of one shard, as tokens of one number."""
        return MappedShard(self.features.scale_map(number).reshape(-1, 1))

    def fill(
        self,
        plan: RowPlan,
        part: slice,
        out: Num[np.ndarray, "B T D"],
        scales: Float16[np.ndarray, "B T"] | None = None,
    ) -> None:
        """Copy some rows of a plan into a buffer, padded with zeros; in any thread.

        Args:
            plan: From `plan`.
            part: Which of the plan's rows.
            out: Their places in the buffer, of `self.dtype`; the old content is lost.
            scales: Where the token scales of an int8 set go.
        """
        if self._budget == "pooled":
            self._fill_pooled(plan, part, out)
        else:
            fill_rows(plan, part, plan.sources, out)
        if scales is not None:
            fill_rows(plan, part, plan.scales, scales[..., None])

    def _fill_pooled(self, plan: RowPlan, part: slice, out: Float16[np.ndarray, "B 1 E"]) -> None:
        """Pooled vectors of some rows."""
        out[:, 0] = self.features.pooled(plan.rows[part])


def _populate(mapped: RowTable | FeatureSet, num_shards: int, stop: threading.Event) -> None:
    """Populate map after map until told to stop; whoever reads a damaged shard reports it."""
    for number in range(num_shards):
        with contextlib.suppress(CacheError):
            if stop.is_set() or not mapped.populate(number):
                return
