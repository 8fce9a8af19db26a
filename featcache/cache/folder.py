"""The folder of a feature set while it is being made: its plan, what is missing, what failed."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from featcache.cache.format import (
    MAX_KEY_BYTES,
    PLAN_FILE,
    SPEC_FILE,
    FeatureSetSpec,
    SetPlan,
    ShardPlan,
    explain_difference,
    plan_values,
    read_plan,
    read_spec,
    shard_name,
    spec_values,
)
from featcache.cache.shard import Shard
from featcache.config import explained_refusals, read_json, replace_file, write_json
from featcache.errors import CacheError, ShardError
from featcache.partial import remove_dead_partials

QUALITY_FILE = "quality.json"
FAILURES_FOLDER = "failures.parquet"
SCALE_FILE = "scale_channel.json"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FAILURES = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("reason", pa.string())])


class FeatureSetWriter:
    """The folder of one feature set, from the side that makes it.

    Get one from `create` (the run that extracts) or `open` (its workers).

    Attributes:
        folder: The set's folder.
        spec: How its rows are made.
        manifest_name: Manifest that its rows come from.
        shards: The planned shards; `shards[i].number == i`.
    """

    def __init__(self, folder: Path, spec: FeatureSetSpec, plan: SetPlan):
        self.folder = folder
        self.spec = spec
        self.manifest_name = plan.manifest_name
        self.shards = plan.shards

    @classmethod
    def create(
        cls,
        folder: Path,
        spec: FeatureSetSpec,
        plan: Sequence[ShardPlan],
        manifest_name: str,
        *,
        append: bool = False,
        rows_changed: bool = False,
    ) -> "FeatureSetWriter":
        """Write `feature_set.json` and `shards.json`, or find equal ones and go on from there.

        The plan of a set that is there stands: `plan` then only says which rows there are, and in
        how large pieces new ones come. A row whose file changed is refused, unless it is one that
        failed: its shard is then given up and is `missing` again.

        Args:
            folder: Folder of the set; made when absent.
            spec: How rows are made.
            plan: From `plan_shards`.
            manifest_name: Manifest that the rows come from.
            append: Take in rows that the set does not have, as shards after its last one; they may
                come from another manifest, which must hold the old rows too.
            rows_changed: Give up the shards of rows whose files changed.

        Raises:
            StaleFeatureSetError: The folder holds a set that was made otherwise.
            CacheError: The plan cannot be, or its rows are not those of the set that is there.
        """
        shards = list(plan)
        _check_plan(shards, folder)
        with explained_refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / SPEC_FILE).exists():
            have = read_spec(folder)
            if have.fingerprint != spec.fingerprint:
                raise explain_difference(have, spec, folder / SPEC_FILE)
        else:
            have = spec
            write_json(folder / SPEC_FILE, spec_values(spec))
        if not (folder / PLAN_FILE).exists():
            write_json(folder / PLAN_FILE, plan_values(SetPlan(manifest_name, shards)))
        writer = cls(folder, have, read_plan(folder))
        writer._take_in(shards, manifest_name, append=append, rows_changed=rows_changed)
        if writer.missing():
            writer.check_library(spec)
        return writer

    def check_library(self, spec: FeatureSetSpec) -> None:
        """Refuse to make shards with other library versions than those that are there.

        Raises:
            StaleFeatureSetError: The versions differ.
        """
        if self.spec.library_version != spec.library_version:
            raise explain_difference(self.spec, spec, self.folder / SPEC_FILE)

    @classmethod
    def open(cls, folder: Path) -> "FeatureSetWriter":
        """Open a set that `create` has made.

        Raises:
            CacheError: There is none, or its files are damaged.
        """
        return cls(folder, read_spec(folder), read_plan(folder))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not complete: absent, cut, or of another set.

        Only headers are read: damage inside a shard is what `verify` finds.
        """
        return [shard.number for shard in self.shards if not self.is_complete(shard.number)]

    def discard(self, numbers: Iterable[int]) -> None:
        """Delete shards, so that they are missing and will be made again."""
        for number in numbers:
            (self.folder / shard_name(number)).unlink(missing_ok=True)

    def remove_dead_partials(self) -> int:
        """Remove half-written files whose writer is gone, and say how many there were."""
        folders = (self.folder, self.folder / FAILURES_FOLDER)
        return sum(remove_dead_partials(folder) for folder in folders)

    def write_scale_channel(self, scale_channel: Float32[np.ndarray, " D"]) -> None:
        """Keep an int8 set's channel scale, which all of its shards share.

        Args:
            scale_channel: From `make_channel_scale`.

        Raises:
            CacheError: The set is not int8, or has another scale already.
        """
        if self.spec.dtype != "int8":
            raise CacheError(f"a {self.spec.dtype} set has no channel scale", where=self.folder)
        have = self.scale_channel()
        if have is not None and not np.array_equal(have, scale_channel):
            raise CacheError(
                "the set has another channel scale already, which its shards share",
                where=self.folder / SCALE_FILE,
                fix="use the stored one: FeatureSetWriter.scale_channel()",
            )
        # A float32 survives the way through JSON's decimal digits exactly.
        write_json(self.folder / SCALE_FILE, scale_channel.astype(float).tolist())

    def scale_channel(self) -> "Float32[np.ndarray, ' D'] | None":
        """An int8 set's channel scale; None when the set is not int8 or has none yet.

        Where the file is lost, a complete shard's copy of it counts.
        """
        path = self.folder / SCALE_FILE
        if self.spec.dtype != "int8":
            return None
        if path.exists():
            return np.array(read_json(path), dtype=np.float32)
        for shard in self.shards:
            if self.is_complete(shard.number):
                with contextlib.suppress(ShardError):
                    return Shard.open(self.folder / shard.file_name).read("scale_channel")
        return None

    def write_failures(self, number: int, reasons: Mapping[str, str]) -> None:
        """Note which rows of one shard failed, in place of what was noted for that shard.

        `failures.parquet` is a folder with a table for each shard that has failures, so workers
        need no lock; Parquet readers take it as one table. Only key and reason are kept.

        Args:
            number: The shard.
            reasons: For each failed row its key and a reason without paths or report text.
        """
        folder = self.folder / FAILURES_FOLDER
        path = folder / f"shard-{number:06d}.parquet"
        if not reasons:
            path.unlink(missing_ok=True)
            return
        with explained_refusals(folder):
            folder.mkdir(exist_ok=True)
        rows = [{"shard": number, "key": key, "reason": reasons[key]} for key in sorted(reasons)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_FAILURES), sink)
        replace_file(path, sink.getvalue().to_pybytes())

    def read_failures(self) -> dict[str, str]:
        """Reason of each failed row of the set, by key."""
        return {row["key"]: row["reason"] for row in read_failures(self.folder)}

    def write_quality(self, values: Mapping[str, Any]) -> None:
        """Add figures learnt about the set to `quality.json`; equal names are replaced."""
        write_json(self.folder / QUALITY_FILE, {**read_quality(self.folder), **values})

    def is_complete(self, number: int) -> bool:
        """Whether a shard's file is there, has its full size, and holds the planned rows."""
        shard = self.shards[number]
        try:
            header = Shard.open(self.folder / shard.file_name).header
        except ShardError:
            return False
        return (header.fingerprint, header.keys_hash) == (self.spec.fingerprint, shard.keys_hash)

    def _take_in(
        self, shards: list[ShardPlan], manifest_name: str, *, append: bool, rows_changed: bool
    ) -> None:
        """Compare the rows of a manifest with the set's, and lay what may be new over the plan."""
        where = self.folder / PLAN_FILE
        if manifest_name != self.manifest_name and not append:
            raise CacheError(
                f"the set holds the rows of manifest `{self.manifest_name}`, this run asks for "
                f"those of `{manifest_name}`",
                where=where,
                fix=f"{self.spec.extract_command} --root OTHER-FOLDER keeps the two apart; or "
                "--append, where it holds the old rows and more",
            )
        asked = {
            key: row_hash
            for shard in shards
            for key, row_hash in zip(shard.keys, shard.row_hashes, strict=True)
        }
        known = {key for shard in self.shards for key in shard.keys}
        added, gone = [key for key in asked if key not in known], known - asked.keys()
        if gone or (added and not append):
            raise CacheError(
                _changed_keys(added, [k for s in self.shards for k in s.keys if k in gone]),
                where=where,
                fix=f"{self.spec.extract_command} --root OTHER-FOLDER starts a new set"
                if gone
                else f"{self.spec.extract_command} --append adds them to this set",
            )
        kept = [
            ShardPlan(old.number, old.keys, [asked[key] for key in old.keys]) for old in self.shards
        ]
        changed = self._changed_shards(kept, allowed=rows_changed)
        step = shards[0].num_rows
        for start in range(0, len(added), step):
            keys = added[start : start + step]
            kept.append(ShardPlan(len(kept), keys, [asked[key] for key in keys]))
        if changed or added or manifest_name != self.manifest_name:
            self.discard(changed)  # first: a plan never claims what a shard does not hold
            write_json(where, plan_values(SetPlan(manifest_name, kept)))
            self.shards, self.manifest_name = kept, manifest_name

    def _changed_shards(self, asked: list[ShardPlan], *, allowed: bool) -> set[int]:
        """Shards with rows whose files are others now, which only failed rows' files may be."""
        changed = [
            (new.number, key)
            for old, new in zip(self.shards, asked, strict=True)
            for key, was, now in zip(new.keys, old.row_hashes, new.row_hashes, strict=True)
            if was != now
        ]
        failed = self.read_failures() if changed and not allowed else {}
        stale = [] if allowed else [key for _, key in changed if key not in failed]
        if stale:
            raise CacheError(
                f"the file of row `{stale[0]}` is another one than when it was extracted"
                + (f", and those of {len(stale) - 1} more rows" if len(stale) > 1 else ""),
                where=self.folder / PLAN_FILE,
                fix=f"featcache repair {self.spec.title} --rows-changed makes their shards again; "
                f"or {self.spec.extract_command} --root OTHER-FOLDER makes a new set",
            )
        return {number for number, _ in changed}


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """Rows of a set's `failures.parquet`: shard, key, reason; none when nothing failed.

    Raises:
        CacheError: The file is damaged.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / FAILURES_FOLDER).glob("shard-*.parquet")):
        try:
            rows += pq.ParquetFile(path).read(columns=_FAILURES.names).to_pylist()
        except (pa.ArrowException, OSError):
            raise CacheError(
                "the file is damaged: it is no table of failures",
                where=path,
                fix="delete it; featcache verify still counts the rows that are not valid",
            ) from None
    return rows


def read_quality(folder: Path) -> dict[str, Any]:
    """A set's `quality.json`: figures that were learnt about it; empty when there are none."""
    path = folder / QUALITY_FILE
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise CacheError("the file is damaged: it holds no JSON object", where=path)
    return values


