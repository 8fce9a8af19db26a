"""Copying rows from shards into a buffer."""

import numpy as np
import pytest

from featcache.loader.sources import MappedShard, RowPlan, fill_rows

TOKENS = np.arange(60, dtype=np.float16).reshape(20, 3)


def fill(first, counts, part, out, *, runs=None, shards=(0, 1, 1, 0)):
    """Fill rows of shard 0, or of shard 1 that holds the negatives."""
    counts, shards = np.array(counts), np.array(shards)
    width = sum(length for _, length in runs) if runs else int(counts.max())
    valid = np.arange(width) < counts[:, None]
    held = {0: MappedShard(TOKENS), 1: MappedShard(-TOKENS)}
    plan = RowPlan(shards, shards, np.array(first), counts, runs, width, valid, held, {})
    fill_rows(plan, part, held, out)


@pytest.mark.parametrize("runs", [None, ((0, 1), (2, 1))])
def test_a_part_of_the_rows_comes_from_the_right_shards(runs):
    out = np.full((2, 2, 3), 7, dtype=np.float16)
    fill([4, 17, 9, 0], [2, 2, 2, 2], slice(1, 3), out, runs=runs)
    columns = [0, 1] if runs is None else [0, 2]
    want = [-TOKENS[[17 + c for c in columns]], -TOKENS[[9 + c for c in columns]]]
    np.testing.assert_array_equal(out, want)


def test_shorter_rows_are_padded_with_zeros():
    out = np.full((3, 3, 3), 7, dtype=np.float16)
    fill([4, 7, 2], [1, 3, 0], slice(0, 3), out, shards=(0, 0, 0))
    np.testing.assert_array_equal(out[0], [TOKENS[4], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(out[1], TOKENS[7:10])
    assert not out[2].any()


def test_rows_of_no_token_are_nothing():
    fill([0, 0], [0, 0], slice(0, 2), np.zeros((2, 0, 3), np.float16), shards=(0, 0))


def test_a_buffer_that_is_no_single_piece_is_refused_and_not_filled_in_a_copy():
    out = np.zeros((2, 4, 3), dtype=np.float16)[:, :2]
    with pytest.raises(ValueError, match="copy"):
        fill([0, 0], [2, 2], slice(0, 2), out, shards=(0, 0))
