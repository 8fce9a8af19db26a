"""Rows of many shards in one address range."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.cache import row_table
from featcache.cache.reader import FeatureSet
from featcache.cache.row_table import RowTable, aligned_starts
from featcache.errors import ShardError

SHARDS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90)), min_size=1, max_size=6)


@given(SHARDS, st.integers(1, 3000), st.sampled_from([512, 4096, 65_536]), st.integers(0, 9))
def test_shards_keep_their_place_within_a_page_and_share_none(shards, row_bytes, page, shift):
    offsets = [one * 2**shift for one, _ in shards]
    counts = [count for _, count in shards]
    starts = aligned_starts(row_bytes, offsets, counts, page=page)
    possible = [
        any((k * row_bytes - offset) % page == 0 for k in range(page)) for offset in offsets
    ]
    if starts is None:
        assert not all(possible)
        return
    free = 0
    for start, offset, count in zip(starts[:-1], offsets, counts, strict=True):
        begins = start * row_bytes
        assert begins % page == offset % page
        assert begins - begins % page >= free
        # A table that wastes more than the rows after which places repeat wastes addresses.
        assert start * row_bytes < free + page + row_bytes * page
        free = -(-(begins + count * row_bytes) // page) * page
    assert starts[-1] * row_bytes >= free
    assert starts[-1] * row_bytes < free + row_bytes


@pytest.fixture(params=["float16", "int8"])
def features(request, build, tmp_path):
    spec = build.make_spec(
        num_tokens=5, num_prefix_tokens=1, grid=(2, 2), dim=7, dtype=request.param
    )
    build.write_set(tmp_path, spec, build.make_content(spec, 50), rows_per_shard=8)
    return FeatureSet.open(tmp_path)


def taken(features, name, rows):
    table = features.row_table(name, by_token=False)
    place = features.shards[0].header.places[name]
    out = np.empty((len(rows), *place.shape[1:]), place.numpy_type)
    table.take(table.locate(*features.shard_of(rows)), out)
    return out


def test_any_rows_of_any_shards_are_copied(features):
    rows = np.random.default_rng(0).integers(0, 50, 300)
    whole = np.concatenate([features.tokens_map(n) for n in range(features.num_shards)])
    np.testing.assert_array_equal(taken(features, "tokens", rows), whole[rows])
    if features.spec.dtype == "int8":
        scales = np.concatenate([features.scale_map(n) for n in range(features.num_shards)])
        np.testing.assert_array_equal(taken(features, "scale_token", rows), scales[rows])


def test_threads_map_shards_at_once(features):
    whole = np.concatenate([features.tokens_map(n) for n in range(features.num_shards)])
    pieces = np.random.default_rng(1).permutation(50).reshape(10, 5)
    with ThreadPoolExecutor(8) as pool:
        for rows, got in zip(
            pieces, pool.map(lambda one: taken(features, "tokens", one), pieces), strict=True
        ):
            np.testing.assert_array_equal(got, whole[rows])


def test_only_shards_that_are_asked_for_are_opened(features):
    features.shards[3].path.unlink()
    assert len(taken(features, "tokens", np.array([0, 9, 47]))) == 3
    with pytest.raises(ShardError, match="shard-000003"):
        taken(features, "tokens", np.array([0, 25]))


def test_a_populated_shard_is_mapped(features):
    assert features.row_table("tokens", by_token=False).populate(2) in (True, False)
    features.shards[2].path.unlink()  # the map outlives it
    assert len(taken(features, "tokens", np.array([17]))) == 1


def test_damaged_scales_are_found_before_they_are_used(build, tmp_path):
    spec = build.make_spec(dtype="int8")
    build.write_set(tmp_path, spec, build.make_content(spec, 6))
    features = FeatureSet.open(tmp_path)
    place = features.shards[0].header.places["scale_token"]
    with features.shards[0].path.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff")
    with pytest.raises(ShardError, match="`scale_token` is damaged"):
        taken(features, "scale_token", np.arange(3))


def test_without_a_table_rows_are_read_all_the_same(features, monkeypatch):
    monkeypatch.setattr(row_table, "MAX_SHARDS", 6)
    with pytest.raises(ShardError, match="do not fit into one table"):
        RowTable(features.shards, "tokens", by_token=False)
    assert features.row_table("tokens", by_token=False) is None
    assert features.populate(0) in (True, False)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_of_rows_of_many_lengths_are_a_table_with_a_zero(build, tmp_path, dtype):
    spec = build.make_spec("text", dtype=dtype)
    build.write_set(tmp_path, spec, build.make_content(spec, 40), rows_per_shard=8)
    features = FeatureSet.open(tmp_path)
    assert features.row_table("tokens", by_token=False) is None
    table = features.row_table("tokens", by_token=True)
    shards = np.array([2, 0, 4])
    places = np.append(table.locate(shards, np.array([3, 0, 1])), table.zero)
    out = np.empty((4, spec.dim), spec.dtype)
    table.take(places, out)
    for row, shard, token in zip(out, shards.tolist(), [3, 0, 1], strict=False):
        np.testing.assert_array_equal(row, features.tokens_map(shard)[token])
    assert not out[3].any()
