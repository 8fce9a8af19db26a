"""The disk fills up at every point of stage one: one clear error, and the rerun goes on."""

import shutil
import subprocess

import pytest
from reliability.kit import content, draw, key_of, partials, write_rows

from featcache.cache.check import verify_feature_set
from featcache.cache.folder import FeatureSetWriter
from featcache.config import read_json, write_json
from featcache.errors import CacheError
from featcache.workspace import Workspace


class Disk:
    """A small file system in memory."""

    def __init__(self, place, size_kb):
        self.place = place
        place.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(place))

    def _mount(self, *options):
        made = subprocess.run(["mount", *options], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")

    def resize(self, size_kb):
        self._mount("-o", f"remount,size={size_kb}k", str(self.place))

    def fill(self, *, but_kb=0):
        """Leave so much room and no more."""
        free = shutil.disk_usage(self.place).free - (but_kb << 10)
        (self.place / "filler").write_bytes(bytes(max(free, 0)))

    def empty(self):
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk", 2700)
    yield made
    subprocess.run(["umount", "-l", str(made.place)], check=True)


def image_content(workspace):
    return {name: value for name, value in content(workspace).items() if name.startswith("image")}


def check_message(said):
    assert "Traceback" not in said
    assert "error: the disk is full, or your quota is" in said
    assert "distributed" not in said


def test_room_for_some_shards_only(tiny, finished, launcher, disk):
    workspace = tiny.workspace(disk.place / "ws")
    code, said = launcher.run(tiny.arguments(workspace))
    assert code == 1
    check_message(said)
    assert str(disk.place) in said
    complete = sorted(path.name for path in workspace.features.rglob("*.h5"))
    assert 1 <= len(complete) < 5
    assert partials(workspace) == []
    report = verify_feature_set(workspace.features / "image/vit")
    whole = [number for number in range(5) if f"shard-{number:06d}.h5" in complete]
    assert not set(whole) & set(report.damaged_shards)
    disk.resize(16_000)
    code, said = launcher.run(tiny.arguments(workspace))
    assert code == 0, said
    assert f"{len(complete)} complete already, going on" in said
    assert content(workspace) == image_content(finished)


@pytest.mark.parametrize("room_kb", [0, 4, 8, 12, 16, 20])
def test_room_for_some_of_the_small_files_only(tiny, finished, disk, room_kb):
    """The set's folder, its two tables, its request: each is the one that does not fit."""
    workspace = tiny.workspace(disk.place / "ws")
    disk.fill(but_kb=room_kb)
    with pytest.raises(CacheError, match="the disk is full") as caught:
        tiny.extract(workspace)
    assert str(disk.place) in str(caught.value.where)
    assert partials(workspace) == []
    disk.empty()
    disk.resize(16_000)
    tiny.extract(workspace)
    assert content(workspace) == image_content(finished)


def test_no_room_for_the_table_of_failures(tiny, disk, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in range(8):
        draw(pictures / f"{key_of(row)}.jpg", row)
    (pictures / f"{key_of(3)}.jpg").write_bytes(b"no picture")
    workspace = write_rows(Workspace.open(disk.place / "ws"), pictures, range(8), texts=0)
    tiny.extract(workspace, dry_run=True)
    folder = workspace.features / "image/vit"
    planned = content(workspace)
    disk.fill(but_kb=800)  # a shard is 788 KiB and its last pages
    with pytest.raises(CacheError, match="the disk is full"):
        tiny.extract(workspace, max_failures=1.0)
    assert content(workspace) == planned
    assert FeatureSetWriter.open(folder).missing() == [0]
    disk.empty()
    tiny.extract(workspace, max_failures=1.0)
    assert FeatureSetWriter.open(folder).read_failures().keys() == {key_of(3)}
    assert verify_feature_set(folder).ok


def test_a_failed_small_write_leaves_the_old_file(disk):
    path = disk.place / "state.json"
    write_json(path, {"old": 1})
    disk.fill()
    with pytest.raises(CacheError, match="the disk is full"):
        write_json(path, {"new": "x" * 10_000})
    assert read_json(path) == {"old": 1}
    assert sorted(one.name for one in disk.place.iterdir()) == ["filler", "state.json"]
