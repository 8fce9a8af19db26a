"""One shard of a feature set: pictures or texts in, rows of tokens out.

Every forward pass of a set has the same batch size, because kernels differ by shape: the last
batch is filled up, unreadable pictures are black and stay in their place, texts are padded to
multiples of 32. Decoding runs ahead in threads and writing behind in one, while this thread
encodes; what it had to wait for is measured.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from featcache.cache.format import FLOAT16_MAX
from featcache.cache.writer import ShardWriter
from featcache.encoders.decode import Preprocessing, decode_image, to_input
from featcache.encoders.interface import Encoded, ImageEncoder, TextEncoder
from featcache.errors import ImageError

DECODE_AHEAD = 3  # batches in flight: enough to hide one slow file, and bounded memory
OnRows = Callable[[int], None]


@dataclass
class ShardStats:
    """Where the time of one shard went, and what could not be read.

    Attributes:
        failures: Row number within the shard and the reason, of each quarantined row.
        decode_wait_s: Time the encoder waited for pictures (or tokenizing).
        encode_s: Time spent in forward passes.
        write_wait_s: Time the encoder waited for the writer.
        truncated: Texts that were longer than the encoder reads.
    """

    failures: list[tuple[int, str]] = field(default_factory=list)
    decode_wait_s: float = 0.0
    encode_s: float = 0.0
    write_wait_s: float = 0.0
    truncated: int = 0

    def add(self, other: "ShardStats") -> None:
        """Lay another shard's figures over these."""
        self.failures += other.failures
        self.decode_wait_s += other.decode_wait_s
        self.encode_s += other.encode_s
        self.write_wait_s += other.write_wait_s
        self.truncated += other.truncated

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one of the three figures."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class Pace:
    """How a worker computes; none of it but the autocast type may change a stored byte.

    Attributes:
        batch_size: Rows of every forward pass.
        threads: Decoding threads.
        device: `cpu` or `cuda`.
        autocast: `bfloat16`, or None for plain float32.
    """

    batch_size: int
    threads: int
    device: str
    autocast: str | None

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=getattr(torch, self.autocast))


class _Behind:
    """One thread that writes, never more than one batch behind."""

    def __init__(self, pool: ThreadPoolExecutor, stats: ShardStats):
        self.pool, self.stats = pool, stats
        self.last: Future[None] | None = None

    def write(self, work: Callable[[], None]) -> None:
        """Hand over one batch; errors of the batch before are raised here."""
        self.wait()
        self.last = self.pool.submit(work)

    def wait(self) -> None:
        """Wait for the batch that is being written."""
        if self.last is not None:
            with self.stats.timed("write_wait_s"):
                self.last.result()


def _decode(path: Path, preprocessing: Preprocessing) -> UInt8[np.ndarray, "H W"] | str:
    """A picture, or the reason why there is none."""
    try:
        return decode_image(path, preprocessing)
    except ImageError as error:
        return error.what


