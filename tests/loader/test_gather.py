"""Batches: their content, their order, passes and resume."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError, ConfigError, StaleFeatureSetError, UsageError
from featcache.loader.gather import Batch, TokenLoader, iterate_rows
from featcache.loader.order import Order


def plain(features, row):
    """A row the plain way, in the loader's dtype."""
    tokens = features.read_tokens(np.array([row]))
    tokens = tokens.reshape(-1, tokens.shape[-1])
    return tokens.astype(np.float32 if features.spec.dtype == "float32" else np.float16)


def pairs_of(batches):
    return [batch.pairs.tolist() for batch in batches]


def copies(batches):
    """Batches that outlive their buffers."""
    return [
        Batch(**{name: value.clone() for name, value in vars(batch).items()}) for batch in batches
    ]


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_batch_holds_the_tokens_of_its_pairs(make_cache, dtype, io):
    cache = make_cache(dtype).cache
    seen = 0
    for batch in TokenLoader(cache, 8, io=io, seed=3):
        assert batch.image_tokens.dtype == batch.text_tokens.dtype
        assert batch.text_tokens.shape[1] == cache.texts.lengths[batch.text_rows.numpy()].max()
        for place, pair in enumerate(batch.pairs.tolist()):
            image_row, text_row = cache.image_rows[pair], cache.text_rows[pair]
            assert (batch.image_rows[place], batch.text_rows[place]) == (image_row, text_row)
            image, text = plain(cache.images, image_row), plain(cache.texts, text_row)
            np.testing.assert_array_equal(batch.image_tokens[place].numpy(), image)
            length = len(text)
            np.testing.assert_array_equal(batch.text_tokens[place, :length].numpy(), text)
            assert not batch.text_tokens[place, length:].any()
            assert batch.text_valid[place].tolist() == [
                n < length for n in range(batch.text_tokens.shape[1])
            ]
            seen += 1
    assert seen == 40


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_the_order_depends_on_no_thread_and_no_prefetch(made, threads, prefetch):
    loader = TokenLoader(made.cache, 6, seed=9, threads=threads, prefetch=prefetch)
    order = Order(made.cache.num_pairs, 6, seed=9)
    got = [pair for _ in range(3) for pair in pairs_of(loader)]
    assert got == [order.batch(step).tolist() for step in range(18)]


def test_leftover_pairs_open_the_next_pass(made):
    loader = TokenLoader(made.cache, 12)
    assert len(loader) == 3  # 41 pairs
    seen = [pair for _ in range(41) for pairs in pairs_of(loader) for pair in pairs]
    assert len(seen) == 41 * 36
    assert np.bincount(seen).tolist() == [36] * 41


def test_a_trainer_that_never_asks_beyond_the_length_gets_a_full_next_pass(made):
    loader = TokenLoader(made.cache, 12)
    order = Order(made.cache.num_pairs, 12)
    for epoch in range(3):
        iterator = iter(loader)
        got = [next(iterator).pairs.tolist() for _ in range(len(loader))]
        assert got == [order.batch(3 * epoch + step).tolist() for step in range(3)]


def test_an_evaluation_starts_anew_and_has_a_short_last_batch(made):
    loader = TokenLoader(made.cache, 12, shuffle=False)
    assert len(loader) == 4
    next(iter(loader))
    for _ in range(2):
        assert [pair for pairs in pairs_of(loader) for pair in pairs] == list(range(41))


def test_ranks_share_the_global_batch(made):
    whole = pairs_of(TokenLoader(made.cache, 12, seed=1))
    ranks = [TokenLoader(made.cache, 12, seed=1, rank=rank, world_size=3) for rank in range(3)]
    shares = zip(*(pairs_of(loader) for loader in ranks), strict=True)
    assert [list(chain(*share)) for share in shares] == whole


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("stop", range(1, 8))
def test_resume_equals_the_undisturbed_run(made, shuffle, stop):
    def loader(**options):
        return TokenLoader(made.cache, 12, seed=4, shuffle=shuffle, **options)

    undisturbed = loader()
    whole = [copies(undisturbed) for _ in range(3)]
    interrupted = loader(prefetch=4)
    done = 0
    while done < stop:
        for _ in interrupted:
            done += 1
            if done == stop:
                state = json.loads(json.dumps(interrupted.state_dict()))
                break
    resumed = loader(threads=3, io="pread")
    resumed.load_state_dict(state)
    passes, step = divmod(stop, len(undisturbed))
    rest = [copies(resumed)]
    assert len(rest[0]) == len(undisturbed) - step
    rest += [copies(resumed) for _ in range(2 - passes)]
    expected = [batch for one in whole for batch in one][stop:]
    got = [batch for one in rest for batch in one]
    for have, want in zip(got, expected, strict=True):
        for name in vars(want):
            assert torch.equal(getattr(have, name), getattr(want, name)), name


