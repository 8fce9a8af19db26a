"""`repair` makes exactly what is damaged again, to the byte."""

import os
import random
import shutil
import time

import pytest
from reliability.kit import (
    ROWS,
    content,
    draw,
    key_of,
    partials,
    times,
    write_rows,
)

from featcache.cache.check import verify_feature_set
from featcache.errors import CacheError, FeatcacheError
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.extract.repair import repair
from featcache.workspace import Workspace


@pytest.fixture
def spoilt(finished, tmp_path):
    """A copy of the finished workspace that a test may spoil."""
    shutil.copytree(finished.root, tmp_path / "ws")
    return Workspace.open(tmp_path / "ws")


@pytest.fixture
def on_cluster(tiny):
    return ExtractConfig(scheduler=tiny.scheduler, device="cpu")


def flip(path, generator):
    """Change one byte anywhere in a file."""
    with path.open("r+b") as file:
        place = generator.randrange(path.stat().st_size)
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ generator.randrange(1, 256)]))


def cut(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def zero(path, start, size=4096):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))


def test_exactly_the_damaged_shards_are_made_again(spoilt, finished, on_cluster):
    folder = spoilt.features / "image/vit"
    shards = [folder / f"shard-{number:06d}.h5" for number in range(5)]
    before, texts = times(folder), times(spoilt.features / "text/bert")
    generator = random.Random(0)
    flip(shards[0], generator)
    cut(shards[1], generator)
    zero(shards[2], 300_000)
    shards[4].unlink()
    result = repair(spoilt, "image/vit", config=on_cluster)
    (one,) = result.sets
    assert (one.remade, one.rows, one.shards) == ([0, 1, 2, 4], 32, 5)
    assert one.known == one.equal
    assert one.known in (8, 16)  # the flip may have hit the checksums themselves
    assert result.ok
    assert "4 shards with 32 rows made again" in result.to_text()
    assert content(spoilt) == content(finished)
    assert partials(spoilt) == []
    after = times(folder)
    assert [n for n in after if after[n] == before[n]] == ["shard-000003.h5"]
    assert times(spoilt.features / "text/bert") == texts

    again = repair(spoilt, config=on_cluster)
    assert [made.remade for made in again.sets] == [[], []]
    assert again.to_text().count("every checksum is right: nothing to do") == 2
    assert times(folder) == after


