"""One bench: what it measures, what is hoped for, and what it found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import JsonValue

from featcache.console import note


@dataclass(frozen=True)
class Setting:
    """What a bench is given.

    Attributes:
        folder: An empty folder; it is removed afterwards.
        repeats: How often each contestant runs, in turn with the others.
        quick: Whether to measure something small, only to see that the bench works.
        device: `cpu` or `cuda`.
        quiet: Whether the user wants no notes.
    """

    folder: Path
    repeats: int
    quick: bool = False
    device: str = "cpu"
    quiet: bool = False

    def choose(self, full: int, quick: int) -> int:
        """A size: the true one, or the small one."""
        return quick if self.quick else full

    @property
    def on_gpu(self) -> bool:
        """Whether encoders run on a GPU."""
        return self.device.startswith("cuda")

    def say(self, text: str) -> None:
        """Tell the user what is being done."""
        note(f"  {text}")


@dataclass(frozen=True)
class Measured:
    """What a bench found.

    Attributes:
        runs: The figure in each repeat (or for each part), at least one.
        value: The figure; None: the median of `runs`.
        detail: Everything else that a reader needs to judge it, as JSON values.
    """

    runs: Sequence[float]
    value: float | None = None
    detail: dict[str, JsonValue] = field(default_factory=dict)

    @property
    def figure(self) -> float:
        """The figure that is held against the goal."""
        return median(self.runs) if self.value is None else self.value


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        name: As typed and printed; `GROUP[VARIANT]` where a group has several of one kind.
        goal: What the figure should reach.
        better: Which side of the goal is the good one; the goal itself always holds.
        unit: `x` for a ratio, else what the figure counts.
        what: One line: what is held against what.
        measure: Does it, in a process of its own.
        repeats: How often each contestant runs unless the user says otherwise.
        disk_mb: Megabytes that it writes at most.
    """

    name: str
    goal: float
    better: Literal["larger", "smaller"]
    unit: str
    what: str
    measure: Callable[[Setting], Measured]
    repeats: int = 5
    disk_mb: int = 10

    @property
    def family(self) -> str:
        """The name without its variant."""
        return self.name.partition("[")[0]

    @property
    def group(self) -> str:
        """The module that lists it: the one of `measure`, also where some arguments are bound."""
        function = self.measure.func if isinstance(self.measure, partial) else self.measure
        return function.__module__

    @property
    def goal_text(self) -> str:
        """The goal with its direction, e.g. `>= 0.95 x`."""
        return f"{'>=' if self.better == 'larger' else '<='} {self.goal:g} {self.unit}"

    def holds(self, value: float) -> bool:
        """Whether a figure reaches the goal."""
        return value >= self.goal if self.better == "larger" else value <= self.goal
