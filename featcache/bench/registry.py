"""Benches by name: every module of `groups/` lists its own."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from featcache.bench.case import Bench
from featcache.errors import UsageError, nearest


def all_benches() -> list[Bench]:
    """Every bench there is: groups by name, and in a group as its module lists them."""
    names = sorted(path.stem for path in (Path(__file__).parent / "groups").glob("[!_]*.py"))
    modules = [import_module(f"featcache.bench.groups.{name}") for name in names]
    return [bench for module in modules for bench in module.BENCHES]


def choose_benches(names: Sequence[str]) -> list[Bench]:
    """The benches that are asked for, in the order of `all_benches`.

    Args:
        names: As typed; a name without its `[VARIANT]` means all variants. None named: all.

    Raises:
        UsageError: There is no such bench; the nearest names are offered.
    """
    benches = all_benches()
    known = list(dict.fromkeys([n for b in benches for n in (b.name, b.family)]))
    for name in names:
        if name not in known:
            raise UsageError(
                f"unknown bench `{name}`; {nearest(name, known)}",
                where="featcache bench",
                fix="featcache bench --list",
            )
    return [b for b in benches if not names or b.name in names or b.family in names]
