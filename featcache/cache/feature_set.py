"""A feature set as one table of rows, read without libhdf5."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Bool, Float16, Float32, Int64, Num, Shaped, UInt64

from featcache.cache import mapping
from featcache.cache.folder import read_quality
from featcache.cache.format import FeatureSetSpec, ShardPlan, dequantise, read_plan, read_spec
from featcache.cache.header import REPAIR_HINT
from featcache.cache.row_table import RowTable
from featcache.cache.shard import Shard
from featcache.errors import CacheError, ShardError

MAX_MAPS = 4_096
"""Arrays mapped at a time; far below the 65,530 maps that Linux gives a process."""


@dataclass(frozen=True)
class TokenPlace:
    """Where a shard's tokens lie, for readers that use `pread`.

    Attributes:
        path: The file.
        offset: First byte of row 0, counted from the start of the file.
        shape: N L D, or S D for ragged rows.
        dtype: As stored.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class FeatureSet:
    """All complete shards of one set as one table of rows.

    It holds no file descriptor, so a thousand shards open under `ulimit -n 64`. It can be pickled
    and forked: the other process maps files anew. Arrays are read when first asked for, and their
    checksums compared then. Only a row's tokens are not compared, unless `read_tokens` is asked to.

    Attributes:
        folder: The set's folder.
        spec: How its rows were made.
        shards: Its complete shards, in the order of their numbers.
        starts: First row of each shard and, last, the number of rows.
    """

    def __init__(self, folder: Path, spec: FeatureSetSpec, shards: list[Shard]):
        self.folder, self.spec, self.shards = folder, spec, shards
        counts = [shard.header.num_rows for shard in shards]
        self.starts: Int64[np.ndarray, " starts"] = np.cumsum([0, *counts], dtype=np.int64)
        self._forget_maps()

    @classmethod
    def open(cls, folder: Path | str, *, allow_partial: bool = False) -> "FeatureSet":
        """Open a set by the headers of its shards.

        Args:
            folder: Holds `feature_set.json`.
            allow_partial: Whether to go on with the shards that are complete. Row numbers then
                count the rows of these alone.

        Raises:
            CacheError: It is no feature set, or shards are missing.
            ShardError: A shard is damaged, or is not the planned one.
        """
        folder = Path(folder)
        spec = read_spec(folder)
        shards, missing = [], 0
        for plan in read_plan(folder).shards:
            path = folder / plan.file_name
            try:
                shards.append(open_planned(path, spec, plan))
            except ShardError:
                if path.exists() and not allow_partial:
                    raise
                missing += 1
        if missing and not allow_partial:
            raise CacheError(
                f"the feature set is not finished: {missing} of {missing + len(shards)} shards are "
                "missing",
                where=folder,
                fix=f"{spec.extract_command} goes on where it stopped",
            )
        return cls(folder, spec, shards)

    def __reduce__(self) -> tuple[Callable[..., "FeatureSet"], tuple[object, ...]]:
        return FeatureSet, (self.folder, self.spec, self.shards)

    @property
    def fingerprint(self) -> str:
        """The spec's fingerprint."""
        return self.spec.fingerprint

    @property
    def num_rows(self) -> int:
        """Rows of all shards, quarantined ones included."""
        return int(self.starts[-1])

    @property
    def num_shards(self) -> int:
        """Shards that are open."""
        return len(self.shards)

    @cached_property
    def keys(self) -> list[str]:
        """`key` (image sets) or `text_id` (text sets) of each row."""
        return [key for shard in self.shards for key in shard.read_keys()]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each key. For many keys at once, `open_cache` joins without it."""
        rows = {key: row for row, key in enumerate(self.keys)}
        if len(rows) != self.num_rows:
            raise ShardError(
                f"{self.num_rows - len(rows)} keys stand in the set twice", where=self.folder
            )
        return rows

    @cached_property
    def valid(self) -> Bool[np.ndarray, " N"]:
        """Which rows are real; the others are quarantined, their tokens zeros."""
        return self._joined("valid", bool)

    @cached_property
    def _token_ranges(self) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
        """First token of each row within its shard, and its number of tokens."""
        bounds = [shard.read_offsets() for shard in self.shards]
        empty = np.zeros(0, dtype=np.int64)
        first = np.concatenate([empty, *(bound[:-1] for bound in bounds)])
        return first, np.concatenate([empty, *(np.diff(bound) for bound in bounds)])

    @property
    def offsets(self) -> Int64[np.ndarray, " N"]:
        """First token of each row, counted in tokens of its own shard's `/tokens`."""
        return self._token_ranges[0]

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Number of tokens of each row."""
        return self._token_ranges[1]

    @cached_property
    def _checksums(self) -> UInt64[np.ndarray, " N"]:
        """XXH3-64 of each row's token bytes."""
        return self._joined("checksums", np.uint64)

    @cached_property
    def scale_channel(self) -> "Float32[np.ndarray, ' D'] | None":
        """Scale of each channel of an int8 set, None for other sets.

        Raises:
            ShardError: The shards do not share it.
        """
        if self.spec.dtype != "int8" or not self.shards:
            return None
        first, *others = (shard.read("scale_channel") for shard in self.shards)
        for shard, other in zip(self.shards[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise ShardError(
                    "the shard has another channel scale than shard 0", where=shard.path
                )
        return first

    @property
    def quality(self) -> dict[str, Any]:
        """Figures that were learnt about the set, from `quality.json`; may be empty."""
        return read_quality(self.folder)

    def shard_of(
        self, rows: Int64[np.ndarray, " B"]
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Where rows are.

        Args:
            rows: Rows of the set, in any order.

        Returns:
            The position of each row's shard in `shards`, and its row within that shard.

        Raises:
            CacheError: A row is outside the set.
        """
        if rows.size and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise CacheError(
                f"rows {rows.min()} to {rows.max()} were asked for, the set has {self.num_rows}",
                where=self.folder,
            )
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return shards, rows - self.starts[shards]

    def tokens_map(self, shard: int) -> Num[np.ndarray, "*shape"]:
        """Map a shard's tokens.

        Args:
            shard: Position in `shards`.

        Returns:
            Read-only N L D, or S D for ragged sets; float16, float32 or int8 as stored. The map
            stays valid as long as the array lives.
        """
        tokens: Num[np.ndarray, "*shape"] = self._map(shard, "tokens")
        return tokens

    def scale_map(self, shard: int) -> Float16[np.ndarray, "*shape"]:
        """Map the token scales of an int8 shard: N L, or S.

        Args:
            shard: Position in `shards`.

        Raises:
            CacheError: The set is not int8.
            ShardError: They are damaged.
        """
        if self.spec.dtype != "int8":
            raise CacheError(f"a {self.spec.dtype} set has no scales", where=self.folder)
        scales: Float16[np.ndarray, "*shape"] = self._map(shard, "scale_token")
        return scales

    def populate(self, shard: int) -> bool:
        """Read a shard's tokens into the page cache and this process's page table.

        Args:
            shard: Position in `shards`.

        Returns:
            False where the system does not know the call.
        """
        tokens = self.tokens_map(shard)
        return mapping.populate(tokens.reshape(-1).view(np.uint8))

    def row_table(self, name: str, *, by_token: bool) -> RowTable | None:
        """Rows of all shards as one array, for those who copy many at once.

        Args:
            name: `tokens`, or `scale_token` of an int8 set.
            by_token: Whether its rows are single tokens, or whole rows, which must be equally long.

        Returns:
            None where they cannot be brought into one array.
        """
        with self._locked():
            key = (name, by_token)
            if key not in self._tables:
                self._tables[key] = None
                if self.shards and (by_token or self.spec.num_tokens is not None):
                    with contextlib.suppress(ShardError):
                        self._tables[key] = RowTable(self.shards, name, by_token=by_token)
            return self._tables[key]

    def token_place(self, shard: int) -> TokenPlace:
        """Where a shard's tokens lie in its file.

        Args:
            shard: Position in `shards`.
        """
        place = self.shards[shard].header.places["tokens"]
        return TokenPlace(self.shards[shard].path, place.offset, place.shape, place.numpy_type)

    def read_tokens(
        self, rows: Int64[np.ndarray, " B"], *, verify: bool = False
    ) -> Num[np.ndarray, "*shape"]:
        """Read rows the plain way, one after another; the loader is the fast one.

        Args:
            rows: Rows of the set, in any order.
            verify: Whether to compare each row with its checksum.

        Returns:
            B L D; for ragged sets the rows' tokens one after another, S D, as `lengths` says.
            float16 and float32 as stored; int8 sets give float32.

        Raises:
            CacheError: A row is outside the set.
            ShardError: A row is damaged.
        """
        parts = list(self._read_rows(rows, verify))
        flat = np.concatenate(parts) if parts else np.zeros((0, self.spec.dim), self._float_type)
        if self.spec.num_tokens is None:
            return flat
        return flat.reshape(len(rows), self.spec.num_tokens, self.spec.dim)

    @property
    def _float_type(self) -> np.dtype[Any]:
        """Type of tokens as `read_tokens` gives them."""
        return np.dtype("float32" if self.spec.dtype == "int8" else self.spec.dtype)

    def _read_rows(
        self, rows: Int64[np.ndarray, " B"], verify: bool
    ) -> Iterator[Num[np.ndarray, "T D"]]:
        """Tokens of one row after the other."""
        shards, local = self.shard_of(rows)
        first, lengths = self._token_ranges
        for row, shard, within in zip(rows.tolist(), shards.tolist(), local.tolist(), strict=True):
            span = slice(int(first[row]), int(first[row] + lengths[row]))
            tokens = self.tokens_map(shard).reshape(-1, self.spec.dim)[span]
            if verify and xxhash.xxh3_64_intdigest(tokens.data) != self._checksums[row]:
                raise ShardError(
                    f"row {within} (`{self.keys[row]}`) is damaged: its checksum differs",
                    where=self.shards[shard].path,
                    fix=REPAIR_HINT,
                )
            if self.scale_channel is not None:
                scales = self.scale_map(shard).reshape(-1)[span]
                tokens = dequantise(tokens, scales, self.scale_channel)
            yield tokens

    def pooled(self, rows: Int64[np.ndarray, " B"]) -> Float16[np.ndarray, "B E"]:
        """Read the encoder's own pooled vectors.

        Args:
            rows: Rows of the set, in any order.

        Raises:
            CacheError: The encoder has none, or a row is outside the set.
            ShardError: They are damaged.
        """
        if self.spec.pooled_dim is None:
            raise CacheError(
                f"encoder `{self.spec.encoder}` has no pooled vector",
                where=self.folder,
                fix="use its tokens, e.g. their mean",
            )
        shards, local = self.shard_of(rows)
        out = np.empty((len(rows), self.spec.pooled_dim), dtype=np.float16)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            out[here] = self._map(shard, "pooled")[local[here]]
        return out

    def _joined(self, name: str, dtype: Any) -> Shaped[np.ndarray, " N"]:
        """One small array of all shards, end to end."""
        parts = [np.zeros(0, dtype), *(shard.read(name) for shard in self.shards)]
        return np.concatenate(parts)

    def _map(self, shard: int, name: str) -> Any:
        """A map of this process, the least recently used one given up beyond `MAX_MAPS`."""
        with self._locked():
            mapped = self._maps.get((shard, name))
            if mapped is None:
                unread = (shard, name) not in self._compared and name != "tokens"
                mapped = self.shards[shard].map(name, check=unread)
                self._compared.add((shard, name))
                self._maps[shard, name] = mapped
                if len(self._maps) > MAX_MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end((shard, name))
            return mapped

    def _locked(self) -> threading.Lock:
        """The lock over the maps of this process."""
        if self._pid != os.getpid():  # forked: another thread may have held the parent's lock
            self._forget_maps()
        return self._lock

    def _forget_maps(self) -> None:
        """Start without maps, in a new object or a new process."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._compared: set[tuple[int, str]] = set()
        self._tables: dict[tuple[str, bool], RowTable | None] = {}

    def key_column(self) -> pa.ChunkedArray:
        """The keys as an Arrow column; nothing is kept, unlike with `keys`."""
        return pa.chunked_array(
            [pa.array(shard.read_keys(), pa.string()) for shard in self.shards], pa.string()
        )


def open_planned(path: Path, spec: FeatureSetSpec, plan: ShardPlan) -> Shard:
    """Open a shard and see that it is the planned one of this set.

    Raises:
        ShardError: It is damaged, or another one.
    """
    shard = Shard.open(path)
    header = shard.header
    tokens = header.places["tokens"]
    pooled = header.places.get("pooled")
    fixed = () if spec.num_tokens is None else (spec.num_tokens,)
    found: dict[str, tuple[object, object]] = {
        "fingerprint": (header.fingerprint, spec.fingerprint),
        "keys": (header.keys_hash, plan.keys_hash),
        "number of rows": (header.num_rows, plan.num_rows),
        "dtype": (tokens.dtype, spec.dtype),
        "shape of a row": (tokens.shape[1:], (*fixed, spec.dim)),
        "pooled width": (None if pooled is None else pooled.shape[1], spec.pooled_dim),
    }
    for name, (have, want) in found.items():
        if have != want:
            raise ShardError(
                f"the shard is not the planned one: its {name} is {have}, the set has {want}",
                where=path,
                fix=REPAIR_HINT,
            )
    return shard
