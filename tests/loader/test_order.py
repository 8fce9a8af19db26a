"""The order of pairs, without any file."""

import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UsageError
from featcache.loader.order import Order, permute

SIZES = st.integers(1, 200)
SEEDS = st.integers(0, 2**64 - 1)


@st.composite
def orders(draw, world_size=1, *, by_length=True):
    share = draw(st.integers(1, 12))
    num_pairs = draw(st.integers(share * world_size, 200))
    block = draw(st.none() | st.integers(1, 30))
    window = draw(st.none() | st.integers(1, 9)) if by_length else None
    lengths = np.random.default_rng(num_pairs).integers(1, draw(st.integers(2, 40)), num_pairs)
    return Order(
        num_pairs,
        share * world_size,
        seed=draw(SEEDS),
        locality_block=block,
        length_window=window,
        lengths=lengths,
    )


@given(SIZES, SEEDS, st.integers(0, 50), st.none() | st.integers(1, 40))
def test_a_permutation_holds_every_pair_once(num_pairs, seed, epoch, block):
    order = permute(num_pairs, seed=seed, epoch=epoch, locality_block=block)
    assert sorted(order.tolist()) == list(range(num_pairs))


def test_seed_and_epoch_both_change_the_order():
    drawn = {
        (seed, epoch): permute(100, seed=seed, epoch=epoch).tobytes()
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(drawn.values())) == 16


