"""What many heads cost beside one: the cache is read once for all of them."""

import time

import numpy as np
from jaxtyping import Float32, Int64

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import VIT_B, write_random_set
from featcache.bench.timing import in_turn, paired, seconds, without_notes
from featcache.cache.feature_set import FeatureSet
from featcache.heads.probe import train_probes
from featcache.heads.vectors import image_vectors

CLASSES = 3
DECAYS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 3e-2, 3e-1)
ONE = 1e-1
SEEDS = tuple(range(8))


def _answers(vectors: Float32[np.ndarray, "N D"]) -> Int64[np.ndarray, " N"]:
    """Classes that a linear map of the vectors explains in part."""
    generator = np.random.default_rng(0)
    scaled = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    scores = scaled @ generator.normal(size=(vectors.shape[1], CLASSES)) / vectors.shape[1] ** 0.5
    noisy = scores + generator.normal(size=scores.shape)
    return np.asarray(noisy.argmax(axis=1), dtype=np.int64)


def probes_64(setting: Setting) -> Measured:
    """Reading the cache and training 64 linear probes over reading it and training one."""
    rows = setting.choose(4_096, 64)
    tokens, dim = (VIT_B[0], VIT_B[1]) if not setting.quick else (5, 16)
    grid = (14, 14) if not setting.quick else (2, 2)
    setting.say(f"writing {rows:,} rows of {tokens} x {dim}")
    write_random_set(
        setting.folder / "set", rows=rows, num_tokens=tokens, dim=dim, shard_rows=1024, grid=grid
    )
    features = FeatureSet.open(setting.folder / "set")
    everything, train = np.arange(rows), [np.arange(rows * 7 // 10)]
    with without_notes():
        targets = _answers(image_vectors(features, everything, None).raw["mean"])
    reading: list[float] = []
    late = 0

    def heads(decays: tuple[float, ...], seeds: tuple[int, ...]) -> None:
        nonlocal late
        started = time.perf_counter()
        with without_notes():
            vectors = image_vectors(features, everything, None).raw["mean"]
        reading.append(time.perf_counter() - started)
        found = train_probes(
            vectors, targets, train, num_classes=CLASSES, decays=decays, seeds=seeds
        )
        late += int((~found.converged).sum())

    taken = in_turn(
        setting,
        {
            "64": lambda: seconds(lambda: heads(DECAYS, SEEDS)),
            "1": lambda: seconds(lambda: heads((ONE,), SEEDS[:1])),
        },
    )
    return Measured(
        paired(taken["64"], taken["1"]),
        detail={
            "rows": rows,
            "training_rows": len(train[0]),
            "width": dim,
            "classes": CLASSES,
            "seconds": {name: [round(one, 3) for one in some] for name, some in taken.items()},
            "reading_s": round(float(np.median(reading)), 3),
            "not_converged": late,
        },
    )


BENCHES = (
    Bench(
        name="probes_64",
        goal=2.0,
        better="smaller",
        unit="x",
        what="reading the cache and training 64 linear probes over reading it and training one",
        measure=probes_64,
        repeats=5,
        disk_mb=1300,
    ),
)
