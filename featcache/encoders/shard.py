"""One pass over pictures or texts: files in, rows of tokens out, for several encoders at once.

Every forward pass of a set has the same batch size, because kernels differ by shape: the last
batch is filled up, unreadable pictures are black and stay in their place, texts are padded to
multiples of 32. Decoding runs ahead in threads and writing behind in one, while this thread
encodes; on a GPU one batch is computed while the next is being launched. What the encoder had to
wait for is measured.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from featcache.cache.format import FLOAT16_MAX, FeatureSetSpec
from featcache.encoders.decode import Preprocessing, decode_images, read_picture, to_input
from featcache.encoders.forward import Forward, Pace, PartStats, Times
from featcache.encoders.interface import Encoded, ImageEncoder, TextEncoder
from featcache.errors import ImageError

DECODE_AHEAD = 3  # batches in flight: enough to hide one slow file, and bounded memory
OnRows = Callable[[int], None]
Grey = UInt8[np.ndarray, "H W"]
# One network at a time: while a task syncs and reads back its shard, the next one encodes.
_TURN = threading.Lock()


@runtime_checkable
class Sink(Protocol):
    """Where rows go: a shard, or whatever else only looks at them."""

    spec: FeatureSetSpec

    def write(
        self,
        rows: Int64[np.ndarray, " B"],
        tokens: Float[np.ndarray, "*shape"],
        pooled: "Float[np.ndarray, 'B E'] | None" = None,
    ) -> None:
        """Take rows; see `ShardWriter.write`."""

    def quarantine(self, row: int) -> None:
        """Take note that a row has no content."""


@dataclass
class Lane:
    """One encoder's share of a pass over pictures: the rows of one shard.

    Attributes:
        encoder: On the pace's device; several lanes may share it.
        preprocessing: What this lane's pictures become; its view may differ from the encoder's.
        first: Row of the pass that is the shard's row 0.
        count: Rows of the shard.
        batch_size: Rows of every forward pass.
        open: Makes the sink when the first row arrives.
        close: Called when the last row is written: notes failures, finishes the shard.
        stats: What becomes of these rows.
    """

    encoder: ImageEncoder
    preprocessing: Preprocessing
    first: int
    count: int
    batch_size: int
    open: Callable[[], Sink]
    close: Callable[[Sink, PartStats], None]
    stats: PartStats = field(default_factory=PartStats)


class _InFlight(NamedTuple):
    """A batch on its way: computed on the device, not yet written."""

    rows: int
    ready: Callable[[], None]
    write: Callable[[], None]


class _Behind:
    """The writing thread, and on a GPU the batch that is still being computed."""

    def __init__(self, pool: ThreadPoolExecutor, times: Times, *, on_gpu: bool):
        self._pool, self._times, self._on_gpu = pool, times, on_gpu
        self._computing: _InFlight | None = None
        self._writing: Future[None] | None = None

    def push(self, batch: _InFlight) -> None:
        """Take a batch; errors of those before are raised here."""
        ready, self._computing = self._computing, batch if self._on_gpu else None
        ready = ready if self._on_gpu else batch
        if ready is not None:
            self._hand_over(ready)

    def drain(self) -> None:
        """Wait until everything pushed is written."""
        if self._computing is not None:
            self._hand_over(self._computing)
            self._computing = None
        self._wait()

    def _hand_over(self, batch: _InFlight) -> None:
        with self._times.timed("encode_s"):
            batch.ready()
        self._wait()
        self._writing = self._pool.submit(batch.write)

    def _wait(self) -> None:
        if self._writing is not None:
            with self._times.timed("write_wait_s"):
                self._writing.result()
            self._writing = None


class _Stored(NamedTuple):
    """Tokens of one batch on their way to the CPU, in the width they are stored in."""

    tokens: Tensor
    pooled: Tensor | None
    fits: Tensor
    exact: Tensor

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """As numpy; a batch beyond float16 as it was, so that the writer can say which value."""
        tokens = self.tokens if bool(self.fits) else self.exact.float().cpu()
        return tokens.numpy(), None if self.pooled is None else self.pooled.numpy()


def _store(encoded: Encoded, dtype: str) -> _Stored:
    """Start the copy to the CPU; on a GPU nothing is waited for."""
    tokens = encoded.tokens
    if dtype == "float16":
        fits = tokens.abs().amax() <= FLOAT16_MAX  # False for a value that is not a number, too
        tokens = tokens.to(torch.float16)
    else:
        fits, tokens = torch.ones((), dtype=torch.bool), tokens.to(torch.float32)
    pooled = None if encoded.pooled is None else encoded.pooled.float()
    return _Stored(
        tokens.to("cpu", non_blocking=True),
        None if pooled is None else pooled.to("cpu", non_blocking=True),
        fits.to("cpu", non_blocking=True),
        encoded.tokens,
    )


def _signal(pace: Pace) -> Callable[[], None]:
    """A wait for all that was launched on the device up to now."""
    if not pace.on_gpu:
        return lambda: None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


class _File(NamedTuple):
    """A picture that a GPU is to decode, with the way to it for when it cannot."""

    path: Path
    content: bytes


_Picture = list[Grey] | _File | str


def _decode(path: Path | str, preprocessings: Sequence[Preprocessing]) -> _Picture:
    """One picture for every encoder, or the reason why there is none."""
    if isinstance(path, str):
        return path
    if preprocessings[0].decoder == "gpu":
        return _File(path, read_picture(path))
    try:
        return decode_images(path, preprocessings)
    except ImageError as error:
        return error.what


class _Filling:
    """A lane while its rows come in: the batch that is filling up."""

    def __init__(self, lane: Lane, which: int, pace: Pace):
        self._lane, self._which, self._pace = lane, which, pace
        self._forward = Forward(lane.encoder, pace, lane.stats, name=lane.encoder.name)
        self._sink: Sink | None = None
        self._start = 0
        self._empty()

    def _empty(self) -> None:
        shape = (self._lane.batch_size, *self._lane.preprocessing.image_size)
        self._greys = np.zeros(shape, dtype=np.uint8)
        self._files: list[_File | None] = []
        self._good: list[int] = []
        self._taken = 0

    def wants(self, row: int) -> bool:
        """Whether a row of the pass belongs to this lane."""
        return 0 <= row - self._lane.first < self._lane.count

    def take(self, picture: _Picture) -> bool:
        """Add the lane's next row; True when a batch is full or the shard ends."""
        self._sink = self._sink or self._lane.open()
        self._files.append(picture if isinstance(picture, _File) else None)
        if not isinstance(picture, _File):
            grey = picture if isinstance(picture, str) else picture[self._which]
            self._place(self._taken, grey)
        self._taken += 1
        return self._taken == self._lane.batch_size or self._start + self._taken == self._lane.count

    def _place(self, position: int, picture: Grey | str) -> None:
        """Put a decoded picture into the batch, or quarantine its row."""
        if isinstance(picture, str):
            row = self._start + position
            self._lane.stats.failures.append((row, picture))
            if self._sink is not None:
                self._sink.quarantine(row)
        else:
            self._greys[position] = picture
            self._good.append(position)

    def _levels(self) -> UInt8[Tensor, "B H W"]:
        """The batch on the device; files that wait for a GPU's decoder are decoded there."""
        if not any(self._files):
            return _on(torch.from_numpy(self._greys), self._pace)
        from featcache.encoders.decode_gpu import decode_batch_on_gpu  # noqa: PLC0415

        contents = [b"" if one is None else one.content for one in self._files]
        decoded = decode_batch_on_gpu(contents, self._lane.preprocessing, self._pace.device)
        left = set(decoded.fall_back)
        self._good += [n for n, one in enumerate(self._files) if one and n not in left]
        for position, one in enumerate(self._files):
            if one is not None and position in left:
                cpu = self._lane.preprocessing.model_copy(update={"decoder": "cpu"})
                picture = _decode(one.path, [cpu])
                if not isinstance(picture, _File):
                    self._place(position, picture if isinstance(picture, str) else picture[0])
        self._good.sort()
        levels = _on(torch.from_numpy(self._greys), self._pace)
        # Each is black where the other is not.
        return levels + _filled_up(decoded.greys, len(levels))

    def flush(self) -> _InFlight:
        """Encode the batch; what is given back writes it."""
        lane, sink = self._lane, self._sink
        if sink is None:
            raise RuntimeError("a batch without rows")
        with torch.inference_mode(), self._pace.precision():
            encoded = self._forward(to_input(self._levels(), lane.preprocessing))
        stored = _store(encoded, sink.spec.dtype)
        start, good, taken = self._start, self._good, self._taken
        self._start += taken
        self._empty()
        is_last = self._start == lane.count

        def write() -> None:
            if good:
                rows = np.asarray(good, dtype=np.int64)
                tokens, pooled = stored.arrays()
                sink.write(start + rows, tokens[rows], None if pooled is None else pooled[rows])
            if is_last:
                lane.close(sink, lane.stats)

        return _InFlight(taken, _signal(self._pace), write)


