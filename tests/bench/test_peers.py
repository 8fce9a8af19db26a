"""Rivals read what was written for them, and one that is not installed is named."""

from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from featcache.bench.batch_peers import BATCH_PEERS
from featcache.bench.case import Setting
from featcache.bench.groups import peers
from featcache.bench.groups.peers import COPY, OURS, gather_vs_batch_peers, gather_vs_peers
from featcache.bench.sample_peers import SAMPLE_PEERS
from featcache.bench.sets import check_pass, make_cache, row_numbers
from featcache.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore")  # rivals warn of what they do themselves
NEVER = ("a_package_that_nobody_has",)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), 32, shape=(3, 8)).images


def installed(all_peers):
    return [
        pytest.param(
            peer,
            id=peer.name,
            marks=pytest.mark.skipif(bool(peer.missing()), reason="not installed"),
        )
        for peer in all_peers
    ]


@pytest.mark.parametrize("peer", installed(SAMPLE_PEERS))
def test_a_sample_loader_delivers_every_row_once_in_another_order_each_time(
    peer, features, tmp_path
):
    peer.write(tmp_path, features)
    loader = peer.load(tmp_path, 8, 0)
    orders = []
    for _ in range(2):
        batches = [peer.pick(batch).numpy() for batch in loader]
        check_pass(peer.name, features, batches)
        orders.append(np.concatenate([row_numbers(one) for one in batches]).tolist())
    assert sorted(orders[0]) == list(range(32))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("peer", installed(BATCH_PEERS))
def test_a_batch_gatherer_gives_the_rows_asked_for_in_their_order(peer, features, tmp_path):
    peer.write(tmp_path, features)
    gather = peer.open(tmp_path, 8)
    for rows in (np.array([31, 0, 7]), np.array([5, 5])):
        found = np.asarray(gather(rows)).reshape(len(rows), 3, 8)
        assert np.array_equal(found, features.read_tokens(rows))


def only(monkeypatch, name, *names):
    """Of the rivals only these, and one that is not installed."""
    known = [peer for peer in getattr(peers, name) if peer.name in names]
    absent = replace(known[0], name="absent", packages=NEVER)
    monkeypatch.setattr(peers, name, (*known, absent))


@pytest.mark.parametrize(
    ("measure", "name", "rivals"),
    [(gather_vs_peers, "SAMPLE_PEERS", ("h5py", "npy memmap")),
     (gather_vs_batch_peers, "BATCH_PEERS", ("index_select on npy", "npy fancy index"))],
)  # fmt: skip
def test_the_best_rival_counts_and_a_missing_one_is_named(
    measure, name, rivals, tmp_path, monkeypatch
):
    only(monkeypatch, name, *rivals)
    monkeypatch.setattr(peers, "cores", lambda: 1)
    measured = measure(Setting(tmp_path, 2, quick=True, quiet=True))
    detail, once = measured.detail, measured.detail["ran_once"]
    assert set(detail["ratio_to_each"]) == set(rivals)
    assert {OURS, COPY, *rivals} == {*detail["seconds_per_pass"], *once}
    assert detail["missing"] == ["absent"]
    # One that was much slower at first runs once; noise may turn the order of two ratios.
    medians = {one: median(detail["seconds_per_pass"][one]) for one in rivals if one not in once}
    assert medians[detail["best_peer"]] == min(medians.values())
    assert len(measured.runs) == 2


def test_a_rival_that_gives_other_rows_than_asked_for_is_refused(tmp_path):
    ours = peers._Ours(Setting(tmp_path, 1, quick=True, quiet=True), 32)
    with pytest.raises(CacheError, match="`index_select on npy` delivers other rows"):
        peers._check_gather(
            ours, BATCH_PEERS[0], lambda rows: ours.cache.images.read_tokens(rows[::-1])
        )
