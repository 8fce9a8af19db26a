"""Missing shards to passes: one over the pictures for all image sets, one per text set."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.cache.folder import read_quality
from featcache.cache.format import Rounding, ShardPlan
from featcache.cache.shard import Shard
from featcache.cluster import find_scales, run_tasks
from featcache.console import note, size, task
from featcache.encoders.forward import Pace
from featcache.encoders.task import Part, ShardTask
from featcache.extract.prepare import Prepared
from featcache.extract.result import PassResult, SetResult, count
from featcache.manifest.table import Manifest


@dataclass(frozen=True)
class Place:
    """Where and how tasks run.

    Attributes:
        client: Dask's.
        tables: The manifest.
        threads: CPU threads of a worker.
        device: `cpu` or `cuda`.
        again: Whether shards that look complete are made again.
    """

    client: Any
    tables: Manifest
    threads: int
    device: str
    again: bool = False

    def task(self, parts: Sequence[Part], autocast: str | None) -> ShardTask:
        """A task over these shards."""
        pace = Pace(self.threads, self.device, autocast)
        folder = self.tables.folder.resolve()  # workers may stand elsewhere
        return ShardTask(tuple(parts), folder, self.tables.meta.hash, pace, self.again)


Missing = tuple[Prepared, SetResult]
SAMENESS = 0.9999
SAMENESS_ROWS = 8
"""First rows of a set that are compared with each other."""


def group_passes(missing: Sequence[Missing]) -> list[list[Missing]]:
    """Image sets share one pass, every text set has its own."""
    images = [one for one in missing if one[0].spec.modality == "image"]
    return [images] * bool(images) + [[one] for one in missing if one not in images]


def nest_shards(plans: Sequence[Sequence[ShardPlan]]) -> list[list[tuple[int, int, int]]]:
    """Lay shards of several sets over each other, so that rows are read once for all of them.

    Args:
        plans: For each set the shards to make.

    Returns:
        Groups of (set, number of the shard, its first row within the group). The group's rows are
        those of its first shard, the largest; the others lie wholly within, in the same order. A
        shard that lies in no other one is a group of its own.
    """
    order = sorted(
        ((which, plan) for which, shards in enumerate(plans) for plan in shards),
        key=lambda one: (-one[1].num_rows, one[1].number, one[0]),
    )
    starts = [{plan.keys[0]: plan for plan in shards} for shards in plans]
    taken: set[tuple[int, int]] = set()
    groups = []
    for which, plan in order:
        if (which, plan.number) in taken:
            continue
        group = [(which, plan.number, 0)]
        for other in (other for other in range(len(plans)) if other != which):
            group += [
                (other, inner.number, first)
                for inner, first in _inside(plan, starts[other])
                if (other, inner.number) not in taken
            ]
        taken |= {(one, number) for one, number, _ in group}
        groups.append(group)
    return sorted(groups, key=lambda group: (group[0][1], group[0][0]))


def _inside(outer: ShardPlan, starts: dict[str, ShardPlan]) -> Iterator[tuple[ShardPlan, int]]:
    """Shards of another set whose rows are consecutive rows of a shard."""
    for first, key in enumerate(outer.keys):
        plan = starts.get(key)
        if plan is not None and outer.keys[first : first + plan.num_rows] == plan.keys:
            yield plan, first


def run_pass(place: Place, sets: Sequence[Missing]) -> PassResult:
    """Make the missing shards of some sets in one pass, with progress.

    Args:
        place: Where tasks run.
        sets: Image sets of one manifest, or one text set; their results are filled in.

    Returns:
        How fast it was.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
        EncoderError: Workers die, or a row does not fit the memory.
    """
    prepared = [one for one, _ in sets]
    shards = [[one.writer.shards[n] for n in one.missing] for one in prepared]
    groups = nest_shards(shards)
    tasks = [
        place.task([_part(prepared[w], number, first) for w, number, first in group],
                   prepared[0].spec.autocast)
        for group in groups
    ]  # fmt: skip
    unit = "images" if prepared[0].spec.modality == "image" else "texts"
    done = PassResult([result.name for _, result in sets], 0, unit)
    done.rows = sum(prepared[g[0][0]].writer.shards[g[0][1]].num_rows for g in groups)
    for one, result in sets:
        _announce(one, result)
    _find_scales(place, prepared)
    group_of = {
        (one.parts[0].folder, one.parts[0].number): group
        for one, group in zip(tasks, groups, strict=True)
    }
    started = time.monotonic()
    with task(f"extract {' + '.join(done.sets)}", *_rows(sets, unit)) as progress:
        on_rows = _counter(sets, progress.update)
        for ended in run_tasks(place.client, tasks, on_rows):
            done.times.add(ended.stats.times)
            first = ended.task.parts[0]
            group = group_of[first.folder, first.number]
            for (which, _, _), stats in zip(group, ended.stats.parts, strict=True):
                sets[which][1].stats.add(stats)
    done.elapsed_s = time.monotonic() - started
    for one, result in sets:
        result.failed_rows = len(one.writer.read_failures())
        _note_quality(one, result, done, place)
        _warn_of_sameness(one, result)
    return done


def _part(one: Prepared, number: int, first: int) -> Part:
    return Part(one.located, one.writer.folder.resolve(), number, first)


def _rows(sets: Sequence[Missing], unit: str) -> tuple[int, str, int]:
    """Total, unit and what was done before, for the display: rows of all sets together."""
    total = sum(result.rows for _, result in sets)
    return total, unit, total - sum(result.missing_rows for _, result in sets)


def _counter(sets: Sequence[Missing], update: Callable[..., None]) -> Callable[[int], None]:
    """Adds up rows as workers report them."""
    done = [_rows(sets, "")[2]]

    def on_rows(number: int) -> None:
        done[0] += number
        failed = sum(len(result.stats.failures) for _, result in sets)
        update(done[0], note=f"{failed} unreadable" if failed else "")

    return on_rows


def _find_scales(place: Place, prepared: Sequence[Prepared]) -> None:
    """Channel scales of int8 sets that have none yet."""
    scales = [(one, one.writer.scale_channel()) for one in prepared if one.spec.dtype == "int8"]
    lacking = [one for one, scale in scales if scale is None]
    for one, scale in scales:
        if scale is not None:
            one.writer.write_scale_channel(scale)
    if lacking:
        note("int8: the first rows are encoded once to find the range of each channel")
        find_scales(
            place.client, [place.task([_part(one, 0, 0)], one.spec.autocast) for one in lacking]
        )


def _announce(one: Prepared, result: SetResult) -> None:
    """The first line of a long job: what, how much, from where on."""
    stored = f", {size(result.rows * result.row_bytes)}" if result.row_bytes else ""
    line = (
        f"extract {result.name} of {result.dataset}  {result.rows:,} rows -> "
        f"{count(result.shards, 'shard')}{stored}, {one.spec.dtype}"
    )
    kept = result.shards - result.missing_shards
    note(line + (f"   {kept} complete already, going on" if kept else ""))


def _warn_of_sameness(one: Prepared, result: SetResult) -> None:
    """Say so when an encoder answers the same whatever it sees: its input is in a wrong range."""
    rows = min(one.writer.shards[0].num_rows, SAMENESS_ROWS)
    if one.spec.modality != "image" or rows < SAMENESS_ROWS:
        return
    shard = Shard.open(one.writer.folder / one.writer.shards[0].file_name)
    tokens = shard.map("tokens", check=False)[:rows].astype(np.float32)
    if one.spec.dtype == "int8":
        tokens *= shard.read("scale_token")[:rows, :, None]
        tokens *= shard.read("scale_channel")
    means = tokens[shard.read("valid")[:rows]].mean(axis=1)  # N D
    if len(means) < 2:
        return
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    if (means @ means[0]).min() > SAMENESS:
        note(
            f"warning: {result.name} gives nearly the same tokens for different pictures (cosine "
            f"above {SAMENESS}); look at its `value_range`, mean and std in feature_set.json"
        )


def _note_quality(one: Prepared, result: SetResult, done: PassResult, place: Place) -> None:
    """What was learnt about a set, beside what earlier runs learnt."""
    stats, values = result.stats, read_quality(one.writer.folder)
    values |= {
        "parameters": one.parameters,
        "rows_per_s": round(done.rows_per_s, 2),
        "truncated_texts": values.get("truncated_texts", 0) * (result.missing_rows < result.rows)
        + stats.truncated,
        "device": place.device,
        "threads": place.threads,
    }
    if stats.pass_rows is not None:
        values |= {
            "numerics": "split",
            "pass_rows": stats.pass_rows,
            "split_difference": stats.difference,
        }
    if stats.rounding is not None:
        values["int8"] = _int8_report(values.get("int8", {}), stats.rounding)
    one.writer.write_quality(values)


def _int8_report(earlier: Mapping[str, float], rounding: Rounding) -> dict[str, float]:
    """What int8 cost over all runs; each weighs with the rows that it measured."""
    before, now = earlier.get("measured_rows", 0), rounding.rows
    errors = (earlier.get("relative_error", 0.0), rounding.relative_error)
    square = (before * errors[0] ** 2 + now * errors[1] ** 2) / max(1, before + now)
    return {
        "measured_rows": before + now,
        "relative_error": round(square**0.5, 6),
        "worst_row": round(max(earlier.get("worst_row", 0.0), rounding.worst), 6),
    }