def test_the_order_is_pinned_for_all_times():
    assert permute(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permute(10, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert permute(8, seed=1, epoch=0, locality_block=2).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_the_order_by_length_is_pinned_for_all_times():
    lengths = np.array([5, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    order = Order(10, 3, seed=7, length_window=2, lengths=lengths)
    assert order.permutation(0).tolist() == [8, 4, 2, 1, 6, 3, 7, 5, 9, 0]
    assert order.permutation(1).tolist() == [3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


def test_places_are_uniform():
    counts = np.zeros((8, 8), dtype=np.int64)  # pair, place
    for epoch in range(4_000):
        counts[permute(8, seed=1, epoch=epoch), np.arange(8)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


@given(orders(), st.integers(1, 5))
def test_every_pair_comes_once_per_permutation_and_no_batch_is_short(order, permutations):
    seen = []
    position = 0
    while position < permutations * order.num_pairs:
        batch = order.pairs_at(position)
        assert len(batch) == order.global_batch
        seen.extend(batch.tolist())
        position += order.global_batch
    for number in range(permutations):
        part = seen[number * order.num_pairs : (number + 1) * order.num_pairs]
        assert sorted(part) == list(range(order.num_pairs))
    counts = Counter(seen)
    assert max(counts.values()) - min(counts.values()) <= 1


@given(orders(world_size=6), st.sampled_from([2, 3, 6]), st.integers(0, 40), st.booleans())
def test_the_shares_of_all_ranks_make_the_global_batch(order, ranks, step, shuffle):
    whole = replace(order, shuffle=shuffle)
    shares = [replace(whole, world_size=ranks, rank=rank).batch(step) for rank in range(ranks)]
    np.testing.assert_array_equal(np.concatenate(shares), whole.batch(step))


@given(orders(world_size=6), st.sampled_from([1, 2, 3, 6]), st.data())
def test_resuming_at_a_position_equals_the_undisturbed_run(order, ranks, data):
    steps = 3 * order.steps_per_epoch + 2
    undisturbed = [order.batch(step).tolist() for step in range(steps)]
    at = data.draw(st.integers(0, steps - 1))
    others = [
        pickle.loads(pickle.dumps(replace(order, world_size=ranks, rank=rank)))
        for rank in range(ranks)
    ]
    resumed = [
        [pair for other in others for pair in other.batch(step).tolist()]
        for step in range(at, steps)
    ]
    assert resumed == undisturbed[at:]


@given(orders(by_length=False), st.integers(0, 500), st.integers(1, 12))
def test_the_row_of_pairs_does_not_depend_on_the_batch_size(order, position, other):
    other = min(other, order.num_pairs)
    wide = Order(order.num_pairs, other, order.seed, locality_block=order.locality_block)
    common = min(other, order.global_batch)
    a, b = order.pairs_at(position)[:common], wide.pairs_at(position)[:common]
    np.testing.assert_array_equal(a, b)


@given(SIZES, st.integers(1, 20), st.sampled_from([1, 2, 4]))
def test_an_evaluation_takes_every_pair_once_over_all_ranks(num_pairs, share, ranks):
    orders = [
        Order(num_pairs, share * ranks, world_size=ranks, rank=rank, shuffle=False)
        for rank in range(ranks)
    ]
    steps = orders[0].steps_per_epoch
    seen = [pair for step in range(steps) for order in orders for pair in order.batch(step)]
    assert seen == list(range(num_pairs))
    assert all(order.batch(steps).size == 0 for order in orders)


def test_leftover_pairs_open_the_next_epoch():
    order = Order(10, 4, seed=3)
    first, second = order.permutation(0).copy(), order.permutation(1).copy()
    assert order.steps_per_epoch == 2
    np.testing.assert_array_equal(order.batch(2), np.concatenate([first[8:], second[:2]]))


def test_locality_reads_runs_of_neighbours():
    far = np.abs(np.diff(permute(100_000, seed=0, epoch=0))).mean()
    window = permute(100_000, seed=0, epoch=0, locality_block=64)
    # 16 blocks of 64 at a time: 1,024 pairs of which each block is complete
    opening = np.unique(window[: 16 * 64] // 64)
    assert len(opening) <= 17
    assert far > 30_000
    assert np.abs(np.diff(window[:1024])).max() > 0


def padding(order, steps):
    """Share of the text tokens of some batches that is padding."""
    lengths = [order.lengths[order.batch(step)] for step in range(steps)]
    real, padded = sum(one.sum() for one in lengths), sum(one.max() * len(one) for one in lengths)
    return 1 - real / padded


@pytest.fixture(scope="module")
def report_lengths():
    """20,000 lengths as reports have them: mean 75, the longest 5 % above 150."""
    drawn = np.random.default_rng(0).lognormal(4.2, 0.5, 20_000)
    return np.clip(drawn.astype(np.int64), 4, 512)


def test_a_length_window_spares_most_of_the_padding(report_lengths):
    plain = Order(20_000, 256, seed=1, lengths=report_lengths)
    grouped = replace(plain, length_window=16)
    assert padding(plain, 150) == pytest.approx(0.72, abs=0.02)
    assert padding(grouped, 150) < 0.25


def test_a_length_window_leaves_no_trend_over_steps_ranks_and_pairs(report_lengths):
    order = Order(20_000, 256, seed=1, length_window=16, lengths=report_lengths)
    means = [report_lengths[order.batch(step)].mean() for step in range(64)]
    assert abs(np.corrcoef(means, np.arange(64) % 16)[0, 1]) < 0.4  # sorted: above 0.8
    halves = [replace(order, world_size=2, rank=rank) for rank in range(2)]
    sums = [sum(report_lengths[half.batch(step)].sum() for step in range(64)) for half in halves]
    assert sums[0] == pytest.approx(sums[1], rel=0.02)


def test_a_length_window_mixes_no_pairs_of_other_windows():
    lengths = np.random.default_rng(0).integers(1, 50, 96)
    plain = Order(96, 8, seed=2, lengths=lengths)
    grouped = replace(plain, length_window=4)
    for start in range(0, 96, 32):
        here = slice(start, start + 32)
        assert set(plain.permutation(0)[here]) == set(grouped.permutation(0)[here])
    shortest = sorted(lengths[grouped.batch(step)].max() for step in range(4))[0]
    assert shortest == np.sort(lengths[plain.permutation(0)[:32]])[7]


def test_a_batch_of_two_permutations_is_left_as_it_is_by_a_length_window():
    lengths = np.random.default_rng(0).integers(1, 50, 50)
    plain = Order(50, 8, seed=2, lengths=lengths)
    grouped = replace(plain, length_window=3)
    for step in (6, 12, 18):  # 48 to 56 holds 50, 96 to 104 holds 100, 144 to 152 holds 150
        np.testing.assert_array_equal(plain.batch(step), grouped.batch(step))


def test_memory_is_one_permutation():
    order = Order(200_000, 64, seed=5)
    tracemalloc.start()
    for step in range(0, 20 * order.steps_per_epoch, order.steps_per_epoch // 2):
        order.batch(step)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = 200_000 * 8
    assert held < 1.1 * one
    assert peak < 4.5 * one  # random words, their order, and the permutation being replaced


def test_a_pickled_order_leaves_its_permutation_behind():
    order = Order(100_000, 10)
    order.batch(0)
    assert len(pickle.dumps(order)) < 1_000


def test_a_handed_out_batch_is_the_callers_own():
    order = Order(12, 4)
    batch = order.batch(0)
    expected = batch.copy()
    batch[:] = -1
    np.testing.assert_array_equal(order.batch(0), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": 0}, "`num_pairs` is 0, it must be at least 1"),
        ({"global_batch": 0}, "`global_batch` is 0"),
        ({"world_size": 3}, r"the global batch of 8 pairs cannot be shared equally by 3 ranks"),
        ({"world_size": 2, "rank": 2}, "rank 2 is outside the 2 ranks"),
        ({"num_pairs": 7}, r"the global batch of 8 is larger than all 7 pairs"),
        ({"seed": -1}, "the seed -1 is outside"),
        ({"locality_block": 0}, "`locality_block` is 0"),
        ({"length_window": 0}, "`length_window` is 0"),
        ({"length_window": 2}, "needs the length of each of 100 texts, 0 were given"),
    ],
)
def test_impossible_orders_are_refused_in_words(arguments, message):
    values = {"num_pairs": 100, "global_batch": 8, **arguments}
    with pytest.raises(UsageError, match=message):
        Order(**values)


@settings(max_examples=20)
@given(st.integers(1, 7))
def test_a_refused_share_offers_a_batch_size_that_works(ranks):
    with pytest.raises(UsageError) as caught:
        Order(100, 7 * (ranks + 1) + 1 if ranks + 1 != 1 else 1, world_size=ranks + 1)
    offered = int(caught.value.fix.rsplit(" ", 1)[1])
    Order(100, offered, world_size=ranks + 1)