def encode_images(
    lanes: Sequence[Lane], paths: Sequence[Path | str], pace: Pace, on_rows: OnRows
) -> Times:
    """Decode pictures once and give them to every lane that wants them.

    Args:
        lanes: Shards to fill; their rows lie within the pass.
        paths: One file per row of the pass, in order; a text in place of a path is the reason why
            the row is not to be read.
        pace: How to compute.
        on_rows: Called with the number of rows that were encoded, after each batch.

    Returns:
        What the time was spent on; what became of the rows is in each lane's stats.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
        EncoderError: A single row does not fit into the memory.
    """
    times = Times()
    busy_s: list[float] = []

    def decode(path: Path | str) -> _Picture:
        started = time.perf_counter()
        picture = _decode(path, kinds)
        busy_s.append(time.perf_counter() - started)
        return picture

    kinds = list(dict.fromkeys(lane.preprocessing for lane in lanes))
    filling = [_Filling(lane, kinds.index(lane.preprocessing), pace) for lane in lanes]
    with ThreadPoolExecutor(pace.threads) as decoders, ThreadPoolExecutor(1) as writers:
        behind = _Behind(writers, times, on_gpu=pace.on_gpu)
        ahead = DECODE_AHEAD * max(lane.batch_size for lane in lanes)
        queue = deque(decoders.submit(decode, path) for path in paths[:ahead])
        rest = iter(paths[ahead:])
        try:
            with _TURN, times.timed("elapsed_s"):
                for row in range(len(paths)):
                    with times.timed("decode_wait_s"):
                        greys = queue.popleft().result()
                    queue.extend(decoders.submit(decode, path) for path in islice(rest, 1))
                    for one in filling:
                        if one.wants(row) and one.take(greys):
                            with times.timed("encode_s"):
                                batch = one.flush()
                            behind.push(batch)
                            on_rows(batch.rows)
            with times.timed("elapsed_s"):
                behind.drain()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise
    if not pace.on_gpu:
        times.decode_busy_s = sum(busy_s) / pace.threads
    return times


