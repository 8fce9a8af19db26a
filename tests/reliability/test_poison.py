"""A picture that kills the process that reads it costs its own row and nothing else."""

from pathlib import Path

import pytest
from reliability.kit import ROWS, content, key_of, partials, write_rows

from featcache.cache.folder import FeatureSetWriter
from featcache.cluster import POISON
from featcache.workspace import Workspace

PRELOAD = str(Path(__file__).with_name("poison.py"))


# With int8 the row is met twice: when the range is measured, and when its shard is made.
@pytest.mark.parametrize(
    "options", [pytest.param([], marks=pytest.mark.slow, id="float16"), ["--dtype", "int8"]]
)
def test_a_row_that_kills_its_worker_is_quarantined(tiny, launcher, tmp_path, options):
    deadly = 21
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in range(ROWS):
        name = f"{key_of(row)}.jpg"
        (pictures / name).symlink_to(tiny.pictures / name)
    workspace = write_rows(Workspace.open(tmp_path / "ws"), pictures, range(ROWS), texts=0)
    arguments = tiny.arguments(workspace, "--set=max_failures=1", *options)
    code, said = launcher.run(
        arguments,
        DASK_DISTRIBUTED__WORKER__PRELOAD=PRELOAD,
        POISON_NAMES=f"{key_of(deadly)}.jpg",
    )
    assert code == 0, said
    assert "killed its worker again and again: looking for the row" in said
    assert "1 unreadable row" in said
    for word in ("Traceback", "distributed", "KilledWorker"):
        assert word not in said
    failures = FeatureSetWriter.open(workspace.features / "image/vit").read_failures()
    assert failures == {key_of(deadly): POISON}
    assert partials(workspace) == []

    # Where that file is merely unreadable, all bytes of all shards are the same.
    (pictures / f"{key_of(deadly)}.jpg").unlink()
    (pictures / f"{key_of(deadly)}.jpg").write_bytes(b"no picture")
    other = write_rows(Workspace.open(tmp_path / "other"), pictures, range(ROWS), texts=0)
    dtype = {"dtype": "int8"} if options else {}
    tiny.extract(other, max_failures=1.0, **dtype)
    assert shards(workspace) == shards(other)


def shards(workspace):
    return {name: value for name, value in content(workspace).items() if name.endswith(".h5")}
