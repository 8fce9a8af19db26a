import multiprocessing
import pickle
import shutil
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest

from featcache.cache import feature_set as module
from featcache.cache.feature_set import FeatureSet
from featcache.cache.format import SetPlan, ShardPlan, plan_values, spec_values
from featcache.config import write_json
from featcache.errors import CacheError, ShardError


def make(build, folder, *, modality="image", rows=11, failed=(5,), rows_per_shard=4, **changes):
    spec = build.make_spec(modality, pooled_dim=3, **changes)
    content = build.make_content(spec, rows, failed=failed)
    build.write_set(folder, spec, content, rows_per_shard=rows_per_shard)
    return spec, content, FeatureSet.open(folder)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_in_the_order_asked_for(build, tmp_path, modality, dtype):
    spec, content, features = make(build, tmp_path / "set", modality=modality, dtype=dtype)
    rows = np.array([10, 0, 5, 5, 3, 4, 9])
    tokens = features.read_tokens(rows, verify=True)
    expected = build.expected_tokens(spec, content, rows.tolist())
    assert tokens.dtype == dtype
    assert tokens.reshape(-1, spec.dim).tobytes() == expected.tobytes()
    assert tokens.ndim == (2 if modality == "text" else 3)
    assert features.lengths.tolist() == content.lengths.tolist()
    assert features.keys == content.keys
    assert features.row_of["key-7"] == 7
    assert np.flatnonzero(~features.valid).tolist() == [5]
    pooled = features.pooled(rows)
    assert not pooled[2:4].any()
    assert pooled[0].tobytes() == content.pooled[10].astype(np.float16).tobytes()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_int8_rows_come_back_as_floats(build, tmp_path, modality):
    spec, content, features = make(build, tmp_path / "set", modality=modality, dtype="int8")
    rows = np.arange(11)[::-1]
    tokens = features.read_tokens(rows, verify=True)
    expected = np.concatenate(
        [content.tokens[row] * (row not in content.failed) for row in rows.tolist()]
    )
    assert tokens.dtype == np.float32
    assert np.abs(tokens.reshape(-1, spec.dim) - expected).max() < 0.02
    assert features.tokens_map(0).dtype == np.int8
    assert features.scale_map(0).shape == features.tokens_map(0).shape[:-1]


def test_maps_places_and_offsets_lead_to_the_same_tokens(build, tmp_path):
    spec, content, features = make(build, tmp_path / "set", modality="text")
    shards, within = features.shard_of(np.arange(11))
    assert shards.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert within.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert features.starts.tolist() == [0, 4, 8, 11]
    for row in range(11):
        shard, first = int(shards[row]), int(features.offsets[row])
        mapped = features.tokens_map(shard)[first : first + features.lengths[row]]
        place = features.token_place(shard)
        content_bytes = place.path.read_bytes()[place.offset :]
        width = place.shape[-1] * place.dtype.itemsize
        read = content_bytes[first * width : (first + int(features.lengths[row])) * width]
        assert mapped.tobytes() == read
        assert read == build.expected_tokens(spec, content, [row]).tobytes()
    assert features.populate(0) in (True, False)
    with pytest.raises(ValueError, match="read-only"):
        features.tokens_map(0)[0, 0] = 1


@pytest.mark.parametrize("rows", [[-1], [11], [0, 2**40]])
def test_rows_outside_the_set_are_refused(build, tmp_path, rows):
    _, _, features = make(build, tmp_path / "set")
    for read in (features.read_tokens, features.pooled, features.shard_of):
        with pytest.raises(CacheError, match="the set has 11"):
            read(np.array(rows))


def test_no_rows_give_no_tokens(build, tmp_path):
    _, _, features = make(build, tmp_path / "set")
    none = np.zeros(0, dtype=np.int64)
    assert features.read_tokens(none).shape == (0, 3, 4)
    assert features.pooled(none).shape == (0, 3)


