"""Many texts in a part of their bytes, until it is known which of them are wanted in which order.

A million reports are 0.7 GB. Rows of a table taken in another order are there twice for a while;
from compressed pieces they are put together once.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

_CODEC = "lz4"


class PackedTexts:
    """Texts in the order in which they were appended, compressed piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[tuple[bytes, Int64[np.ndarray, " N+1"]]] = []
        self._codec = pa.Codec(_CODEC)

    def append(self, texts: pa.LargeStringArray) -> None:
        """Add a piece.

        Args:
            texts: Some thousands of them; a null takes a place and holds nothing.
        """
        _, offsets, content = texts.buffers()
        last = texts.offset + len(texts) + 1
        places = np.frombuffer(offsets, np.int64)[texts.offset : last]
        plain = memoryview(b"" if content is None else content)[places[0] : places[-1]]
        self._pieces.append((self._codec.compress(plain, asbytes=True), places - places[0]))

    def take(self, rows: Int64[np.ndarray, " K"]) -> pa.LargeStringArray:
        """Put some of the texts together.

        Args:
            rows: Their numbers, in the order that is wanted.

        Returns:
            K texts without a null.
        """
        sizes = [len(places) - 1 for _, places in self._pieces]
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(p) for _, p in self._pieces)])
        targets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[rows])])
        content = np.empty(targets[-1], dtype=np.uint8)
        view = content.data
        order = np.argsort(rows, kind="stable")
        bounds = np.cumsum([0, *sizes])
        cuts = np.searchsorted(rows[order], bounds)
        for number, (packed, places) in enumerate(self._pieces):
            wanted = order[cuts[number] : cuts[number + 1]]
            plain = memoryview(self._codec.decompress(packed, int(places[-1]), asbytes=True))
            local = rows[wanted] - bounds[number]
            columns = (places[local], places[local + 1], targets[wanted], targets[wanted + 1])
            for start, stop, at, end in zip(*(one.tolist() for one in columns), strict=True):
                view[at:end] = plain[start:stop]
        buffers = [None, pa.py_buffer(targets), pa.py_buffer(content)]
        return pa.Array.from_buffers(pa.large_string(), len(rows), buffers)
