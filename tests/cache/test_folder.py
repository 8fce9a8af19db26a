import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from featcache.cache import folder as module
from featcache.cache.folder import FeatureSetWriter, read_failures
from featcache.cache.format import ShardPlan, plan_shards, read_plan
from featcache.errors import CacheError, StaleFeatureSetError
from featcache.partial import host_name, partial_path


@pytest.fixture
def spec(build):
    return build.make_spec()


@pytest.fixture
def content(build, spec):
    return build.make_content(spec, 10, failed={5})


@pytest.fixture
def done(build, spec, content, tmp_path):
    return build.write_set(tmp_path / "set", spec, content)


def plan_of(spec, content, hashes=None):
    return plan_shards(spec, content.keys, hashes or content.keys, shard_bytes=4 * spec.row_bytes)


def test_a_second_run_finds_the_same_plan_and_nothing_to_do(spec, content, done):
    before = {path.name: path.read_bytes() for path in done.folder.iterdir()}
    again = FeatureSetWriter.create(done.folder, spec, plan_of(spec, content), "m")
    assert again.missing() == []
    assert again.shards == done.shards
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == before


def test_worker_opens_what_the_run_planned(spec, content, done):
    opened = FeatureSetWriter.open(done.folder)
    assert (opened.spec, opened.shards, opened.manifest_name) == (spec, done.shards, "m")
    assert [shard.number for shard in opened.shards] == [0, 1, 2]


def test_another_recipe_is_refused_with_both_values(build, content, done):
    other = build.make_spec(batch_size=64)
    with pytest.raises(StaleFeatureSetError, match="`batch_size`: the cache has 2, this run asks"):
        FeatureSetWriter.create(done.folder, other, plan_of(other, content), "m")


def test_another_library_version_may_not_go_on_but_may_be_finished(build, spec, content, done):
    newer = build.make_spec(library_version="2.0")
    assert FeatureSetWriter.create(done.folder, newer, plan_of(spec, content), "m").missing() == []
    done.discard([1])
    with pytest.raises(StaleFeatureSetError, match="`library_version`: the cache has 1"):
        FeatureSetWriter.create(done.folder, newer, plan_of(spec, content), "m")


def test_another_manifest_is_offered_another_root(spec, content, done):
    with pytest.raises(CacheError, match="manifest `m`, this run asks for those of `n`") as caught:
        FeatureSetWriter.create(done.folder, spec, plan_of(spec, content), "n")
    assert "--root" in caught.value.fix


def test_changed_row_is_named(spec, content, done):
    hashes = [*content.keys[:3], "touched", *content.keys[4:7], "touched", *content.keys[8:]]
    with pytest.raises(CacheError, match=r"row `key-3` is another one .* 1 more rows"):
        FeatureSetWriter.create(done.folder, spec, plan_of(spec, content, hashes), "m")


def test_repaired_file_of_a_failed_row_makes_its_shard_again(spec, content, done):
    done.write_failures(1, {"key-5": "cut short"})
    hashes = [*content.keys[:5], "mended", *content.keys[6:]]
    again = FeatureSetWriter.create(done.folder, spec, plan_of(spec, content, hashes), "m")
    assert again.missing() == [1]
    assert again.shards[1].row_hashes[1] == "mended"
    assert read_plan(done.folder).shards == again.shards


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (lambda keys: [*keys, "key-new"], "1 more, 0 fewer; `key-new` is new"),
        (lambda keys: keys[1:], "0 more, 1 fewer; `key-0` is gone"),
    ],
)
def test_other_rows_are_refused(spec, content, done, keys, message):
    wanted = keys(content.keys)
    plan = plan_shards(spec, wanted, wanted, shard_bytes=4 * spec.row_bytes)
    with pytest.raises(CacheError, match=message):
        FeatureSetWriter.create(done.folder, spec, plan, "m")


def test_the_plan_of_a_set_stands_whatever_order_and_size_is_asked_for(spec, content, done):
    keys = content.keys[::-1]
    again = FeatureSetWriter.create(done.folder, spec, plan_shards(spec, keys, keys), "m")
    assert again.shards == done.shards
    assert again.missing() == done.missing()


