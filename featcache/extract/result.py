"""What stage one did, for a person and for a program."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.console import duration, size
from featcache.encoders.forward import PartStats, Times

_STAGES = {"decode": "decoding", "encode": "encoding", "write": "writing"}


def count(number: int, noun: str) -> str:
    """A number with its noun, e.g. `1 shard`, `2 shards`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@dataclass
class SetResult:
    """What happened to one feature set.

    Attributes:
        name: e.g. `image/vit-b`.
        dataset: The manifest's title.
        folder: The set's folder.
        rows: Rows of the set.
        shards: Its shards.
        missing_shards: Those that this run made.
        missing_rows: Rows of these.
        row_bytes: Bytes of one row's tokens; None for texts.
        failed_rows: Quarantined rows of the whole set.
        stats: What became of the rows that were made.
    """

    name: str
    dataset: str
    folder: Path
    rows: int
    shards: int
    missing_shards: int
    missing_rows: int
    row_bytes: int | None
    failed_rows: int = 0
    stats: PartStats = field(default_factory=PartStats)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "dataset": self.dataset,
            "folder": str(self.folder),
            "rows": self.rows,
            "rows_made": self.missing_rows,
            "shards": self.shards,
            "shards_made": self.missing_shards,
            "failed_rows": self.failed_rows,
            "truncated_texts": self.stats.truncated,
        }

    def to_text(self, dry_run: bool) -> str:
        """One or more lines for a person."""
        line = f"{self.name} of {self.dataset}: {self.rows:,} rows in {count(self.shards, 'shard')}"
        if dry_run:
            stored = f", {size(self.rows * self.row_bytes)} of tokens" if self.row_bytes else ""
            return f"{line}{stored}, {self.shards - self.missing_shards} complete already"
        if not self.missing_shards:
            line += ", complete already: nothing to do"
        elif self.missing_shards < self.shards:
            line += f", {self.missing_shards:,} of them made now"
        if self.stats.truncated:
            line += f"\n  {count(self.stats.truncated, 'text')} cut to the encoder's length"
        if self.stats.pass_rows:
            line += (
                f"\n  out of memory: passes of {self.stats.pass_rows} rows instead of whole "
                "batches; quality.json says what that changed"
            )
        if self.stats.rounding is not None:
            line += f"\n  int8: relative error {self.stats.rounding.relative_error:.4f}"
        if self.failed_rows:
            line += f"\n  {count(self.failed_rows, 'unreadable row')}: "
            line += f"{self.folder / 'failures.parquet'}"
        return line


@dataclass
class PassResult:
    """One pass over the pictures, or over the texts for one encoder.

    Attributes:
        sets: Names of the sets that it filled.
        rows: Pictures or texts that were read, each once.
        unit: `images` or `texts`.
        elapsed_s: From the first task to the last.
        times: Where the workers' time went, all of them together.
    """

    sets: Sequence[str]
    rows: int
    unit: str
    elapsed_s: float = 0.0
    times: Times = field(default_factory=Times)

    @property
    def rows_per_s(self) -> float:
        """Rows per second."""
        return self.rows / max(self.elapsed_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        stage, share = self.times.limit()
        return {
            "sets": list(self.sets),
            "rows": self.rows,
            "elapsed_s": round(self.elapsed_s, 3),
            "rows_per_s": round(self.rows_per_s, 2),
            "limit": stage,
            "limit_share": round(share, 3),
            "decode_wait_s": round(self.times.decode_wait_s, 3),
            "encode_s": round(self.times.encode_s, 3),
            "write_wait_s": round(self.times.write_wait_s, 3),
        }

    def to_text(self) -> str:
        """One line: how fast, and which stage was the bottleneck for what share of the time."""
        stage, share = self.times.limit()
        return (
            f"{self.rows:,} {self.unit} in {duration(self.elapsed_s)}, {self.rows_per_s:.1f}/s; "
            f"the limit was {_STAGES[stage]}, {share:.0%} of the time"
        )


@dataclass
class ExtractResult:
    """What `extract` did, set by set and pass by pass."""

    sets: list[SetResult]
    passes: list[PassResult]
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sets": [made.to_json() for made in self.sets],
            "passes": [one.to_json() for one in self.passes],
            "dry_run": self.dry_run,
        }

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [made.to_text(self.dry_run) for made in self.sets]
        if self.dry_run:
            return "\n".join([*lines, "next: the same command without --dry-run"])
        lines += [one.to_text() for one in self.passes]
        lines += [f"wrote {made.folder}" for made in self.sets if made.missing_shards]
        return "\n".join([*lines, "next: featcache train-adaptor"])
