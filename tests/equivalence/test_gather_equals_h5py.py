"""Batches of the loader hold exactly what any HDF5 reader finds in the shards."""

import tempfile
from pathlib import Path

import h5py
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.cache.reader import FeatureSet
from featcache.loader.gather import iterate_rows


def read_with_h5py(features):
    """Every row's tokens in float32 where they are int8, else as stored."""
    rows = []
    for path in sorted(features.folder.glob("*.h5")):
        with h5py.File(path, "r", locking=False) as file:
            tokens = file["tokens"][...]
            if tokens.dtype == np.int8:
                tokens = tokens.astype(np.float32)
                tokens *= file["scale_token"][...].astype(np.float32)[..., None]
                tokens *= file["scale_channel"][...]
            if "offsets" in file:
                rows += np.split(tokens, file["offsets"][1:-1])
            else:
                rows += list(tokens)
    return rows


BUDGETS = {
    "all": slice(None),
    "prefix": slice(0, 2),
    "grid": slice(2, None),
    "pooled": slice(None),
    "random:4": slice(None),
}
"""Which of 2 prefix tokens and 2 x 2 patches each budget keeps."""


def read_pooled_with_h5py(features):
    rows = []
    for path in sorted(features.folder.glob("*.h5")):
        with h5py.File(path, "r", locking=False) as file:
            rows += list(file["pooled"][...][:, None])
    return rows


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_budgets_equal_slices_of_what_h5py_reads(build, data):
    draw = data.draw
    modality = draw(st.sampled_from(["image", "text"]))
    budget = draw(st.sampled_from(sorted(BUDGETS) if modality == "image" else ["all", "pooled"]))
    limit = draw(st.none() | st.integers(1, 12))
    shape = {"num_tokens": 6, "num_prefix_tokens": 2, "grid": (2, 2)} if modality == "image" else {}
    dtype = draw(st.sampled_from(["float16", "float32", "int8"]))
    spec = build.make_spec(
        modality, dtype=dtype, dim=draw(st.integers(1, 9)), pooled_dim=3, **shape
    )
    num_rows = draw(st.integers(1, 12))
    content = build.make_content(spec, num_rows, seed=draw(st.integers(0, 99)))
    rows = np.array(draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20)))
    options = {
        "io": draw(st.sampled_from(["mmap", "pread"])),
        "tokens": budget,
        "text_tokens": limit,
    }
    with tempfile.TemporaryDirectory() as folder:
        build.write_set(Path(folder), spec, content, rows_per_shard=draw(st.integers(1, 12)))
        features = FeatureSet.open(Path(folder))
        whole = read_pooled_with_h5py(features) if budget == "pooled" else read_with_h5py(features)
        if modality == "text" and budget == "all":
            whole = [row[:limit] for row in whole]
        seen = []
        for some, tokens, valid in iterate_rows(features, rows, draw(st.integers(1, 8)), **options):
            for place, row in enumerate(some.tolist()):
                got = tokens[place].numpy()
                real = got if valid is None else got[valid[place].numpy()]
                want = whole[row][BUDGETS[budget]].astype(got.dtype)
                np.testing.assert_array_equal(real, want)
                assert not got[len(real) :].any()
            seen += some.tolist()
    assert seen == rows.tolist()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_gathered_rows_equal_those_that_h5py_reads(build, data):
    draw = data.draw
    modality = draw(st.sampled_from(["image", "text"]))
    spec = build.make_spec(
        modality,
        dtype=draw(st.sampled_from(["float16", "float32", "int8"])),
        dim=draw(st.integers(1, 9)),
    )
    num_rows = draw(st.integers(1, 12))
    content = build.make_content(spec, num_rows, seed=draw(st.integers(0, 99)))
    rows = np.array(draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20)))
    options = {
        "io": draw(st.sampled_from(["mmap", "pread"])),
        "threads": draw(st.integers(1, 3)),
        "prefetch": draw(st.integers(0, 3)),
    }
    with tempfile.TemporaryDirectory() as folder:
        build.write_set(Path(folder), spec, content, rows_per_shard=draw(st.integers(1, 12)))
        features = FeatureSet.open(Path(folder))
        expected = read_with_h5py(features)
        seen = []
        for some, tokens, valid in iterate_rows(features, rows, draw(st.integers(1, 8)), **options):
            for place, row in enumerate(some.tolist()):
                got = tokens[place].numpy()
                real = got if valid is None else got[valid[place].numpy()]
                np.testing.assert_array_equal(real, expected[row].astype(got.dtype))
                assert not got[len(real) :].any()
            seen += some.tolist()
    assert seen == rows.tolist()
