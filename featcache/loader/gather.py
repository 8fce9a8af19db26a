"""Batches of cached tokens at memory speed, for training and for heads.

    for batch in TokenLoader(cache, batch_size=256):
        batch.image_tokens  # B L D, float16
        batch.text_tokens   # B T E, float16, padded to the longest text of the batch
        batch.text_valid    # B T, True at real tokens

The tokens of a batch lie in a buffer that is used again: **they are valid until the next batch is
asked for.** Keep them longer with `clone()`, or by moving them to a GPU with `Batch.to`.
"""

import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Never

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featcache.cache.reader import Cache, FeatureSet
from featcache.config import validate
from featcache.errors import StaleFeatureSetError, UsageError
from featcache.loader.batch import Batch, Int8Tokens, StoredBatch, as_float
from featcache.loader.order import Order
from featcache.loader.resident import OnDevice, open_resident
from featcache.loader.ring import Filled, Reading, Request, Ring, open_readers


class TokenLoader:
    """An iterable over the pairs of a cache, with a length, for training or evaluation.

    Each `iter(loader)` is one pass, and starts where the last one stopped: a shuffled pass is
    `num_pairs // batch_size` full batches and leaves the rest for the next pass; without `shuffle`
    a pass is all pairs in order, the last batch short. There is one pass at a time: a new one ends
    the one before. The order depends on the cache, `seed` and `batch_size` alone, and on
    `locality_block` or `length_window` where one is given.

    It knows nothing of Lightning, but works as its dataloader: the state is that of the batches
    handed out, never of those filled ahead, and an epoch begins in `__iter__`, since a trainer that
    knows the length never asks for more. It can be pickled and forked; files are opened, buffers
    allocated and threads started by the process that iterates, when it does.

    Args:
        cache: From `open_cache`.
        batch_size: Pairs of the *global* batch, over all ranks.
        seed: Of the order.
        shuffle: Permutations for training; False for evaluation.
        rank: This process among the ranks.
        world_size: Number of ranks; it divides `batch_size`.
        **reading: Fields of `Reading`: threads, prefetch, buffer_mb, io, tokens, text_tokens,
            locality_block, length_window, resident.

    Raises:
        UsageError: Values that cannot be, or a batch larger than all pairs.
    """

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        **reading: int | str | None,
    ):
        if cache.images.spec.num_tokens is None:
            raise UsageError(
                "rows of an image set must have equally many tokens, those of "
                f"{cache.images.spec.title} do not",
                where=cache.images.folder,
            )
        self.cache = cache
        self.reading = validate(Reading, reading, where="TokenLoader")
        self.order = Order(
            cache.num_pairs,
            batch_size,
            seed,
            world_size,
            rank,
            shuffle=shuffle,
            locality_block=self.reading.locality_block,
            length_window=self.reading.length_window,
            lengths=cache.texts.lengths[cache.text_rows] if self.reading.length_window else None,
        )
        self._position = 0
        self._in_pass = 0
        self._is_fresh = True  # no batch was handed out since the pass began
        self._forget_process()

    def _forget_process(self) -> None:
        """Start without what belongs to one process: buffers, open files, a running pass."""
        self._opened: tuple[int, Ring | OnDevice] | None = None
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process."""
        return {**self.__dict__, "_opened": None, "_running": None}

    def __len__(self) -> int:
        """Batches of one pass, always the same number."""
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass, or go on with the one that `load_state_dict` stopped in."""
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()
        if not self._is_fresh:
            self._in_pass = 0
            self._position = self._position if self.order.shuffle else 0
            self._is_fresh = True
        batches = self._batches()
        self._running = weakref.ref(batches)
        return batches

    def __getitem__(self, index: object) -> Never:
        """Refuse: only torch's `DataLoader` asks for items, taking this for a data set.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "a TokenLoader is a data loader itself, and no data set of single items",
            fix="for batch in TokenLoader(cache, batch_size): ... without a DataLoader around it; "
            "it reads ahead with threads of its own",
        )

    def _batches(self) -> Generator[Batch, None, None]:
        with closing(self._open().run(self._requests())) as results:
            for request, (images, texts) in results:
                handed_out = self._global_size(self._position)
                self._position += handed_out
                self._in_pass += handed_out
                self._is_fresh = False
                yield _batch(request, images, texts)

    def _requests(self) -> Iterator[Request]:
        """The rest of this pass, ahead of what the consumer has."""
        position, in_pass = self._position, self._in_pass
        for _ in range(self._steps_left(in_pass)):
            pairs = self.order.pairs_at(position)
            rows = (self.cache.image_rows[pairs], self.cache.text_rows[pairs])
            yield Request(pairs, rows, position)
            position += self._global_size(position)

    def _global_size(self, position: int) -> int:
        """Pairs of the global batch at a position."""
        batch = self.order.global_batch
        return batch if self.order.shuffle else min(batch, self.order.num_pairs - position)

    def _steps_left(self, in_pass: int) -> int:
        """Batches of a pass that are still to come."""
        batch = self.order.global_batch
        if self.order.shuffle:
            return max(0, len(self) - -(-in_pass // batch))
        return -(-(self.order.num_pairs - in_pass) // batch)

    def _open(self) -> Ring | OnDevice:
        """Buffers and files of this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            sets = (self.cache.images, self.cache.texts)
            rows = (self.cache.image_rows, self.cache.text_rows)
            share = self.order.global_batch // self.order.world_size
            order, reading = self.order, self.reading
            opened: Ring | OnDevice
            if reading.resident:
                opened = open_resident(sets, rows, share, reading, seed=order.seed)
            else:
                readers = open_readers(sets, reading, seed=order.seed, is_training=order.shuffle)
                opened = Ring(readers, rows, share, reading)
            self._opened = (os.getpid(), opened)
        return self._opened[1]

    def state_dict(self) -> dict[str, int | str]:
        """Where the run stands, as JSON values.

        Returns:
            `seed`; `epoch`, the number of the permutation; `position`, pairs of it that were handed
            out over all ranks; `in_pass`, pairs handed out since the last `iter`; `num_pairs`; and
            the cache's `fingerprint`; and `order`, where that is more than a plain shuffle.
        """
        epoch, position = divmod(self._position, self.order.num_pairs)
        arrangement = self.order.arrangement
        return {
            "seed": self.order.seed,
            "epoch": epoch,
            "position": position,
            "in_pass": self._in_pass,
            "num_pairs": self.order.num_pairs,
            "fingerprint": self.cache.fingerprint,
            **({"order": arrangement} if arrangement else {}),
        }

    def load_state_dict(self, state_dict: Mapping[str, int | str]) -> None:
        """Go on where a state was taken: the next `iter` gives the rest of its pass.

        Ranks, threads and buffers may be others than then. With another batch size the pairs still
        come in the same order, cut into other batches; not so with a `length_window`.

        Args:
            state_dict: From `state_dict`.

        Raises:
            StaleFeatureSetError: It was taken over another cache.
            UsageError: It was taken with another seed or another kind of order, or is no such
                state.
        """
        missing = sorted(set(self.state_dict()) - {"order"} - set(state_dict))
        if missing:
            raise UsageError(f"this is no state of a loader: it has no `{missing[0]}`")
        if state_dict["fingerprint"] != self.cache.fingerprint:
            raise StaleFeatureSetError(
                f"the state was taken over the cache {state_dict['fingerprint']}, this one is "
                f"{self.cache.fingerprint}: other features or other pairs",
                where=f"{self.cache.images.folder} and {self.cache.texts.folder}",
                fix="resume with the feature sets and the manifest of the run",
            )
        if state_dict["seed"] != self.order.seed:
            raise UsageError(
                f"the state was taken with seed {state_dict['seed']}, this loader has "
                f"{self.order.seed}: another order",
                fix=f"seed {state_dict['seed']}",
            )
        have, want = state_dict.get("order", ""), self.order.arrangement
        if have != want:
            raise UsageError(
                f"the state was taken in the order: {have or 'plain shuffle'}; this loader has: "
                f"{want or 'plain shuffle'}",
                fix="resume with the `length_window`, `locality_block` and batch size of the run",
            )
        epoch, position = int(state_dict["epoch"]), int(state_dict["position"])
        self._position = epoch * self.order.num_pairs + position
        self._in_pass = int(state_dict["in_pass"])
        if self._steps_left(self._in_pass) == 0:  # taken after the last batch of a pass
            self._in_pass = 0
            self._position = self._position if self.order.shuffle else 0
        self._is_fresh = True


