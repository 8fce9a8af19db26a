"""One shard file, read without libhdf5: its arrays, compared with their checksums.

No descriptor outlives a call, so shards can be opened by the thousand, forked and pickled.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Int64, Shaped, UInt64

from featcache.cache.header import REPAIR_HINT, USER_BLOCK, Header, Place, parse_header
from featcache.cache.mapping import map_range
from featcache.errors import ShardError

_PIECE_BYTES = 2**21
"""Read at a time into one buffer: it stays in the processor's cache."""
_UNIT_BYTES = 16 * 2**20
"""Rows that one thread compares at a time, so that one shard keeps all of them busy."""
_SMALL_ROW_BYTES = 4_096

Spread = Callable[
    [Callable[[tuple[int, int]], "list[Damage]"], Iterable[tuple[int, int]]],
    "Iterable[list[Damage]]",
]
"""Calls a function for each of several ranges of rows, like `map` or an executor's `map`."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a shard.

    Attributes:
        array: Array it is about, None for the header or the file.
        row: Row within the shard, where it is about one.
        what: A sentence.
    """

    array: str | None
    row: int | None
    what: str


def read_range(descriptor: int, offset: int, size_bytes: int) -> bytes:
    """Read bytes at a place, however often the system stops short; fewer only at the file's end."""
    pieces = []
    while size_bytes > 0:
        piece = os.pread(descriptor, size_bytes, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        size_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Read until a buffer is full, however often the system stops short.

    Raises:
        OSError: The file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "it became shorter meanwhile")  # not what is in the buffer
        done += count


def digest_rest(
    descriptor: int, header_end: int, file_size: int, places: Mapping[str, Place]
) -> int:
    """XXH3-64 of all bytes that belong neither to the header nor to an array, in file order."""
    digest = xxhash.xxh3_64()
    start = header_end
    solid = [place for place in places.values() if place.size_bytes]
    for place in sorted(solid, key=lambda place: place.offset):
        digest.update(read_range(descriptor, start, place.offset - start))
        start = place.offset + place.size_bytes
    digest.update(read_range(descriptor, start, file_size - start))
    return int(digest.intdigest())


