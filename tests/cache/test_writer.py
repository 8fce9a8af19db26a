import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from featcache.cache.shard import Shard
from featcache.cache.writer import ShardWriter
from featcache.errors import CacheError

KINDS = [
    ("image", "float16"),
    ("image", "float32"),
    ("image", "int8"),
    ("text", "float16"),
    ("text", "int8"),
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("modality", "dtype"), KINDS)
def test_bytes_do_not_depend_on_the_order_of_writes(build, tmp_path, modality, dtype):
    spec = build.make_spec(modality, dtype=dtype, pooled_dim=3)
    content = build.make_content(spec, 12, failed={2})
    orders = [
        [list(range(12))],
        [[row] for row in reversed(range(12))],
        [[7, 3, 4, 5], [11, 0, 1], [2], [10, 8, 9, 6]],
        [[3, 4], [3, 4, 3], list(range(12))],  # rows written again
    ]
    files = []
    for number, batches in enumerate(orders):
        writer = build.start_set(tmp_path / str(number), spec, content, rows_per_shard=16)
        path = build.write_shard(writer.folder, spec, content, writer.shards[0], batches=batches)
        files.append(path.read_bytes())
    assert len(set(files)) == 1


def test_row_written_before_it_failed_is_zeros(build, tmp_path):
    spec = build.make_spec("text", dtype="int8", pooled_dim=3)
    content = build.make_content(spec, 4)
    scale = build.channel_scale(spec, content)
    files = []
    for number, failed in enumerate([set(), {2}]):
        writer = build.start_set(tmp_path / str(number), spec, content)
        content.failed = failed
        plan = writer.shards[0]
        with ShardWriter(writer.folder, spec, plan, content.lengths, scale) as shard:
            build.fill(shard, content, [[0, 1, 2, 3]])
            if not failed:
                shard.quarantine(2)
            files.append(shard.finish().read_bytes())
    assert files[0] == files[1]


def test_rows_are_checked_with_what_was_in_memory(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.write_set(tmp_path / "set", spec, content)
    sums = Shard.open(writer.folder / "shard-000000.h5").read("checksums")
    expected = [xxhash.xxh3_64_intdigest(row.astype("<f2").tobytes()) for row in content.tokens]
    assert sums.tolist() == expected


def test_file_has_its_whole_room_before_the_first_row(build, tmp_path):
    spec = build.make_spec(dim=1024, num_tokens=64)
    content = build.make_content(spec, 16)
    writer = build.start_set(tmp_path / "set", spec, content, rows_per_shard=16)
    with ShardWriter(writer.folder, spec, writer.shards[0]):
        (partial,) = writer.folder.glob("*.partial-*")
        status = partial.stat()
        assert status.st_size > 16 * spec.row_bytes
        assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("stop", [KeyboardInterrupt, CacheError, MemoryError])
def test_an_exception_leaves_nothing_behind(build, tmp_path, stop):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)

    def stopped():
        with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
            build.fill(shard, content, [[0]])
            raise stop("stop")

    with pytest.raises(stop):
        stopped()
    assert names(writer.folder) == ["feature_set.json", "shards.json"]


@pytest.mark.parametrize("moment", ["fsync", "pwrite", "replace"])
def test_killed_writer_leaves_no_complete_shard(build, tmp_path, moment):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    program = f"""
        import os, signal, pathlib
        import numpy as np
        from featcache.cache.writer import FeatureSetWriter, ShardWriter

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        writer = FeatureSetWriter.open(pathlib.Path({str(writer.folder)!r}))
        with ShardWriter(writer.folder, writer.spec, writer.shards[0]) as shard:
            if {moment!r} == "replace":
                pathlib.Path.replace = die
            else:
                os.{moment} = die
            shard.write(np.arange(4), np.ones((4, 3, 4), np.float32))
            shard.finish()
        """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert writer.missing() == [0]
    assert len(list(writer.folder.glob("*.partial-*"))) == 1
    assert writer.remove_dead_partials() == 1
    build.write_shard(writer.folder, spec, content, writer.shards[0])
    assert writer.missing() == []


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_no_numbers_are_never_stored(build, tmp_path, dtype, bad):
    spec = build.make_spec(dtype=dtype)
    content = build.make_content(spec, 4)
    scale = build.channel_scale(spec, content)
    writer = build.start_set(tmp_path / "set", spec, content)
    content.tokens[2][1, 3] = bad
    with ShardWriter(writer.folder, spec, writer.shards[0], None, scale) as shard:
        with pytest.raises(CacheError, match=r"gave -?(inf|nan) in channel 3 of row `key-2`"):
            build.fill(shard, content, [[3, 2, 0, 1]])
        with pytest.raises(CacheError, match="4 rows of the shard were never written"):
            shard.finish()


def test_float16_overflow_names_encoder_row_channel_and_value(build, tmp_path):
    spec = build.make_spec(pooled_dim=2)
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    content.tokens[1][2, 3] = 70_000
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        message = "`tiny` gave 70000 in channel 3 of row `key-1`, which float16 cannot hold .*65504"
        with pytest.raises(CacheError, match=message) as caught:
            build.fill(shard, content, [[0, 1, 2, 3]])
    assert "--dtype float32" in caught.value.fix