def test_appended_rows_get_shards_after_the_last_one(spec, content, done):
    before = {path.name: path.read_bytes() for path in done.folder.glob("*.h5")}
    keys = ["new-0", *content.keys, *(f"new-{number}" for number in range(1, 6))]
    plan = plan_shards(spec, keys, keys, shard_bytes=4 * spec.row_bytes)
    with pytest.raises(CacheError, match="6 more, 0 fewer; `new-0` is new") as caught:
        FeatureSetWriter.create(done.folder, spec, plan, "m")
    assert "--append" in str(caught.value)
    grown = FeatureSetWriter.create(done.folder, spec, plan, "m", append=True)
    assert grown.shards[: len(done.shards)] == done.shards
    assert [shard.keys for shard in grown.shards[len(done.shards) :]] == [
        ["new-0", "new-1", "new-2", "new-3"],
        ["new-4", "new-5"],
    ]
    assert {path.name: path.read_bytes() for path in done.folder.glob("*.h5")} == before
    assert FeatureSetWriter.create(done.folder, spec, plan, "m").shards == grown.shards


def test_append_refuses_rows_that_are_gone_and_may_take_another_manifest(spec, content, done):
    fewer = [*content.keys[1:], "new"]
    plan = plan_shards(spec, fewer, fewer, shard_bytes=4 * spec.row_bytes)
    with pytest.raises(CacheError, match="`key-0` is gone"):
        FeatureSetWriter.create(done.folder, spec, plan, "m", append=True)
    more = [*content.keys, "new"]
    plan = plan_shards(spec, more, more, shard_bytes=4 * spec.row_bytes)
    with pytest.raises(CacheError, match="manifest `m`"):
        FeatureSetWriter.create(done.folder, spec, plan, "larger")
    grown = FeatureSetWriter.create(done.folder, spec, plan, "larger", append=True)
    assert grown.manifest_name == read_plan(done.folder).manifest_name == "larger"


def test_changed_files_are_taken_in_when_asked_for(spec, content, done):
    hashes = [*content.keys[:5], "changed", *content.keys[6:]]
    plan = plan_of(spec, content, hashes)
    with pytest.raises(CacheError, match="row `key-5`") as caught:
        FeatureSetWriter.create(done.folder, spec, plan, "m")
    assert "featcache repair image/tiny --rows-changed" in str(caught.value)
    missing = done.missing()
    again = FeatureSetWriter.create(done.folder, spec, plan, "m", rows_changed=True)
    assert again.missing() == sorted({*missing, 1})
    assert read_plan(done.folder).shards[1].row_hashes[1] == "changed"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "no rows to extract"),
        ([ShardPlan(0, [], [])], "no rows to extract"),
        ([ShardPlan(0, ["a", "a"], ["x", "y"])], "`a` stands twice"),
        ([ShardPlan(0, ["a", "b\n"], ["x", "y"])], "control"),
        ([ShardPlan(0, [""], ["x"])], "empty"),
        ([ShardPlan(0, ["é" * 65], ["x"])], "longer than 128 bytes"),
        ([ShardPlan(1, ["a"], ["x"])], "shard 0 contradicts itself"),
        ([ShardPlan(0, ["a"], ["x", "y"])], "shard 0 contradicts itself"),
        ([ShardPlan(0, ["a"], ["x\n"])], "line feed"),
    ],
)
def test_impossible_plan_is_refused_before_anything_is_written(spec, tmp_path, plan, message):
    with pytest.raises(CacheError, match=message):
        FeatureSetWriter.create(tmp_path / "set", spec, plan, "m")
    assert not (tmp_path / "set").exists()


