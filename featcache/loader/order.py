"""In which order training sees the pairs: a pure function of a few numbers.

Shuffled training walks along one endless row of pairs: a permutation of all pairs, then another
one, and so on, each drawn from (seed, number of the permutation). A *position* counts pairs from
the row's start; the global batch at a position is the next `global_batch` pairs, of which each rank
takes its share. So order, batches and resume depend on no rank, worker, thread or file, and the
pairs that a trainer's epoch leaves over open its next one: no batch is short, nothing is lost.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from featcache.errors import UsageError

WINDOW_BLOCKS = 16
"""Blocks that are shuffled together in the locality mode."""
MAX_SEED = 2**64 - 1


def permute(
    num_pairs: int, *, seed: int, epoch: int, locality_block: int | None = None
) -> Int64[np.ndarray, " N"]:
    """One permutation of all pairs, drawn from (seed, epoch) by a counter-based generator.

    It sorts raw Philox words instead of calling numpy's `permutation`, whose algorithm may change
    between numpy versions; a resumed run must find the same order years later.

    Args:
        num_pairs: Pairs to order, at least 1.
        seed: In `[0, 2**64)`.
        epoch: Number of the permutation, from 0.
        locality_block: None for a full shuffle. Else blocks of that many consecutive pairs are
            drawn in random order and the pairs of 16 blocks at a time are mixed: a spinning disk
            or a network file system then reads runs of rows, at the price of weaker mixing.

    Returns:
        Every number in `[0, num_pairs)` once.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    words = generator.random_raw(num_pairs)
    if locality_block is None:
        return np.argsort(words, kind="stable").astype(np.int64, copy=False)
    num_blocks = -(-num_pairs // locality_block)
    drawn = np.argsort(generator.random_raw(num_blocks), kind="stable")
    window_of_block = np.empty(num_blocks, dtype=np.int64)
    window_of_block[drawn] = np.arange(num_blocks) // WINDOW_BLOCKS
    window = window_of_block[np.arange(num_pairs) // locality_block]
    return np.lexsort((words, window)).astype(np.int64, copy=False)


@dataclass(frozen=True)
class Order:
    """Which pairs a rank gets at each position.

    Without `shuffle` it is the order of an evaluation: pairs 0, 1, 2, ..., each exactly once over
    all ranks, the last batch short; a rank's share of a short batch may be one pair shorter than
    another's, or empty. There a position never exceeds `num_pairs`.

    Attributes:
        num_pairs: Pairs of the cache, at least 1.
        global_batch: Pairs of a batch over all ranks.
        seed: Of the permutations; no effect without `shuffle`.
        world_size: Number of ranks; it divides `global_batch`.
        rank: This process, in `[0, world_size)`.
        shuffle: Permutations, or one plain pass.
        locality_block: See `permute`.
    """

    num_pairs: int
    global_batch: int
    seed: int = 0
    world_size: int = 1
    rank: int = 0
    shuffle: bool = True
    locality_block: int | None = None
    # The permutation in use, by its number: one entry, so memory is one permutation.
    _held: dict[int, Int64[np.ndarray, " N"]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name, value in (("num_pairs", self.num_pairs), ("global_batch", self.global_batch)):
            if value < 1:
                raise UsageError(f"`{name}` is {value}, it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is outside the {self.world_size} ranks of this run")
        if self.global_batch % self.world_size:
            down = self.global_batch - self.global_batch % self.world_size
            raise UsageError(
                f"the global batch of {self.global_batch} pairs cannot be shared equally by "
                f"{self.world_size} ranks",
                fix=f"a batch size of {down or self.world_size}",
            )
        if self.shuffle and self.global_batch > self.num_pairs:
            raise UsageError(
                f"the global batch of {self.global_batch} is larger than all {self.num_pairs} "
                "pairs: a batch would hold some of them twice",
                fix=f"a batch size of at most {self.num_pairs}",
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"the seed {self.seed} is outside 0 to 2**64 - 1")
        if self.locality_block is not None and self.locality_block < 1:
            raise UsageError(f"`locality_block` is {self.locality_block}, it must be at least 1")

    def __getstate__(self) -> dict[str, object]:
        """Everything but the permutation, which the other process draws again."""
        return {**self.__dict__, "_held": {}}

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass of the trainer; always the same number.

        A shuffled pass is `num_pairs // global_batch` batches and its left-over pairs open the next
        pass; an evaluation's last batch is short instead.
        """
        if self.shuffle:
            return self.num_pairs // self.global_batch
        return -(-self.num_pairs // self.global_batch)

    def permutation(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """The order of permutation number `epoch`; a plain range without `shuffle`.

        The array is kept until another one is asked for; do not write to it.
        """
        if not self.shuffle:
            return np.arange(self.num_pairs, dtype=np.int64)
        if epoch not in self._held:
            self._held.clear()
            self._held[epoch] = permute(
                self.num_pairs, seed=self.seed, epoch=epoch, locality_block=self.locality_block
            )
        return self._held[epoch]

    def global_pairs_at(self, position: int) -> Int64[np.ndarray, " G"]:
        """The global batch that starts at a position.

        Args:
            position: Pairs that were handed out before, over all ranks. Any whole number from 0;
                it need not be a multiple of the batch, so a run may resume with another batch size.

        Returns:
            Pair numbers: `global_batch` of them, fewer only at the end of an evaluation. A pair
            occurs twice in a shuffled batch only where it ends one permutation and opens the next.
        """
        if not self.shuffle:
            stop = min(position + self.global_batch, self.num_pairs)
            return np.arange(min(position, stop), stop, dtype=np.int64)
        epoch, start = divmod(position, self.num_pairs)
        pairs = self.permutation(epoch)[start : start + self.global_batch]
        if len(pairs) < self.global_batch:  # copied before the permutation is dropped
            following = self.global_batch - len(pairs)
            pairs = np.concatenate([pairs, self.permutation(epoch + 1)[:following]])
        return pairs.copy()

    def pairs_at(self, position: int) -> Int64[np.ndarray, " B"]:
        """This rank's share of the global batch at a position; see `global_pairs_at`."""
        pairs = self.global_pairs_at(position)
        start = self.rank * len(pairs) // self.world_size
        stop = (self.rank + 1) * len(pairs) // self.world_size
        return pairs[start:stop]

    def batch(self, step: int) -> Int64[np.ndarray, " B"]:
        """This rank's pairs at a step of the run, counted from 0 and on through all epochs."""
        return self.pairs_at(step * self.global_batch)
