"""The loader against what others use for the same rows."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import packages_distributions, version
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int64

from featcache.bench.batch_peers import BATCH_PEERS, BatchPeer, Gather
from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.groups.gather import BATCH, Memcpy, check_loader, run_passes
from featcache.bench.sample_peers import SAMPLE_PEERS, SamplePeer
from featcache.bench.sets import check_pass, make_cache, row_numbers
from featcache.bench.stage_one import cores
from featcache.bench.timing import in_turn, median_interval, paired, rounded, seconds
from featcache.cache.reader import Cache
from featcache.errors import CacheError
from featcache.loader.gather import TokenLoader

OURS = "featcache"
COPY = "memcpy"
SLOWER = 3
"""Rivals slower than the fastest by more than this in their first pass are run only once."""
INSTALL = "pip install 'featcache[bench]'; docs/performance.md says how to add mosaicml streaming"


@dataclass(frozen=True)
class _Rival:
    """A rival that is checked and warm.

    Attributes:
        name: As printed.
        run: Gives the seconds of a pass.
        tried_s: Seconds of its first timed pass.
        workers: Worker processes that serve it best; None where it has none.
    """

    name: str
    run: Callable[[], float]
    tried_s: float
    workers: int | None = None


class _Ours:
    """The set, and our loader over it."""

    def __init__(self, setting: Setting, rows: int):
        self.setting = setting
        self.batch = setting.choose(BATCH, 16)
        setting.say(f"writing {rows:,} rows")
        self.cache: Cache = make_cache(setting.folder / OURS, rows)
        self.loader = TokenLoader(self.cache, self.batch, threads=cores())
        self.passes = setting.choose(5, 1)
        row_bytes = self.cache.images.spec.row_bytes or 0
        self.copying = Memcpy(rows * row_bytes, self.batch * row_bytes, 4, cores())
        check_loader(self.loader)

    def run(self) -> float:
        """Seconds of a pass."""
        return seconds(lambda: run_passes(self.loader, self.passes)) / self.passes

    def copy(self) -> float:
        """Seconds of copying a pass's bytes in memory, which no loader can go below."""
        return seconds(lambda: self.copying.run(self.passes)) / self.passes

    def installed(self, peers: Sequence[Any]) -> list[Any]:
        """The rivals that can run here; the others are named."""
        missing = [peer.name for peer in peers if peer.missing()]
        if missing:
            self.setting.say(f"not installed: {', '.join(missing)}; {INSTALL}")
        return [peer for peer in peers if not peer.missing()]

    def against(
        self, peers: Sequence[Any], rivals: Sequence[_Rival]
    ) -> tuple[list[float], dict[str, Any]]:
        """The fastest rival's time over ours in each repeat, and what a reader has to know.

        Rivals that were much slower than the fastest in their first pass are not run again.
        """
        limit = SLOWER * min(one.tried_s for one in rivals)
        kept = {one.name: one.run for one in rivals if one.tried_s <= limit}
        self.copy()
        taken = in_turn(self.setting, {OURS: self.run, COPY: self.copy, **kept})
        best = min(kept, key=lambda name: median(taken[name]))
        ratios = paired(taken[best], taken[OURS])
        return ratios, {
            "best_peer": best,
            "most_that_memory_allows": round(median(paired(taken[best], taken[COPY])), 3),
            "ratio_to_each": {
                one.name: round(
                    median(paired(taken[one.name], taken[OURS]))
                    if one.name in kept
                    else one.tried_s / median(taken[OURS]),
                    3,
                )
                for one in rivals
            },
            "ran_once": [one.name for one in rivals if one.name not in kept],
            "workers": {one.name: one.workers for one in rivals if one.workers is not None},
            "interval_95": [round(one, 4) for one in median_interval(ratios)],
            "missing": [peer.name for peer in peers if peer.missing()],
            "versions": _versions(peers),
            "rows": self.cache.num_pairs,
            "row_bytes": self.cache.images.spec.row_bytes,
            "batch_size": self.batch,
            "threads": cores(),
            "seconds_per_pass": rounded(taken),
        }


def _versions(peers: Sequence[Any]) -> dict[str, str]:
    """Of the installed packages of rivals, by the name that they are installed under."""
    known = packages_distributions()
    names = [name for peer in peers if not peer.missing() for name in peer.packages]
    return {one: version(one) for name in names for one in known.get(name, [])[:1]}


