import gc
import mmap
import os
import resource

import numpy as np
import pytest

from featcache.cache.mapping import AddressRange, map_range, populate
from featcache.errors import ShardError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.arange(100_000, dtype=np.uint8).tobytes())
    return path


def open_map(path, offset, size):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_range(descriptor, offset, size, path)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("offset", "size"), [(0, 100_000), (1, 10), (4095, 2), (50_001, 49_999)])
def test_map_shows_the_files_bytes(file, offset, size):
    assert open_map(file, offset, size).tobytes() == file.read_bytes()[offset : offset + size]


def test_map_cannot_be_written(file):
    mapped = open_map(file, 0, 10)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        mapped.flags.writeable = True


def test_map_of_nothing_is_empty(file):
    assert open_map(file, 0, 0).size == 0
    assert populate(open_map(file, 0, 0))


def maps_of(path):
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        return sum(str(path) in line for line in maps)


def test_maps_keep_no_descriptor_and_end_with_their_array(file, open_files):
    maps = [open_map(file, 0, 5000)[10:] for _ in range(20)]
    assert open_files(file) == 0
    assert maps_of(file) == 20
    view = maps[3][100:].view(np.int8)
    del maps
    gc.collect()
    assert maps_of(file) == 1
    assert view[0] == 110
    del view
    gc.collect()
    assert maps_of(file) == 0


def test_map_outlives_its_file(file):
    mapped = open_map(file, 8192, 3)
    file.unlink()
    assert mapped.tolist() == [0, 1, 2]


def test_populate_reads_ahead_or_says_no(file):
    mapped = open_map(file, 5000, 50_000)
    assert populate(mapped) in (True, False)
    assert mapped[0] == 5000 % 256


def test_refused_map_is_explained(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        pages = int(statm.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        with pytest.raises(ShardError, match="refuses to map"):
            open_map(file, 0, 2**32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_files_and_zeros_lie_where_they_are_put_in_a_range(file, tmp_path):
    page = mmap.PAGESIZE
    reserved = AddressRange(8 * page, tmp_path)
    descriptor = os.open(file, os.O_RDONLY)
    reserved.map(2 * page + 7, descriptor, page + 7, page, file)
    reserved.map(5 * page, descriptor, 100, 0, file)  # nothing is nowhere
    reserved.zero(6 * page + 9, 100, tmp_path)
    os.close(descriptor)
    got = reserved.content[2 * page + 7 : 3 * page + 7]
    assert got.tobytes() == file.read_bytes()[page + 7 : 2 * page + 7]
    assert not reserved.content[6 * page + 9 : 6 * page + 109].any()
    assert maps_of(file) == 1
    with pytest.raises(ValueError, match="read-only"):
        reserved.content[2 * page + 7] = 1
    del reserved
    gc.collect()
    assert got[0] == (page + 7) % 256
    del got
    gc.collect()
    assert maps_of(file) == 0
