"""What a feature set is: how its rows were made, which rows it has, how int8 rows are scaled.

The bytes of one shard are in `shard.py`; `docs/format.md` is the normative text for both.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from jaxtyping import Float, Float16, Float32, Int8
from pydantic import Field, JsonValue, PositiveInt, model_validator

from featcache.config import Config, canonical_json, read_json, to_plain, validate
from featcache.errors import CacheError, ConfigError, StaleFeatureSetError

FORMAT_VERSION = 1
SPEC_FILE = "feature_set.json"
PLAN_FILE = "shards.json"
SHARD_BYTES = 512 * 2**20
RAGGED_SHARD_ROWS = 65_536
SCALE_ROWS = 2_048
"""Rows whose largest values make the channel scale of an int8 set."""
ROUNDING_EVERY = 16
"""What int8 costs is measured on each 16th row."""
MAX_KEY_BYTES = 128
ITEM_BYTES = {"float16": 2, "float32": 4, "int8": 1}
FLOAT16_MAX = 65_504.0


class FeatureSetSpec(Config):
    """How the rows of a feature set were made; the whole content of `feature_set.json`.

    Two sets with equal fingerprints hold interchangeable rows. Which rows a set holds is no part of
    this: that stands in `shards.json`.
    """

    format_version: Literal[1] = Field(default=1, description="Version of the cache format.")
    modality: Literal["image", "text"] = Field(description="What the encoder reads.")
    encoder: str = Field(min_length=1, description="Short name, e.g. `vit-b`.")
    source: str = Field(description="Where the encoder comes from, e.g. `timm:vit_base_...`.")
    library: str = Field(description="Library that ran it: `timm`, `transformers`, ...")
    library_version: str = Field(description="Its version; recorded, not in the fingerprint.")
    weights_sha256: str = Field(description="SHA-256 of the weights, in hex.")
    preprocessing: dict[str, JsonValue] = Field(
        default_factory=dict, description="The complete path from file to encoder input."
    )
    tokenizer_sha256: str | None = Field(
        default=None, description="SHA-256 of the tokenizer's files."
    )
    num_prefix_tokens: int = Field(default=0, ge=0, description="Class and register tokens.")
    grid: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="Height and width in tokens; None when tokens have no place."
    )
    num_tokens: PositiveInt | None = Field(default=None, description="Tokens per row, or ragged.")
    max_tokens: PositiveInt | None = Field(default=None, description="Longest ragged row.")
    dim: PositiveInt = Field(description="Width of a token.")
    pooled_dim: PositiveInt | None = Field(
        default=None, description="Width of the encoder's own pooled vector; None = it has none."
    )
    dtype: Literal["float16", "float32", "int8"] = Field(
        default="float16", description="Stored numbers."
    )
    batch_size: PositiveInt = Field(description="Rows of every forward pass.")
    autocast: str | None = Field(default=None, description="Autocast dtype; None = full float32.")

    @model_validator(mode="after")
    def _layout_adds_up(self) -> "FeatureSetSpec":
        if self.grid is not None:
            expected = self.num_prefix_tokens + self.grid[0] * self.grid[1]
            if self.num_tokens != expected:
                raise ValueError(
                    f"num_tokens is {self.num_tokens}, but {self.num_prefix_tokens} prefix tokens "
                    f"and a grid of {self.grid[0]} x {self.grid[1]} make {expected}"
                )
        try:
            json.dumps(self.preprocessing, allow_nan=False)
        except ValueError:
            raise ValueError("`preprocessing` holds a number that is not finite") from None
        return self

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in their number of tokens."""
        return self.num_tokens is None

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one row's tokens as stored; None for ragged sets."""
        if self.num_tokens is None:
            return None
        return self.num_tokens * self.dim * ITEM_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """32 hex digits over everything here but the library's version."""
        values = to_plain(self)
        del values["library_version"]
        return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        """How messages call the set, e.g. `image/vit-b`."""
        return f"{self.modality}/{self.encoder}"

    @property
    def extract_command(self) -> str:
        """The command that makes such a set, without its `--root`."""
        option = "--backbone" if self.modality == "image" else "--text-encoder"
        return f"featcache extract {option} {self.encoder}"


