"""The rules that every head's result follows.

Intervals come from resampled patients, the test split is read once, and a finished result is left
alone. The words are in `docs/protocol.md`.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.console import Console

from featcache import config as files
from featcache.errors import TrainingError
from featcache.heads.table import (
    Column,
    Estimate,
    Interval,
    Row,
    Table,
    table_from_plain,
)

# A result's parts have a module of their own; heads import only this one.
__all__ = [
    "Column",
    "Estimate",
    "Interval",
    "Results",
    "Row",
    "Table",
    "TestGate",
    "finished",
    "interval_of",
    "open_gate",
    "patient_bootstrap",
    "patient_weights",
    "request_hash",
    "save_results",
]

SCHEMA = 1
BLOCK_VALUES = 4_000_000  # weights that a block of bootstrap draws may hold at once


def patient_weights(
    subject_ids: Sequence[str], *, draws: int, seed: int
) -> Iterator[Float64[np.ndarray, "_ N"]]:
    """How often each row counts in each bootstrap draw, in blocks of draws.

    A draw takes as many patients as there are, with replacement; all rows of a patient come along.
    Neither the rows' order nor the size of the blocks changes what a patient's weight is.

    Args:
        subject_ids: Patient of each row.
        draws: Draws in all.
        seed: Seed of the draws.
    """
    patients, patient_of = np.unique(np.asarray(subject_ids, dtype=str), return_inverse=True)
    generator = np.random.default_rng(seed)
    even = np.full(len(patients), 1.0 / len(patients))
    block = max(1, BLOCK_VALUES // max(1, len(patient_of)))
    for start in range(0, draws, block):
        counts = generator.multinomial(len(patients), even, size=min(block, draws - start))
        yield counts[:, patient_of].astype(np.float64)


def patient_bootstrap(
    metric: Callable[[Float64[np.ndarray, "W N"]], Float64[np.ndarray, "W M"]],
    subject_ids: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Float64[np.ndarray, "draws M"]:
    """Figures over resampled patients.

    Equal seeds give equal draws, so the figures of two methods on the same rows can be subtracted
    draw by draw: that is the paired bootstrap.

    Args:
        metric: Gives M figures for each of W weightings of the rows, NaN where one does not exist.
        subject_ids: Patient of each row.
        draws: Draws in all.
        seed: Seed of the draws.
    """
    blocks = patient_weights(subject_ids, draws=draws, seed=seed)
    return np.concatenate([metric(weights) for weights in blocks])


def interval_of(drawn: Float64[np.ndarray, " draws"]) -> Interval | None:
    """The 95 % interval of a figure from its draws; None when it never existed."""
    exists = drawn[~np.isnan(drawn)]
    if len(exists) == 0:
        return None
    low, high = np.percentile(exists, [2.5, 97.5])
    return Interval(float(low), float(high), len(drawn), len(drawn) - len(exists))


def request_hash(parts: Mapping[str, Any]) -> str:
    """First 16 hex digits of SHA-256 over everything that decides a result."""
    return hashlib.sha256(files.canonical_json(parts).encode()).hexdigest()[:16]


class TestGate:
    """The one way to the test split's answers: every read is written down in the output folder.

    Args:
        folder: Output folder of the head.
        request: Hash of everything that decides the result.
        again: Whether the user asked for a second read.
    """

    __test__ = False  # its name begins like a test's

    def __init__(self, folder: Path, request: str, *, again: bool = False):
        self.path = folder / "test_reads.json"
        self.request = request
        self.again = again

    def reads(self) -> list[dict[str, str]]:
        """Reads so far, oldest first."""
        return list(files.read_json(self.path)["reads"]) if self.path.is_file() else []

    def requests_before(self) -> int:
        """How many other requests have read this test split into this folder."""
        return len({read["request"] for read in self.reads()} - {self.request})

    def check(self) -> None:
        """Refuse a second look before any long work.

        The same request may repeat a read whose result was lost: nothing was chosen in between.

        Raises:
            TrainingError: Another request has read the test split, and `again` was not asked for.
        """
        others = self.requests_before()
        if others and not self.again:
            raise TrainingError(
                f"the test split was read before for this folder, by {others} other request(s); "
                "choosing between results on test makes them worthless",
                where=self.path,
                fix="--again reads it once more, and the table will say so",
            )

    def read(self, answers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the read down, then hand out the sealed answers.

        Raises:
            TrainingError: As in `check`.
        """
        self.check()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        reads = [*self.reads(), {"request": self.request, "time": now}]
        files.write_json(self.path, {"schema": SCHEMA, "reads": reads})
        return answers

    def note(self) -> str:
        """A sentence for the table."""
        others = self.requests_before()
        if not others:
            return "The test split was read once, after everything had been chosen on validation."
        return (
            f"The test split had been read by {others} other request(s) before: --again was used."
        )


@dataclass(frozen=True)
class Results:
    """What a head found, and where it stands.

    Attributes:
        folder: Holds `results.json` and `results.md`.
        values: Content of `results.json`.
        table: For printing.
        is_new: False when a finished identical result was found and nothing was done.
    """

    folder: Path
    values: dict[str, Any]
    table: Table
    is_new: bool

    def to_json(self) -> dict[str, Any]:
        """The content of `results.json`, with the folder it stands in."""
        return {**self.values, "folder": str(self.folder)}

    def to_text(self) -> str:
        """The table for a terminal, then where it was written."""
        text = StringIO()
        width = max(124, shutil.get_terminal_size().columns)
        Console(file=text, width=width, highlight=False).print(self.table.to_rich())
        done = "written" if self.is_new else "found finished, left untouched"
        return f"{text.getvalue()}{done}: {self.folder / 'results.md'}, results.json"


def finished(folder: Path, request: str) -> Results | None:
    """The result of the very same request, when it stands in the folder already."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    values = files.read_json(path)
    if values.get("schema") != SCHEMA or values.get("request") != request:
        return None
    return Results(folder, values, table_from_plain(values), is_new=False)


def open_gate(
    out: Path, facts: Mapping[str, Any], *, again: bool, reads_test: bool = True
) -> Results | TestGate:
    """The finished result of a request, else the gate to its test answers.

    Args:
        out: Output folder of the head.
        facts: Everything that decides the result.
        again: Whether the user asked for a second read.
        reads_test: Whether the request is about the test split at all.

    Raises:
        TrainingError: Another request has read the test split, and `again` is False.
    """
    gate = TestGate(out, request_hash(facts), again=again)
    done = finished(out, gate.request)
    if done is not None:
        return done
    if reads_test:
        gate.check()
    return gate


def save_results(folder: Path, table: Table, facts: Mapping[str, Any]) -> Results:
    """Write `results.json` and `results.md`.

    Args:
        folder: Made when it is missing.
        table: The results.
        facts: JSON-compatible values that stand beside the table; `request` is one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {"schema": SCHEMA, **facts, **table.to_plain()}
    files.replace_file(folder / "results.md", table.to_markdown().encode())
    files.write_json(folder / "results.json", values)  # last: it says that the rest is there
    return Results(folder, values, table, is_new=True)
