"""One task of stage one, as a worker does it: all shards that lie in one range of rows.

A task is told names and numbers; weights, manifest and plan are read once per worker process.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from featcache.cache.format import SCALE_ROWS, FeatureSetSpec, ShardPlan, make_channel_scale
from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.encoders.forward import Pace, PartStats, Times
from featcache.encoders.interface import LocatedEncoder, load_encoder
from featcache.encoders.shard import Lane, OnRows, Sink, encode_images, encode_texts
from featcache.manifest.table import Manifest, open_manifest


@dataclass(frozen=True)
class Part:
    """One shard of one set.

    Attributes:
        located: The set's encoder.
        folder: The set's folder.
        number: The shard.
        first: Row of the task that is the shard's row 0.
    """

    located: LocatedEncoder
    folder: Path
    number: int
    first: int = 0


@dataclass(frozen=True)
class ShardTask:
    """What a worker is told: small, and no weights in it.

    Attributes:
        parts: Shards to make; the first one's rows are the task's, the others' lie within.
        manifest: Folder of the manifest.
        manifest_hash: Its hash, so that a worker notices another version.
        pace: How to compute.
        again: Whether shards that look complete are made again.
        poison: Rows of the task that are not touched, because they killed their worker, and why.
    """

    parts: tuple[Part, ...]
    manifest: Path
    manifest_hash: str
    pace: Pace
    again: bool = False
    poison: Mapping[int, str] = field(default_factory=dict)


@dataclass
class TaskStats:
    """What a task did: where its time went, and what became of each part's rows."""

    times: Times = field(default_factory=Times)
    parts: list[PartStats] = field(default_factory=list)


@lru_cache(maxsize=1)
def _tables(folder: Path, manifest_hash: str) -> tuple[Manifest, dict[str, int]]:
    """The manifest and each key's row, read once per worker and version of it."""
    manifest = open_manifest(folder)
    return manifest, {key: row for row, key in enumerate(manifest.keys)}


@lru_cache(maxsize=1)
def _texts(folder: Path, manifest_hash: str) -> dict[str, str]:
    """Text by `text_id`, read once per worker and version of the manifest."""
    ids, texts = _tables(folder, manifest_hash)[0].unique_texts()
    return dict(zip(ids, texts, strict=True))


_loaded: dict[tuple[Any, ...], Any] = {}
_loading = Lock()


def load_networks(parts: tuple[Part, ...], device: str) -> list[Any]:
    """The network of each part, built once per worker; those of other tasks make room."""
    wanted = [(part.located.network_key, device) for part in parts]
    with _loading:
        for key in [key for key in _loaded if key not in wanted]:
            del _loaded[key]
        for key, part in zip(wanted, parts, strict=True):
            if key not in _loaded:
                _loaded[key] = load_encoder(part.located, device=device)
        return [_loaded[key] for key in wanted]


def make_shards(task: ShardTask, on_rows: OnRows) -> TaskStats:
    """Make the shards of a task, but for those that somebody has made already.

    Args:
        task: What to do.
        on_rows: Called with the number of rows done after each batch.

    Returns:
        Times and failures; a part that was complete has none.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
        EncoderError: A single row does not fit into the memory.
    """
    torch.set_num_threads(task.pace.threads)
    stats = TaskStats(parts=[PartStats() for _ in task.parts])
    todo = []
    for part, one in zip(task.parts, stats.parts, strict=True):
        made = FeatureSetWriter.open(part.folder)
        if task.again or not made.is_complete(part.number):
            todo.append((part, made, one))
        else:
            on_rows(made.shards[part.number].num_rows)
    if todo and todo[0][0].located.modality == "image":
        stats.times = _make_images(task, todo, on_rows)
    elif todo:
        stats.times = _make_texts(task, todo[0], on_rows)
    return stats


_Todo = tuple[Part, FeatureSetWriter, PartStats]


def _make_images(task: ShardTask, todo: list[_Todo], on_rows: OnRows) -> Times:
    """One pass over the pictures for the shards of all image sets."""
    encoders = load_networks(tuple(part for part, _, _ in todo), task.pace.device)
    first = min(part.first for part, _, _ in todo)
    keys: dict[int, str] = {}
    with ExitStack() as open_shards:
        lanes = []
        for (part, made, stats), encoder in zip(todo, encoders, strict=True):
            plan = made.shards[part.number]
            keys |= {part.first - first + row: key for row, key in enumerate(plan.keys)}
            lanes.append(
                Lane(
                    encoder=encoder,
                    preprocessing=part.located.preprocessing,
                    first=part.first - first,
                    count=plan.num_rows,
                    batch_size=made.spec.batch_size,
                    open=_opener(open_shards, made, plan),
                    close=_closer(made, plan),
                    stats=stats,
                )
            )
        paths = _paths(task, keys, first)
        return encode_images(lanes, paths, task.pace, on_rows)


def _paths(task: ShardTask, keys: Mapping[int, str], first: int) -> list[Path | str]:
    """The file of each row of a pass, or the reason not to touch it."""
    manifest, row_of = _tables(task.manifest, task.manifest_hash)
    return [
        # A row that belongs to no shard of this pass is not read: those shards are complete.
        task.poison.get(first + row)
        or (manifest.image_file(row_of[keys[row]]) if row in keys else "not wanted")
        for row in range(max(keys) + 1)
    ]


def _opener(stack: ExitStack, made: FeatureSetWriter, plan: ShardPlan) -> Callable[[], ShardWriter]:
    """Starts a shard when its first row comes; it is removed if the task fails."""
    return lambda: stack.enter_context(
        ShardWriter(made.folder, made.spec, plan, scale_channel=made.scale_channel())
    )


