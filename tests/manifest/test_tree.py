"""What lies in a folder."""

import os

import pytest

from featcache.errors import ManifestError
from featcache.manifest.tree import (
    SYNTHETIC_MARK,
    file_faults,
    file_sizes,
    files_present,
    is_synthetic,
)


def test_files_are_found_as_the_file_system_finds_them(tmp_path):
    for name in ("a.png", "one/b.png", "one/two/c (1).png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nothing.png")
    paths = [
        "a.png", "one/b.png", "one/two/c (1).png", "link.png", str(tmp_path / "one" / "b.png"),
        "dead.png", "one", "one/two", "A.png", "b.png", "absent/x.png", "a.png/x", "",
        "one/../a.png", "x" * 300 + "/y.png", "zero\0/byte.png", "/a.png",
    ]  # fmt: skip
    found = files_present(tmp_path, paths).tolist()
    assert found == [True] * 5 + [False] * 8 + [True] + [False] * 3


def test_a_million_rows_do_not_cost_a_call_each(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    calls = []
    real = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: calls.append(path) or real(path))
    found = files_present(tmp_path, [f"a/{number}.png" for number in range(5_000)])
    assert found.sum() == 1
    assert len(calls) == 1


def test_a_folder_that_cannot_be_listed_is_an_error_without_its_name(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", deny)
    with pytest.raises(ManifestError, match="cannot be listed: Permission denied") as caught:
        files_present(tmp_path, ["p1234/x.png"])
    assert "p1234" not in str(caught.value)


def test_a_synthetic_tree_says_so_at_its_root(tmp_path):
    assert not is_synthetic(tmp_path)
    (tmp_path / SYNTHETIC_MARK).touch()
    assert is_synthetic(tmp_path)


def test_sizes_of_files_and_what_is_wrong_with_rows(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "some.png").write_bytes(b"12345")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "some.png")
    (tmp_path / "a" / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "circle.png").symlink_to("circle.png")
    names = ["empty", "some", "folder", "link", "dead", "none", "some", "Some"]
    paths = [f"a/{name}.png" for name in names] + [str(tmp_path / "a" / "some.png"), "b/x.png"]
    paths.append("a/circle.png")
    sizes = file_sizes(tmp_path, paths)
    assert sizes.tolist() == [0, 5, -1, 5, -1, -1, 5, -1, 5, -1, -1]
    assert (sizes >= 0).tolist() == files_present(tmp_path, paths).tolist()
    faults = {reason: fault.tolist() for reason, fault in file_faults(sizes[:3]).items()}
    assert faults == {
        "missing file": [False, False, True],
        "file of zero bytes": [True, False, False],
    }
