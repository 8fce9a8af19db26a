"""Training from the cache against the same training from memory: its time and its memory."""

from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

from featcache.adaptor.model import AdaptorConfig
from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import BERT_BASE, VIT_B, join_rows, write_random_set, write_random_texts
from featcache.bench.stage_one import cores
from featcache.bench.steps import Training, copy_batch, random_batch
from featcache.bench.timing import (
    anonymous_memory,
    in_fresh_process,
    in_turn,
    median_interval,
    paired,
    rounded,
    seconds,
)
from featcache.cache.reader import Cache
from featcache.loader.batch import Batch
from featcache.loader.gather import TokenLoader

TEXT_LENGTHS = (8, 16, 24, 32)
"""Tokens of the texts, which go round the rows."""
SMALL = AdaptorConfig(dim=256, heads=4, feedforward=512)
"""Smaller than the default: a shorter step leaves the loader less time."""
TINY = AdaptorConfig(dim=64, layers=0, heads=4, objective="dual")
"""No more than it needs: its own memory is the same on both sides."""


def _make_cache(folder: Path, rows: int) -> Cache:
    """Rows of a ViT-B with texts of BERT's width, random numbers both."""
    tokens, dim = VIT_B
    write_random_set(folder / "images", rows=rows, num_tokens=tokens, dim=dim, shard_rows=1024)
    write_random_texts(folder / "texts", lengths=TEXT_LENGTHS, dim=BERT_BASE[1])
    return join_rows(folder / "images", folder / "texts")


def step_vs_memory(setting: Setting) -> Measured:
    """Time of steps on batches that lie in memory over that of steps fed by the loader."""
    batch, steps = setting.choose(64, 8), setting.choose(6, 2)
    setting.say("writing the set")
    cache = _make_cache(setting.folder, batch * steps)
    loader = TokenLoader(cache, batch, threads=cores())
    in_memory = [copy_batch(one) for one in loader]
    training = Training(SMALL, VIT_B[1], BERT_BASE[1], setting.device)
    training.run(in_memory[:1])
    passes = setting.choose(10, 1)

    def deliver() -> None:
        for _ in range(passes):
            for _ in loader:
                pass

    taken = in_turn(
        setting,
        {
            "memory": lambda: training.run(in_memory),
            "cache": lambda: training.run(loader),
            "loader_alone": lambda: seconds(deliver) / passes,
        },
    )
    ratios = paired(taken["memory"], taken["cache"])
    pairs_per_s = batch * steps / median(taken["loader_alone"])
    return Measured(
        ratios,
        detail={
            "adaptor": SMALL.model_dump(mode="json"),
            "device": setting.device,
            "batch_size": batch,
            "steps": steps,
            "seconds": rounded(taken),
            "interval_95": [round(one, 4) for one in median_interval(ratios)],
            "step_s": round(median(taken["memory"]) / steps, 5),
            "loader_pairs_per_s": round(pairs_per_s),
            "loader_is_the_limit_below_step_s": round(batch / pairs_per_s, 5),
        },
    )


def _anonymous_after(folder: Path, fed: str, steps: int, batch: int) -> int:
    """Bytes that a training has allocated after so many steps, measured in its own process.

    Args:
        folder: Of the sets.
        fed: `constant` for the same batch again and again, else the loader's way of reading.
        steps: How many.
        batch: Pairs of a step.
    """
    training = Training(TINY, VIT_B[1], BERT_BASE[1], "cpu")
    batches: Iterator[Batch]
    if fed == "constant":
        batches = repeat(random_batch(batch, VIT_B, BERT_BASE))
    else:
        cache = join_rows(folder / "images", folder / "texts")
        loader = TokenLoader(cache, batch, threads=cores(), io=fed)
        batches = chain.from_iterable(repeat(loader))
    for pairs in islice(batches, steps):
        training.step(pairs)
    return anonymous_memory()  # with the last batch and the loader still there


def train_memory_gb(setting: Setting) -> Measured:
    """Memory of a training from the cache above that of the same from one constant batch."""
    rows, batch = setting.choose(4096, 64), setting.choose(256, 16)
    steps = setting.choose(50, 4)
    setting.say("writing the set")
    _make_cache(setting.folder, rows)
    ways = ("constant", "mmap", "pread")
    found: dict[str, list[int]] = {way: [] for way in ways}
    for number in range(setting.repeats):
        for way in ways if number % 2 == 0 else ways[::-1]:
            used = in_fresh_process(_anonymous_after, setting.folder, way, steps, batch)
            found[way].append(used)
            setting.say(f"repeat {number + 1}: {way} {used / 1e9:.3f} GB")
    over = {
        way: [(one - base) / 1e9 for one, base in zip(found[way], found["constant"], strict=True)]
        for way in ways[1:]
    }
    return Measured(
        [max(each) for each in zip(*over.values(), strict=True)],
        detail={
            "set_bytes": rows * VIT_B[0] * VIT_B[1] * 2,
            "batch_size": batch,
            "batch_bytes": batch * VIT_B[0] * VIT_B[1] * 2,
            "steps": steps,
            "value_is": "the larger of mmap and pread",
            "gb": {way: [round(one, 4) for one in some] for way, some in over.items()},
            "constant_gb": [round(one / 1e9, 4) for one in found["constant"]],
        },
    )


BENCHES = (
    Bench(
        name="step_vs_memory",
        goal=0.98,
        better="larger",
        unit="x",
        what="training steps on batches in memory over the same steps fed from the cache",
        measure=step_vs_memory,
        repeats=5,
        disk_mb=200,
    ),
    Bench(
        name="train_memory_gb",
        goal=1,
        better="smaller",
        unit="GB",
        what="memory of training from the cache above that of the same from one constant batch",
        measure=train_memory_gb,
        repeats=1,
        disk_mb=1300,
    ),
)