def read_spec(folder: Path) -> FeatureSetSpec:
    """Read and check `feature_set.json`.

    Raises:
        CacheError: It is missing, damaged, edited, or of a version that this code does not know.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        raise CacheError(
            f"this folder is no feature set: it has no {SPEC_FILE}",
            where=folder,
            fix="featcache extract makes one; featcache info lists those of a workspace",
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise CacheError("the file is damaged: it holds no JSON object", where=path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"the feature set has format version {version}, this featcache reads {FORMAT_VERSION}",
            where=path,
            fix="install the featcache that wrote it, or extract into another --root",
        )
    stored = values.pop("fingerprint", None)
    try:
        spec = validate(FeatureSetSpec, values, where=path)
    except ConfigError as error:
        raise CacheError(
            error.what, where=path, fix="the file is immutable: restore it from a copy"
        ) from None
    if stored != spec.fingerprint:
        raise CacheError(
            f"the file was changed after it was written: its fingerprint is {stored}, "
            f"its content has {spec.fingerprint}",
            where=path,
            fix="restore the file from a copy, or extract into another --root",
        )
    return spec


def spec_values(spec: FeatureSetSpec) -> dict[str, Any]:
    """The content of `feature_set.json`: the spec and its fingerprint."""
    return {**to_plain(spec), "fingerprint": spec.fingerprint}


def _differences(have: Any, want: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of all values that differ, with both values."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in [*have, *(key for key in want if key not in have)]:
            inner = f"{name}.{key}" if name else key
            yield from _differences(have.get(key), want.get(key), inner)
    elif have != want or type(have) is not type(want):
        yield name, have, want


def _shown(value: Any) -> str:
    """A value as a message shows it: None in words, long ones cut."""
    text = "nothing" if value is None else canonical_json(value).strip('"')
    return text if len(text) <= 60 else text[:57] + "..."


def explain_difference(
    have: FeatureSetSpec, want: FeatureSetSpec, where: Path
) -> StaleFeatureSetError:
    """The error for a set that was made otherwise than asked for; the caller raises it.

    Args:
        have: What the set on disk says.
        want: What this run asks for; it differs from `have` in at least one field.
        where: The set's `feature_set.json` or folder.

    Returns:
        An error that names the first differing field (dotted inside `preprocessing`) with both
        values, and the names of the others.
    """
    found = list(_differences(to_plain(have), to_plain(want), ""))
    found.sort(key=lambda item: item[0] == "library_version")  # the least telling one last
    name, old, new = found[0] if found else ("fingerprint", have.fingerprint, want.fingerprint)
    others = ", ".join(f"`{other[0]}`" for other in found[1:])
    return StaleFeatureSetError(
        f"feature set differs in `{name}`: the cache has {_shown(old)}, this run asks for "
        f"{_shown(new)}" + (f" (also: {others})" if others else ""),
        where=where,
        fix=f"{want.extract_command} --root OTHER-FOLDER makes the new set beside this one",
    )


@dataclass(frozen=True)
class ShardPlan:
    """Which rows one shard holds.

    Attributes:
        number: Position among the set's shards, from 0.
        keys: `key` (image sets) or `text_id` (text sets) of each row, in row order.
        row_hashes: For each row what its input was: `row_hash` of the file, or the `text_id`.
    """

    number: int
    keys: list[str]
    row_hashes: list[str]

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.keys)

    @property
    def keys_hash(self) -> str:
        """32 hex digits over the ordered keys."""
        return hash_keys(self.keys)

    @property
    def file_name(self) -> str:
        """Name of the shard's file inside the set's folder."""
        return shard_name(self.number)


def shard_name(number: int) -> str:
    """File name of a shard, e.g. `shard-000012.h5`."""
    return f"shard-{number:06d}.h5"


def hash_keys(keys: Sequence[str]) -> str:
    """32 hex digits of SHA-256 over keys joined by line feeds, in the order given."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]


def row_hash(key: str, path: str, size_bytes: int, mtime_ns: int) -> str:
    """16 hex digits that change when a row's input file is another one or was changed."""
    text = f"{key}\n{path}\n{size_bytes}\n{mtime_ns}"
    return xxhash.xxh3_64_hexdigest(text.encode())


def plan_rows(
    row_ids: Sequence[str],
    row_bytes: int | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    ragged_rows: int = RAGGED_SHARD_ROWS,
) -> list[range]:
    """Cut ordered rows into shards; nothing but these arguments has a say.

    Shards have a power of two of rows, so that those of several encoders nest: a pass over one
    range of pictures fills whole shards of all of them.

    Args:
        row_ids: Ordered `key`s or `text_id`s.
        row_bytes: Bytes of one row's tokens, None for ragged sets.
        shard_bytes: Token bytes that a shard of fixed-size rows may hold; one row always fits.
        ragged_rows: Most rows of a ragged shard.

    Returns:
        Consecutive row ranges that cover all rows; all but the last have the same length.
    """
    most = ragged_rows if row_bytes is None else shard_bytes // row_bytes
    step = 1 << (max(1, most).bit_length() - 1)
    total = len(row_ids)
    return [range(start, min(start + step, total)) for start in range(0, total, step)]


