"""Comparing every byte with its checksum."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import write_random_set
from featcache.bench.timing import in_turn, rounded, seconds, without_notes
from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import open_planned
from featcache.cache.format import ShardPlan
from featcache.cache.libhdf5 import ask_libhdf5
from featcache.errors import CacheError

ROW_TOKENS, DIM, SHARD_ROWS = 49, 1280, 1024  # 125 kB a row, 128 MB a shard
MOST_COPIED = 10**9  # the buffers of memcpy; far larger than any cache


def _pieces(total: int, held: int, threads: int) -> list[slice]:
    """What to copy, so that it is `total` bytes: the buffers again and again, a piece a thread."""
    rounds = [min(held, total - start) for start in range(0, total, held)]
    cuts = [np.linspace(0, size, threads + 1).astype(np.int64).tolist() for size in rounds]
    return [slice(a, b) for one in cuts for a, b in pairwise(one)]


def verify_vs_memcpy(setting: Setting) -> Measured:
    """Time of copying as many bytes in memory over that of verifying them."""
    shards, rows = setting.choose(48, 2), setting.choose(SHARD_ROWS, 64)
    folder = setting.folder / "set"
    setting.say("writing the set")
    writer = write_random_set(
        folder, rows=rows * shards, num_tokens=ROW_TOKENS, dim=DIM, shard_rows=rows
    )
    paths = [folder / one.file_name for one in writer.shards]
    total = sum(path.stat().st_size for path in paths)
    threads = os.cpu_count() or 1
    source = np.full(min(total, MOST_COPIED), 1, dtype=np.uint8)
    target = np.zeros_like(source)  # written once below, so that its pages are there
    pieces = _pieces(total, len(source), threads)

    def copy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: np.copyto(target[piece], source[piece]), pieces))

    def verify() -> None:
        with without_notes():
            report = verify_feature_set(folder)
        if not report.ok:
            raise CacheError("a set that was just written is damaged", where=folder)

    def compare() -> None:
        def look(plan: ShardPlan) -> None:
            list(open_planned(folder / plan.file_name, writer.spec, plan).damage())

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(look, writer.shards))

    copy()
    verify()  # brings the files into the page cache
    taken = in_turn(
        setting,
        {
            "memcpy": lambda: seconds(copy),
            "verify": lambda: seconds(verify),
            "checksums": lambda: seconds(compare),
            "libhdf5": lambda: seconds(lambda: list(ask_libhdf5(paths, deep=False))),
        },
    )
    parts = {
        name: [copied / one for copied, one in zip(taken["memcpy"], taken[name], strict=True)]
        for name in ("verify", "checksums")
    }
    return Measured(
        parts["verify"],
        detail={
            "bytes": total,
            "threads": threads,
            "shards": shards,
            "seconds": rounded(taken),
            "checksums_alone": [round(one, 4) for one in parts["checksums"]],
        },
    )


BENCHES = (
    Bench(
        name="verify_vs_memcpy",
        goal=0.5,
        better="larger",
        unit="x",
        what="time of memcpy over that of verify, same bytes (6 GB, page-cached), same threads",
        measure=verify_vs_memcpy,
        repeats=7,
        disk_mb=6500,
    ),
)