def _store(encoded: Encoded, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Bring one batch to the CPU in the width it is stored in.

    A batch beyond float16 goes to the writer as it is, which says which row and value it was.
    """
    tokens = encoded.tokens
    fits = dtype == "float16" and bool(tokens.abs().amax() <= FLOAT16_MAX)
    pooled = None if encoded.pooled is None else encoded.pooled.float().cpu()
    return tokens.to(torch.float16 if fits else torch.float32).cpu(), pooled


def encode_images(
    encoder: ImageEncoder,
    shard: ShardWriter,
    paths: Sequence[Path],
    pace: Pace,
    on_rows: OnRows,
) -> ShardStats:
    """Fill one shard of an image set.

    Args:
        encoder: On `pace.device`.
        shard: Where the rows go; not finished here.
        paths: One file per row of the shard, in order.
        pace: How to compute.
        on_rows: Called with the number of rows done after each batch.

    Returns:
        Times, and the rows that are quarantined.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
    """
    stats = ShardStats()
    height, width = encoder.preprocessing.image_size
    starts = range(0, len(paths), pace.batch_size)
    with ThreadPoolExecutor(pace.threads) as decoders, ThreadPoolExecutor(1) as writers:
        behind = _Behind(writers, stats)

        def decode(start: int) -> list[Future[UInt8[np.ndarray, "H W"] | str]]:
            batch = paths[start : start + pace.batch_size]
            return [decoders.submit(_decode, path, encoder.preprocessing) for path in batch]

        ahead = deque(decode(start) for start in starts[:DECODE_AHEAD])
        for index, start in enumerate(starts):
            greys = np.zeros((pace.batch_size, height, width), dtype=np.uint8)
            good: list[int] = []
            with stats.timed("decode_wait_s"):
                pictures = [future.result() for future in ahead.popleft()]
            if index + DECODE_AHEAD < len(starts):
                ahead.append(decode(starts[index + DECODE_AHEAD]))
            for offset, picture in enumerate(pictures):
                if isinstance(picture, str):
                    stats.failures.append((start + offset, picture))
                    shard.quarantine(start + offset)
                else:
                    greys[offset] = picture
                    good.append(offset)
            with stats.timed("encode_s"):
                tokens, pooled = _encode_greys(encoder, greys, pace, shard.spec.dtype)
            behind.write(_image_rows(shard, start, good, tokens, pooled))
            on_rows(len(pictures))
        behind.wait()
    return stats


def _encode_greys(
    encoder: ImageEncoder, greys: UInt8[np.ndarray, "B H W"], pace: Pace, dtype: str
) -> tuple[Tensor, Tensor | None]:
    """One forward pass over decoded pictures."""
    levels = torch.from_numpy(greys)
    if pace.device.startswith("cuda"):
        levels = levels.pin_memory().to(pace.device, non_blocking=True)
    with torch.inference_mode(), pace.precision():
        return _store(encoder(to_input(levels, encoder.preprocessing)), dtype)


def _image_rows(
    shard: ShardWriter, start: int, good: list[int], tokens: Tensor, pooled: Tensor | None
) -> Callable[[], None]:
    """The writing of one batch, as work for the writing thread."""

    def work() -> None:
        if good:
            rows = np.asarray(good, dtype=np.int64)
            vectors = None if pooled is None else pooled.numpy()[rows]
            shard.write(start + rows, tokens.numpy()[rows], vectors)

    return work


def encode_texts(
    encoder: TextEncoder,
    shard: ShardWriter,
    ids: Sequence[list[int]],
    pace: Pace,
    on_rows: OnRows,
) -> ShardStats:
    """Fill one shard of a text set, shortest texts first so that padding is small.

    Args:
        encoder: On `pace.device`.
        shard: Made for the lengths of `ids`; not finished here.
        ids: Token ids of each row of the shard, in order, special tokens included.
        pace: How to compute.
        on_rows: Called with the number of rows done after each batch.

    Returns:
        Times; texts do not fail.

    Raises:
        CacheError: A row does not fit the stored type, or the disk is full.
    """
    stats = ShardStats()
    lengths = np.asarray([len(row) for row in ids], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    with ThreadPoolExecutor(1) as writers:
        behind = _Behind(writers, stats)
        for start in range(0, len(order), pace.batch_size):
            rows = order[start : start + pace.batch_size]
            batch = [ids[row] for row in rows]
            batch += [batch[-1]] * (pace.batch_size - len(batch))
            with stats.timed("encode_s"):
                padded, valid = encoder.pad_batch(batch)
                with torch.inference_mode(), pace.precision():
                    encoded = encoder(padded.to(pace.device), valid.to(pace.device))
                tokens, pooled = _store(encoded, shard.spec.dtype)
            behind.write(_text_rows(shard, rows, lengths[rows], tokens, pooled))
            on_rows(len(rows))
        behind.wait()
    return stats


def _text_rows(
    shard: ShardWriter,
    rows: np.ndarray,
    lengths: np.ndarray,
    tokens: Tensor,
    pooled: Tensor | None,
) -> Callable[[], None]:
    """The writing of one batch without its padding, as work for the writing thread."""

    def work() -> None:
        table = tokens.numpy()
        flat = np.concatenate([table[i, :length] for i, length in enumerate(lengths)])
        vectors = None if pooled is None else pooled.numpy()[: len(rows)]
        shard.write(rows, flat, vectors)

    return work
