"""Forward passes of one shape, halved when they do not fit into the memory."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featcache.cache.format import Rounding
from featcache.console import size
from featcache.encoders.interface import Encoded
from featcache.errors import EncoderError

# What PyTorch's CPU allocator says; on a GPU there is a type of its own.
_CPU_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


@dataclass(frozen=True)
class Pace:
    """How a worker computes; none of it but the autocast type may change a stored byte.

    Attributes:
        threads: Decoding threads.
        device: `cpu` or `cuda`.
        autocast: `bfloat16`, or None for plain float32.
    """

    threads: int
    device: str
    autocast: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether batches are computed while this program goes on."""
        return self.device.startswith("cuda")

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=getattr(torch, self.autocast))


@dataclass
class Times:
    """Where the time of a pass went, as the encoding thread saw it, in seconds.

    Attributes:
        decode_wait_s: It waited for pictures (or for tokenizing).
        encode_s: It ran forward passes, or waited for the GPU to do so.
        write_wait_s: It waited for the writer.
        decode_busy_s: The decoders worked, shared out over their threads. Only where they share
            the cores with the encoder: there each slows the other, and waiting does not tell who
            is to blame.
        elapsed_s: All of the encoding thread's time, from its first row to its last: the first
            three and what it does between them.
    """

    decode_wait_s: float = 0.0
    encode_s: float = 0.0
    write_wait_s: float = 0.0
    decode_busy_s: float = 0.0
    elapsed_s: float = 0.0

    def add(self, other: "Times") -> None:
        """Lay another pass over this one."""
        self.decode_wait_s += other.decode_wait_s
        self.encode_s += other.encode_s
        self.write_wait_s += other.write_wait_s
        self.decode_busy_s += other.decode_busy_s
        self.elapsed_s += other.elapsed_s

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one of the figures."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def limit(self) -> tuple[str, float]:
        """The stage that took most of the time (decode, encode or write), and its share."""
        shared = self.decode_wait_s + self.encode_s
        decode = self.decode_wait_s
        if self.decode_busy_s:
            decode = shared * self.decode_busy_s / (self.decode_busy_s + self.encode_s)
        spent = {"decode": decode, "encode": shared - decode, "write": self.write_wait_s}
        slowest = max(spent, key=lambda stage: spent[stage])
        return slowest, spent[slowest] / (sum(spent.values()) or 1.0)


@dataclass
class PartStats:
    """What became of the rows of one or more shards of one set.

    Attributes:
        failures: Row within the shard and the reason, of each quarantined row.
        truncated: Texts that were longer than the encoder reads.
        pass_rows: Rows of a forward pass after it had to be halved; None when it never had to.
        difference: Largest relative difference between whole and halved passes, measured on the
            first batch; None when nothing was halved, or down to single rows.
        rounding: What int8 cost; None for other types.
    """

    failures: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0
    pass_rows: int | None = None
    difference: float | None = None
    rounding: Rounding | None = None

    def add(self, other: "PartStats") -> None:
        """Lay another shard's figures over these."""
        self.failures += other.failures
        self.truncated += other.truncated
        if other.pass_rows is not None:
            self.pass_rows = min(other.pass_rows, self.pass_rows or other.pass_rows)
        if other.difference is not None:
            self.difference = max(other.difference, self.difference or 0.0)
        if other.rounding is not None:
            self.rounding = other.rounding + (self.rounding or Rounding())


class Forward:
    """One encoder's forward passes.

    A batch that does not fit is computed in halves, and halves of halves; what fitted once is kept
    for the batches of the shard that follow.
    """

    def __init__(self, encoder: Callable[..., Encoded], pace: Pace, stats: PartStats, *, name: str):
        """See the class.

        Args:
            encoder: Takes tensors with one row per row of the batch.
            pace: Where it runs.
            stats: Is told when batches are halved.
            name: The encoder's, for messages.
        """
        self._encoder, self._pace, self._stats, self._name = encoder, pace, stats, name

    def __call__(self, *inputs: Tensor) -> Encoded:
        """Encode a batch.

        Raises:
            EncoderError: A single row does not fit into the memory.
        """
        rows = len(inputs[0])
        pass_rows = min(self._stats.pass_rows or rows, rows)
        while True:
            try:
                encoded = self._in_pieces(inputs, pass_rows)
            except (RuntimeError, MemoryError) as error:
                message = str(error)
                if not _is_out_of_memory(error):
                    raise
            else:
                break
            # Outside the `except`: the traceback would keep the tensors of the failed pass.
            if pass_rows == 1:
                raise self._too_large(message)
            pass_rows = (pass_rows + 1) // 2
            if self._pace.on_gpu:
                torch.cuda.empty_cache()
        if pass_rows < rows and self._stats.pass_rows != pass_rows:
            self._mark(inputs, encoded, pass_rows)
        return encoded

    def _in_pieces(self, inputs: tuple[Tensor, ...], pass_rows: int) -> Encoded:
        """One pass, or several laid together."""
        rows = len(inputs[0])
        if pass_rows >= rows:
            return self._encoder(*inputs)
        pieces = [
            self._encoder(*(one[start : start + pass_rows] for one in inputs))
            for start in range(0, rows, pass_rows)
        ]
        pooled = [piece.pooled for piece in pieces if piece.pooled is not None]
        return Encoded(
            torch.cat([piece.tokens for piece in pieces]), torch.cat(pooled) if pooled else None
        )

    def _mark(self, inputs: tuple[Tensor, ...], encoded: Encoded, pass_rows: int) -> None:
        """Note the halving, and measure on what fits what another halving changes."""
        self._stats.pass_rows = pass_rows
        if pass_rows > 1:
            some = tuple(one[:pass_rows] for one in inputs)
            halved = self._in_pieces(some, (pass_rows + 1) // 2).tokens.float()
            whole = encoded.tokens[:pass_rows].float()
            largest = whole.abs().amax().clamp(min=1e-12)
            self._stats.difference = float((whole - halved).abs().amax() / largest)

    def _too_large(self, message: str) -> EncoderError:
        """The error for a single row that does not fit."""
        asked = re.search(r"(?:allocate|needs?:?) (\d[\d.]* ?(?:[KMGT]i?B|bytes))", message)
        needs = f" (it asked for {asked.group(1)} more)" if asked else ""
        return EncoderError(
            f"a single row of `{self._name}` does not fit into the memory{needs}; "
            f"{size(_free_bytes(self._pace.device))} are free",
            where=self._pace.device,
            fix="a smaller --image-size or --max-tokens, or a machine with more memory",
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a pass failed for lack of memory, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _CPU_MEMORY)


def _free_bytes(device: str) -> int:
    """Free memory of a GPU, or of this machine."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
