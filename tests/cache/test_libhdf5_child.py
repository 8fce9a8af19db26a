import io
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from featcache.cache import libhdf5_child
from featcache.cache.libhdf5_child import look
from featcache.cache.shard import Shard


@pytest.fixture
def path(build, tmp_path):
    spec = build.make_spec(pooled_dim=2)
    content = build.make_content(spec, 4)
    return build.write_set(tmp_path / "set", spec, content).folder / "shard-000000.h5"


def arrays_of(path):
    places = Shard.open(path).header.places
    return {name: [one.offset, one.shape, one.numpy_type.str] for name, one in places.items()}


def test_libhdf5_agrees_with_the_header(path):
    for deep in (False, True):
        assert look(str(path), arrays_of(path), "featcache", deep=deep) is None


def test_disagreement_is_described(path):
    arrays = arrays_of(path)
    offset, shape, dtype = arrays["tokens"]
    for wrong in (
        [offset + 4096, shape, dtype],
        [offset, shape[:2], dtype],
        [offset, shape, "<u2"],
    ):
        said = look(str(path), {**arrays, "tokens": wrong}, "featcache", deep=False)
        assert said.startswith("HDF5 sees `tokens` as float16 (4, 3, 4)")
    del arrays["tokens"]
    assert "HDF5 names the arrays ['checksums'," in look(str(path), arrays, "featcache", deep=False)
    with h5py.File(path, "r+") as file:
        file.attrs.modify("featcache", np.bytes_(b"{}".ljust(2048)))
    said = look(str(path), arrays_of(path), "featcache", deep=False)
    assert said == "the attribute `featcache` is not the header's JSON"


def test_other_values_are_found_when_all_is_read(path, monkeypatch):
    monkeypatch.setattr(libhdf5_child, "_PIECE_BYTES", 48)  # two rows of `tokens`
    pread = os.pread
    look_at = Shard.open(path).header.places["tokens"].offset
    last_rows = look_at + 2 * 24

    def damaged(descriptor, size, offset):
        content = pread(descriptor, size, offset)
        return bytes(size) if offset == last_rows else content

    monkeypatch.setattr(os, "pread", damaged)
    said = look(str(path), arrays_of(path), "featcache", deep=True)
    assert said == "HDF5 reads other values of `tokens` than stand at its place"


def test_each_line_is_answered(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "none.h5").write_bytes(b"none")
    names = [str(path), str(tmp_path / "none.h5"), "absent"]
    asked = [{"path": name, "arrays": arrays_of(path), "attribute": "featcache"} for name in names]
    lines = "\n".join(map(json.dumps, [{"deep": True}, *asked]))
    monkeypatch.setattr(libhdf5_child.sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(libhdf5_child, "limit_resources", lambda: None)
    libhdf5_child.main()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["path"] for answer in answers] == names
    assert answers[0]["problem"] is None
    assert answers[1]["problem"] == "libhdf5 cannot read it (OSError)"
    assert answers[2]["problem"] == "libhdf5 cannot read it (FileNotFoundError)"


def test_memory_and_time_are_bounded(tmp_path, monkeypatch):
    seen = tmp_path / "limits"
    monkeypatch.setattr(libhdf5_child, "CHILD_CPU_S", 1000)
    child = os.fork()
    if child == 0:
        import resource

        libhdf5_child.limit_resources()
        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
        seen.write_text(json.dumps(limits))
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(seen.read_text()) == [4 * 2**30, 1000]


def test_the_script_needs_none_of_our_modules():
    """They take longer to import than libhdf5 does."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "('featcache', 'pydantic', 'pyarrow', 'jaxtyping')])"
    )
    command = [sys.executable, "-P", "-c", code, libhdf5_child.__file__]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[]"
