import json
from pathlib import Path

import numpy as np
import pytest

from featcache.cache import check
from featcache.cache.check import describe, info, verify, verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.errors import CacheError, WorkspaceError
from featcache.workspace import Workspace


@pytest.fixture
def folder(build, tmp_path):
    spec = build.make_spec("text", pooled_dim=3, dtype="int8")
    content = build.make_content(spec, 11, failed={5})
    writer = build.write_set(tmp_path / "features" / "text" / "tiny", spec, content)
    writer.write_failures(1, {"key-5": "no text"})
    writer.write_quality({"parameters": 7})
    return writer.folder


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("deep", [False, True])
def test_sound_set_passes(folder, deep):
    report = verify_feature_set(folder, deep=deep)
    assert report.ok
    assert (report.shards, report.rows, report.problems) == (3, 11, [])
    assert report.to_text().endswith("11 rows in 3 shards, every checksum is right")


def test_every_damage_is_named_by_shard_array_and_key(folder):
    features = FeatureSet.open(folder)
    first, second, third = (shard.path for shard in features.shards)
    rows = np.flatnonzero(features.lengths[:4] > 0)
    key = features.keys[int(rows[0])]
    places = features.shards[0].header.places
    start = places["tokens"].offset + int(features.offsets[rows[0]]) * 4
    overwrite(first, start, bytes([first.read_bytes()[start] ^ 1]))
    overwrite(first, places["pooled"].offset, b"\x12\x34")
    third.unlink()
    second.write_bytes(second.read_bytes()[:-200])
    report = verify_feature_set(folder)
    assert not report.ok
    assert [(p.shard, p.array, p.key) for p in report.problems] == [
        (0, "pooled", None),
        (0, "tokens", key),
        (1, None, None),
        (2, None, None),
    ]
    assert report.damaged_shards == [0, 1, 2]
    text = report.to_text()
    assert f"shard-000000.h5, `tokens`, row `{key}`: the row's tokens differ" in text
    assert "shard-000002.h5: the shard is missing" in text
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


def test_zeros_in_the_middle_are_found(folder):
    shard = FeatureSet.open(folder).shards[1]
    overwrite(shard.path, shard.header.places["tokens"].offset, bytes(20))
    assert verify_feature_set(folder).damaged_shards == [1]


def test_damaged_offsets_do_not_hide_the_rest(folder):
    shard = FeatureSet.open(folder).shards[1]
    overwrite(shard.path, shard.header.places["offsets"].offset + 7, b"\x7f")
    assert [p.array for p in verify_feature_set(folder).problems] == ["offsets"]


def test_long_lists_are_cut_for_a_person(folder):
    report = check.VerifyReport(
        folder, 1, 100, [check.Problem(0, "tokens", f"k{i}", "bad") for i in range(100)]
    )
    assert "and 80 more" in report.to_text()
    assert len(report.to_json()["problems"]) == 100


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("featcache-data/features/image/vit-b", "featcache repair image/vit-b"),
        ("a b/features/text/x@flip", "featcache repair text/x@flip --root 'a b'"),
        ("elsewhere/my set", "featcache repair 'elsewhere/my set'"),
    ],
)
def test_damage_comes_with_the_command_that_repairs_it(folder, command):
    report = check.VerifyReport(Path(folder), 1, 1, [check.Problem(0, None, None, "bad")])
    assert report.to_text().endswith(f"\nnext: {command} makes exactly these again")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CacheError, match="no feature set"):
        verify_feature_set(tmp_path)


def test_libhdf5_sees_only_sound_shards(folder, monkeypatch):
    shard = FeatureSet.open(folder).shards[1]
    overwrite(shard.path, shard.header.places["checksums"].offset, b"\0")
    asked = []
    said = "HDF5 reads other values"

    def ask(paths, *, deep, child):
        asked.extend(paths)
        return [(paths[1], said)]

    monkeypatch.setattr(check, "ask_libhdf5", ask)
    report = verify_feature_set(folder)
    assert [path.name for path in asked] == ["shard-000000.h5", "shard-000002.h5"]
    assert [(p.shard, p.array) for p in report.problems] == [(1, "checksums"), (2, None)]
    assert report.problems[1].what == said


def test_info_tells_what_is_there(folder):
    (folder / "shard-000002.h5").unlink()
    found = info(folder)
    assert (found["rows"], found["stored_rows"], found["failed_rows"]) == (11, 8, 1)
    assert (found["shards"], found["complete_shards"]) == (3, 2)
    assert found["failures"] == {"no text": 1}
    assert found["manifest"] == "m"
    assert found["quality"] == {"parameters": 7}
    assert found["spec"]["encoder"] == "tiny"
    assert json.loads(json.dumps(found)) == found


def test_commands_take_names_folders_or_all(folder, tmp_path):
    workspace = Workspace(tmp_path)
    for name in (None, "text/tiny", str(folder)):
        text = describe(workspace, name).to_text()
        assert "text/tiny" in text
        assert "11 of 11 in 3 of 3 shards" in text
        assert "1 x no text" in text
    assert verify(workspace, "text/tiny").ok
    assert verify(workspace).to_json()["sets"][0]["rows"] == 11
    with pytest.raises(WorkspaceError, match="neither image/NAME, text/NAME nor a folder"):
        describe(workspace, "tiny")
    with pytest.raises(WorkspaceError, match="no image feature set `tiny`"):
        verify(workspace, "image/tiny")
    with pytest.raises(WorkspaceError, match="no feature sets"):
        describe(Workspace(tmp_path / "empty"))
