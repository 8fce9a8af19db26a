"""Elsewhere one HDF5 handle, shared by workers, gave wrong rows or could not be sent to them."""

import itertools
import multiprocessing
import pickle

import numpy as np
import pytest
from cache import building as build
from field import row_numbers

from featcache.cache.feature_set import FeatureSet

ROWS = 64


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A set whose every value is the number of its row."""
    spec = build.make_spec()
    content = build.make_content(spec, ROWS)
    content.tokens = [np.full((3, spec.dim), row, np.float32) for row in range(ROWS)]
    folder = tmp_path_factory.mktemp("set")
    build.write_set(folder / "set", spec, content)
    return FeatureSet.open(folder / "set")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "workers"), [*itertools.product(["fork", "spawn", "forkserver"], [1, 4])]
)
def test_every_start_method_gives_the_rows_asked_for(features, method, workers):
    rows = np.random.default_rng(workers).permutation(ROWS)
    assert features.read_tokens(rows)[:, 0, 0].astype(int).tolist() == rows.tolist()  # touched
    context = multiprocessing.get_context(method)
    with context.Pool(workers, row_numbers.start, (features,)) as pool:
        answers = pool.map(row_numbers.read, rows.reshape(-1, 4).tolist(), chunksize=1)
    assert [row for found, _ in answers for row in found] == rows.tolist()
    if method == "spawn":
        assert not any(torch for _, torch in answers)  # it would cost each worker seconds


def test_a_touched_set_is_small_when_pickled(features):
    """What it has mapped and read stays at home."""
    fresh = len(pickle.dumps(FeatureSet.open(features.folder)))
    features.read_tokens(np.arange(ROWS), verify=True)
    pickled = pickle.dumps(features)
    assert len(pickled) == fresh
    copy = pickle.loads(pickled)
    assert copy.keys == features.keys
    assert (copy.read_tokens(np.arange(ROWS)) == features.read_tokens(np.arange(ROWS))).all()
