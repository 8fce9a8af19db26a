"""`featcache bench`: each bench in a child process, and all results beside the machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from pydantic import Field

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.machine import Machine, describe_machine
from featcache.bench.registry import choose_benches
from featcache.bench.timing import seconds
from featcache.config import Config, read_json
from featcache.console import duration, is_quiet, note, size
from featcache.device import resolve_device
from featcache.errors import FeatcacheError

QUICK_REPEATS = 2


class BenchConfig(Config):
    """How benches run."""

    repeats: int | None = Field(
        None, ge=1, description="Runs of each contestant; None: what the bench needs."
    )


@dataclass(frozen=True)
class Result:
    """What became of one bench.

    Attributes:
        bench: Which.
        measured: What it found; None where it could not be measured.
        error: Why not.
    """

    bench: Bench
    measured: Measured | None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        bench, found = self.bench, self.measured
        return {
            "name": bench.name,
            "value": None if found is None else round(found.figure, 4),
            "unit": bench.unit,
            "goal": bench.goal,
            "better": bench.better,
            "holds": found is not None and bench.holds(found.figure),
            "runs": [] if found is None else [round(one, 4) for one in found.runs],
            "what": bench.what,
            "detail": {"error": self.error} if found is None else found.detail,
        }

    def to_cells(self) -> tuple[str, ...]:
        """A line of the table."""
        bench, found = self.bench, self.measured
        if found is None:
            return bench.name, "-", bench.goal_text, "-", f"not measured: {self.error}"
        value = f"{found.figure:.3g} {bench.unit}"
        verdict = "holds" if bench.holds(found.figure) else "misses"
        return bench.name, value, bench.goal_text, verdict, bench.what


@dataclass(frozen=True)
class BenchReport:
    """All results of one run of the command.

    Attributes:
        machine: Where they were measured.
        results: In the order in which they were.
        quick: Whether only something small was measured.
    """

    machine: Machine
    results: Sequence[Result]
    quick: bool

    @property
    def ok(self) -> bool:
        """Whether every bench could be measured, whatever it found."""
        return all(result.measured is not None for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "machine": self.machine.to_json(),
            "quick": self.quick,
            "results": [result.to_json() for result in self.results],
        }

    def to_text(self) -> str:
        """A table for a person."""
        lines = [self.machine.to_text()]
        if self.machine.is_busy:
            lines.append("! the machine was busy: these figures are doubtful")
        if self.quick:
            lines.append("! quick: small sizes, to see that the benches work; no figures to quote")
        head = ("bench", "value", "goal", "", "what")
        return "\n".join([*lines, *_table([head, *(one.to_cells() for one in self.results)])])


@dataclass(frozen=True)
class BenchList:
    """The benches there are."""

    benches: Sequence[Bench]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("name", "goal", "better", "unit", "what", "disk_mb")
        return {"benches": [{name: getattr(one, name) for name in names} for one in self.benches]}

    def to_text(self) -> str:
        """A line each."""
        return "\n".join(_table([(one.name, one.goal_text, one.what) for one in self.benches]))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells as lines with straight columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def list_benches(names: Sequence[str] = ()) -> BenchList:
    """What can be measured.

    Args:
        names: Only these; none named: all.

    Raises:
        UsageError: There is no such bench.
    """
    return BenchList(choose_benches(names))


def run_benches(
    names: Sequence[str] = (),
    config: BenchConfig | None = None,
    *,
    device: str = "auto",
    quick: bool = False,
) -> BenchReport:
    """Measure, one bench after the other, each in a process of its own.

    Every process has `OMP_WAIT_POLICY=passive`, rivals and limits too: threads that wait for work
    by spinning would slow down whoever runs beside them. All files go to a temporary folder
    (`TMPDIR` says where), which is removed.

    Args:
        names: Benches as `list_benches` gives them; none named: all.
        config: Repeats.
        device: `auto`, `cpu` or `cuda`: where encoders run.
        quick: Measure something small, only to see that the benches work.

    Returns:
        All results; one that could not be measured says why.

    Raises:
        UsageError: There is no such bench or device.
        FeatcacheError: The disk is too small.
    """
    benches = choose_benches(names)
    device = resolve_device(device)
    machine = describe_machine()
    if machine.is_busy:
        note(f"! load {machine.load:.2f}: something else is running, figures will be doubtful")
    _check_disk(benches, quick)
    results = []
    for number, bench in enumerate(benches, 1):
        note(f"{number}/{len(benches)}  {bench.name}: {bench.what}")
        repeats = (config or BenchConfig()).repeats or bench.repeats
        results.append(
            _run(bench, min(repeats, QUICK_REPEATS) if quick else repeats, quick, device)
        )
    return BenchReport(machine, results, quick)


def _check_disk(benches: Sequence[Bench], quick: bool) -> None:
    """Say what will be written, and refuse before any work when there is no room for it."""
    needed = max((bench.disk_mb for bench in benches), default=0) * 10**6
    folder = gettempdir()
    free = shutil.disk_usage(folder).free
    note(f"up to {size(needed)} in {folder}, removed afterwards; {size(free)} are free")
    if free < needed and not quick:
        raise FeatcacheError(
            f"the benches write up to {size(needed)}, {size(free)} are free",
            where=folder,
            fix="TMPDIR=FOLDER featcache bench, with a folder on a larger disk",
        )


def _run(bench: Bench, repeats: int, quick: bool, device: str) -> Result:
    """One bench in a child."""
    # The parent owns the folder: it goes away even when the child is killed.
    with TemporaryDirectory(prefix="featcache-bench-", ignore_cleanup_errors=True) as folder:
        out = Path(folder) / "measured.json"
        work = Path(folder) / "work"
        work.mkdir()
        setting = asdict(Setting(work, repeats, quick, device, is_quiet()))
        request = {
            "name": bench.name,
            "group": bench.group,
            "setting": {**setting, "folder": str(work)},
            "out": str(out),
        }
        codes: list[int] = []
        taken_s = seconds(lambda: codes.append(_child(request)))
        result = _read(bench, out, codes[0])
    cells = result.to_cells()
    note(f"  {cells[1]}, goal {cells[2]}, in {duration(taken_s)}")
    return result


def _child(request: dict[str, Any]) -> int:
    """Run the child process; its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "featcache.bench.child"],
        input=json.dumps(request).encode(),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    return done.returncode


def _read(bench: Bench, out: Path, code: int) -> Result:
    """What the child left."""
    if not out.is_file():
        return Result(bench, None, f"its process ended with code {code}")
    values = read_json(out)
    if "error" in values:
        what, fix = values["error"]
        words = [" ".join(what.split()), *([f"try {fix}"] if fix else [])]
        return Result(bench, None, "; ".join(words))
    return Result(bench, Measured(**values))