def test_the_state_counts_what_was_handed_out(made):
    loader = TokenLoader(made.cache, 12, prefetch=3)
    assert loader.state_dict() == {
        "seed": 0,
        "epoch": 0,
        "position": 0,
        "in_pass": 0,
        "num_pairs": 41,
        "fingerprint": "ab" * 16,
    }
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert (loader.state_dict()["position"], loader.state_dict()["in_pass"]) == (24, 24)
    list(iterator)
    next(iter(loader))
    state = loader.state_dict()
    assert (state["epoch"], state["position"], state["in_pass"]) == (1, 48 - 41, 12)


def test_asking_twice_for_an_iterator_loses_no_batch(made):
    loader = TokenLoader(made.cache, 12, seed=2)
    first = pairs_of(TokenLoader(made.cache, 12, seed=2))
    next(iter(loader))
    resumed = TokenLoader(made.cache, 12, seed=2)
    resumed.load_state_dict(loader.state_dict())
    iter(resumed)
    assert pairs_of(iter(resumed)) == first[1:]


def test_a_pass_that_was_left_early_is_not_gone_on_with(made):
    loader = TokenLoader(made.cache, 12, seed=2)
    order = Order(made.cache.num_pairs, 12, seed=2)
    for _ in loader:
        break
    assert pairs_of(loader) == [order.batch(step).tolist() for step in (1, 2, 3)]


def test_resuming_with_another_batch_size_keeps_the_order(made):
    loader = TokenLoader(made.cache, 12, seed=2)
    iterator = iter(loader)
    next(iterator), next(iterator)
    other = TokenLoader(made.cache, 5, seed=2)
    other.load_state_dict(loader.state_dict())
    rest = pairs_of(other)
    order = Order(made.cache.num_pairs, 5, seed=2)
    assert rest == [order.pairs_at(24 + 5 * n).tolist() for n in range(3)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fingerprint": "cd" * 16}, StaleFeatureSetError, "the cache cdcdcd.*other features"),
        ({"seed": 8}, UsageError, "taken with seed 8, this loader has 0"),
        ({"epoch": None}, UsageError, "no state of a loader: it has no `epoch`"),
    ],
)
def test_a_foreign_state_is_refused(made, change, error, message):
    loader = TokenLoader(made.cache, 12)
    state = {**loader.state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(error, match=message):
        loader.load_state_dict(state)


def test_a_length_window_fills_batches_by_the_texts_of_the_pairs(made):
    lengths = made.cache.texts.lengths[made.cache.text_rows]
    loader = TokenLoader(made.cache, 4, seed=2, length_window=5)
    order = Order(41, 4, seed=2, length_window=5, lengths=lengths)
    plain = TokenLoader(made.cache, 4, seed=2)
    assert pairs_of(loader) == [order.batch(step).tolist() for step in range(10)]
    widths = [sum(b.text_tokens.shape[1] for b in one) for one in (copies(loader), copies(plain))]
    assert widths[0] < 0.85 * widths[1]
    for batch in loader:
        assert batch.text_tokens.shape[1] == lengths[batch.pairs].max()


def test_a_length_window_resumes_exactly_and_only_with_the_same_one(made):
    def loader(size=12, **options):
        return TokenLoader(made.cache, size, seed=4, **options)

    windowed = loader(length_window=2)
    whole = [pairs for _ in range(3) for pairs in pairs_of(windowed)]
    stopped = loader(length_window=2, prefetch=3)
    list(stopped)
    next(iter(stopped))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["order"] == "by text length over 2 batches of 12 pairs"
    shares = []
    for rank in range(2):
        resumed = loader(length_window=2, rank=rank, world_size=2, threads=1)
        resumed.load_state_dict(state)
        shares.append([pairs for _ in range(2) for pairs in pairs_of(resumed)])
    assert [a + b for a, b in zip(*shares, strict=True)] == whole[4:]
    others = (loader(), loader(6, length_window=2), loader(length_window=3))
    for other in (*others, loader(length_window=2, locality_block=8)):
        with pytest.raises(UsageError, match="in the order: by text length over 2 batches"):
            other.load_state_dict(state)
    with pytest.raises(UsageError, match="order: plain shuffle; this loader has: blocks of 8"):
        loader(locality_block=8).load_state_dict(loader().state_dict())


def test_a_data_loader_around_it_is_refused_with_a_way_out(made):
    loader = TokenLoader(made.cache, 12)
    for options in ({}, {"batch_size": None}, {"batch_size": 4, "shuffle": True}):
        with pytest.raises(UsageError, match="is a data loader itself") as caught:
            next(iter(torch.utils.data.DataLoader(loader, **options)))
        assert "without a DataLoader" in caught.value.fix


def test_a_pickled_loader_goes_on_where_it_was(made):
    loader = TokenLoader(made.cache, 12, seed=6)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    assert copy._opened is None  # buffers and files stay behind
    list(iterator)
    order = Order(made.cache.num_pairs, 12, seed=6)
    assert pairs_of(copy) == [order.batch(step).tolist() for step in (1, 2, 3)]


def test_another_process_reads_the_same_batches(made, tmp_path):
    loader = TokenLoader(made.cache, 12, seed=6)
    next(iter(loader))  # touched before: files are open here
    (tmp_path / "loader").write_bytes(pickle.dumps(loader))
    code = (
        "import pickle, sys\n"
        "loader = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for batch in loader: print(batch.pairs.tolist(), batch.image_tokens.float().sum().item())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "loader")],
        capture_output=True,
        text=True,
        check=True,
    )
    here = [f"{b.pairs.tolist()} {b.image_tokens.float().sum().item()}" for b in loader]
    assert out.stdout.splitlines() == here


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"thread": 2}, ConfigError, "`thread`: unknown key; did you mean `threads`"),
        ({"threads": 0}, ConfigError, "`threads`: input should be greater than or equal to 1"),
        ({"io": "h5py"}, ConfigError, "`io`: "),
        ({"tokens": "some"}, ConfigError, "`tokens`: "),
        ({"batch_size": 42}, UsageError, "batch of 42 is larger than all 41 pairs"),
        ({"world_size": 5}, UsageError, "cannot be shared equally by 5 ranks"),
    ],
)
def test_impossible_options_are_refused_at_once(made, options, error, message):
    with pytest.raises(error, match=message):
        TokenLoader(made.cache, **{"batch_size": 12, **options})


