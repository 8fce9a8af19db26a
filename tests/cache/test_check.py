import json
import os

import numpy as np
import pytest

from featcache.cache import check, hdf5
from featcache.cache.check import ask_libhdf5, describe, info, verify, verify_feature_set
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


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CacheError, match="no feature set"):
        verify_feature_set(tmp_path)


def test_libhdf5_sees_only_sound_shards(folder, monkeypatch):
    shard = FeatureSet.open(folder).shards[1]
    overwrite(shard.path, shard.header.places["checksums"].offset, b"\0")
    asked = []
    monkeypatch.setattr(check, "ask_libhdf5", lambda paths, deep: asked.extend(paths) or [])
    verify_feature_set(folder)
    assert [path.name for path in asked] == ["shard-000000.h5", "shard-000002.h5"]


def child_program(tmp_path, monkeypatch, body):
    """Stand in for the interpreter, to act like a child whose libhdf5 misbehaves."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(check.sys, "executable", str(program))


def test_crash_of_libhdf5_is_blamed_on_its_shard(folder, tmp_path, monkeypatch):
    paths = [shard.path for shard in FeatureSet.open(folder).shards]
    good = json.dumps({"path": str(paths[0]), "problem": None})
    # The first child answers one shard and dies; the second dies at once, and so on.
    body = f"test -e {tmp_path}/been || echo '{good}'\ntouch {tmp_path}/been\nkill -SEGV $$"
    child_program(tmp_path, monkeypatch, body)
    problems = dict(ask_libhdf5(paths, deep=False))
    assert list(problems) == paths[1:]
    assert all("ended with code -11" in what for what in problems.values())


def test_what_libhdf5_dislikes_becomes_a_problem(folder, tmp_path, monkeypatch):
    shards = FeatureSet.open(folder).shards
    said = [{"path": str(shard.path), "problem": None} for shard in shards]
    said[1]["problem"] = "HDF5 reads other values"
    body = "\n".join(f"echo '{json.dumps(answer)}'" for answer in said)
    child_program(tmp_path, monkeypatch, body)
    report = verify_feature_set(folder)
    assert [(p.shard, p.what) for p in report.problems] == [(1, "HDF5 reads other values")]


def test_endless_loop_of_libhdf5_is_ended(folder, tmp_path, monkeypatch):
    child_program(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(check, "CHILD_TIMEOUT_S", 0.2)
    path = FeatureSet.open(folder).shards[0].path
    assert list(ask_libhdf5([path], deep=False)) == [
        (path, "libhdf5 took longer than 0 s while it opened the shard")
    ]


def test_child_has_bounded_memory(folder, tmp_path, monkeypatch):
    seen = tmp_path / "limits"
    monkeypatch.setattr(hdf5, "CHILD_CPU_S", 1000)
    child = os.fork()
    if child == 0:
        import resource

        hdf5._limit_resources()
        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
        seen.write_text(json.dumps(limits))
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(seen.read_text()) == [4 * 2**30, 1000]


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