def _closer(made: FeatureSetWriter, plan: ShardPlan) -> Callable[[Sink, PartStats], None]:
    """Notes what failed, then completes the shard."""

    def close(sink: Sink, stats: PartStats) -> None:
        made.write_failures(plan.number, {plan.keys[row]: why for row, why in stats.failures})
        if isinstance(sink, ShardWriter):
            stats.rounding = sink.rounding if made.spec.dtype == "int8" else None
            sink.finish()

    return close


def _make_texts(task: ShardTask, todo: _Todo, on_rows: OnRows) -> Times:
    """One shard of a text set."""
    part, made, stats = todo
    (encoder,) = load_networks((part,), task.pace.device)
    plan = made.shards[part.number]
    texts = _texts(task.manifest, task.manifest_hash)
    times = Times()
    with times.timed("decode_wait_s"):
        tokenized = encoder.tokenize([texts[text_id] for text_id in plan.keys])
    stats.truncated = sum(tokenized.truncated)
    lengths = np.array([len(row) for row in tokenized.ids], dtype=np.int64)
    with ShardWriter(made.folder, made.spec, plan, lengths, made.scale_channel()) as shard:
        times.add(
            encode_texts(
                encoder, shard, tokenized.ids, made.spec.batch_size, task.pace, stats, on_rows
            )
        )
        _closer(made, plan)(shard, stats)
    return times


def count_rows(task: ShardTask) -> int:
    """Rows of a task."""
    return max(
        part.first + FeatureSetWriter.open(part.folder).shards[part.number].num_rows
        for part in task.parts
    )


def try_rows(task: ShardTask, rows: range) -> bool:
    """Read and encode some rows of a task and write nothing: what a deadly row is found by.

    Args:
        task: The task.
        rows: Rows of the task.

    Returns:
        True, for one who is still alive.
    """
    for part in task.parts:
        made = FeatureSetWriter.open(part.folder)
        keys = made.shards[part.number].keys
        inside = range(max(rows.start - part.first, 0), min(rows.stop - part.first, len(keys)))
        if len(inside):
            _look(task, part, made.spec, keys[inside.start : inside.stop], _Largest(made.spec))
    return True


def _look(
    task: ShardTask, part: Part, spec: FeatureSetSpec, ids: Sequence[str], sink: Sink
) -> None:
    """Encode rows of one set for a sink that keeps none of them."""
    torch.set_num_threads(task.pace.threads)
    (encoder,) = load_networks((part,), task.pace.device)

    def on_rows(count: int) -> None:
        """These rows will be made later, or were."""

    if part.located.modality == "image":
        lane = Lane(
            encoder=encoder,
            preprocessing=part.located.preprocessing,
            first=0,
            count=len(ids),
            batch_size=spec.batch_size,
            open=lambda: sink,
            close=lambda *_: None,
        )
        paths = _paths(replace(task, poison={}), dict(enumerate(ids)), 0)
        encode_images([lane], paths, task.pace, on_rows)
        return
    texts = _texts(task.manifest, task.manifest_hash)
    tokens = encoder.tokenize([texts[one] for one in ids]).ids
    encode_texts(encoder, sink, tokens, spec.batch_size, task.pace, PartStats(), on_rows)


class _Largest:
    """A sink that keeps the largest absolute value of each channel, and no row."""

    def __init__(self, spec: FeatureSetSpec):
        self.spec = spec
        self.values: Float32[np.ndarray, " D"] = np.zeros(spec.dim, dtype=np.float32)

    def write(
        self,
        rows: Int64[np.ndarray, " B"],
        tokens: Float[np.ndarray, "*shape"],
        pooled: "Float[np.ndarray, 'B E'] | None" = None,
    ) -> None:
        """Look at rows."""
        largest = np.abs(tokens.reshape(-1, self.spec.dim)).max(axis=0, initial=0)
        self.values = np.maximum(self.values, np.nan_to_num(largest, nan=0, posinf=0))

    def quarantine(self, row: int) -> None:
        """A row without content has no say."""


def measure_scale(task: ShardTask) -> bool:
    """Find an int8 set's channel scale from its first rows, unless it has one.

    The rows are encoded for this alone, and again when their shard is made: workers, shards and
    appended rows then share one scale.

    Args:
        task: A single part; its number does not matter. `poison` counts from the set's first row.

    Returns:
        True, for one who is still alive.
    """
    part = task.parts[0]
    made = FeatureSetWriter.open(part.folder)
    if made.scale_channel() is None:
        ids = [key for row, key in enumerate(_scale_ids(made)) if row not in task.poison]
        sink = _Largest(made.spec)
        _look(task, part, made.spec, ids, sink)
        made.write_scale_channel(make_channel_scale(sink.values[None]))
    return True


def try_scale_rows(task: ShardTask, rows: range) -> bool:
    """Read and encode some of the rows that `measure_scale` looks at; see `try_rows`."""
    part = task.parts[0]
    made = FeatureSetWriter.open(part.folder)
    ids = _scale_ids(made)[rows.start : rows.stop]
    _look(task, part, made.spec, ids, _Largest(made.spec))
    return True


def count_scale_rows(task: ShardTask) -> int:
    """Rows that `measure_scale` looks at."""
    return len(_scale_ids(FeatureSetWriter.open(task.parts[0].folder)))


def _scale_ids(made: FeatureSetWriter) -> list[str]:
    """The first rows of a set."""
    return list(islice(chain.from_iterable(plan.keys for plan in made.shards), SCALE_ROWS))