def test_pooled_overflow_is_refused_too(build, tmp_path):
    spec = build.make_spec(dtype="float32", pooled_dim=2)
    content = build.make_content(spec, 4)
    content.pooled[3, 1] = -1e6
    writer = build.start_set(tmp_path / "set", spec, content)
    with (
        ShardWriter(writer.folder, spec, writer.shards[0]) as shard,
        pytest.raises(CacheError, match=r"gave -1e\+06 in channel 1 of row `key-3`"),
    ):
        build.fill(shard, content, [[0, 1, 2, 3]])


def test_ragged_overflow_names_the_right_row(build, tmp_path):
    spec = build.make_spec("text")
    content = build.make_content(spec, 4)
    content.tokens[2] = np.full((3, 4), 1, np.float32)
    content.tokens[2][0, 0] = 1e9
    content.tokens[1] = np.zeros((0, 4), np.float32)
    writer = build.start_set(tmp_path / "set", spec, content)
    with (
        ShardWriter(writer.folder, spec, writer.shards[0], content.lengths) as shard,
        pytest.raises(CacheError, match="of row `key-2`"),
    ):
        build.fill(shard, content, [[3, 1, 2, 0]])


def test_int8_scale_overflow_is_refused(build, tmp_path):
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 4)
    scale = build.channel_scale(spec, content)
    content.tokens[0][0, 0] = 1e30
    writer = build.start_set(tmp_path / "set", spec, content)
    with (
        ShardWriter(writer.folder, spec, writer.shards[0], None, scale) as shard,
        pytest.raises(CacheError, match=r"1e\+30 in channel 0 of row `key-0`, which int8"),
    ):
        build.fill(shard, content, [[0, 1, 2, 3]])


def test_wrong_shapes_and_rows_are_refused(build, tmp_path):
    spec = build.make_spec(pooled_dim=2)
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    rows, tokens, pooled = np.arange(2), np.ones((2, 3, 4), np.float32), np.ones((2, 2), np.float16)
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        with pytest.raises(CacheError, match=r"tokens of float32 \(2, 3, 5\), the set needs"):
            shard.write(rows, np.ones((2, 3, 5), np.float32), pooled)
        with pytest.raises(CacheError, match="tokens of int64"):
            shard.write(rows, tokens.astype(np.int64), pooled)
        with pytest.raises(CacheError, match="pooled vectors of None"):
            shard.write(rows, tokens)
        with pytest.raises(CacheError, match=r"pooled vectors of \(2, 1\)"):
            shard.write(rows, tokens, pooled[:, :1])
        with pytest.raises(CacheError, match="a row is outside a shard of 4 rows: 3 to 4"):
            shard.write(rows + 3, tokens, pooled)
        with pytest.raises(CacheError, match="a row is outside"):
            shard.write(rows - 1, tokens, pooled)
        with pytest.raises(CacheError, match="row 4 is outside"):
            shard.quarantine(4)


def test_lengths_and_scales_must_go_with_the_spec(build, tmp_path):
    image, text = build.make_spec(), build.make_spec("text")
    small = build.make_spec(dtype="int8")
    content = build.make_content(image, 4)
    plan = build.start_set(tmp_path / "set", image, content).shards[0]
    lengths, scale = np.full(4, 2), np.ones(4, np.float32)
    cases = [
        (image, lengths, None, "takes no lengths"),
        (text, None, None, "needs lengths"),
        (text, lengths[:3], None, "4 numbers from 0 to 9"),
        (text, lengths - 3, None, "4 numbers from 0 to 9"),
        (text, lengths + 8, None, "4 numbers from 0 to 9"),
        (image, None, scale, "float16 set takes no channel scale"),
        (small, None, None, "int8 set needs a channel scale"),
        (small, None, scale[:3], "4 positive, finite numbers"),
        (small, None, scale * np.float32(0), "4 positive, finite numbers"),
    ]
    for spec, *arguments, message in cases:
        with pytest.raises(CacheError, match=message):
            ShardWriter(tmp_path / "set", spec, plan, *arguments)
    assert names(tmp_path / "set") == ["feature_set.json", "shards.json"]


