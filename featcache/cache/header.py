"""The header that opens a shard: where each array lies, and what its checksum is.

`docs/format.md` is the normative text. A header is believed only after its checksum, the file's
size, and every offset and shape have been checked with whole numbers that cannot overflow.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcache.cache.format import FORMAT_VERSION, MAX_KEY_BYTES
from featcache.config import canonical_json
from featcache.errors import ShardError

MAGIC = b"FEATCACH"
USER_BLOCK = 8_192
ALIGNMENT = 4_096
ATTRIBUTE = "featcache"
"""Name of the HDF5 attribute that repeats the header's JSON."""
ATTRIBUTE_BYTES = 2_048
"""Size of that attribute; also the JSON's largest length."""
ARRAY_ORDER = (
    "tokens",
    "scale_token",
    "scale_channel",
    "offsets",
    "pooled",
    "valid",
    "keys",
    "checksums",
)
NUMPY_TYPES = {
    "float16": "<f2",
    "float32": "<f4",
    "int8": "|i1",
    "int64": "<i8",
    "uint64": "<u8",
    "bool": "|b1",
}
_KEY_TYPES = {f"S{size}" for size in range(1, MAX_KEY_BYTES + 1)}
_JSON_KEYS = {"format_version", "fingerprint", "keys_hash", "file_size", "arrays"}
_HEAD = struct.Struct("<8sII")
REPAIR_HINT = "featcache repair makes exactly the damaged shards again"


@dataclass(frozen=True)
class Place:
    """Where one array lies in its file.

    Attributes:
        offset: First byte, counted from the start of the file.
        shape: Length of each axis.
        dtype: `float16`, `float32`, `int8`, `int64`, `uint64`, `bool`, or `S1` to `S128`.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """The little-endian numpy type."""
        return np.dtype(NUMPY_TYPES.get(self.dtype, self.dtype))

    @property
    def size_bytes(self) -> int:
        """Bytes of the array, exact whatever a header claims."""
        return prod(self.shape) * self.numpy_type.itemsize


@dataclass(frozen=True)
class Header:
    """The checked content of a shard's user block.

    Attributes:
        fingerprint: Of the feature set.
        keys_hash: Of the ordered keys.
        file_size: Bytes of the whole file.
        places: Each array, in the order of the format.
        digests: XXH3-64 of each array but `tokens`, and of the `rest` of the file.
        end: First byte after the header's last digest.
    """

    fingerprint: str
    keys_hash: str
    file_size: int
    places: Mapping[str, Place]
    digests: Mapping[str, int]
    end: int

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self.places["keys"].shape[0]


def array_shapes(
    num_rows: int, tokens: tuple[int, ...], dtype: str, pooled_dim: int | None, key_type: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array that such a shard has, in the order of the format.

    Args:
        num_rows: Rows of the shard.
        tokens: Shape of `tokens`: N L D, or S D for ragged rows.
        dtype: Of `tokens`.
        pooled_dim: Width of the pooled vectors, or None.
        key_type: `S1` to `S128`.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"tokens": (tokens, dtype)}
    if dtype == "int8":
        shapes["scale_token"] = (tokens[:-1], "float16")
        shapes["scale_channel"] = (tokens[-1:], "float32")
    if len(tokens) == 2:
        shapes["offsets"] = ((num_rows + 1,), "int64")
    if pooled_dim is not None:
        shapes["pooled"] = ((num_rows, pooled_dim), "float16")
    shapes["valid"] = ((num_rows,), "bool")
    shapes["keys"] = ((num_rows,), key_type)
    shapes["checksums"] = ((num_rows,), "uint64")
    return shapes


def header_text(
    fingerprint: str, keys_hash: str, file_size: int, places: Mapping[str, Place]
) -> bytes:
    """The header's JSON: sorted keys, no blanks, ASCII."""
    arrays = {
        name: {"offset": place.offset, "shape": list(place.shape), "dtype": place.dtype}
        for name, place in places.items()
    }
    values = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "keys_hash": keys_hash,
        "file_size": file_size,
        "arrays": arrays,
    }
    return canonical_json(values).encode()