def plan_shards(
    spec: FeatureSetSpec,
    row_ids: Sequence[str],
    row_hashes: Sequence[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    ragged_rows: int = RAGGED_SHARD_ROWS,
) -> list[ShardPlan]:
    """The plan of a whole set: `plan_rows` with the rows filled in.

    Args:
        spec: Gives the bytes per row.
        row_ids: Ordered `key`s or `text_id`s.
        row_hashes: As many, see `ShardPlan`.
        shard_bytes: See `plan_rows`.
        ragged_rows: See `plan_rows`.
    """
    ranges = plan_rows(row_ids, spec.row_bytes, shard_bytes=shard_bytes, ragged_rows=ragged_rows)
    return [
        ShardPlan(number, list(row_ids[r.start : r.stop]), list(row_hashes[r.start : r.stop]))
        for number, r in enumerate(ranges)
    ]


@dataclass(frozen=True)
class SetPlan:
    """The content of `shards.json`.

    Attributes:
        manifest_name: Manifest that the rows come from.
        shards: All planned shards, numbered from 0 without gaps.
    """

    manifest_name: str
    shards: list[ShardPlan]


def plan_values(plan: SetPlan) -> dict[str, Any]:
    """`shards.json` as JSON values; lists joined by line feeds parse ten times faster."""
    shards = [
        {
            "number": shard.number,
            "num_rows": shard.num_rows,
            "keys_hash": shard.keys_hash,
            "keys": "\n".join(shard.keys),
            "row_hashes": "\n".join(shard.row_hashes),
        }
        for shard in plan.shards
    ]
    return {"format_version": FORMAT_VERSION, "manifest": plan.manifest_name, "shards": shards}


def read_plan(folder: Path) -> SetPlan:
    """Read and check `shards.json`.

    Raises:
        CacheError: It is missing, damaged, or contradicts itself.
    """
    path = folder / PLAN_FILE
    values = read_json(path)
    try:
        shards = [
            ShardPlan(entry["number"], entry["keys"].split("\n"), entry["row_hashes"].split("\n"))
            for entry in values["shards"]
        ]
        manifest = str(values["manifest"])
        stored = [(entry["num_rows"], entry["keys_hash"]) for entry in values["shards"]]
    except (KeyError, TypeError, AttributeError):
        raise CacheError(
            "the file is damaged: it has not the form of a list of shards", where=path
        ) from None
    for position, (shard, (num_rows, keys_hash)) in enumerate(zip(shards, stored, strict=True)):
        if (
            shard.number != position
            or shard.num_rows != num_rows
            or len(shard.row_hashes) != num_rows
            or shard.keys_hash != keys_hash
        ):
            raise CacheError(
                f"the file is damaged: the entry of shard {position} contradicts itself",
                where=path,
                fix="restore the file from a copy, or extract into another --root",
            )
    return SetPlan(manifest, shards)


def make_channel_scale(tokens: Float[np.ndarray, "*rows D"]) -> Float32[np.ndarray, " D"]:
    """The channel scale of an int8 set, from the set's first `SCALE_ROWS` rows.

    Args:
        tokens: Tokens of these rows, finite; any leading axes. The largest absolute values of
            parts of them serve as well.

    Returns:
        The largest absolute value of each channel. A channel that is zero throughout gets the
        median of the others, so that a later value in it does not coarsen the whole token.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    largest: Float32[np.ndarray, " D"] = np.abs(flat).max(axis=0, initial=0).astype(np.float32)
    alive = largest[largest > 0]
    largest[largest == 0] = np.median(alive) if alive.size else 1.0
    return largest


def quantise(
    tokens: Float[np.ndarray, "*rows D"], scale_channel: Float32[np.ndarray, " D"]
) -> tuple[Int8[np.ndarray, "*rows D"], Float16[np.ndarray, "*rows"]]:
    """Round tokens to int8, symmetric, with a scale per token times a scale per channel.

    Args:
        tokens: Finite values.
        scale_channel: Positive, from `make_channel_scale`.

    Returns:
        The rounded tokens in [-127, 127], and the scale of each token: the smallest float16 that
        clips nothing. It is infinite where float16 cannot hold it, which the writer refuses.
    """
    relative = tokens.astype(np.float32) / scale_channel
    exact = np.abs(relative).max(axis=-1, initial=0) / np.float32(127)
    with np.errstate(over="ignore"):
        scale = exact.astype(np.float16)
    too_small = scale.astype(np.float32) < exact
    scale[too_small] = np.nextafter(scale[too_small], np.float16(np.inf))
    steps = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    rounded = np.rint(relative / steps)
    return np.clip(rounded, -127, 127).astype(np.int8), scale


def dequantise(
    tokens: Int8[np.ndarray, "*rows D"],
    scale_token: Float16[np.ndarray, "*rows"],
    scale_channel: Float32[np.ndarray, " D"],
) -> Float32[np.ndarray, "*rows D"]:
    """Undo `quantise` up to half a step: `tokens * scale_token * scale_channel` in float32."""
    out = tokens.astype(np.float32)
    out *= scale_token.astype(np.float32)[..., None]
    out *= scale_channel
    return out


@dataclass(frozen=True)
class Rounding:
    """What int8 cost, measured on some of the rows.

    Attributes:
        rows: Rows that were measured.
        error: Sum of the squared differences between stored and true values.
        total: Sum of the squared true values.
        worst: Largest relative error of one row: the root of its error over its total.
    """

    rows: int = 0
    error: float = 0.0
    total: float = 0.0
    worst: float = 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            self.rows + other.rows,
            self.error + other.error,
            self.total + other.total,
            max(self.worst, other.worst),
        )

    @property
    def relative_error(self) -> float:
        """Root of the error over the total; 0 where nothing was measured."""
        return (self.error / self.total) ** 0.5 if self.total else 0.0