@dataclass(frozen=True)
class Shard:
    """A shard whose header has been checked.

    Attributes:
        path: The file.
        header: What its user block says.
        block_digest: XXH3-64 of the user block; tells whether the file is still the same.
    """

    path: Path
    header: Header
    block_digest: int

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read and check the header of a shard.

        Raises:
            ShardError: The file is missing, unreadable, damaged or lies.
        """
        with _descriptor(path) as (descriptor, file_size):
            block = read_range(descriptor, 0, USER_BLOCK)
        return cls(path, parse_header(block, file_size, path), xxhash.xxh3_64_intdigest(block))

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Open the file for reading, once more checked to be the one whose header we know.

        Raises:
            ShardError: It is gone, or was replaced by another one.
        """
        with _descriptor(self.path) as (descriptor, file_size):
            block = read_range(descriptor, 0, USER_BLOCK)
            same = xxhash.xxh3_64_intdigest(block) == self.block_digest
            if file_size != self.header.file_size or not same:
                raise ShardError(
                    "the shard was replaced or changed since it was opened",
                    where=self.path,
                    fix="start again; let no other run write into the set meanwhile",
                )
            yield descriptor

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """Read one array (not `tokens`) whole and compare its checksum.

        Raises:
            ShardError: The array is damaged.
        """
        place = self.header.places[name]
        with self.descriptor() as descriptor:
            content = read_range(descriptor, place.offset, place.size_bytes)
        self._compare(name, content)
        if place.dtype == "bool":  # any byte but 0 is true, whatever a forger wrote
            flags: Shaped[np.ndarray, "*shape"] = np.frombuffer(content, np.uint8) != 0
            return flags
        array: Shaped[np.ndarray, "*shape"] = np.frombuffer(content, place.numpy_type)
        return array.reshape(place.shape)

    def map(self, name: str, *, check: bool) -> Shaped[np.ndarray, "*shape"]:
        """Map one array read-only.

        Args:
            name: Array of this shard.
            check: Whether to read it all and compare its checksum; not for `tokens`, whose
                checksums are those of the rows.

        Raises:
            ShardError: The file was replaced, the map is refused, or the array is damaged.
        """
        place = self.header.places[name]
        with self.descriptor() as descriptor:
            mapped = map_range(descriptor, place.offset, place.size_bytes, self.path)
        if check:
            self._compare(name, mapped.data)
        array: Shaped[np.ndarray, "*shape"] = mapped.view(place.numpy_type)
        return array.reshape(place.shape)

    def _compare(self, name: str, content: bytes | memoryview) -> None:
        """Raise unless an array's bytes have the checksum that the header names."""
        if xxhash.xxh3_64_intdigest(content) != self.header.digests[name]:
            raise ShardError(
                f"`{name}` is damaged: its checksum differs", where=self.path, fix=REPAIR_HINT
            )

    def read_keys(self) -> list[str]:
        """The ordered keys, compared with the header's hash of them.

        Raises:
            ShardError: They are damaged, or not the planned ones.
        """
        return self._joined_keys().split("\n")

    def _joined_keys(self) -> str:
        """The ordered keys, joined by line feeds; compared as `read_keys` does."""
        joined = b"\n".join(self.read("keys").tolist())
        try:
            text = joined.decode()
        except UnicodeDecodeError:
            text = ""
        named = hashlib.sha256(joined).hexdigest()[:32] == self.header.keys_hash
        if not text or not named or text.count("\n") != self.header.num_rows - 1:
            raise ShardError(
                "`keys` are not those that the header names", where=self.path, fix=REPAIR_HINT
            )
        return text

    def read_offsets(self) -> Int64[np.ndarray, " starts"]:
        """First token of each row and, last, the number of tokens; also for fixed-size rows.

        Raises:
            ShardError: They are damaged, or point outside the tokens.
        """
        tokens = self.header.places["tokens"].shape
        if len(tokens) == 3:
            return np.arange(tokens[0] + 1, dtype=np.int64) * tokens[1]
        offsets: Int64[np.ndarray, " starts"] = self.read("offsets")
        rising = bool((np.diff(offsets) >= 0).all())
        if not rising or offsets[0] != 0 or offsets[-1] != tokens[0]:
            raise ShardError(
                "`offsets` do not lead through the tokens", where=self.path, fix=REPAIR_HINT
            )
        return offsets

    def damage(self, spread: Spread | None = None) -> Iterator[Damage]:
        """Read the whole file and name all that differs from its checksums.

        Every byte is covered: the arrays, the rows of `tokens`, and what lies between them.
        The file is read by `pread`, so that a disk error is reported and kills nothing.

        Args:
            spread: Compares ranges of rows, by default one after the other; an executor's `map`
                does so on several threads.

        Raises:
            ShardError: The file cannot be read, or is replaced meanwhile.
        """
        sound = set()
        for name in (name for name in self.header.digests if name != "rest"):
            try:
                self._look_at(name)
                sound.add(name)
            except ShardError as error:
                yield Damage(name, None, error.what)
        with self.descriptor() as descriptor:
            header = self.header
            rest = digest_rest(descriptor, header.end, header.file_size, header.places)
        if rest != header.digests["rest"]:
            yield Damage("rest", None, "bytes between the arrays are damaged")
        if {"checksums", "offsets"} & set(header.places) <= sound:
            yield from self._damaged_rows(spread or map)

    def _look_at(self, name: str) -> None:
        """Read one array with all that is known about it."""
        if name == "keys":
            self._joined_keys()
        elif name == "offsets":
            self.read_offsets()
        else:
            self.read(name)

    def _damaged_rows(self, spread: Spread) -> Iterator[Damage]:
        """Rows whose token bytes differ from their checksum."""
        place = self.header.places["tokens"]
        starts = self.read_offsets() * (place.shape[-1] * place.numpy_type.itemsize)
        checksums: UInt64[np.ndarray, " N"] = self.read("checksums")

        def compare(rows: tuple[int, int]) -> list[Damage]:
            unit = slice(rows[0], rows[1])
            with self.descriptor() as descriptor:  # of its own: who closes it has finished with it
                ends = place.offset + starts[rows[0] : rows[1] + 1]
                wrong = _unequal_rows(descriptor, ends, checksums[unit])
            what = "the row's tokens differ from their checksum"
            return [Damage("tokens", rows[0] + row, what) for row in wrong]

        for found in spread(compare, _cut(starts, _UNIT_BYTES)):
            yield from found