def header_size(text_bytes: int, num_arrays: int) -> int:
    """Bytes of a packed header: head, JSON, its digest, the other digests, their digest."""
    return _HEAD.size + text_bytes + 8 * (num_arrays + 2)


def pack_header(text: bytes, digests: Sequence[int]) -> bytes:
    """The bytes that open a shard.

    Args:
        text: The JSON of `header_text`.
        digests: XXH3-64 of each array but `tokens` in the order of the format, then of the rest.
    """
    head = _HEAD.pack(MAGIC, FORMAT_VERSION, len(text))
    packed = struct.pack(f"<{len(digests)}Q", *digests)
    sums = (xxhash.xxh3_64_intdigest(text), xxhash.xxh3_64_intdigest(packed))
    return head + text + struct.pack("<Q", sums[0]) + packed + struct.pack("<Q", sums[1])


def parse_header(block: bytes, file_size: int, where: Path) -> Header:
    """Check a user block from the outside in; nothing is believed before it is checked.

    Args:
        block: The first `USER_BLOCK` bytes of the file, or as many as it has.
        file_size: The file's real size.
        where: For messages.

    Raises:
        ShardError: The header is damaged, of another version, or lies about the file.
    """
    text = _checked_text(block, where)
    values = _json_object(text, where)
    if values["file_size"] != file_size:
        raise ShardError(
            f"the file has {file_size} bytes, its header says {str(values['file_size'])[:40]}",
            where=where,
            fix=REPAIR_HINT,
        )
    places = _checked_places(values["arrays"], file_size, where)
    names = [name for name in places if name != "tokens"] + ["rest"]
    start = _HEAD.size + len(text) + 8
    end = header_size(len(text), len(places))
    packed = block[start : end - 8]
    (total,) = struct.unpack("<Q", block[end - 8 : end])
    if xxhash.xxh3_64_intdigest(packed) != total:
        raise ShardError("the header's list of checksums is damaged", where=where, fix=REPAIR_HINT)
    digests = dict(zip(names, struct.unpack(f"<{len(names)}Q", packed), strict=True))
    return Header(values["fingerprint"], values["keys_hash"], file_size, places, digests, end)


def _checked_text(block: bytes, where: Path) -> bytes:
    """The JSON's bytes, once magic, version, length and checksum are right."""
    if len(block) < USER_BLOCK:
        raise ShardError(
            f"the file has only {len(block)} bytes, less than a header",
            where=where,
            fix=REPAIR_HINT,
        )
    magic, version, length = _HEAD.unpack_from(block)
    if magic != MAGIC:
        raise ShardError(
            "the file is no shard of ours: it does not start with the header of the format "
            "(a copy that another HDF5 tool rewrote, e.g. with chunks, has none)",
            where=where,
            fix=REPAIR_HINT,
        )
    if version != FORMAT_VERSION:
        raise ShardError(
            f"the shard has format version {version}, this featcache reads {FORMAT_VERSION}",
            where=where,
            fix="install the featcache that wrote it, or extract into another --root",
        )
    if not 2 <= length <= ATTRIBUTE_BYTES:
        raise ShardError(
            f"the header is damaged: its length says {length} bytes", where=where, fix=REPAIR_HINT
        )
    text = block[_HEAD.size : _HEAD.size + length]
    (stored,) = struct.unpack_from("<Q", block, _HEAD.size + length)
    if xxhash.xxh3_64_intdigest(text) != stored:
        raise ShardError(
            "the header is damaged: its checksum differs", where=where, fix=REPAIR_HINT
        )
    return text


