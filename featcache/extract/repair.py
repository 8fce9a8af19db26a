"""`featcache repair`: exactly the damaged shards are made again, and the rest is left alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from featcache.cache.check import VerifyReport, set_folders, verify_feature_set
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.shard import Shard
from featcache.console import note
from featcache.encoders.request import locate_all, read_request
from featcache.errors import ShardError
from featcache.extract.command import make_missing
from featcache.extract.config import ExtractConfig
from featcache.extract.prepare import Admission, prepare
from featcache.extract.result import count
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace


@dataclass
class RepairedSet:
    """What `repair` did to one feature set.

    Attributes:
        name: e.g. `image/vit-b`.
        folder: The set's folder.
        shards: Its shards.
        remade: Numbers of those that were made again.
        rows: Rows of these.
        known: Rows whose old checksums could still be read.
        equal: Of these, rows whose bytes have the checksum that they had before.
        left: What is still wrong.
    """

    name: str
    folder: Path
    shards: int
    remade: list[int] = field(default_factory=list)
    rows: int = 0
    known: int = 0
    equal: int = 0
    left: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return self.left is None or self.left.ok

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "ok": self.ok,
            "shards": self.shards,
            "shards_made": self.remade,
            "rows_made": self.rows,
            "rows_with_known_checksum": self.known,
            "rows_with_equal_checksum": self.equal,
        }

    def to_text(self) -> str:
        """One or more lines for a person."""
        line = f"{self.name}: {count(self.shards, 'shard')}"
        if not self.remade:
            return f"{line}, every checksum is right: nothing to do"
        line += f", {count(len(self.remade), 'shard')} with {count(self.rows, 'row')} made again"
        if self.known:
            line += f"; {self.equal:,} of {self.known:,} rows have the checksum that they had"
        if self.left is not None and not self.left.ok:
            line += "\n" + self.left.to_text()
        return line


@dataclass
class RepairResult:
    """What `repair` did, set by set."""

    root: Path
    sets: Sequence[RepairedSet]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return all(one.ok for one in self.sets)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": self.ok, "sets": [one.to_json() for one in self.sets]}

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [f"repair in {self.root}", *(one.to_text() for one in self.sets)]
        return "\n".join(lines)


def repair(
    workspace: Workspace,
    name: str | None = None,
    *,
    rows_changed: bool = False,
    config: ExtractConfig | None = None,
) -> RepairResult:
    """Find damaged and missing shards, make them again, and compare all their checksums.

    A damaged shard stays until its successor is complete.

    Args:
        workspace: Where the sets and their manifests are.
        name: `image/NAME`, `text/NAME`, or a folder; None for all sets.
        rows_changed: Whether shards of rows whose files changed are made again too, which is
            refused otherwise.
        config: Workers, threads, device and scheduler.

    Raises:
        CacheError: A set's own files are damaged, or its manifest has other rows.
        WeightsError: The weights that made a set are no longer here.
        StaleFeatureSetError: Another library version would make other bytes.
    """
    settings = config or ExtractConfig()
    sets = [
        _repair_set(workspace, folder, settings, rows_changed)
        for folder in set_folders(workspace, name)
    ]
    return RepairResult(workspace.root, sets)


def _repair_set(
    workspace: Workspace, folder: Path, config: ExtractConfig, rows_changed: bool
) -> RepairedSet:
    """Verify one set and make again what is wrong with it."""
    report = verify_feature_set(folder)
    made = FeatureSetWriter.open(folder)
    done = RepairedSet(made.spec.title, folder, report.shards)
    if report.ok and not rows_changed:
        return done
    tables = _manifest(workspace, made)
    request = read_request(folder)
    admission = Admission(rows_changed=rows_changed)
    before = {n: _row_checksums(folder / made.shards[n].file_name) for n in report.damaged_shards}
    (located,) = locate_all([request])
    one = prepare(folder, tables, request, located, config.device, admission)
    changed = [number for number in one.missing if number not in report.damaged_shards]
    one.missing = sorted({*one.missing, *report.damaged_shards})
    if not one.missing:
        return done
    made.check_library(one.spec)
    note(f"{done.name}: {count(len(one.missing), 'shard')} to make again")
    result = one.planned(tables)
    make_missing([(one, result)], tables, config, again=True)
    done.remade, done.rows = one.missing, result.missing_rows
    done.left = verify_feature_set(folder, only=one.missing)
    for number, sums in before.items():
        if sums is not None and number not in changed:
            now = _row_checksums(folder / made.shards[number].file_name)
            done.known += len(sums)
            done.equal += 0 if now is None else int((sums == now).sum())
    return done


def _manifest(workspace: Workspace, made: FeatureSetWriter) -> Manifest:
    """The manifest that a set's rows come from."""
    return open_manifest(workspace.manifest(made.manifest_name))


def _row_checksums(path: Path) -> UInt64[np.ndarray, " N"] | None:
    """The checksums of a shard's rows as they were written; None when these are damaged too."""
    try:
        return Shard.open(path).read("checksums")
    except ShardError:
        return None
