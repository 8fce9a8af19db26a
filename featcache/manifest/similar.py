"""Pictures that look alike: a signature of 256 bits for each, and all pairs that nearly agree.

The signature holds the signs of the 256 lowest frequencies of a thumbnail, the mean left out. It
does not change with brightness and hardly with size, contrast or JPEG quality; a cut margin, a turn
or a mirror image makes another one. Radiographs of different people are alike in their lowest
frequencies, so that the usual 64 bits are too few: `docs/datasets.md` has the figures.

Pairs are found by bands. Two signatures that differ in at most 23 bits have at least one of 12
bands in which they differ in at most one bit, so nothing is missed, and only such pairs are looked
at: 400,000 radiographs take seconds.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

from featcache.console import task

SIDE = 32  # of the thumbnail, in pixels
NUM_BITS = 256
MAX_DISTANCE = 23  # bits; different patients in 5,011 real radiographs differ in 39 and more
_BANDS = 12
_PIECE = 1 << 20
_FEW = 30_000  # below, a table of all values takes longer than it saves


@cache
def _frequencies() -> tuple[Int64[np.ndarray, " 256"], Int64[np.ndarray, " 256"]]:
    """Row and column of the lowest frequencies of a thumbnail, from low to high."""
    rows, columns = np.divmod(np.arange(1, SIDE * SIDE), SIDE)
    order = np.lexsort((columns, rows, rows**2 + columns**2))[:NUM_BITS]
    return rows[order], columns[order]


def signature(thumbnail: UInt8[np.ndarray, "32 32"]) -> UInt64[np.ndarray, " 4"]:
    """What a picture looks like, in 256 bits.

    Args:
        thumbnail: The whole picture, squeezed into a square, as grey levels.

    Returns:
        All zero for a picture of one level, which looks like no other.
    """
    from scipy.fft import dctn  # noqa: PLC0415 - a tenth of a second that few commands need

    if thumbnail.min() == thumbnail.max():
        return np.zeros(4, np.uint64)
    levels = dctn(thumbnail.astype(np.float64), norm="ortho")
    signs: UInt8[np.ndarray, " 32"] = np.packbits(levels[_frequencies()] > 0)
    return signs.view(np.uint64)


def near_pairs(signatures: UInt64[np.ndarray, "N 4"]) -> Int64[np.ndarray, "P 2"]:
    """All pairs that differ in at most `MAX_DISTANCE` bits.

    Args:
        signatures: Each once.

    Returns:
        Positions of each pair, the smaller one first, sorted.
    """
    number = max(len(signatures), 1)
    codes = np.zeros(0, np.int64)  # `smaller * number + larger`: pairs of a cluster are many
    bits = np.unpackbits(signatures.view(np.uint8), axis=1)
    with task("look for pictures that look alike", _BANDS, "bands") as progress:
        for band in range(_BANDS):
            found = [codes]
            for one, other in _candidates(bits[:, band::_BANDS]):
                differ = np.bitwise_count(signatures[one] ^ signatures[other]).sum(axis=1)
                near = differ <= MAX_DISTANCE
                one, other = one[near], other[near]
                found.append(np.minimum(one, other) * number + np.maximum(one, other))
            codes = np.unique(np.concatenate(found))
            progress.update(band + 1)
    pairs: Int64[np.ndarray, "P 2"] = np.stack(np.divmod(codes, number), axis=1)
    return pairs


def _candidates(
    bits: UInt8[np.ndarray, "N W"],
) -> Iterator[tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]]:
    """Pairs that agree in all bits of a band, or in all but one, a piece at a time.

    Args:
        bits: Every twelfth bit: neighbouring frequencies agree too often to stand together.
    """
    width = bits.shape[1]
    values = bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    table = None
    if len(values) >= _FEW:
        table = np.concatenate([[0], np.cumsum(np.bincount(values, minlength=1 << width))])

    def begin(wanted: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        """Where values begin among the sorted ones; looking it up is four times as fast."""
        places: Int64[np.ndarray, " M"] = (
            np.searchsorted(ordered, wanted) if table is None else table[wanted]
        )
        return places

    after = np.arange(1, len(order) + 1)
    yield from _spans(order, order, after, begin(ordered + 1))
    for bit in range(width):
        ones = np.flatnonzero((values >> bit) & 1 == 0)
        wanted = values[ones] | 1 << bit
        yield from _spans(ones, order, begin(wanted), begin(wanted + 1))


def _spans(
    ones: Int64[np.ndarray, " M"],
    order: Int64[np.ndarray, " N"],
    start: Int64[np.ndarray, " M"],
    stop: Int64[np.ndarray, " M"],
) -> Iterator[tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]]:
    """Each of some signatures with all of its span in an order, about a million pairs at a time."""
    some = np.flatnonzero(stop > start)
    ones, start, number = ones[some], start[some], (stop - start)[some]
    ends = np.cumsum(number)
    pieces = int(ends[-1]) // _PIECE + 1 if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(pieces + 1) * _PIECE)
    cuts[-1:] = len(ends)
    for first, last in pairwise(cuts.tolist()):
        many = number[first:last]
        total = int(many.sum())
        within = np.arange(total) - np.repeat(np.cumsum(many) - many, many)
        yield np.repeat(ones[first:last], many), order[np.repeat(start[first:last], many) + within]


def alike_elsewhere(
    node: Int64[np.ndarray, " N"], pairs: Int64[np.ndarray, "P 2"], group: Int64[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Which pictures look like one of another group.

    Args:
        node: Number of each picture's signature; -1 for a picture without one.
        pairs: Numbers of signatures that nearly agree.
        group: Of each picture, from 0; -1 for a picture that is in none.

    Returns:
        True for a picture in a group that looks like one in another group.
    """
    result = np.zeros(len(node), np.bool_)
    counted = np.flatnonzero((node >= 0) & (group >= 0))
    if not len(counted):
        return result
    size, mine, of = int(node.max()) + 1, group[counted], node[counted]
    lowest, highest = np.full(size, np.iinfo(np.int64).max), np.full(size, -1)
    np.minimum.at(lowest, of, mine)
    np.maximum.at(highest, of, mine)
    low, high = lowest.copy(), highest.copy()
    for one, other in (pairs.T, pairs.T[::-1]):
        np.minimum.at(low, one, lowest[other])
        np.maximum.at(high, one, highest[other])
    result[counted] = (low[of] < mine) | (high[of] > mine)
    return result