def _json_object(text: bytes, where: Path) -> dict[str, Any]:
    """The header's JSON, which only a forger can have made unreadable."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ShardError("the header holds no JSON", where=where, fix=REPAIR_HINT) from None
    if not isinstance(values, dict) or set(values) != _JSON_KEYS:
        raise ShardError("the header's JSON has not the keys of the format", where=where)
    hashes = (values["fingerprint"], values["keys_hash"])
    if values["format_version"] != FORMAT_VERSION or not all(isinstance(h, str) for h in hashes):
        raise ShardError("the header's JSON contradicts the format", where=where)
    return values


def _checked_places(arrays: Any, file_size: int, where: Path) -> dict[str, Place]:
    """Places that lie inside the file, overlap nowhere, and belong together."""
    problem = ""
    places: dict[str, Place] = {}
    if not isinstance(arrays, dict) or not set(arrays) <= set(ARRAY_ORDER):
        problem = "the header's list of arrays is not one of this format"
    else:
        for name in (name for name in ARRAY_ORDER if name in arrays):
            found = _place(arrays[name], file_size)
            if isinstance(found, str):
                problem = f"`{name}` {found}"
                break
            places[name] = found
    problem = problem or _misfit(places) or _overlap(places)
    if problem:
        raise ShardError(f"the header lies: {problem}", where=where, fix=REPAIR_HINT)
    return places


def _place(entry: Any, file_size: int) -> "Place | str":
    """One array's place, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"offset", "shape", "dtype"}:
        return "is not described by offset, shape and dtype"
    offset, shape, dtype = entry["offset"], entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or (dtype not in NUMPY_TYPES and dtype not in _KEY_TYPES):
        return "has a dtype that the format does not know"
    if not isinstance(shape, list) or not 1 <= len(shape) <= 3:
        return "has a shape that is none"
    if not all(type(axis) is int and 0 <= axis <= file_size for axis in shape):
        return f"has the shape {str(shape)[:80]}, more than a file of {file_size} bytes can hold"
    if type(offset) is not int or offset < USER_BLOCK or offset % ALIGNMENT:
        return f"starts at {str(offset)[:40]}, which no array can"
    place = Place(offset, tuple(shape), dtype)
    if offset + place.size_bytes > file_size:
        return f"ends at byte {offset + place.size_bytes} of a file of {file_size} bytes"
    return place


def _misfit(places: Mapping[str, Place]) -> str:
    """Which array contradicts the others' shapes or dtypes, in words; empty when none does."""
    if "keys" not in places or "tokens" not in places:
        return "`keys` or `tokens` is missing"
    tokens, keys = places["tokens"], places["keys"]
    if tokens.dtype not in ("float16", "float32", "int8") or keys.dtype not in _KEY_TYPES:
        return "`tokens` or `keys` has a dtype that it cannot have"
    if len(keys.shape) != 1 or keys.shape[0] < 1 or len(tokens.shape) < 2:
        return "`tokens` or `keys` has a shape that it cannot have"
    if 0 in tokens.shape[1:] or (len(tokens.shape) == 3 and tokens.shape[0] != keys.shape[0]):
        return f"`tokens` has the shape {tokens.shape} beside {keys.shape[0]} keys"
    pooled = places["pooled"].shape[-1] if "pooled" in places else None
    if pooled == 0:
        return "`pooled` is empty"
    expected = array_shapes(keys.shape[0], tokens.shape, tokens.dtype, pooled, keys.dtype)
    if set(expected) != set(places):
        return f"`{min(set(expected) ^ set(places))}` is missing, or should not be there"
    for name, (shape, dtype) in expected.items():
        if (places[name].shape, places[name].dtype) != (shape, dtype):
            return f"`{name}` is {places[name].dtype} {places[name].shape}, not {dtype} {shape}"
    return ""


def _overlap(places: Mapping[str, Place]) -> str:
    """Two arrays that share bytes, in words; empty when none do."""
    end, last = USER_BLOCK, "the header"
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.size_bytes == 0:
            continue
        if place.offset < end:
            return f"`{name}` overlaps {last}"
        end, last = place.offset + place.size_bytes, f"`{name}`"
    return ""
