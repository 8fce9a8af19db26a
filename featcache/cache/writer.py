"""Stage one's only way to disk: a kill at any moment leaves a complete shard or none."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Float32, Int64, Num, Shaped

from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import (
    FLOAT16_MAX,
    ROUNDING_EVERY,
    FeatureSetSpec,
    Rounding,
    ShardPlan,
    dequantise,
    quantise,
)
from featcache.cache.hdf5 import write_skeleton
from featcache.cache.header import Place, array_shapes, header_size, header_text, pack_header
from featcache.cache.shard import Shard, digest_rest
from featcache.console import size
from featcache.errors import CacheError, ShardError
from featcache.partial import partial_path

# FeatureSetWriter and ShardPlan have modules of their own; stage one imports only this one.
__all__ = ["FeatureSetWriter", "ShardPlan", "ShardWriter"]

_SKELETON_BYTES = 2**17  # more than a shard without its arrays has
_EXPONENT = {"float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


class ShardWriter:
    """One shard while it is written. Use it as a context manager.

    The file has its full size from the start; rows go to their place at once, in any order, and
    the same rows give the same bytes. Memory holds one batch and the shard's small arrays.

    Attributes:
        rounding: What int8 cost so far; nothing for other types.
    """

    def __init__(
        self,
        folder: Path,
        spec: FeatureSetSpec,
        shard: ShardPlan,
        lengths: "Int64[np.ndarray, ' N'] | None" = None,
        scale_channel: "Float32[np.ndarray, ' D'] | None" = None,
    ):
        """Lay out the shard beside its final place and reserve its room on the disk.

        Args:
            folder: The set's folder.
            spec: The set's spec.
            shard: Which rows it holds.
            lengths: Tokens of each row, known from the tokenizer. Ragged sets only.
            scale_channel: The set's channel scale. int8 sets only.

        Raises:
            CacheError: The arguments do not fit the spec, the disk has no room, or this process
                writes the same shard already.
        """
        self.spec, self.shard = spec, shard
        self.rounding = Rounding()
        self.path = folder / shard.file_name
        self._partial = partial_path(self.path)
        _check_arguments(spec, shard, lengths, scale_channel, self.path)
        tokens = lengths if lengths is not None else np.full(shard.num_rows, spec.num_tokens)
        self._lengths: Int64[np.ndarray, " N"] = tokens.astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        shape: tuple[int, ...] = (int(self._offsets[-1]), spec.dim)
        if spec.num_tokens is not None:
            shape = (shard.num_rows, spec.num_tokens, spec.dim)
        keys = np.array([key.encode() for key in shard.keys])
        shapes = array_shapes(
            shard.num_rows, shape, spec.dtype, spec.pooled_dim, keys.dtype.str[1:]
        )
        self._size_bytes = sum(Place(0, *one).size_bytes for one in shapes.values())
        self._small = _empty_arrays(shapes, keys, self._offsets, scale_channel)
        self._state = np.zeros(shard.num_rows, dtype=np.int8)  # 1 written, 2 quarantined
        self._descriptor, self._is_renamed = -1, False
        with _explained(self.path, self._size_bytes):
            # Exclusive: two writers of one process would share the name of the partial.
            os.close(os.open(self._partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        try:
            self._try_room()
            self._reserve(shapes)
        except BaseException:
            self._remove()
            raise

    def _try_room(self) -> None:
        """Notice a full disk before libhdf5 does: it cannot close a file that it cannot flush."""
        with _explained(self.path, self._size_bytes):
            self._partial.write_bytes(bytes(_SKELETON_BYTES))

    def _reserve(self, shapes: dict[str, tuple[tuple[int, ...], str]]) -> None:
        """Write the HDF5 skeleton, then allocate every block of the file."""
        with _explained(self.path, self._size_bytes):
            self._text, self._places = write_skeleton(
                self._partial,
                shapes,
                lambda file_size, places: header_text(
                    self.spec.fingerprint, self.shard.keys_hash, file_size, places
                ),
            )
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CLOEXEC)
            self._file_size = os.fstat(self._descriptor).st_size
            # Early allocation leaves holes: a full disk would show only in the middle of the rows.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self._file_size)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        """Close, and delete the partial unless it has become the shard."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not self._is_renamed:
            self._partial.unlink(missing_ok=True)

    def write(
        self,
        rows: Int64[np.ndarray, " B"],
        tokens: Num[np.ndarray, "*shape"],
        pooled: "Float[np.ndarray, 'B E'] | None" = None,
    ) -> None:
        """Write rows at their places.

        Args:
            rows: Row numbers within the shard, in any order. A row that is written twice keeps
                the later content.
            tokens: Floats of any width, cast (or quantised) here: B L D, or for ragged sets the
                rows' tokens one after another, S D.
            pooled: The encoder's pooled vectors, in sets that have them.

        Raises:
            CacheError: A row is outside, a shape is wrong, or a value is not finite or too large
                for the set's dtype.
        """
        self._check_shapes(rows, tokens, pooled)
        ends = np.cumsum(self._lengths[rows])
        flat = tokens.reshape(-1, self.spec.dim)
        stored, scales = self._stored(rows, ends, flat)
        content = _bytes_of(stored)
        width = self.spec.dim * stored.itemsize
        bounds = np.concatenate([[0], ends]) * width
        sums = self._small["checksums"]
        for position, row in enumerate(rows.tolist()):
            sums[row] = xxhash.xxh3_64_intdigest(content[bounds[position] : bounds[position + 1]])
        if scales is not None:
            self._scatter_scales(rows, ends, scales)
        if pooled is not None:
            self._small["pooled"][rows] = self._cast(rows, np.arange(1, len(rows) + 1), pooled)
        with _explained(self.path, self._size_bytes):
            self._write_runs(rows, bounds, content, width)
        self._small["valid"][rows] = True
        self._state[rows] = 1

    def _write_runs(
        self,
        rows: Int64[np.ndarray, " B"],
        bounds: Int64[np.ndarray, " ends"],
        content: memoryview,
        width: int,
    ) -> None:
        """Write token bytes, consecutive rows in one call."""
        base = self._places["tokens"].offset
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            if first < last:
                place = base + int(self._offsets[rows[first]]) * width
                _write_at(self._descriptor, content[bounds[first] : bounds[last]], place)

    def quarantine(self, row: int) -> None:
        """Mark a row as failed: not valid, and zeros throughout.

        Args:
            row: Row number within the shard.
        """
        if not 0 <= row < self.shard.num_rows:
            raise CacheError(
                f"row {row} is outside a shard of {self.shard.num_rows} rows", where=self.path
            )
        tokens = self._places["tokens"]
        width = tokens.shape[-1] * tokens.numpy_type.itemsize
        zeros = bytes(int(self._lengths[row]) * width)
        if self._state[row] == 1:  # otherwise the file holds zeros there
            with _explained(self.path, self._size_bytes):
                _write_at(self._descriptor, memoryview(zeros), self._token_start(row, width))
        self._small["checksums"][row] = xxhash.xxh3_64_intdigest(zeros)
        if "pooled" in self._small:
            self._small["pooled"][row] = 0
        if "scale_token" in self._small:
            flat = self._small["scale_token"].reshape(-1)
            flat[self._offsets[row] : self._offsets[row + 1]] = 0
        self._small["valid"][row] = False
        self._state[row] = 2

    def _token_start(self, row: int, width: int) -> int:
        """Absolute place of a row's first token."""
        return self._places["tokens"].offset + int(self._offsets[row]) * width

    def finish(self) -> Path:
        """Write what is left, sync, read everything back from the disk, and rename.

        Returns:
            The complete shard.

        Raises:
            CacheError: Rows are missing, or the disk gives other bytes back.
        """
        absent = np.flatnonzero(self._state == 0)
        if absent.size:
            raise CacheError(
                f"{absent.size} rows of the shard were never written, the first is "
                f"`{self.shard.keys[int(absent[0])]}`",
                where=self.path,
            )
        with _explained(self.path, self._size_bytes):
            digests = []
            for name, array in self._small.items():
                content = _bytes_of(array)
                _write_at(self._descriptor, content, self._places[name].offset)
                digests.append(xxhash.xxh3_64_intdigest(content))
            end = header_size(len(self._text), len(self._places))
            digests.append(digest_rest(self._descriptor, end, self._file_size, self._places))
            _write_at(self._descriptor, memoryview(pack_header(self._text, digests)), 0)
            os.fsync(self._descriptor)
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._descriptor)
            self._descriptor = -1
            self._read_back()
            self._partial.replace(self.path)
            self._is_renamed = True
            _sync_folder(self.path.parent)
        return self.path

    def _read_back(self) -> None:
        """Compare the file with all of its checksums.

        Raises:
            CacheError: A byte differs.
        """
        try:
            wrong = next(Shard.open(self._partial).damage(), None)
        except ShardError as error:
            raise CacheError(
                f"the disk gave back another header than was written: {error.what}", where=self.path
            ) from None
        if wrong is not None:
            key = "" if wrong.row is None else f" (row `{self.shard.keys[wrong.row]}`)"
            raise CacheError(
                f"the disk gave back other bytes than were written to `{wrong.array}`{key}",
                where=self.path,
                fix="check the disk; running the command again makes the shard anew",
            )

    def _check_shapes(
        self,
        rows: Int64[np.ndarray, " B"],
        tokens: Num[np.ndarray, "*shape"],
        pooled: "Float[np.ndarray, 'B E'] | None",
    ) -> None:
        """Refuse rows and shapes that do not belong to this shard."""
        if rows.size and not (rows.min() >= 0 and rows.max() < self.shard.num_rows):
            raise CacheError(
                f"a row is outside a shard of {self.shard.num_rows} rows: {rows.min()} to "
                f"{rows.max()}",
                where=self.path,
            )
        expected: tuple[int, ...] = (int(self._lengths[rows].sum()), self.spec.dim)
        if self.spec.num_tokens is not None:
            expected = (len(rows), self.spec.num_tokens, self.spec.dim)
        if tokens.shape != expected or tokens.dtype.kind != "f":
            raise CacheError(
                f"encoder `{self.spec.encoder}` gave tokens of {tokens.dtype} {tokens.shape}, the "
                f"set needs floats of {expected}",
                where=self.path,
            )
        have = None if pooled is None else pooled.shape
        want = None if self.spec.pooled_dim is None else (len(rows), self.spec.pooled_dim)
        if have != want:
            raise CacheError(
                f"encoder `{self.spec.encoder}` gave pooled vectors of {have}, the set needs "
                f"{want}",
                where=self.path,
            )

    def _stored(
        self,
        rows: Int64[np.ndarray, " B"],
        ends: Int64[np.ndarray, " B"],
        flat: Float[np.ndarray, "S D"],
    ) -> "tuple[Num[np.ndarray, 'S D'], Shaped[np.ndarray, ' S'] | None]":
        """Tokens as they go to the disk, and for int8 the scale of each."""
        if self.spec.dtype != "int8":
            return self._cast(rows, ends, flat, self.spec.dtype), None
        self._cast(rows, ends, flat.astype(np.float32), "float32")  # finite, or an error
        tokens, scales = quantise(flat, self._small["scale_channel"])
        self._refuse(~np.isfinite(scales)[:, None], rows, ends, flat, "int8")
        self._measure(rows, ends, flat, tokens, scales)
        return tokens, scales

    def _measure(
        self,
        rows: Int64[np.ndarray, " B"],
        ends: Int64[np.ndarray, " B"],
        flat: Float[np.ndarray, "S D"],
        tokens: Num[np.ndarray, "S D"],
        scales: Shaped[np.ndarray, " S"],
    ) -> None:
        """Compare some rows with what will be read back."""
        starts = [0, *ends.tolist()]
        for position in np.flatnonzero(rows % ROUNDING_EVERY == 0).tolist():
            place = slice(starts[position], starts[position + 1])
            true = flat[place].astype(np.float32)
            stored = dequantise(tokens[place], scales[place], self._small["scale_channel"])
            error, total = float(np.square(stored - true).sum()), float(np.square(true).sum())
            worst = (error / total) ** 0.5 if total else 0.0
            self.rounding += Rounding(1, error, total, worst)

    def _cast(
        self,
        rows: Int64[np.ndarray, " B"],
        ends: Int64[np.ndarray, " B"],
        values: Float[np.ndarray, "S D"],
        dtype: str = "float16",
    ) -> Float[np.ndarray, "S D"]:
        """Values in a float type, all of them finite."""
        with np.errstate(over="ignore"):
            cast = values.astype(dtype, copy=False)
        integer, exponent = _EXPONENT[dtype]
        # All exponent bits set: infinite or not a number. Five times faster than np.isfinite.
        bits = np.ascontiguousarray(cast).view(integer) & integer(exponent)
        self._refuse(bits == exponent, rows, ends, values, dtype)
        return cast

    def _refuse(
        self,
        bad: Bool[np.ndarray, "S W"],
        rows: Int64[np.ndarray, " B"],
        ends: Int64[np.ndarray, " B"],
        values: Float[np.ndarray, "S D"],
        dtype: str,
    ) -> None:
        """Raise when any value is bad, naming the row, the channel and the value."""
        if not bad.any():
            return
        line = int(np.flatnonzero(bad.any(axis=1))[0])
        row = int(rows[int(np.searchsorted(ends, line, side="right"))])
        token = np.nan_to_num(np.abs(values[line].astype(np.float64)), nan=np.inf, posinf=np.inf)
        channel = int(token.argmax())
        raise CacheError(
            f"encoder `{self.spec.encoder}` gave {values[line, channel]:.6g} in channel {channel} "
            f"of row `{self.shard.keys[row]}`, which {dtype} cannot hold"
            + (f" (its largest value is {FLOAT16_MAX:.0f})" if dtype == "float16" else ""),
            where=self.path,
            fix="`pooled: normalized_mean` in the encoder's YAML: every set has float16 for pooled"
            if dtype == "float16" != self.spec.dtype
            else f"{self.spec.extract_command} --dtype float32 --root OTHER-FOLDER, or int8; a "
            "value that is not a number needs another encoder or input",
        )

    def _scatter_scales(
        self,
        rows: Int64[np.ndarray, " B"],
        ends: Int64[np.ndarray, " B"],
        scales: Shaped[np.ndarray, " S"],
    ) -> None:
        """Put the scales of a batch's tokens where their rows are."""
        flat = self._small["scale_token"].reshape(-1)
        starts = [0, *ends.tolist()]
        for position, row in enumerate(rows.tolist()):
            place = slice(self._offsets[row], self._offsets[row + 1])
            flat[place] = scales[starts[position] : starts[position + 1]]


