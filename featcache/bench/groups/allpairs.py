"""What it costs that every text of a batch looks at every image."""

from statistics import median

from pydantic import JsonValue

from featcache.adaptor.model import AdaptorConfig
from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import BERT_BASE, VIT_B
from featcache.bench.steps import Training, random_batch
from featcache.bench.timing import in_fresh_process, in_turn, rounded, watch_memory

CHUNK = 32
"""Pairs of a chunk of the gradient cache."""
BARE = AdaptorConfig(layers=0)
"""Projections alone: what objectives do after the blocks is the same without them."""


def _training(config: AdaptorConfig, objective: str, device: str) -> Training:
    """A training with the gradient cache, on an objective."""
    named = config.model_copy(update={"objective": objective})
    return Training(named, VIT_B[1], BERT_BASE[1], device, chunk=CHUNK)


def _peak_of_step(objective: str, batch: int) -> int:
    """The highest allocated memory of a process during one step, on the CPU."""
    pairs = random_batch(batch, VIT_B, BERT_BASE)
    training = _training(BARE, objective, "cpu")
    training.step(random_batch(2, VIT_B, BERT_BASE))  # what every step needs: moments, threads
    with watch_memory() as memory:
        training.step(pairs)
    return memory.anonymous_bytes


def _sizes(setting: Setting) -> tuple[int, int]:
    """The two batch sizes."""
    return setting.choose(256, 8), setting.choose(1024, 16)


def allpairs_memory(setting: Setting) -> Measured:
    """Highest memory of a step with `allpairs` above that of the same step with `dual`, in GiB."""
    over: dict[int, list[float]] = {}
    peaks: dict[str, JsonValue] = {}
    for batch in _sizes(setting):
        for _ in range(setting.repeats):
            dual, pooled = (
                in_fresh_process(_peak_of_step, name, batch) for name in ("dual", "allpairs")
            )
            over.setdefault(batch, []).append((pooled - dual) / 2**30)
            setting.say(f"batch {batch}: {over[batch][-1]:.2f} GiB")
            peaks[str(batch)] = {"dual_bytes": dual, "allpairs_bytes": pooled}
    largest = over[max(over)]
    images = max(over) * VIT_B[0] * BARE.dim * 4 / 2**30
    return Measured(
        largest,
        detail={
            "gib": {str(batch): [round(one, 4) for one in some] for batch, some in over.items()},
            "adapted_tokens_of_the_images_gib": round(images, 4),
            "peaks_of_the_last_repeat": peaks,
            "pooling": BARE.pooling,
            "chunk": CHUNK,
            "tokens": {"image": VIT_B[0], "text": BERT_BASE[0]},
        },
    )


def allpairs_step(setting: Setting) -> Measured:
    """Share of `allpairs` in a training step with the gradient cache, at the larger batch.

    A whole step at that size takes minutes on a CPU, so it is put together: the step with `dual`,
    which grows with the pairs alone, from few chunks; and what `allpairs` adds, measured at its
    true size with an Adaptor of no blocks.
    """
    sizes, some = _sizes(setting), setting.choose(2 * CHUNK, 4)
    whole = _training(AdaptorConfig(), "dual", setting.device)
    bare = {name: _training(BARE, name, setting.device) for name in ("dual", "allpairs")}
    few = random_batch(some, VIT_B, BERT_BASE)
    large = random_batch(max(sizes), VIT_B, BERT_BASE)
    contestants = {"step_of_few": lambda: whole.run([few])}
    for name, training in bare.items():
        training.run([random_batch(2, VIT_B, BERT_BASE)])
        contestants[f"{name}_{max(sizes)}"] = lambda one=training: one.run([large])  # type: ignore[misc]
    small = random_batch(min(sizes), VIT_B, BERT_BASE)
    for name, training in bare.items():
        contestants[f"{name}_{min(sizes)}"] = lambda one=training: one.run([small])  # type: ignore[misc]
    whole.run([random_batch(2, VIT_B, BERT_BASE)])
    taken = in_turn(setting, contestants)
    shares: dict[int, list[float]] = {}
    for batch in sizes:
        columns = (taken[f"allpairs_{batch}"], taken[f"dual_{batch}"], taken["step_of_few"])
        for pooled, dual, step in zip(*columns, strict=True):
            extra = pooled - dual
            shares.setdefault(batch, []).append(extra / (extra + step * batch / some))
    return Measured(
        shares[max(sizes)],
        detail={
            "share": {str(batch): round(median(some), 4) for batch, some in shares.items()},
            "pooling": BARE.pooling,
            "device": setting.device,
            "chunk": CHUNK,
            "pairs_of_step_of_few": some,
            "tokens": {"image": VIT_B[0], "text": BERT_BASE[0]},
            "seconds": rounded(taken),
        },
    )


BENCHES = (
    Bench(
        name="allpairs_cost[memory]",
        goal=1.0,
        better="smaller",
        unit="GiB",
        what="memory of a step with allpairs above that with dual, 1,024 pairs of 197 tokens",
        measure=allpairs_memory,
        repeats=1,
    ),
    Bench(
        name="allpairs_cost[step]",
        goal=0.1,
        better="smaller",
        unit="of 1",
        what="share of allpairs in a training step, 1,024 pairs of 197 tokens",
        measure=allpairs_step,
        repeats=1,
    ),
)
