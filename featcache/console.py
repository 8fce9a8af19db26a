"""What a person sees while something runs: notes, and one bar per long job, all on stderr."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

PLAIN_LINE_EVERY_S = 30.0

_state = {"quiet": False}


class Progress(Protocol):
    """How a long job says how far it is."""

    def update(self, done: int, *, note: str = "") -> None:
        """Report progress.

        Args:
            done: Units finished so far, in all.
            note: A few words beside the count, e.g. `3 unreadable`.
        """


def set_quiet(quiet: bool) -> None:
    """Switch notes and progress off or on for this process."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Whether notes and progress are switched off."""
    return bool(_state["quiet"])


def is_terminal() -> bool:
    """Whether stderr is a terminal that can draw a bar."""
    return sys.stderr.isatty() and (sys.stderr.encoding or "").lower().startswith("utf")


def _write(text: str) -> None:
    """One line on stderr, whatever its encoding can show."""
    if not _state["quiet"]:
        encoding = sys.stderr.encoding or "ascii"
        sys.stderr.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stderr.flush()


def note(text: str) -> None:
    """Tell the user something that is no result: one line on stderr, nothing when quiet."""
    _write(text)


def duration(seconds: float) -> str:
    """A time span in words, e.g. `8 min 36 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(size_bytes: float) -> str:
    """A number of bytes in words, in powers of 1000, e.g. `114.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


class _Silent:
    """Progress of a quiet run."""

    def update(self, done: int, *, note: str = "") -> None:
        """Say nothing."""


class _Lines:
    """Progress without a terminal: a plain line every 30 seconds."""

    def __init__(self, title: str, total: int, unit: str, done: int):
        self.title, self.total, self.unit, self.first = title, total, unit, done
        self.started = self.printed = time.monotonic()

    def update(self, done: int, *, note: str = "") -> None:
        """Print a line when the last one is old enough."""
        now = time.monotonic()
        if now - self.printed < PLAIN_LINE_EVERY_S:
            return
        self.printed = now
        rate = (done - self.first) / (now - self.started)
        left = duration((self.total - done) / rate) + " left" if rate > 0 else "time left unknown"
        tail = f"  {note}" if note else ""
        line = f"{self.title}  {done:,}/{self.total:,} {self.unit}  {rate:.1f}/s  {left}{tail}"
        _write(line)


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, title: str, total: int, unit: str, done: int):
        self.bar, self.unit, self.first = bar, unit, done
        self.started = time.monotonic()
        self.job = bar.add_task(title, total=total, completed=done, rate="", note="")

    def update(self, done: int, *, note: str = "") -> None:
        """Move the bar."""
        elapsed_s = time.monotonic() - self.started
        rate = f"{(done - self.first) / elapsed_s:.1f} {self.unit}/s" if elapsed_s > 0.5 else ""
        self.bar.update(self.job, completed=done, rate=rate, note=note)


@contextmanager
def task(title: str, total: int, unit: str = "images", done: int = 0) -> Iterator[Progress]:
    """Show the progress of one long job.

    Args:
        title: What runs, e.g. `extract image/vit-b`.
        total: Units in all.
        unit: What is counted, in the plural.
        done: Units that were finished before this run; they do not count towards the rate.

    Yields:
        The object whose `update` moves the display.
    """
    if _state["quiet"]:
        yield _Silent()
    elif not is_terminal():
        yield _Lines(title, total, unit, done)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar, title, total, unit, done)


def emit(values: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print a command's result on stdout: one JSON object, or text for a person.

    Args:
        values: The result; `"schema": 1` is added.
        as_json: Whether the user asked for JSON.
        text: The same for a person.
    """
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, **values}, sort_keys=True) + "\n")
    else:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()


def set_up_logging() -> None:
    """Send our own log to stderr; other libraries keep to warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("featcache")
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING if _state["quiet"] else logging.INFO)
    logger.propagate = False
