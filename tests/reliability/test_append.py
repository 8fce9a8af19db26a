"""`--append`: new rows become shards after the last one, and nothing else changes."""

import random
import time

import numpy as np
import pytest
from reliability.kit import content, key_of, partials, times, write_rows

from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError

OLD = range(20, 40)
NEW = range(40)  # the new ones stand before the old ones


@pytest.mark.parametrize("name", ["few", "more"], ids=["same manifest", "another manifest"])
def test_new_rows_come_after_the_old_ones(tiny, finished, tmp_path, name):
    workspace = tiny.workspace(tmp_path, OLD, texts=8)
    tiny.extract(workspace, texts=True)
    sets = [workspace.features / "image/vit", workspace.features / "text/bert"]
    old = {folder: times(folder) for folder in sets}
    assert [len(old[folder]) for folder in sets] == [3, 2]
    write_rows(workspace, tiny.pictures, NEW, name=name, texts=8)
    said = "20 more, 0 fewer" if name == "few" else "manifest `few`"
    with pytest.raises(CacheError, match=said) as caught:
        tiny.extract(workspace, texts=True)
    assert "--append" in str(caught.value)
    result = tiny.extract(workspace, texts=True, append=True)
    assert [made.missing_shards for made in result.sets] == [3, 2]
    assert [made.missing_rows for made in result.sets] == [20, 160]
    for folder in sets:
        after = times(folder)
        assert {n: when for n, when in after.items() if n in old[folder]} == old[folder]
        assert sorted(after)[: len(old[folder])] == sorted(old[folder])
    grown = FeatureSet.open(sets[0])
    assert grown.keys == [key_of(row) for row in [*OLD, *range(20)]]
    clean = FeatureSet.open(finished.features / "image/vit")
    places = np.asarray([clean.row_of[key] for key in grown.keys])
    np.testing.assert_array_equal(
        grown.read_tokens(np.arange(40), verify=True), clean.read_tokens(places)
    )
    kept = content(workspace)
    for append in (True, False):
        result = tiny.extract(workspace, texts=True, append=append)
        assert [made.missing_shards for made in result.sets] == [0, 0]
    assert content(workspace) == kept


def test_appended_rows_of_an_int8_set_share_its_scale(tiny, tmp_path):
    workspace = tiny.workspace(tmp_path, OLD, texts=0)
    tiny.extract(workspace, dtype="int8")
    folder = workspace.features / "image/vit"
    scale, old = (folder / "scale_channel.json").read_bytes(), times(folder)
    write_rows(workspace, tiny.pictures, NEW, texts=0)
    tiny.extract(workspace, append=True)
    assert (folder / "scale_channel.json").read_bytes() == scale
    assert {n: when for n, when in times(folder).items() if n in old} == old
    want = content(workspace)
    # The scale is in every shard: when the file is lost, the rows that came later have no say.
    (folder / "scale_channel.json").unlink()
    (folder / "shard-000000.h5").unlink()
    tiny.extract(workspace)
    assert content(workspace) == want


def test_an_append_may_be_killed(tiny, launcher, tmp_path):
    calm = tiny.workspace(tmp_path / "calm", OLD, texts=0)
    tiny.extract(calm)
    write_rows(calm, tiny.pictures, NEW, texts=0)
    tiny.extract(calm, append=True)
    workspace = tiny.workspace(tmp_path / "ws", OLD, texts=0)
    tiny.extract(workspace)
    write_rows(workspace, tiny.pictures, NEW, texts=0)
    generator = random.Random(4)
    for _ in range(3):
        command = launcher.start(tiny.arguments(workspace, "--append"))
        time.sleep(generator.uniform(0, 0.8))
        command.kill()
        command.wait()
    code, said = launcher.run(tiny.arguments(workspace, "--append"))
    assert code == 0, said
    assert content(workspace) == content(calm)
    assert partials(workspace) == []