def test_encoder_without_pooled_vectors_says_so(build, tmp_path):
    spec = build.make_spec()
    build.write_set(tmp_path / "set", spec, build.make_content(spec, 4))
    features = FeatureSet.open(tmp_path / "set")
    with pytest.raises(CacheError, match="no pooled vector"):
        features.pooled(np.array([0]))
    with pytest.raises(CacheError, match="has no scales"):
        features.scale_map(0)
    assert features.scale_channel is None
    assert features.quality == {}


def test_unfinished_set_is_refused_or_read_in_part(build, tmp_path):
    _, content, _ = make(build, tmp_path / "set")
    (tmp_path / "set" / "shard-000001.h5").unlink()
    with pytest.raises(CacheError, match="1 of 3 shards are missing") as caught:
        FeatureSet.open(tmp_path / "set")
    assert caught.value.fix.startswith("featcache extract --backbone tiny")
    part = FeatureSet.open(tmp_path / "set", allow_partial=True)
    assert part.keys == content.keys[:4] + content.keys[8:]
    assert part.num_rows == 7


def test_cut_shard_is_refused_by_name(build, tmp_path):
    make(build, tmp_path / "set")
    path = tmp_path / "set" / "shard-000001.h5"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match="its header says") as caught:
        FeatureSet.open(tmp_path / "set")
    assert "shard-000001.h5" in caught.value.where


def test_shard_of_another_set_or_place_is_refused(build, tmp_path):
    make(build, tmp_path / "set")
    make(build, tmp_path / "other", batch_size=9)
    path = tmp_path / "set" / "shard-000001.h5"
    shutil.copy(tmp_path / "other" / "shard-000001.h5", path)
    with pytest.raises(ShardError, match="not the planned one: its fingerprint"):
        FeatureSet.open(tmp_path / "set")
    shutil.copy(tmp_path / "set" / "shard-000000.h5", path)
    with pytest.raises(ShardError, match="not the planned one: its keys"):
        FeatureSet.open(tmp_path / "set")


def test_damaged_row_is_found_when_asked_to_verify(build, tmp_path):
    _, _, features = make(build, tmp_path / "set")
    place = features.token_place(1)
    with place.path.open("r+b") as file:
        file.seek(place.offset + 24 + 2)
        file.write(b"\x77")
    assert features.read_tokens(np.array([5])).shape == (1, 3, 4)
    with pytest.raises(ShardError, match=r"row 1 \(`key-5`\) is damaged"):
        features.read_tokens(np.array([4, 5]), verify=True)


def test_damaged_pooled_vectors_are_found_when_first_read(build, tmp_path):
    _, _, features = make(build, tmp_path / "set")
    place = features.shards[2].header.places["pooled"]
    with features.shards[2].path.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x77\x77")
    assert features.pooled(np.array([0, 5])).shape == (2, 3)
    with pytest.raises(ShardError, match="`pooled` is damaged"):
        features.pooled(np.array([0, 9]))


def test_rewritten_shard_is_refused_with_the_reason(build, tmp_path):
    make(build, tmp_path / "set")
    path = tmp_path / "set" / "shard-000000.h5"
    with h5py.File(path, "r") as old, h5py.File(tmp_path / "new.h5", "w") as new:
        for name in old:
            chunks = {"chunks": old[name].shape, "compression": "gzip"}
            new.create_dataset(name, data=old[name][:], **chunks)
        new.attrs["featcache"] = old.attrs["featcache"]
    (tmp_path / "new.h5").replace(path)
    with pytest.raises(ShardError, match="another HDF5 tool rewrote"):
        FeatureSet.open(tmp_path / "set")


def test_set_survives_pickling_and_notices_replaced_shards(build, tmp_path):
    _, content, features = make(build, tmp_path / "set")
    features.read_tokens(np.arange(11))
    copy = pickle.loads(pickle.dumps(features))
    assert copy.keys == content.keys
    assert (
        copy.read_tokens(np.arange(11)).tobytes() == features.read_tokens(np.arange(11)).tobytes()
    )
    again = pickle.loads(pickle.dumps(features))
    path = tmp_path / "set" / "shard-000000.h5"
    block = bytearray(path.read_bytes())
    block[8000] ^= 1
    path.write_bytes(block)
    with pytest.raises(ShardError, match="replaced or changed"):
        again.read_tokens(np.array([0]))