def encode_texts(
    encoder: TextEncoder,
    sink: Sink,
    ids: Sequence[list[int]],
    batch_size: int,
    pace: Pace,
    stats: PartStats,
    on_rows: OnRows,
) -> Times:
    """Fill one shard of a text set, shortest texts first so that padding is small.

    Args:
        encoder: On `pace.device`.
        sink: Made for the lengths of `ids`; not finished here.
        ids: Token ids of each row of the shard, in order, special tokens included.
        batch_size: Rows of every forward pass.
        pace: How to compute.
        stats: Is told when batches are halved.
        on_rows: Called with the number of rows done after each batch.

    Returns:
        What the time was spent on; texts do not fail.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
        EncoderError: A single text does not fit into the memory.
    """
    times = Times()
    lengths = np.asarray([len(row) for row in ids], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    forward = Forward(encoder, pace, stats, name=encoder.name)
    with ThreadPoolExecutor(1) as writers, _TURN, times.timed("elapsed_s"):
        behind = _Behind(writers, times, on_gpu=pace.on_gpu)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [ids[row] for row in rows]
            batch += [batch[-1]] * (batch_size - len(batch))
            with times.timed("encode_s"):
                padded, valid = encoder.pad_batch(batch)
                with torch.inference_mode(), pace.precision():
                    encoded = forward(_on(padded, pace), _on(valid, pace))
                stored = _store(encoded, sink.spec.dtype)
            write = _text_rows(sink, rows, lengths[rows], stored)
            behind.push(_InFlight(len(rows), _signal(pace), write))
            on_rows(len(rows))
        behind.drain()
    return times


def _filled_up(greys: UInt8[Tensor, "N H W"], rows: int) -> UInt8[Tensor, "B H W"]:
    """A last batch with as many black pictures as a whole one needs."""
    return torch.nn.functional.pad(greys, (0, 0, 0, 0, 0, rows - len(greys)))


def _on(tensor: Tensor, pace: Pace) -> Tensor:
    """A tensor on the pace's device, copied there while this program goes on."""
    if not pace.on_gpu:
        return tensor
    return tensor.pin_memory().to(pace.device, non_blocking=True)


def _text_rows(
    sink: Sink, rows: Int64[np.ndarray, " B"], lengths: Int64[np.ndarray, " B"], stored: _Stored
) -> Callable[[], None]:
    """The writing of one batch without its padding, as work for the writing thread."""

    def write() -> None:
        table, pooled = stored.arrays()
        flat = np.concatenate([table[i, :length] for i, length in enumerate(lengths)])
        sink.write(rows, flat, None if pooled is None else pooled[: len(rows)])

    return write