def _check_plan(shards: list[ShardPlan], where: Path) -> None:
    """Refuse plans that could not be written or read back."""
    keys = [key for shard in shards for key in shard.keys]
    if not keys or not all(shard.keys for shard in shards):
        raise CacheError(
            "there are no rows to extract", where=where, fix="look at the manifest's funnel"
        )
    if len(set(keys)) != len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise CacheError(f"the key `{twice}` stands twice in the plan", where=where)
    for key in keys:
        if not 1 <= len(key.encode()) <= MAX_KEY_BYTES or _CONTROL.search(key):
            raise CacheError(
                f"the key {key!r} is empty, longer than {MAX_KEY_BYTES} bytes, or holds control "
                "characters",
                where=where,
            )
    for position, shard in enumerate(shards):
        if shard.number != position or len(shard.row_hashes) != len(shard.keys):
            raise CacheError(f"the plan of shard {position} contradicts itself", where=where)
        if any("\n" in text for text in shard.row_hashes):
            raise CacheError(f"a row hash of shard {position} has a line feed", where=where)


def _changed_keys(added: list[str], gone: list[str]) -> str:
    """A sentence about rows that came or went."""
    first = f"`{gone[0]}` is gone" if gone else f"`{added[0]}` is new"
    return (
        f"the manifest has other rows than the set: {len(added)} more, {len(gone)} fewer; {first}"
    )