def _cut(starts: Int64[np.ndarray, " starts"], size_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of as many whole rows as have so many bytes, at least one row each."""
    first, total = 0, len(starts) - 1
    while first < total:
        last = int(np.searchsorted(starts, starts[first] + size_bytes, side="right")) - 1
        last = min(max(last, first + 1), total)
        yield first, last
        first = last


def _unequal_rows(
    descriptor: int, starts: Int64[np.ndarray, " starts"], checksums: UInt64[np.ndarray, " N"]
) -> list[int]:
    """Which of some consecutive rows have another XXH3-64 than they should.

    Args:
        descriptor: The open file.
        starts: First byte of each row within the file and, last, the end of the last one.
        checksums: What the rows should have.
    """
    wrong: list[int] = []
    buffer = memoryview(bytearray(min(_PIECE_BYTES, int(starts[-1] - starts[0]))))
    for first, last in _cut(starts, _PIECE_BYTES):
        bounds = starts[first : last + 1] - starts[first]
        if bounds[-1] > _PIECE_BYTES:
            found = [_digest_long_row(descriptor, int(starts[first]), int(starts[last]), buffer)]
        else:
            piece = buffer[: int(bounds[-1])]
            _fill(descriptor, piece, int(starts[first]))
            found = list(map(xxhash.xxh3_64_intdigest, _split(piece, bounds)))
        unequal = np.array(found, dtype=np.uint64) != checksums[first:last]
        wrong += (first + np.flatnonzero(unequal)).tolist()
    return wrong


def _split(
    piece: memoryview, bounds: Int64[np.ndarray, " starts"]
) -> "Sequence[bytes] | Sequence[memoryview]":
    """The rows of a piece; small ones of equal length in one step of C, 100 ns each."""
    length = int(bounds[1])
    if 0 < length <= _SMALL_ROW_BYTES and (np.diff(bounds) == length).all():
        rows: list[bytes] = np.frombuffer(piece, f"V{length}").tolist()
        return rows
    return [piece[start:end] for start, end in pairwise(bounds.tolist())]


def _digest_long_row(descriptor: int, start: int, end: int, buffer: memoryview) -> int:
    """XXH3-64 of a row that is longer than the buffer."""
    digest = xxhash.xxh3_64()
    for offset in range(start, end, len(buffer)):
        piece = buffer[: end - offset]
        _fill(descriptor, piece, offset)
        digest.update(piece)
    return int(digest.intdigest())


@contextmanager
def _descriptor(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file: its descriptor and size."""
    try:  # O_NONBLOCK, since opening a pipe would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ShardError("the shard is missing", where=path, fix=REPAIR_HINT) from None
    except OSError as error:
        raise ShardError(f"the shard cannot be opened: {error.strerror}", where=path) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ShardError("this is no regular file", where=path, fix=REPAIR_HINT)
        yield descriptor, status.st_size
    except OSError as error:
        raise ShardError(
            f"the shard cannot be read: {error.strerror}", where=path, fix=REPAIR_HINT
        ) from None
    finally:
        os.close(descriptor)