def _check_arguments(
    spec: FeatureSetSpec,
    shard: ShardPlan,
    lengths: "Int64[np.ndarray, ' N'] | None",
    scale_channel: "Float32[np.ndarray, ' D'] | None",
    where: Path,
) -> None:
    """Refuse lengths and scales that do not go with the spec."""
    if (lengths is None) == spec.is_ragged:
        need = "needs" if spec.is_ragged else "takes no"
        raise CacheError(f"the set `{spec.title}` {need} lengths", where=where)
    if lengths is not None:
        longest = spec.max_tokens or int(lengths.max(initial=0))
        if lengths.shape != (shard.num_rows,) or lengths.min() < 0 or lengths.max() > longest:
            raise CacheError(
                f"lengths must be {shard.num_rows} numbers from 0 to {longest}", where=where
            )
    if (scale_channel is None) == (spec.dtype == "int8"):
        need = "needs a" if spec.dtype == "int8" else "takes no"
        raise CacheError(f"a {spec.dtype} set {need} channel scale", where=where)
    if scale_channel is not None and (
        scale_channel.shape != (spec.dim,)
        or not (np.isfinite(scale_channel) & (scale_channel > 0)).all()
    ):
        raise CacheError(
            f"a channel scale must be {spec.dim} positive, finite numbers", where=where
        )


