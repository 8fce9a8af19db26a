"""Dask: worker processes, and the tasks they are given."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import dask
import torch
from distributed import Client, Nanny, SpecCluster, as_completed, get_worker
from distributed.scheduler import KilledWorker, Scheduler

from featcache.console import note
from featcache.encoders.task import (
    ShardTask,
    TaskStats,
    count_rows,
    count_scale_rows,
    make_shards,
    measure_scale,
    try_rows,
    try_scale_rows,
)
from featcache.errors import EncoderError, UsageError

ROWS_TOPIC = "featcache-rows"
POISON = (
    "the worker process died every time it read this row: it crashed, or its memory did not suffice"
)
# A task that was on a worker when it died twice is suspected; Dask's own patience is four deaths.
_SCHEDULER = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-saturation": 1.0,
}
# Read when a process starts, so `env` would come too late. Passive: OpenMP threads that wait for
# work would keep the decoders from theirs. And none of Dask's own MALLOC_TRIM_THRESHOLD_, by which
# malloc gives every picture's memory back to the system. Both together: 2.4 times as fast.
_BEFORE_START = {"OMP_WAIT_POLICY": "passive"}
# Two tasks at a time, of which one encodes while the other syncs and reads back its shard.
_TASKS = 2
ANSWER_S = 10
"""Seconds that a scheduler gets to answer."""


@dataclass(frozen=True)
class Done:
    """A task that ended.

    Attributes:
        task: Which.
        stats: What it did.
    """

    task: ShardTask
    stats: TaskStats


def _report_rows(count: int) -> None:
    """Tell the client that rows are done."""
    get_worker().log_event(ROWS_TOPIC, count)


def _make_shards(task: ShardTask) -> TaskStats:
    return make_shards(task, _report_rows)


def local_workers(device: str, workers: int | None, threads: int | None) -> list[dict[str, str]]:
    """The environment of each local worker: one per visible GPU, each seeing only its own.

    Args:
        device: `cpu` or `cuda`.
        workers: Number asked for; None: one per GPU, one on a CPU.
        threads: CPU threads of each; None: an equal share of the cores.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cuda":
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        places = [
            {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(workers or len(gpus))
        ]
    else:
        places = [{} for _ in range(workers or 1)]
    share = threads or worker_threads(len(places))
    return [place | {"OMP_NUM_THREADS": str(share)} for place in places]


def worker_threads(workers: int) -> int:
    """An equal share of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


@contextmanager
def connect(scheduler: str | None, environments: Sequence[dict[str, str]]) -> Iterator[Client]:
    """A Dask client: of a running scheduler, or of worker processes started here.

    Args:
        scheduler: Address such as `tcp://host:8786`, or None to start workers.
        environments: One per worker to start; see `local_workers`.

    Raises:
        UsageError: Nothing answers at the address.
    """
    quiet = logging.CRITICAL
    logging.getLogger("distributed").setLevel(quiet)
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=ANSWER_S)
        except (OSError, ValueError):
            raise UsageError(
                "no Dask scheduler answers", where=scheduler, fix="dask scheduler, then try again"
            ) from None
        with client:
            yield client
        return
    workers = {
        place: {
            "cls": Nanny,
            "options": {
                "nthreads": _TASKS,
                "env": environment,
                "memory_limit": 0,
                "silence_logs": quiet,
                "dashboard": False,
            },
        }
        for place, environment in enumerate(environments)
    }
    # Port 0: any free one, so that two runs on a machine do not meet.
    local = {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    head = {"cls": Scheduler, "options": local}
    with (
        _unseen_main(),
        _restored(_BEFORE_START),
        dask.config.set(
            {**_SCHEDULER, "distributed.nanny.pre-spawn-environ": _BEFORE_START},
        ),
        SpecCluster(workers=workers, scheduler=head, silence_logs=quiet) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _restored(names: Iterable[str]) -> Iterator[None]:
    """Give this process its environment back, which Dask changes to start a worker."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _unseen_main() -> Iterator[None]:
    """Start workers without running the user's program in them, which they do not need.

    Python's `spawn` imports it there: without `if __name__ == "__main__"` it would extract again,
    and one that came by standard input cannot be found.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def find_scales(client: Client, tasks: Sequence[ShardTask]) -> None:
    """Have the channel scale of int8 sets measured, before any of their shards is made.

    Raises:
        EncoderError: Measuring kills its workers, but none of the rows does so alone.
        FeatcacheError: What a task raised.
    """
    waiting = {client.submit(measure_scale, one, pure=False): one for one in tasks}
    deadly: list[ShardTask] = []
    for future in as_completed(list(waiting)):
        try:
            future.result()
        except KilledWorker:
            deadly.append(waiting[future])
        finally:
            future.release()
    for one in deadly:
        title = f"the range of {one.parts[0].folder.name}"
        _without_poison(client, one, title, measure_scale, try_scale_rows, count_scale_rows(one))


def run_tasks(
    client: Client, tasks: Sequence[ShardTask], on_rows: Callable[[int], None]
) -> Iterator[Done]:
    """Have shards made and say of each task when it is done.

    A task whose worker dies again and again is taken apart once all others are done: the rows that
    kill it are found by halving and left out.

    Args:
        client: Of a cluster whose workers see the same files.
        tasks: What to do.
        on_rows: Called with the number of rows done, from another thread.

    Raises:
        EncoderError: A task kills its workers, but none of its rows does so alone.
        FeatcacheError: What a task raised.
    """

    def heard(event: tuple[float, object]) -> None:
        if isinstance(event[1], int):
            on_rows(event[1])

    client.subscribe_topic(ROWS_TOPIC, heard)
    waiting = {client.submit(_make_shards, one, pure=False): one for one in tasks}
    deadly: list[ShardTask] = []
    try:
        for future in as_completed(list(waiting)):
            one = waiting.pop(future)
            try:
                stats = future.result()
            except KilledWorker:
                deadly.append(one)
            else:
                yield Done(one, stats)
            finally:
                future.release()  # else Dask would repeat it when its worker dies
        for one in deadly:
            title = f"shard {one.parts[0].number} of {one.parts[0].folder.name}"
            rows = count_rows(one)
            stats = _without_poison(client, one, title, _make_shards, try_rows, rows)
            yield Done(one, stats)
    finally:
        client.unsubscribe_topic(ROWS_TOPIC)
        client.cancel(list(waiting))


def _survives(client: Client, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives on a worker; None when it kills one after the other."""
    future = client.submit(function, *arguments, pure=False)
    try:
        return future.result()
    except KilledWorker:
        return None
    finally:
        future.release()


def _without_poison(
    client: Client,
    task: ShardTask,
    title: str,
    function: Callable[..., Any],
    attempt: Callable[[ShardTask, range], bool],
    rows: int,
) -> Any:
    """Run a deadly task without the rows that kill."""
    note(f"{title} killed its worker again and again: looking for the row")
    poison = dict.fromkeys(_deadly_rows(client, task, attempt, range(rows)), POISON)
    result = _survives(client, function, replace(task, poison=poison))
    if result is None:
        raise EncoderError(
            f"{title} kills its worker, but no row of it does so alone; most likely it is too large"
            " for the memory",
            where=task.parts[0].folder,
            fix="fewer --workers, a smaller --image-size or --set batch_size=N, or a machine with "
            "more memory",
        )
    return result


def _deadly_rows(
    client: Client, task: ShardTask, attempt: Callable[[ShardTask, range], bool], rows: range
) -> list[int]:
    """The rows that kill a worker, found by halving."""
    if _survives(client, attempt, task, rows) is not None:
        return []
    if len(rows) == 1:
        return list(rows)
    middle = len(rows) // 2
    halves = (rows[:middle], rows[middle:])
    return [row for half in halves for row in _deadly_rows(client, task, attempt, half)]