def test_rows_that_were_never_written_are_an_error(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        build.fill(shard, content, [[0, 2, 3]])
        with pytest.raises(CacheError, match=r"1 rows .* never written, the first is `key-1`"):
            shard.finish()
    assert writer.missing() == [0]


def test_full_disk_is_said_at_the_start(build, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    spec = build.make_spec(dim=1000, num_tokens=1000)
    content = build.make_content(build.make_spec(), 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match=r"disk is full.*next shard needs 8\.0 MB"):
        ShardWriter(writer.folder, spec, writer.shards[0])
    assert names(writer.folder) == ["feature_set.json", "shards.json"]


def test_folder_that_cannot_be_written_is_explained(build, tmp_path):
    spec = build.make_spec()
    plan = build.start_set(tmp_path / "set", spec, build.make_content(spec, 4)).shards[0]
    with pytest.raises(CacheError, match="cannot be written: No such file or directory"):
        ShardWriter(tmp_path / "absent", spec, plan)


@pytest.mark.parametrize(
    ("array", "message"),
    [("tokens", r"`tokens` \(row `key-2`\)"), ("pooled", "`pooled`"), (None, "another header")],
)
def test_disk_that_gives_other_bytes_back_is_noticed(build, tmp_path, monkeypatch, array, message):
    spec = build.make_spec(pooled_dim=2)
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        build.fill(shard, content, [[0, 1, 2, 3]])
        place = 30 if array is None else shard._places[array].offset
        place += 2 * spec.row_bytes if array == "tokens" else 0
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"\x55", place))
        with pytest.raises(CacheError, match=message):
            shard.finish()
    assert names(writer.folder) == ["feature_set.json", "shards.json"]


def test_two_writers_of_one_process_do_not_share_a_partial(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        with pytest.raises(CacheError, match="this process writes the same shard already"):
            ShardWriter(writer.folder, spec, writer.shards[0])
        build.fill(shard, content, [[0, 1, 2, 3]])
        shard.finish()
        with ShardWriter(writer.folder, spec, writer.shards[0]):
            pass
    assert writer.missing() == []


def test_two_processes_may_make_the_same_shard(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 4)
    writer = build.start_set(tmp_path / "set", spec, content)
    with ShardWriter(writer.folder, spec, writer.shards[0]) as shard:
        child = os.fork()
        if child == 0:
            build.write_shard(writer.folder, spec, content, writer.shards[0])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        path = writer.folder / "shard-000000.h5"
        first = path.read_bytes()
        build.fill(shard, content, [[0, 1, 2, 3]])
        shard.finish()
    assert path.read_bytes() == first


def test_batches_may_come_from_another_thread(build, tmp_path):
    spec = build.make_spec("text", pooled_dim=3)
    content = build.make_content(spec, 40)
    writer = build.start_set(tmp_path / "set", spec, content, rows_per_shard=64)
    with ShardWriter(writer.folder, spec, writer.shards[0], content.lengths) as shard:
        halves = ([[row] for row in range(20)], [[row] for row in range(20, 40)])
        threads = [
            threading.Thread(target=build.fill, args=(shard, content, half)) for half in halves
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shard.finish()
    assert list(Shard.open(writer.folder / "shard-000000.h5").damage()) == []


def test_no_time_is_stored(build, tmp_path):
    spec = build.make_spec("text", dtype="int8", pooled_dim=3)
    writer = build.write_set(tmp_path / "set", spec, build.make_content(spec, 4))
    content = (writer.folder / "shard-000000.h5").read_bytes()
    flags = [content[found.start() + 5] for found in re.finditer(b"OHDR", content)]
    assert len(flags) == 9  # object headers of the root group and of eight arrays
    assert not any(flag & 0x20 for flag in flags)


@pytest.mark.parametrize(("modality", "dtype"), KINDS)
def test_file_is_laid_out_as_the_format_page_says(build, tmp_path, modality, dtype):
    spec = build.make_spec(modality, dtype=dtype, pooled_dim=3)
    content = build.make_content(spec, 4)
    writer = build.write_set(tmp_path / "set", spec, content)
    path = writer.folder / "shard-000000.h5"
    places = Shard.open(path).header.places
    with h5py.File(path, "r") as file:
        assert file.userblock_size == 8192
        assert list(file.attrs) == ["featcache"]
        assert file.attrs.get_id("featcache").get_type().get_size() == 2048
        assert set(file) == set(places)
        for name, place in places.items():
            array = file[name]
            layout = array.id.get_create_plist()
            assert array.id.get_offset() == place.offset
            assert place.offset % 4096 == 0
            assert layout.get_layout() == h5py.h5d.CONTIGUOUS
            assert layout.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
            assert layout.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
            assert not layout.get_obj_track_times()


def test_network_file_system_without_locks_is_no_obstacle(build, tmp_path):
    source = tmp_path / "nolock.c"
    source.write_text("#include <errno.h>\nint flock(int f, int o) { errno = 37; return -1; }\n")
    library = tmp_path / "nolock.so"
    made = subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=False)
    if made.returncode != 0:
        pytest.skip("no C compiler")
    spec = build.make_spec()
    writer = build.start_set(tmp_path / "set", spec, build.make_content(spec, 4))
    program = f"""
        import pathlib, numpy as np
        from featcache.cache.writer import FeatureSetWriter, ShardWriter
        from featcache.cache.check import verify_feature_set
        writer = FeatureSetWriter.open(pathlib.Path({str(writer.folder)!r}))
        with ShardWriter(writer.folder, writer.spec, writer.shards[0]) as shard:
            shard.write(np.arange(4), np.ones((4, 3, 4), np.float32))
            shard.finish()
        assert verify_feature_set(writer.folder).ok
        """
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment)
    assert Path(writer.folder / "shard-000000.h5").exists()