def test_a_ragged_image_set_is_refused(made):
    cache = replace(made.cache, images=made.cache.texts)
    with pytest.raises(UsageError, match="must have equally many tokens"):
        TokenLoader(cache, 4)


def test_a_batch_moves_and_turns_its_tokens_into_a_dtype(made):
    batch = next(iter(TokenLoader(made.cache, 4)))
    moved = batch.to("cpu", torch.float32)
    assert (moved.image_tokens.dtype, moved.text_tokens.dtype) == (torch.float32, torch.float32)
    assert (moved.text_valid.dtype, moved.pairs.dtype) == (torch.bool, torch.int64)
    assert torch.equal(moved.image_tokens, batch.image_tokens.float())
    assert len(moved) == 4
    assert batch.to("cpu").image_tokens.data_ptr() == batch.image_tokens.data_ptr()


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_rows_of_one_set_come_in_the_order_given(made, io):
    for features, has_mask in ((made.cache.images, False), (made.cache.texts, True)):
        rows = np.array([3, 0, 16, 3, 9, 12, 1])
        seen = []
        for some, tokens, valid in iterate_rows(features, rows, 3, io=io):
            seen += some.tolist()
            assert (valid is not None) == has_mask
            for place, row in enumerate(some.tolist()):
                want = plain(features, row)
                real = tokens[place] if valid is None else tokens[place][valid[place]]
                np.testing.assert_array_equal(real.numpy(), want)
        assert seen == rows.tolist()


@pytest.mark.parametrize(
    "option", [{"locality_block": 4}, {"length_window": 2}, {"resident": "cpu"}]
)
def test_rows_in_the_order_given_take_no_option_of_training(made, option):
    with pytest.raises(UsageError, match=f"`{next(iter(option))}` has no effect on rows"):
        iterate_rows(made.cache.images, np.array([0]), 1, **option)


def test_no_rows_give_no_batches(made):
    assert list(iterate_rows(made.cache.images, np.zeros(0, dtype=np.int64), 4)) == []


def test_rows_outside_the_set_and_quarantined_ones_are_refused(build, made, tmp_path):
    with pytest.raises(CacheError, match="rows 0 to 23 were asked for, the set has 23"):
        list(iterate_rows(made.cache.images, np.array([0, 23]), 2))
    with pytest.raises(CacheError, match="rows -1 to 0"):
        list(iterate_rows(made.cache.images, np.array([0, -1]), 2))
    with pytest.raises(UsageError, match="`batch_size` is 0"):
        iterate_rows(made.cache.images, np.array([0]), 0)
    spec = build.make_spec()
    build.write_set(tmp_path, spec, build.make_content(spec, 6, failed=[4]))
    features = FeatureSet.open(tmp_path)
    assert len(list(iterate_rows(features, np.flatnonzero(features.valid), 2))) == 3
    with pytest.raises(CacheError, match=r"1 of these rows .* row 4, key key-4"):
        list(iterate_rows(features, np.arange(6), 6))