def test_cut_foreign_and_absent_shards_are_missing(build, spec, content, done, tmp_path):
    first, second, third = (done.folder / shard.file_name for shard in done.shards)
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(third.read_bytes())
    assert done.missing() == [0, 1]
    third.unlink()
    assert done.missing() == [0, 1, 2]
    other = build.write_set(tmp_path / "other", build.make_spec(batch_size=9), content)
    for shard in other.shards:
        (other.folder / shard.file_name).replace(done.folder / shard.file_name)
    assert done.missing() == [0, 1, 2]


def start_time(pid):
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return int(stat.read().rpartition(")")[2].split()[19])


def test_partials_of_dead_processes_are_removed_and_no_others(done):
    host = host_name()
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead_started = start_time(dead.pid)
    # Not yet waited for, it is a zombie by the time the folder is cleaned.
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    names = {
        "mine": partial_path(done.folder / "shard-000000.h5").name,
        "living": f"shard-000001.h5.partial-{host}-{living.pid}-{start_time(living.pid)}",
        "zombie": f"shard-000001.h5.partial-{host}-{dead.pid}-{dead_started}",
        "reused number": f"shard-000001.h5.partial-{host}-{living.pid}-1",
        "foreign": "shard-000001.h5.partial-an-other-host-7-7",
        "old foreign": "shard-000002.h5.partial-an-other-host-7-7",
    }
    try:
        for name in names.values():
            (done.folder / name).write_bytes(b"x")
        os.utime(done.folder / names["old foreign"], (1, 1))
        assert done.remove_dead_partials() == 3
        kept = {short for short, name in names.items() if (done.folder / name).exists()}
        assert kept == {"mine", "living", "foreign"}
        assert done.missing() == []
    finally:
        living.kill()
        living.wait()
        dead.wait()


def test_failures_are_kept_by_shard_and_hold_nothing_else(done):
    done.write_failures(1, {"key-5": "cut short"})
    done.write_failures(0, {"key-3": "no image", "key-1": "cut short"})
    assert done.read_failures() == {"key-1": "cut short", "key-3": "no image", "key-5": "cut short"}
    table = pq.read_table(done.folder / "failures.parquet")
    assert table.column_names == ["shard", "key", "reason"]
    done.write_failures(0, {})
    done.write_failures(2, {})
    assert done.read_failures() == {"key-5": "cut short"}


def test_damaged_failures_are_named(done):
    done.write_failures(1, {"key-5": "cut short"})
    path = done.folder / "failures.parquet" / "shard-000001.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(CacheError, match="no table of failures"):
        read_failures(done.folder)


def note(folder, number):
    FeatureSetWriter.open(folder).write_failures(number, {f"key-{number * 4}": "cut short"})


def test_workers_note_failures_at_the_same_time(done):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=note, args=(done.folder, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done.read_failures()) == ["key-0", "key-4", "key-8"]


def test_quality_is_added_to(done):
    done.write_quality({"parameters": 7, "rate": 1.5})
    done.write_quality({"rate": 2.5})
    assert module.read_quality(done.folder) == {"parameters": 7, "rate": 2.5}
    (done.folder / "quality.json").write_text("[]")
    with pytest.raises(CacheError, match="no JSON object"):
        module.read_quality(done.folder)


def test_channel_scale_is_written_once(build, tmp_path):
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    assert writer.scale_channel() is None
    scale = build.channel_scale(spec, content)
    writer.write_scale_channel(scale)
    writer.write_scale_channel(scale)
    again = FeatureSetWriter.open(writer.folder).scale_channel()
    assert again.dtype == np.float32
    assert again.tobytes() == scale.tobytes()
    with pytest.raises(CacheError, match="another channel scale"):
        writer.write_scale_channel(scale * np.float32(2))


def test_float_sets_have_no_channel_scale(done):
    assert done.scale_channel() is None
    with pytest.raises(CacheError, match="float16 set has no channel scale"):
        done.write_scale_channel(np.ones(4, np.float32))


def test_a_kill_between_the_two_files_is_made_good(spec, content, done):
    (done.folder / "shards.json").unlink()
    again = FeatureSetWriter.create(done.folder, spec, plan_of(spec, content), "m")
    assert again.shards == done.shards