def _empty_arrays(
    shapes: dict[str, tuple[tuple[int, ...], str]],
    keys: Shaped[np.ndarray, " N"],
    offsets: Int64[np.ndarray, " starts"],
    scale_channel: "Float32[np.ndarray, ' D'] | None",
) -> dict[str, Shaped[np.ndarray, "*shape"]]:
    """All arrays but `tokens`, in the order of the format; the known ones filled in."""
    known: dict[str, Any] = {"keys": keys, "offsets": offsets, "scale_channel": scale_channel}
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        if name != "tokens":
            array = np.zeros(shape, Place(0, shape, dtype).numpy_type)
            if name in known:
                array[...] = known[name]
            arrays[name] = array
    return arrays


def _bytes_of(array: Shaped[np.ndarray, "*shape"]) -> memoryview:
    """An array's bytes in row-major order."""
    flat: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return flat


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write bytes at a place, however often the system stops short."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path, size_bytes: int) -> Iterator[None]:
    """Turn the system's refusals into sentences."""
    try:
        yield
    except FileExistsError:
        raise CacheError(
            "this process writes the same shard already", where=path, fix="give each shard one task"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"the disk is full, or your quota is: the next shard needs {size(size_bytes)}",
                where=path,
                fix="free some space and run the same command again: complete shards are kept",
            ) from None
        reason = error.strerror or f"libhdf5 refused: {error}"
        raise CacheError(f"the shard cannot be written: {reason}", where=path) from None