def _batch(request: Request, images: Filled, texts: Filled) -> Batch:
    """What the consumer gets: floats, or int8 that is dequantised where it asks for it."""
    rows = [torch.from_numpy(rows) for rows in (request.numbers, *request.rows)]
    if isinstance(images.tokens, Int8Tokens) or isinstance(texts.tokens, Int8Tokens):
        return StoredBatch(images.tokens, texts.tokens, texts.valid, *rows)
    return Batch(images.tokens, texts.tokens, texts.valid, *rows)


def iterate_rows(
    features: FeatureSet,
    rows: Int64[np.ndarray, " N"],
    batch_size: int,
    **reading: int | str | None,
) -> Iterator[tuple[Int64[np.ndarray, " B"], Float[Tensor, "B T D"], Bool[Tensor, "B T"] | None]]:
    """Read rows of one feature set in the order given, for heads and retrieval.

    Args:
        features: The set.
        rows: Row numbers in the set, any order, repeats allowed; none may be quarantined.
        batch_size: Rows of a batch; the last one is short.
        **reading: Fields of `Reading`, as for `TokenLoader`, but none about the order of pairs and
            no `resident`, since each row is read once.

    Returns:
        An iterator over batches: their row numbers; their tokens, valid until the next batch is
        asked for; and for text sets the mask of real tokens (padding is zeros), None for images.

    Raises:
        UsageError: `batch_size` or a reading option cannot be.
    """
    checked = validate(Reading, reading, where="iterate_rows")
    if batch_size < 1:
        raise UsageError(f"`batch_size` is {batch_size}, it must be at least 1")
    for name in ("locality_block", "length_window", "resident"):
        if getattr(checked, name) is not None:
            raise UsageError(f"`{name}` has no effect on rows that are read in the order given")
    return _iterate(features, rows, batch_size, checked)


def _iterate(
    features: FeatureSet, rows: Int64[np.ndarray, " N"], batch_size: int, reading: Reading
) -> Generator[tuple[Int64[np.ndarray, " B"], Tensor, Tensor | None], None, None]:
    if not len(rows):
        return
    features.shard_of(rows)  # refuses rows outside the set before their lengths are looked up
    ring = Ring(open_readers([features], reading), [rows], min(batch_size, len(rows)), reading)
    cuts = range(0, len(rows), batch_size)
    requests = (Request(part, (part,), at) for at in cuts for part in [rows[at : at + batch_size]])
    with closing(ring.run(requests)) as results:
        for request, (filled,) in results:
            valid = filled.valid if features.spec.modality == "text" else None
            yield request.numbers, as_float(filled.tokens), valid
