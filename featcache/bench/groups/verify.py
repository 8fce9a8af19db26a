"""Comparing every byte with its checksum."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import write_random_set
from featcache.bench.timing import in_turn, rounded, seconds, without_notes
from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import open_planned
from featcache.cache.format import ShardPlan
from featcache.cache.libhdf5 import ask_libhdf5
from featcache.errors import CacheError

ROW_TOKENS, DIM, SHARD_ROWS = 49, 1280, 256  # 125 kB a row, 32 MB a shard


def verify_vs_memcpy(setting: Setting) -> Measured:
    """Time of copying as many bytes in memory over that of verifying them."""
    shards, rows = setting.choose(32, 2), setting.choose(SHARD_ROWS, 64)
    folder = setting.folder / "set"
    setting.say("writing the set")
    writer = write_random_set(
        folder, rows=rows * shards, num_tokens=ROW_TOKENS, dim=DIM, shard_rows=rows
    )
    paths = [folder / one.file_name for one in writer.shards]
    total = sum(path.stat().st_size for path in paths)
    threads = os.cpu_count() or 1
    source = np.full(total, 1, dtype=np.uint8)
    target = np.zeros_like(source)  # written once below, so that its pages are there
    bounds = np.linspace(0, total, threads + 1).astype(np.int64).tolist()

    def copy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda a, b: np.copyto(target[a:b], source[a:b]), bounds, bounds[1:]))

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
        what="time of memcpy over that of verify, same bytes (1 GB, page-cached), same threads",
        measure=verify_vs_memcpy,
        repeats=7,
        disk_mb=1100,
    ),
)