def test_maps_are_given_up_beyond_their_bound(build, tmp_path, monkeypatch):
    spec, content, features = make(build, tmp_path / "set")
    monkeypatch.setattr(module, "MAX_MAPS", 2)
    kept = features.tokens_map(0)
    rows = np.arange(11)
    assert (
        features.read_tokens(rows, verify=True).tobytes()
        == build.expected_tokens(spec, content, rows).tobytes()
    )
    assert len(features._maps) == 2
    assert kept.shape == (4, 3, 4)
    assert kept.sum() == features.tokens_map(0).sum()


def read_rows(features, rows, out):
    out.put([int(features.read_tokens(np.array([row]))[0, 0, 0]) for row in rows])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read_the_right_rows(build, tmp_path, method):
    spec = build.make_spec()
    content = build.make_content(spec, 24)
    content.tokens = [np.full((3, 4), row, np.float32) for row in range(24)]
    build.write_set(tmp_path / "set", spec, content)
    features = FeatureSet.open(tmp_path / "set")
    features.read_tokens(np.arange(24))  # touched in the parent before
    context = multiprocessing.get_context(method)
    out = context.Queue()
    rows = np.random.default_rng(0).permutation(24).tolist()
    workers = [
        context.Process(target=read_rows, args=(features, rows[part::2], out)) for part in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(map(tuple, found)) == sorted([tuple(rows[0::2]), tuple(rows[1::2])])


def test_many_shards_need_few_descriptors(build, tmp_path):
    _, _, features = make(build, tmp_path / "set", rows=100, rows_per_shard=1)
    expected = features.read_tokens(np.arange(100), verify=True).tobytes()
    program = f"""
        import resource, pathlib, sys
        import numpy as np
        from featcache.cache.check import info
        from featcache.cache.feature_set import FeatureSet
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        features = FeatureSet.open(pathlib.Path({str(tmp_path / "set")!r}))
        rows = np.random.default_rng(0).permutation(100)
        tokens = features.read_tokens(rows, verify=True)
        assert features.pooled(rows).shape == (100, 3)
        assert info(features.folder)["complete_shards"] == 100
        sys.stdout.buffer.write(tokens[np.argsort(rows)].tobytes())
        """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True
    )
    assert child.stdout == expected


def test_opening_costs_no_descriptor_and_little_time(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 50)
    build.write_set(tmp_path / "set", spec, content, rows_per_shard=1)
    started = time.thread_time()
    FeatureSet.open(tmp_path / "set")
    # 1,000 shards take 0.07 to 0.15 s; a twentieth of them, fifty times slower, is below this.
    assert time.thread_time() - started < 0.5


def test_int8_shards_must_share_their_scale(build, tmp_path):
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 8)
    writer = build.start_set(tmp_path / "set", spec, content)
    for plan in writer.shards:
        content.tokens[0] = content.tokens[0] * 3
        build.write_shard(writer.folder, spec, content, plan)
    with pytest.raises(ShardError, match="another channel scale"):
        FeatureSet.open(tmp_path / "set").read_tokens(np.array([0]))


def test_key_that_stands_in_two_shards_is_refused(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 2)
    plans = [ShardPlan(number, content.keys, content.keys) for number in range(2)]
    folder = tmp_path / "set"
    folder.mkdir()
    write_json(folder / "feature_set.json", spec_values(spec))
    write_json(folder / "shards.json", plan_values(SetPlan("m", plans)))
    for plan in plans:
        build.write_shard(folder, spec, content, plan)
    with pytest.raises(ShardError, match="2 keys stand in the set twice"):
        FeatureSet.open(folder).row_of  # noqa: B018


def test_reading_leaves_no_descriptor_open(build, tmp_path, open_files):
    _, _, features = make(build, tmp_path / "set")
    features.read_tokens(np.arange(11), verify=True)
    features.pooled(np.arange(11))
    assert features.valid.shape == (11,)
    assert open_files(tmp_path) == 0