def test_a_text_set_is_repaired(spoilt, finished, on_cluster):
    folder = spoilt.features / "text/bert"
    before = times(folder)
    assert len(before) == 2
    path = folder / "shard-000001.h5"
    zero(path, path.stat().st_size // 2, 64)
    (one,) = repair(spoilt, "text/bert", config=on_cluster).sets
    assert (one.remade, one.rows, one.known, one.equal) == ([1], 72, 72, 72)
    assert content(spoilt) == content(finished)
    assert times(folder)["shard-000000.h5"] == before["shard-000000.h5"]


@pytest.mark.parametrize("scale_is_lost", [False, True])
def test_an_int8_set_is_repaired(tiny, tmp_path, on_cluster, scale_is_lost):
    workspace = tiny.workspace(tmp_path, texts=0)
    tiny.extract(workspace, dtype="int8")
    want = content(workspace)
    folder = workspace.features / "image/vit"
    before = times(folder)
    assert len(before) == 3
    zero(folder / "shard-000001.h5", 300_000)
    if scale_is_lost:
        (folder / "scale_channel.json").unlink()
    (one,) = repair(workspace, config=on_cluster).sets
    assert (one.remade, one.rows, one.known, one.equal) == ([1], 16, 16, 16)
    assert content(workspace) == want
    assert times(folder).keys() == before.keys()
    assert [n for n in before if before[n] != times(folder)[n]] == ["shard-000001.h5"]


@pytest.fixture
def own_pictures(tiny, tmp_path):
    """A finished workspace whose pictures a test may change."""
    pictures = tmp_path / "pictures"
    shutil.copytree(tiny.pictures, pictures)
    workspace = write_rows(Workspace.open(tmp_path / "own"), pictures, range(ROWS), texts=0)
    tiny.extract(workspace)
    return workspace, pictures


def test_a_changed_picture_is_refused_and_taken_in_when_asked(tiny, own_pictures, on_cluster):
    workspace, pictures = own_pictures
    folder = workspace.features / "image/vit"
    before, old = times(folder), content(workspace)
    draw(pictures / f"{key_of(17)}.jpg", 4_000)
    with pytest.raises(CacheError, match=key_of(17)) as caught:
        tiny.extract(workspace)
    assert "featcache repair image/vit --rows-changed" in str(caught.value)
    assert content(workspace) == old
    (one,) = repair(workspace, config=on_cluster).sets
    assert one.remade == []  # no byte is damaged
    (one,) = repair(workspace, rows_changed=True, config=on_cluster).sets
    assert (one.remade, one.rows) == ([2], 8)
    after = times(folder)
    assert [n for n in before if before[n] != after[n]] == ["shard-000002.h5"]
    assert tiny.extract(workspace).sets[0].missing_shards == 0
    (one,) = repair(workspace, rows_changed=True, config=on_cluster).sets
    assert one.remade == []
    changed = {name for name, value in content(workspace).items() if old[name] != value}
    assert changed == {"image/vit/shard-000002.h5", "image/vit/shards.json"}


def test_a_repair_of_changed_rows_may_be_killed(tiny, own_pictures, launcher, on_cluster):
    workspace, pictures = own_pictures
    for row in range(0, ROWS, 8):
        draw(pictures / f"{key_of(row)}.jpg", 5_000 + row)
    fresh = write_rows(Workspace.open(pictures.parent / "fresh"), pictures, range(ROWS), texts=0)
    tiny.extract(fresh)
    generator = random.Random(3)
    for _ in range(3):
        command = launcher.start(
            ["repair", "--rows-changed", "--root", str(workspace.root), "--device", "cpu"]
        )
        time.sleep(generator.uniform(0, 0.8))
        command.kill()
        command.wait()
    code, said = launcher.run(
        ["repair", "--rows-changed", "--root", str(workspace.root), "--device", "cpu"]
    )
    assert code == 0, said
    assert content(workspace) == content(fresh)
    assert partials(workspace) == []
    assert tiny.extract(workspace).sets[0].missing_shards == 0


def test_the_command_says_what_it_did(spoilt, finished, launcher):
    zero(spoilt.features / "image/vit/shard-000003.h5", 300_000)
    arguments = ["--root", str(spoilt.root)]
    code, said = launcher.run(["verify", *arguments])
    assert code == 1
    assert "featcache repair" in said
    assert "makes exactly these again" in said
    code, said = launcher.run(["repair", *arguments, "--device", "cpu"])
    assert code == 0, said
    assert "image/vit: 5 shards, 1 shard with 8 rows made again; 8 of 8 rows have" in said
    assert "text/bert: 2 shards, every checksum is right: nothing to do" in said
    assert content(spoilt) == content(finished)
    code, said = launcher.run(["repair", "image/none", *arguments])
    assert code in (1, 2)
    assert "error: " in said
    assert "Traceback" not in said


def test_lost_weights_are_named_and_nothing_is_touched(tiny, tmp_path, on_cluster):
    vit = tmp_path / "vit"
    shutil.copytree(tiny.vit, vit)
    workspace = tiny.workspace(tmp_path / "ws", texts=0)
    extract(
        workspace,
        on_cluster.model_copy(update={"batch_size": 4, "threads": 1, "shard_mb": 1}),
        backbones=[str(vit)],
    )
    zero(workspace.features / "image/vit/shard-000003.h5", 300_000)
    damaged = content(workspace)
    shutil.rmtree(vit)
    with pytest.raises(FeatcacheError):
        repair(workspace, config=on_cluster)
    assert content(workspace) == damaged


@pytest.mark.slow
def test_a_thousand_flips_and_a_hundred_cuts(spoilt, finished, on_cluster):
    generator, want = random.Random(7), content(finished)
    folder = spoilt.features / "image/vit"
    shards = sorted([*folder.glob("*.h5"), *(spoilt.features / "text/bert").glob("*.h5")])
    flips = cuts = made = 0
    while flips < 1_000 or cuts < 100:
        chosen = generator.sample(shards, generator.randrange(1, len(shards) + 1))
        for path in chosen:
            if cuts < 100 and generator.random() < 0.3:
                cut(path, generator)
                cuts += 1
            else:
                for _ in range(generator.choice((1, 1, 3, 9))):
                    flip(path, generator)
                    flips += 1
        wrong = {name for name, value in content(spoilt).items() if want[name] != value}
        before = {path: path.stat().st_mtime_ns for path in shards}
        result = repair(spoilt, config=on_cluster)
        assert content(spoilt) == want
        assert result.ok
        touched = {path for path in shards if path.stat().st_mtime_ns != before[path]}
        assert {str(path.relative_to(spoilt.features)) for path in touched} == wrong
        made += len(touched)
        for one in result.sets:
            assert one.equal <= one.known
    assert made > 300
    assert verify_feature_set(folder).ok
