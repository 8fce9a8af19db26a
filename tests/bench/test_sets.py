"""Sets of random numbers are real sets, and a pass over them can be checked."""

import numpy as np
import pytest

from featcache.bench.sets import (
    check_pass,
    make_cache,
    row_numbers,
    write_random_set,
    write_random_texts,
)
from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.errors import CacheError


def test_a_random_set_is_complete_and_its_checksums_are_right(tmp_path):
    write_random_set(tmp_path / "set", rows=10, num_tokens=3, dim=4, shard_rows=4)
    features = FeatureSet.open(tmp_path / "set")
    assert (features.num_rows, features.num_shards) == (10, 3)
    assert verify_feature_set(tmp_path / "set").ok


def test_rows_say_which_they_are_beyond_the_whole_numbers_of_float16(tmp_path):
    write_random_set(tmp_path / "set", rows=5000, num_tokens=1, dim=2, shard_rows=4096)
    tokens = FeatureSet.open(tmp_path / "set").read_tokens(np.arange(5000))
    assert row_numbers(tokens).tolist() == list(range(5000))


def test_texts_have_the_lengths_asked_for(tmp_path):
    write_random_texts(tmp_path / "set", lengths=[3, 1, 2], dim=4)
    features = FeatureSet.open(tmp_path / "set")
    assert features.lengths.tolist() == [3, 1, 2]
    assert verify_feature_set(tmp_path / "set").ok


def test_a_grid_leaves_the_tokens_before_it_as_prefix(tmp_path):
    write_random_set(tmp_path / "set", rows=2, num_tokens=5, dim=2, shard_rows=2, grid=(2, 2))
    assert FeatureSet.open(tmp_path / "set").spec.num_prefix_tokens == 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), 8, shape=(3, 4))


def test_a_pass_of_every_row_once_is_accepted_in_any_order(cache):
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    check_pass(
        "rival", cache.images, [cache.images.read_tokens(part) for part in (order, order[:0])]
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 1, 2, 3, 4, 5, 6], "leaves out 1 rows of 8 and repeats 0"),
     ([0, 1, 2, 3, 4, 5, 6, 6], "leaves out 1 rows of 8 and repeats 1")],
)  # fmt: skip
def test_a_pass_that_leaves_out_or_repeats_is_refused(cache, rows, message):
    with pytest.raises(CacheError, match=message):
        check_pass("rival", cache.images, [cache.images.read_tokens(np.array(rows))])


@pytest.mark.parametrize("place", [(2, 2, 3), (2, 0, 0)])
def test_a_row_with_another_byte_is_refused(cache, place):
    tokens = cache.images.read_tokens(np.arange(8))
    tokens[place] += 1
    with pytest.raises(CacheError, match="`rival` delivers a row that is none of the set's"):
        check_pass("rival", cache.images, [tokens])
