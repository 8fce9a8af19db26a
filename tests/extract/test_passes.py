"""Which shards of several sets are made in one pass over the pictures."""

from hypothesis import given
from hypothesis import strategies as st

from featcache.cache.format import ShardPlan
from featcache.extract.passes import nest_shards

# For each set the rows of a shard, and which of its shards are missing.
SETS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64]),
        st.lists(st.booleans(), min_size=40, max_size=40),
    ),
    min_size=1,
    max_size=4,
)


def shards(rows: int, step: int) -> list[ShardPlan]:
    keys = [f"k{row}" for row in range(rows)]
    ranges = [keys[start : start + step] for start in range(0, rows, step)]
    return [ShardPlan(number, part, part) for number, part in enumerate(ranges)]


@given(st.integers(1, 40), SETS)
def test_every_shard_is_in_one_group_and_lies_within_its_first(rows, drawn):
    sets = [
        [shard for shard in shards(rows, step) if missing[shard.number]] for step, missing in drawn
    ]
    groups = nest_shards(sets)
    keys = [{shard.number: shard.keys for shard in one} for one in sets]
    seen = [(which, number) for group in groups for which, number, _ in group]
    assert len(seen) == len(set(seen))
    assert set(seen) == {(which, number) for which, one in enumerate(keys) for number in one}
    for group in groups:
        outer = keys[group[0][0]][group[0][1]]
        assert group[0][2] == 0
        for which, number, first in group:
            inner = keys[which][number]
            assert outer[first : first + len(inner)] == inner


@given(st.integers(1, 40), st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=2, max_size=4))
def test_sets_of_powers_of_two_need_each_row_once(rows, steps):
    sets = [shards(rows, step) for step in steps]
    groups = nest_shards(sets)
    read = [key for group in groups for key in sets[group[0][0]][group[0][1]].keys]
    assert read == [f"k{row}" for row in range(rows)]
