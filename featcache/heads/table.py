"""A table of results: figures with their spread, and all that must be said with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

DIGITS = 6
"""Decimals that are stored: the last bits of a sum change no byte of a result."""


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of a figure over bootstrap draws.

    Attributes:
        low: 2.5th percentile.
        high: 97.5th percentile.
        draws: Draws made.
        undefined: Draws in which the figure did not exist; they are left out, not redrawn.
    """

    low: float
    high: float
    draws: int
    undefined: int


def _rounded(value: float | None) -> float | None:
    """A number as it is stored; what does not exist is null."""
    return None if value is None or np.isnan(value) else round(float(value), DIGITS) + 0.0


@dataclass(frozen=True)
class Estimate:
    """One figure of one row of a table.

    Attributes:
        values: One per subset and seed, NaN where it does not exist; rounded as they are stored, so
            that what is read back prints the same text.
        interval: Of the mean, over resampled patients; None when there is none.
    """

    values: tuple[float, ...]
    interval: Interval | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(round(one, DIGITS) for one in self.values))

    @property
    def mean(self) -> float:
        """Mean over subsets and seeds; NaN when one of them does not exist."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """Standard deviation over subsets and seeds (n - 1); None for a single value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def to_plain(self) -> dict[str, Any]:
        """JSON-compatible values, rounded."""
        interval = self.interval
        return {
            "mean": _rounded(self.mean),
            "sd": _rounded(self.sd),
            "low": _rounded(interval.low) if interval else None,
            "high": _rounded(interval.high) if interval else None,
            "draws": interval.draws if interval else 0,
            "undefined_draws": interval.undefined if interval else 0,
            "values": [_rounded(value) for value in self.values],
        }

    def text(self, scale: float = 1.0, decimals: int = 1) -> str:
        """`mean ± sd [low, high]` for a person."""
        if np.isnan(self.mean):
            return "undefined"

        def number(value: float) -> str:
            stored = round(value, DIGITS)
            return f"{round(stored * scale, decimals) + 0.0:.{decimals}f}"  # never -0.0

        words = number(self.mean)
        if self.sd is not None:
            words += f" ± {number(self.sd)}"
        if self.interval is not None:
            words += f" [{number(self.interval.low)}, {number(self.interval.high)}]"
        return words


@dataclass(frozen=True)
class Column:
    """A figure that every row of a table has.

    Attributes:
        name: Key in `Row.figures`.
        title: Head of the column.
        percent: Whether the figure is a share, shown in percent.
    """

    name: str
    title: str
    percent: bool = True


@dataclass(frozen=True)
class Row:
    """One line of a table: a method in a setting.

    Attributes:
        dataset: Name of the data set, with the words `synthetic stand-in` where it is one.
        method: What was measured.
        setting: What else tells the line from others, e.g. `{"train": "1 %"}`.
        figures: By column name; empty when there is nothing to show.
        details: JSON-compatible facts for `results.json` alone.
        remark: Said beside the figures, or in their place: why there are none.
    """

    dataset: str
    method: str
    setting: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Estimate] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    remark: str = ""

    def to_plain(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {
            "dataset": self.dataset,
            "method": self.method,
            "setting": self.setting,
            "figures": {name: figure.to_plain() for name, figure in self.figures.items()},
            "remark": self.remark,
            **self.details,
        }


@dataclass(frozen=True)
class Table:
    """Results with all that must be said with them.

    Attributes:
        title: What the table is about.
        columns: The figures.
        rows: The lines, trivial ones included.
        notes: Sentences above the table.
        configurations: How many configurations were tried and compared on validation, in all.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    configurations: int

    @property
    def settings(self) -> list[str]:
        """Names in the rows' settings, in the order of the columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row.setting))

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, ended by the number of configurations."""
        tried = f"Configurations tried and compared on validation: {self.configurations}."
        return (*self.notes, tried)

    def to_plain(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {
            "title": self.title,
            "settings": self.settings,
            "columns": [vars(column) for column in self.columns],
            "rows": [row.to_plain() for row in self.rows],
            "notes": list(self.all_notes),
            "configurations_tried": self.configurations,
        }

    def to_markdown(self) -> str:
        """The table in Markdown, its notes above it."""
        titles = (column.title for column in self.columns)
        cells = [["data set", *self.settings, "method", *titles, "remark"]]
        for row in self.rows:
            figures = (_cell(row, column) for column in self.columns)
            own = (row.setting.get(name, "") for name in self.settings)
            cells.append([row.dataset, *own, row.method, *figures, row.remark])
        lines = [f"| {' | '.join(one.replace('|', '/') for one in line)} |" for line in cells]
        lines.insert(1, "|" + " --- |" * len(cells[0]))
        notes = "\n".join(f"- {note}" for note in self.all_notes)
        return f"# {self.title}\n\n{notes}\n\n" + "\n".join(lines) + "\n"

    def to_rich(self) -> Group:
        """The table for a terminal: a block for each setting, intervals below, remarks after it."""
        parts: list[RenderableType] = [
            Text(line) for line in (self.title, "", *(f"- {note}" for note in self.all_notes))
        ]
        blocks: dict[str, list[Row]] = {}
        for row in self.rows:
            words = [f"{name} {value}" for name, value in row.setting.items()]
            blocks.setdefault(", ".join([row.dataset, *words]), []).append(row)
        width = min(28, max((len(row.method) for row in self.rows), default=0))
        for name, rows in blocks.items():
            parts += [Text(f"\n{name}"), *self._block(rows, width)]
        return Group(*parts)

    def _block(self, rows: Sequence[Row], width: int) -> Iterator[RichTable | Text]:
        """The lines of one setting."""
        table = RichTable(box=MARKDOWN)
        table.add_column("", min_width=width, max_width=width)
        for column in self.columns:
            table.add_column(column.title, min_width=14, no_wrap=True)
        for row in rows:
            cells = (_cell(row, column).replace(" [", "\n[") for column in self.columns)
            table.add_row(Text(row.method), *map(Text, cells))
        yield table
        yield from (Text(f"  {row.method}: {row.remark}") for row in rows if row.remark)


def _cell(row: Row, column: Column) -> str:
    """One figure as text."""
    if column.name not in row.figures:
        return "-"
    return row.figures[column.name].text(100.0 if column.percent else 1.0)


def table_from_plain(values: Mapping[str, Any]) -> Table:
    """The table that a `results.json` was written from."""
    rows = []
    for line in values["rows"]:
        figures = {name: _estimate(plain) for name, plain in line["figures"].items()}
        known = {"dataset", "method", "setting", "figures", "remark"}
        details = {name: value for name, value in line.items() if name not in known}
        given = line["setting"]
        setting = {name: given[name] for name in values["settings"] if name in given}
        rows.append(Row(line["dataset"], line["method"], setting, figures, details, line["remark"]))
    columns = tuple(Column(**column) for column in values["columns"])
    notes = tuple(values["notes"][:-1])
    return Table(values["title"], columns, tuple(rows), notes, values["configurations_tried"])


def _estimate(plain: Mapping[str, Any]) -> Estimate:
    """An `Estimate` back from JSON."""
    values = tuple(float("nan") if value is None else value for value in plain["values"])
    if plain["low"] is None:
        return Estimate(values)
    ends = (plain["low"], plain["high"])
    return Estimate(values, Interval(*ends, plain["draws"], plain["undefined_draws"]))
