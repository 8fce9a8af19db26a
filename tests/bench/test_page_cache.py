"""What is said to be read from the disk is not in memory."""

import os
from pathlib import Path

import pytest

from featcache.bench.page_cache import cached_share, drop_from_cache
from featcache.errors import FeatcacheError

MEMORY = Path("/dev/shm")


def write(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("one", "two")]
    for path in paths:
        path.write_bytes(os.urandom(2**20 + 1))
    return paths


def is_kept(folder: Path) -> bool:
    """Whether a folder lies in memory, where nothing can be dropped."""
    kinds = {
        parts[1]: parts[2]
        for parts in (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    }
    nearest = next(str(one) for one in (folder, *folder.parents) if str(one) in kinds)
    return kinds[nearest] in ("tmpfs", "ramfs")


def test_a_file_that_was_read_is_cached_and_one_that_was_dropped_is_not(tmp_path):
    if is_kept(tmp_path):
        pytest.skip("the temporary folder lies in memory")
    paths = write(tmp_path)
    assert cached_share(paths) == 1
    drop_from_cache(paths)
    assert cached_share(paths) <= 0.01
    paths[0].read_bytes()
    assert 0.4 < cached_share(paths) <= 0.6


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="needs a file system in memory")
def test_a_file_system_that_keeps_its_pages_is_refused():
    path = MEMORY / f"featcache-test-{os.getpid()}"
    path.write_bytes(bytes(2**16))
    try:
        with pytest.raises(FeatcacheError, match="stay in the page cache: 100 %"):
            drop_from_cache([path])
    finally:
        path.unlink()
