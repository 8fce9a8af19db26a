"""Vectors that lie in a file."""

from pathlib import Path

import numpy as np
import pytest

from featcache.errors import CacheError
from featcache.heads.vector_file import VectorFile, read_vectors

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_vectors_come_back_as_they_were_written(tmp_path):
    with VectorFile(tmp_path, 4, "kept.npy") as file:
        file.add(ROWS[:3])
        file.add(ROWS[3:])
        found = file.finish()
    np.testing.assert_array_equal(found, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npy"]
    np.testing.assert_array_equal(read_vectors(tmp_path / "kept.npy", 4), ROWS)
    np.testing.assert_array_equal(np.load(tmp_path / "kept.npy"), ROWS)


def test_file_without_a_name_leaves_nothing_behind(tmp_path):
    with VectorFile(tmp_path, 4) as file:
        file.add(ROWS)
        found = file.finish()
    assert list(tmp_path.iterdir()) == []
    found[0] = -1.0  # a change of the array is its own
    np.testing.assert_array_equal(found[1:], ROWS[1:])


def test_unfinished_file_is_not_taken_for_a_finished_one(tmp_path):
    with VectorFile(tmp_path, 4, "kept.npy") as file:
        file.add(ROWS[:2])
        assert read_vectors(tmp_path / "kept.npy", 4) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"damaged", b"\x93NUMPY\x01\x00"])
def test_damaged_file_is_none(tmp_path, content):
    (tmp_path / "kept.npy").write_bytes(content)
    assert read_vectors(tmp_path / "kept.npy", 4) is None


def test_file_of_other_images_is_none(tmp_path):
    np.save(tmp_path / "kept.npy", ROWS)
    assert read_vectors(tmp_path / "kept.npy", 5) is None


def test_full_disk_is_said_in_words(tmp_path):
    def fill():
        with VectorFile(tmp_path, 4) as file:
            file._file.close()
            file._file = Path("/dev/full").open("wb")  # noqa: SIM115 - it is closed as its own is
            file.add(ROWS)

    with pytest.raises(CacheError, match="the disk is full"):
        fill()


def test_folder_that_cannot_be_made_is_said_in_words(tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be written"):
        VectorFile(tmp_path / "taken" / "random", 4, "kept.npy")
