"""Dask: worker processes, and the shards they are given."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from distributed import Client, Nanny, SpecCluster, as_completed, get_worker
from distributed.scheduler import KilledWorker, Scheduler

from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.encoders.interface import LocatedEncoder, load_encoder
from featcache.encoders.shard import Pace, ShardStats, encode_images, encode_texts
from featcache.errors import EncoderError, UsageError
from featcache.manifest.table import Manifest, open_manifest

ROWS_TOPIC = "featcache-rows"


@dataclass(frozen=True)
class ShardJob:
    """What a task is told: small, and no weights in it."""

    located: LocatedEncoder
    folder: Path
    manifest: Path
    manifest_hash: str
    number: int
    pace: Pace


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


_loaded: dict[tuple[str, str, str], Any] = {}


def _encoder(located: LocatedEncoder, device: str) -> Any:
    """The encoder, built once per worker; another one takes its place."""
    name = (located.weights_sha256, repr(located.config), device)
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = load_encoder(located, device=device)
    return _loaded[name]


def _report_rows(count: int) -> None:
    """Tell the client that rows are done."""
    get_worker().log_event(ROWS_TOPIC, count)


def make_shard(job: ShardJob, on_rows: Callable[[int], None] = _report_rows) -> ShardStats:
    """Make one shard, unless somebody already has.

    Args:
        job: What to do.
        on_rows: Called with the number of rows done after each batch.

    Returns:
        Times and failures of this shard; empty if it was complete.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
    """
    torch.set_num_threads(job.pace.threads)
    made = FeatureSetWriter.open(job.folder)
    plan = made.shards[job.number]
    if job.number not in made.missing():
        on_rows(plan.num_rows)
        return ShardStats()
    encoder = _encoder(job.located, job.pace.device)
    if job.located.modality == "image":
        manifest, row_of = _tables(job.manifest, job.manifest_hash)
        paths = [manifest.image_file(row_of[key]) for key in plan.keys]
        with ShardWriter(job.folder, made.spec, plan) as shard:
            stats = encode_images(encoder, shard, paths, job.pace, on_rows)
            made.write_failures(job.number, {plan.keys[row]: why for row, why in stats.failures})
            shard.finish()
        return stats
    texts = _texts(job.manifest, job.manifest_hash)
    tokenized = encoder.tokenize([texts[text_id] for text_id in plan.keys])
    lengths = torch.tensor([len(row) for row in tokenized.ids]).numpy()
    with ShardWriter(job.folder, made.spec, plan, lengths) as shard:
        stats = encode_texts(encoder, shard, tokenized.ids, job.pace, on_rows)
        stats.truncated = sum(tokenized.truncated)
        shard.finish()
    return stats


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
            client = Client(scheduler, timeout=10)
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
                "nthreads": 1,
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
        SpecCluster(workers=workers, scheduler=head, silence_logs=quiet) as cluster,
        Client(cluster) as client,
    ):
        yield client


def run_jobs(
    client: Client, jobs: Sequence[ShardJob], on_rows: Callable[[int], None]
) -> Iterator[ShardStats]:
    """Have shards made and give back their statistics as they are completed.

    Args:
        client: Of a cluster whose workers see the same files.
        jobs: One per shard.
        on_rows: Called with the number of rows done, from another thread.

    Raises:
        EncoderError: Workers die of a shard again and again.
        FeatcacheError: What a task raised.
    """

    def heard(event: tuple[float, object]) -> None:
        if isinstance(event[1], int):
            on_rows(event[1])

    client.subscribe_topic(ROWS_TOPIC, heard)
    waiting = {client.submit(make_shard, job, pure=False): job for job in jobs}
    try:
        for future in as_completed(list(waiting)):
            job = waiting.pop(future)
            try:
                yield future.result()
            except KilledWorker:
                raise EncoderError(
                    f"shard {job.number} killed its worker several times, most likely for memory",
                    where=job.folder,
                    fix="fewer --workers, a smaller --image-size, or a machine with more memory",
                ) from None
            finally:
                future.release()
    finally:
        client.unsubscribe_topic(ROWS_TOPIC)
        client.cancel(list(waiting))
