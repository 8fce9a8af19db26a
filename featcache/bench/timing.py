"""Contestants in turn, intervals of what they took, and the memory of a process."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from featcache.bench.case import Setting
from featcache.console import is_quiet, set_quiet

LOOK_EVERY_S = 0.05
RESAMPLES = 10_000

Found = TypeVar("Found")


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(
    setting: Setting, contestants: Mapping[str, Callable[[], float]]
) -> dict[str, list[float]]:
    """Run every contestant once per repeat, every other repeat in reverse order.

    What disturbs the machine for a while then hits all of them, and none always comes first.

    Args:
        setting: Says how often.
        contestants: Each gives the seconds that it took; by name.

    Returns:
        The seconds of each contestant, repeat by repeat.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(setting.repeats):
        order = list(contestants) if repeat % 2 == 0 else list(contestants)[::-1]
        for name in order:
            taken[name].append(contestants[name]())
        shown = ", ".join(f"{name} {taken[name][-1]:.3g} s" for name in contestants)
        setting.say(f"repeat {repeat + 1} of {setting.repeats}: {shown}")
    return taken


def paired(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of two contestants in each repeat."""
    return [one / other for one, other in zip(over, under, strict=True)]


def median_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median, over repeats.

    Percentiles of the medians of 10,000 resamples, always drawn from the same seed.

    Args:
        values: One figure for each repeat.
        level: Share of the medians inside.
    """
    given = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    medians = np.median(given[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def in_fresh_process(work: Callable[..., Found], *values: object) -> Found:
    """Call a function of a module in a new process that owes nothing to this one.

    Args:
        work: It and what it returns can be pickled.
        values: Its arguments.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *values).result()


def rounded(values: Mapping[str, list[float]]) -> Any:
    """Seconds as a result shows them."""
    return {name: [round(one, 4) for one in some] for name, some in values.items()}


@contextmanager
def without_notes() -> Iterator[None]:
    """Keep what runs inside from talking."""
    before = is_quiet()
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


@dataclass
class Memory:
    """Largest resident memory that was seen.

    Attributes:
        own_bytes: Of this process.
        anonymous_bytes: Of this process, without files that are mapped: what it allocated.
        child_bytes: Of the largest process below it that is followed.
    """

    own_bytes: int = 0
    anonymous_bytes: int = 0
    child_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def _watch(self, child: int | None) -> None:
        is_over = False
        while not is_over:
            is_over = self._stop.wait(LOOK_EVERY_S)  # a last look when it is over
            self.own_bytes = max(self.own_bytes, _resident(os.getpid(), "VmRSS"))
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous_memory())
            followed = _below(os.getpid()) if child is None else {child, *_below(child)}
            peaks = [_resident(one, "VmHWM") for one in followed]
            self.child_bytes = max([self.child_bytes, *peaks])


@contextmanager
def watch_memory(child: int | None = None) -> Iterator[Memory]:
    """Follow the memory of this process and of those below it; Linux only.

    Args:
        child: The only process below it, with those below that one, that is followed; None is all.
    """
    memory = Memory()
    thread = threading.Thread(target=memory._watch, args=(child,), daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        memory._stop.set()
        thread.join()


def anonymous_memory() -> int:
    """Bytes that this process allocated and touched, mapped files not counted; Linux only."""
    return _resident(os.getpid(), "RssAnon")


def _resident(process: int, name: str) -> int:
    """A line of /proc/PID/status in bytes; 0 for a process that is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else 0


def _below(process: int) -> set[int]:
    """All processes below one."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold blanks.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    todo = {process}
    while todo:
        todo = {one for one, parent in parents.items() if parent in todo}
        found |= todo
    return found
