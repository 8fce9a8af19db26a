"""The loader against its machine: memory, disk, and its own speed at few rows."""

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import JsonValue

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.page_cache import drop_from_cache
from featcache.bench.sets import (
    VIT_B,
    check_pass,
    join_rows,
    make_cache,
    write_random_texts,
)
from featcache.bench.stage_one import cores
from featcache.bench.timing import (
    anonymous_memory,
    in_fresh_process,
    in_turn,
    median_interval,
    paired,
    rounded,
    seconds,
    watch_memory,
)
from featcache.cache.reader import Cache
from featcache.loader.gather import TokenLoader

BATCH = 256
STREAM_BYTES = 2**23  # of a read call of the sequential stream


def run_passes(loader: TokenLoader, count: int = 1) -> None:
    """Ask for all batches of some passes, and do nothing with them."""
    for _ in range(count):
        for _ in loader:
            pass


def check_loader(loader: TokenLoader) -> None:
    """See that a pass over the loader delivers every row of its image set, byte for byte.

    Raises:
        CacheError: It does not.
    """
    check_pass("featcache", loader.cache.images, (batch.image_tokens.numpy() for batch in loader))


class Memcpy:
    """Threads that copy memory: bytes from a large array into as many buffers as the loader has."""

    def __init__(self, total: int, buffer_bytes: int, buffers: int, threads: int):
        self._source = np.full(total, 1, dtype=np.uint8)
        self._targets = [np.ones(buffer_bytes, dtype=np.uint8) for _ in range(buffers)]
        self._threads = threads

    def run(self, count: int) -> None:
        """Copy everything some times, each thread its part of every buffer."""
        size = len(self._targets[0])
        bounds = np.linspace(0, size, self._threads + 1).astype(np.int64).tolist()
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in range(count):
                list(pool.map(self._copy, pairwise(bounds)))

    def _copy(self, part: tuple[int, int]) -> None:
        size, (first, last) = len(self._targets[0]), part
        for number, start in enumerate(range(0, len(self._source), size)):
            target = self._targets[number % len(self._targets)]
            source = self._source[start + first : start + last]
            np.copyto(target[first : first + len(source)], source)


def gather_vs_memcpy(setting: Setting) -> Measured:
    """Time of copying a pass's bytes in memory over that of gathering and collating them."""
    rows, batch = setting.choose(8192, 64), setting.choose(BATCH, 16)
    passes, threads = setting.choose(2, 1), cores()
    setting.say(f"writing {rows:,} rows")
    cache = make_cache(setting.folder, rows)
    row_bytes = cache.images.spec.row_bytes or 0
    loader = TokenLoader(cache, batch, threads=threads)
    check_loader(loader)  # also brings everything into memory
    copying = Memcpy(rows * row_bytes, batch * row_bytes, 4, threads)
    write_random_texts(setting.folder / "words", lengths=[8, 16, 24, 32], dim=VIT_B[1])
    worded = join_rows(setting.folder / "images", setting.folder / "words")
    pairs = TokenLoader(worded, batch, threads=threads)
    pair_bytes = sum(one.image_tokens.nbytes + one.text_tokens.nbytes for one in pairs)

    copying.run(1)
    taken = in_turn(
        setting,
        {
            "memcpy": lambda: seconds(lambda: copying.run(passes)) / passes,
            "gather": lambda: seconds(lambda: run_passes(loader, passes)) / passes,
            "gather_with_texts": lambda: seconds(lambda: run_passes(pairs, passes)) / passes,
        },
    )
    ratios = paired(taken["memcpy"], taken["gather"])
    with_texts = median(paired(taken["memcpy"], taken["gather_with_texts"]))
    return Measured(
        ratios,
        detail={
            "rows": rows,
            "row_bytes": row_bytes,
            "batch_size": batch,
            "threads": threads,
            "passes_per_run": passes,
            "seconds_per_pass": rounded(taken),
            "gigabytes_per_s": round(rows * row_bytes / 1e9 / median(taken["gather"]), 2),
            "interval_95": [round(one, 4) for one in median_interval(ratios)],
            "with_texts_of_8_to_32_tokens": round(with_texts * pair_bytes / rows / row_bytes, 4),
        },
    )


class _Cold:
    """One set, read from the disk again and again."""

    def __init__(self, setting: Setting, rows: int, shape: tuple[int, int]):
        self.folder, self.batch = setting.folder, setting.choose(BATCH, 16)
        self.features = make_cache(setting.folder, rows, shape=shape).images
        self.paths = [shard.path for shard in self.features.shards]

    def _drop(self) -> None:
        gc.collect()  # maps of the loader before keep their pages
        drop_from_cache(self.paths)

    def gather(self, io: str) -> float:
        """Seconds of a shuffled pass, the opening of the set included."""
        self._drop()

        def work() -> None:
            cache = join_rows(self.folder / "images", self.folder / "texts")
            run_passes(TokenLoader(cache, self.batch, threads=cores(), io=io))

        return seconds(work)

    def stream(self) -> float:
        """Seconds of reading the same files from end to end, one after the other."""
        self._drop()
        buffer = bytearray(STREAM_BYTES)

        def work() -> None:
            for path in self.paths:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        return seconds(work)