def _consume(batches: Iterable[Any]) -> float:
    """Seconds of a pass."""

    def work() -> None:
        for _ in batches:
            pass

    return seconds(work)


def _sample_rival(ours: _Ours, peer: SamplePeer) -> _Rival:
    """A rival's loader, with workers or without, whichever is faster."""
    folder = ours.setting.folder / peer.name.replace(" ", "-")
    folder.mkdir()
    ours.setting.say(f"{peer.name}: writing its rows, checking them")
    peer.write(folder, ours.cache.images)
    tried = []
    for workers in (0, cores()):
        loader = peer.load(folder, ours.batch, workers)
        tokens = (peer.pick(batch).numpy() for batch in loader)
        check_pass(peer.name, ours.cache.images, tokens)
        run = partial(_consume, loader)
        tried.append(_Rival(peer.name, run, run(), workers))
    return min(tried, key=lambda one: one.tried_s)


def gather_vs_peers(setting: Setting) -> Measured:
    """Time of the fastest loader that takes one sample at a time over ours."""
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a rival's
    ours = _Ours(setting, setting.choose(2048, 64))
    rivals = [_sample_rival(ours, peer) for peer in ours.installed(SAMPLE_PEERS)]
    ratios, detail = ours.against(SAMPLE_PEERS, rivals)
    return Measured(ratios, detail=detail)


def _batches(rows: int, batch: int, seed: int) -> Iterator[Int64[np.ndarray, " B"]]:
    """A permutation of all rows, cut into batches."""
    order = np.random.default_rng(seed).permutation(rows)
    for start in range(0, rows, batch):
        yield order[start : start + batch]


def _check_gather(ours: _Ours, peer: BatchPeer, gather: Gather) -> None:
    """See that a rival gives the very rows that it is asked for, in their order.

    Raises:
        CacheError: It does not.
    """
    features = ours.cache.images
    shape = (-1, features.spec.num_tokens or 0, features.spec.dim)

    def delivered() -> Iterator[np.ndarray]:
        for rows in _batches(features.num_rows, ours.batch, seed=0):
            tokens = np.asarray(gather(rows)).reshape(shape)
            if not np.array_equal(row_numbers(tokens), rows):
                raise CacheError(f"`{peer.name}` delivers other rows than asked for")
            yield tokens

    check_pass(peer.name, features, delivered())


def _batch_rival(ours: _Ours, peer: BatchPeer) -> _Rival:
    """A rival's gathering of as many passes as ours, each in another order."""
    folder = ours.setting.folder / peer.name.replace(" ", "-")
    folder.mkdir()
    ours.setting.say(f"{peer.name}: writing its rows, checking them")
    peer.write(folder, ours.cache.images)
    gather = peer.open(folder, ours.batch)
    _check_gather(ours, peer, gather)

    def run(passes: int) -> float:
        orders = [list(_batches(ours.cache.num_pairs, ours.batch, n)) for n in range(passes)]
        taken = seconds(lambda: [gather(batch) for order in orders for batch in order])
        return taken / passes

    return _Rival(peer.name, partial(run, ours.passes), run(1))


def gather_vs_batch_peers(setting: Setting) -> Measured:
    """The upper end of the interval of the fastest batch gatherer's time over ours."""
    ours = _Ours(setting, setting.choose(2048, 64))
    rivals = [_batch_rival(ours, peer) for peer in ours.installed(BATCH_PEERS)]
    ratios, detail = ours.against(BATCH_PEERS, rivals)
    return Measured(
        ratios,
        value=median_interval(ratios)[1],
        detail={
            **detail,
            "median": round(median(ratios), 4),
            "value_is": "the upper end of the 95 % bootstrap interval of the median ratio",
        },
    )


BENCHES = (
    Bench(
        name="gather_vs_peers",
        goal=8,
        better="larger",
        unit="x",
        what="the fastest sample-at-a-time loader over ours, same rows, page-cached, shuffled",
        measure=gather_vs_peers,
        repeats=5,
        disk_mb=7000,
    ),
    Bench(
        name="gather_vs_batch_peers",
        goal=1.0,
        better="larger",
        unit="x",
        what="the fastest gatherer of whole batches over ours: upper end of the 95 % interval",
        measure=gather_vs_batch_peers,
        repeats=15,
        disk_mb=3500,
    ),
)
