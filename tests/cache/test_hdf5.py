import json
import sys
import threading

import h5py
import numpy as np
import pytest

from featcache.cache import hdf5
from featcache.cache.libhdf5 import ask_libhdf5
from featcache.cache.shard import Shard


@pytest.fixture
def path(build, tmp_path):
    spec = build.make_spec(pooled_dim=2)
    content = build.make_content(spec, 4)
    return build.write_set(tmp_path / "set", spec, content).folder / "shard-000000.h5"


def test_attribute_repeats_the_header(path):
    block = path.read_bytes()[:8192]
    with h5py.File(path, "r") as file:
        text = bytes(file.attrs["featcache"])
    assert block[16:].startswith(text)
    values = json.loads(text)
    assert values["file_size"] == path.stat().st_size
    assert list(values) == sorted(values)


def test_skeleton_does_not_depend_on_the_text(tmp_path):
    shapes = {"tokens": ((2, 3), "float16"), "keys": ((2,), "S3")}
    files = []
    for text in (b"{}", b"x" * 2048):
        found, places = hdf5.write_skeleton(tmp_path / "a", shapes, lambda *_, text=text: text)
        assert found == text
        files.append((len((tmp_path / "a").read_bytes()), places))
    assert files[0] == files[1]


def test_array_without_bytes_has_the_first_place(build, tmp_path):
    spec = build.make_spec("text")
    content = build.make_content(spec, 2)
    content.tokens = [np.zeros((0, 4), np.float32)] * 2
    folder = build.write_set(tmp_path / "set", spec, content).folder
    shard = Shard.open(folder / "shard-000000.h5")
    assert shard.header.places["tokens"].offset == 8192
    assert list(shard.damage()) == []
    assert list(ask_libhdf5([shard.path], deep=True)) == []


def test_a_profiler_that_holds_frames_does_not_keep_the_file_open(tmp_path):
    """Dask samples the frames of its workers' threads, and with them our open arrays."""
    stop, held = threading.Event(), []
    mine = threading.get_ident()

    def sample():
        while not stop.is_set():
            held[:] = [*held[-20:], sys._current_frames()[mine]]

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        shapes = {"tokens": ((4, 3, 2), "float16"), "valid": ((4,), "bool")}
        for _ in range(200):
            hdf5.write_skeleton(tmp_path / "shard.h5", shapes, lambda size, places: b"{}")
    finally:
        stop.set()
        sampler.join()
