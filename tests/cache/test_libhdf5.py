import json

import pytest

from featcache.cache import libhdf5
from featcache.cache.libhdf5 import ask_libhdf5, started_child


@pytest.fixture
def paths(build, tmp_path):
    spec = build.make_spec("text", pooled_dim=3, dtype="int8")
    writer = build.write_set(tmp_path / "set", spec, build.make_content(spec, 11))
    return [writer.folder / shard.file_name for shard in writer.shards]


@pytest.mark.parametrize("deep", [False, True])
def test_sound_shards_please_libhdf5(paths, deep):
    assert list(ask_libhdf5(paths, deep=deep)) == []
    with started_child() as child:
        assert list(ask_libhdf5(paths, deep=deep, child=child)) == []


def test_a_child_that_is_not_asked_is_ended():
    with started_child() as child:
        assert child.poll() is None
    assert child.returncode is not None
    with started_child() as child:
        assert list(ask_libhdf5([], deep=False, child=child)) == []


def test_more_shards_than_one_child_takes(paths, monkeypatch):
    monkeypatch.setattr(libhdf5, "CHILD_SHARDS", 2)
    with started_child() as child:
        assert list(ask_libhdf5(paths, deep=False, child=child)) == []


def test_what_has_no_header_is_not_asked_about(paths):
    paths[1].write_bytes(b"none")
    paths[2].unlink()
    said = dict(ask_libhdf5(paths, deep=True))
    assert said == {
        paths[1]: "the file has only 4 bytes, less than a header",
        paths[2]: "the shard is missing",
    }


def child_program(tmp_path, monkeypatch, body):
    """Stand in for the interpreter, to act like a child whose libhdf5 misbehaves."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(libhdf5.sys, "executable", str(program))


def test_crash_of_libhdf5_is_blamed_on_its_shard(paths, tmp_path, monkeypatch):
    good = json.dumps({"path": str(paths[0]), "problem": None})
    # The first child answers one shard and dies; the second dies at once, and so on.
    body = f"test -e {tmp_path}/been || echo '{good}'\ntouch {tmp_path}/been\nkill -SEGV $$"
    child_program(tmp_path, monkeypatch, body)
    problems = dict(ask_libhdf5(paths, deep=False))
    assert list(problems) == paths[1:]
    assert all("ended with code -11" in what for what in problems.values())


def test_what_libhdf5_dislikes_is_handed_on(paths, tmp_path, monkeypatch):
    said = [{"path": str(path), "problem": None} for path in paths]
    said[1]["problem"] = "HDF5 reads other values"
    body = "\n".join(f"echo '{json.dumps(answer)}'" for answer in said)
    child_program(tmp_path, monkeypatch, body)
    assert list(ask_libhdf5(paths, deep=False)) == [(paths[1], "HDF5 reads other values")]


def test_endless_loop_of_libhdf5_is_ended(paths, tmp_path, monkeypatch):
    child_program(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(libhdf5, "CHILD_TIMEOUT_S", 0.2)
    assert list(ask_libhdf5(paths[:1], deep=False)) == [
        (paths[0], "libhdf5 took longer than 0 s while it opened the shard")
    ]