def cold_vs_sequential(setting: Setting) -> Measured:
    """Time of one sequential stream over that of a shuffled pass, both from the disk."""
    shape = (32, 1024)  # 65,536 bytes
    rows = setting.choose(32_768, 256)
    setting.say(f"writing {rows:,} rows")
    cold = _Cold(setting, rows, shape)
    loader = TokenLoader(
        join_rows(setting.folder / "images", setting.folder / "texts"), cold.batch, io="pread"
    )
    check_loader(loader)
    del loader
    taken = in_turn(
        setting,
        {
            "stream": cold.stream,
            "pread": lambda: cold.gather("pread"),
            "mmap": lambda: cold.gather("mmap"),
        },
    )
    total = sum(path.stat().st_size for path in cold.paths)
    speeds: dict[str, JsonValue] = {
        name: round(total / 1e9 / median(some), 3) for name, some in taken.items()
    }
    return Measured(
        paired(taken["stream"], taken["pread"]),
        detail={
            "rows": rows,
            "row_bytes": cold.features.spec.row_bytes,
            "bytes": total,
            "batch_size": cold.batch,
            "value_is": "stream over pread, the way of sets larger than memory",
            "mmap": [round(one, 4) for one in paired(taken["stream"], taken["mmap"])],
            "seconds": rounded(taken),
            "gigabytes_per_s": speeds,
        },
    )


def _anonymous_growth(folder: Path, batch: int) -> int:
    """Bytes that opening a cache and two passes over it add to a process, at their peak."""
    warm = make_cache(folder.parent / f"{folder.name}-warm", batch, shape=(1, 2))
    run_passes(TokenLoader(warm, batch, threads=cores()))
    before = anonymous_memory()
    with watch_memory() as memory:
        loader = TokenLoader(join_rows(folder / "images", folder / "texts"), batch, threads=cores())
        run_passes(loader, 2)
    return memory.anonymous_bytes - before


def gather_scaling(setting: Setting) -> Measured:
    """The worse of two ratios, many rows over few: time per row, and memory per row."""
    # Whole batches: a pass that leaves rows over for the next one could not be checked.
    few, many = setting.choose(102_400, 512), setting.choose(2_048_000, 4096)
    batch, shape = setting.choose(1024, 64), (4, 512)  # 4,096 bytes
    loaders, growth = {}, {}
    for name, rows in (("few", few), ("many", many)):
        setting.say(f"writing {rows:,} rows of 4 kB")
        folder = setting.folder / name
        cache: Cache = make_cache(folder, rows, shape=shape)
        growth[name] = in_fresh_process(_anonymous_growth, folder, batch)
        loaders[name] = TokenLoader(cache, batch, threads=cores(), io="mmap")
        check_loader(loaders[name])
    rounds = max(1, setting.choose(10, 2))

    def few_rows() -> float:
        return seconds(lambda: run_passes(loaders["few"], rounds)) / rounds

    taken = in_turn(
        setting, {"few": few_rows, "many": lambda: seconds(lambda: run_passes(loaders["many"]))}
    )
    ratios = [one * few / many for one in paired(taken["many"], taken["few"])]
    per_row = {"few": growth["few"] / few, "many": growth["many"] / many}
    memory_ratio = per_row["many"] / per_row["few"]
    return Measured(
        ratios,
        value=max(median(ratios), memory_ratio),
        detail={
            "rows": {"few": few, "many": many},
            "row_bytes": 4096,
            "batch_size": batch,
            "time_ratio": round(median(ratios), 4),
            "memory_ratio": round(memory_ratio, 4),
            "value_is": "the larger of time_ratio and memory_ratio",
            "anonymous_bytes": {name: int(one) for name, one in growth.items()},
            "anonymous_bytes_per_row": {name: round(one, 1) for name, one in per_row.items()},
            "seconds_per_pass": rounded(taken),
        },
    )


BENCHES = (
    Bench(
        name="gather_vs_memcpy",
        goal=0.9,
        better="larger",
        unit="x",
        what="memcpy over shuffled gather and collate, same bytes, page-cached, same threads",
        measure=gather_vs_memcpy,
        repeats=15,
        disk_mb=2500,
    ),
    Bench(
        name="cold_vs_sequential",
        goal=0.8,
        better="larger",
        unit="x",
        what="one sequential stream over a shuffled pass, page cache dropped, rows of 64 kB",
        measure=cold_vs_sequential,
        repeats=5,
        disk_mb=2300,
    ),
    Bench(
        name="gather_scaling",
        goal=1.15,
        better="smaller",
        unit="x",
        what="time (and memory) per row at 2,048,000 rows of 4 kB over that at 102,400",
        measure=gather_scaling,
        repeats=5,
        disk_mb=9600,
    ),
)
