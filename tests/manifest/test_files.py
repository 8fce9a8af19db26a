"""Image files from outside: kinds by content, sizes from the first bytes, equal files."""

import io

import numpy as np
import pytest
from PIL import Image

from featcache.manifest.files import EMPTY, MISSING, NO_PICTURE, UNKNOWN, glance, glance_at, kind_of


def picture(kind: str, size=(31, 17), **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0]), 90, np.uint8)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_kind_is_told_by_the_first_bytes(kind):
    assert kind_of(picture(kind)) == kind.lower()


def test_what_is_no_picture():
    assert kind_of(b"") == EMPTY
    assert kind_of(b"\n <!DOCTYPE html><html>") == NO_PICTURE
    assert kind_of(b"version https://git-lfs.github.com/spec/v1") == NO_PICTURE
    assert kind_of(b"hello") == UNKNOWN
    assert kind_of(bytes(128) + b"DICM") == "dicom"


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})]
)
def test_height_and_width_come_from_the_header(tmp_path, kind, options):
    path = tmp_path / "a"
    path.write_bytes(picture(kind, **options))
    one = glance(str(path))
    assert (one.height, one.width) == (17, 31)
    assert one.size_bytes == path.stat().st_size


@pytest.mark.parametrize("kept", range(0, 300, 7))
def test_a_file_cut_anywhere_is_looked_at_without_an_error(tmp_path, kept):
    for kind in ("JPEG", "PNG"):
        path = tmp_path / kind
        path.write_bytes(picture(kind)[:kept])
        one = glance(str(path))
        assert one.size_bytes == path.stat().st_size
        assert (one.height, one.width) in ((17, 31), (-1, -1))


def test_a_missing_file_and_a_folder_are_no_files(tmp_path):
    assert glance(str(tmp_path / "none")).kind == MISSING
    assert glance(str(tmp_path)).kind == MISSING


def test_equal_files_are_found_and_alike_ones_are_not(tmp_path):
    long = bytes(range(256)) * 64
    other = bytearray(long)
    other[len(long) // 2] ^= 1  # the first and last kilobytes agree
    for name, content in {"a": long, "b": long, "c": bytes(other), "d": b"", "e": b""}.items():
        (tmp_path / name).write_bytes(content)
    looked = glance_at(tmp_path, ["c", "b", "a", "d", "e", "a"])
    assert looked.paths == ["c", "b", "a", "d", "e"]
    assert looked.copies(tmp_path) == [["a", "b"]]
    assert looked.count(EMPTY) == 2


def test_names_that_lie_are_named(tmp_path):
    names = {"a.png": "JPEG", "b.JPG": "JPEG", "c.jpeg": "PNG", "d.dat": "PNG"}
    for name, kind in names.items():
        (tmp_path / name).write_bytes(picture(kind))
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "f.dcm").write_bytes(b"no mark, as some have none")
    looked = glance_at(tmp_path, [*names, "e.png", "f.dcm", "g.png"])
    assert looked.misnamed() == ["a.png", "c.jpeg"]
    assert looked.count(MISSING) == 1


def test_absolute_paths_ignore_the_root(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert glance_at(tmp_path / "nowhere", [str(tmp_path / "a")]).size_bytes.tolist() == [1]
