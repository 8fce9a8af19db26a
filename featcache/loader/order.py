"""In which order training sees the pairs: a pure function of a few numbers.

Shuffled training walks along one endless row of pairs: a permutation of all pairs, then another
one, and so on, each drawn from (seed, number of the permutation). A *position* counts pairs from
the row's start; the global batch at a position is the next `global_batch` pairs, of which each rank
takes its share. So order, batches and resume depend on no rank, worker, thread or file, and the
pairs that a trainer's epoch leaves over open its next one: no batch is short, nothing is lost.

With a length window the batches of a permutation are filled anew: texts of similar length share a
batch, so that little of it is padding. Still every pair comes once per permutation.
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


def group_by_length(
    pairs: Int64[np.ndarray, " N"],
    lengths: Int64[np.ndarray, " N"],
    *,
    first: int,
    batch: int,
    window: int,
    seed: int,
    epoch: int,
) -> Int64[np.ndarray, " N"]:
    """Fill the batches of a permutation with pairs whose texts are similar in length.

    The pairs of `window` batches at a time are sorted by length and cut into batches again; these
    come in random order, so that lengths do not rise and fall with the steps, and hold their pairs
    in the permutation's order, so that no rank gets all long texts. What belongs to a batch that
    two permutations share stays where it is.

    Args:
        pairs: A permutation of all pairs.
        lengths: Length of each pair's text, by the pair's number.
        first: Place in `pairs` at which the first whole batch starts.
        batch: Pairs of a global batch.
        window: Batches that are sorted together, at least 1. The more, the less padding, and the
            less the pairs of a batch are a random sample.
        seed: Of the order of batches.
        epoch: Number of the permutation.

    Returns:
        The same pairs.
    """
    count = (len(pairs) - first) // batch
    if count < 1:
        return pairs
    whole = slice(first, first + count * batch)
    windows = np.arange(count) // window
    places = np.lexsort((lengths[pairs[whole]], windows.repeat(batch))).reshape(count, batch)
    # Another part of the generator's sequence than the permutation's words.
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, 0, 1])
    drawn = np.lexsort((generator.random_raw(count), windows))
    grouped = pairs.copy()
    grouped[whole] = pairs[whole][np.sort(places[drawn], axis=1).ravel()]
    return grouped


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
        length_window: Batches whose pairs are sorted by length together, see `group_by_length`;
            None leaves them as they are. With it the order depends on `global_batch`. No effect
            without `shuffle`.
        lengths: Length of each pair's text; needed for `length_window`.
    """

    num_pairs: int
    global_batch: int
    seed: int = 0
    world_size: int = 1
    rank: int = 0
    shuffle: bool = True
    locality_block: int | None = None
    length_window: int | None = None
    lengths: Int64[np.ndarray, " N"] | None = field(default=None, repr=False, compare=False)
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
        for name in ("locality_block", "length_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` is {value}, it must be at least 1")
        known = 0 if self.lengths is None else len(self.lengths)
        if self.length_window is not None and known != self.num_pairs:
            raise UsageError(
                f"`length_window` needs the length of each of {self.num_pairs} texts, "
                f"{known} were given"
            )

    def __getstate__(self) -> dict[str, object]:
        """Everything but the permutation, which the other process draws again."""
        return {**self.__dict__, "_held": {}}

    @property
    def arrangement(self) -> str:
        """What else decides the order of pairs beside their number and the seed, in words.

        Empty for a plain shuffle, whose order does not depend on the batch size. A resumed run must
        have the same.
        """
        words = []
        if self.shuffle and self.locality_block is not None:
            words.append(f"blocks of {self.locality_block} pairs")
        if self.shuffle and self.length_window is not None:
            words.append(
                f"by text length over {self.length_window} batches of {self.global_batch} pairs"
            )
        return ", ".join(words)

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
            self._held[epoch] = self._draw(epoch)
        return self._held[epoch]

    def _draw(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """Permutation number `epoch`, its batches filled by length where that is wanted."""
        pairs = permute(
            self.num_pairs, seed=self.seed, epoch=epoch, locality_block=self.locality_block
        )
        if self.length_window is None or self.lengths is None:
            return pairs
        return group_by_length(
            pairs,
            self.lengths,
            first=-epoch * self.num_pairs % self.global_batch,
            batch=self.global_batch,
            window=self.length_window,
            seed=self.seed,
            epoch=epoch,
        )

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
