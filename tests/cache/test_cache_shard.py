import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from featcache.cache import shard as shard_module
from featcache.cache.header import pack_header
from featcache.cache.shard import Shard, digest_rest
from featcache.errors import ShardError


@pytest.fixture
def path(build, tmp_path):
    spec = build.make_spec("text", pooled_dim=2)
    content = build.make_content(spec, 4, failed={1})
    writer = build.start_set(tmp_path / "set", spec, content)
    return build.write_shard(writer.folder, spec, content, writer.shards[0])


def flip(path, position, bit=1):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def test_arrays_are_read_with_their_checksum(build, path):
    shard = Shard.open(path)
    assert shard.read("valid").tolist() == [True, False, True, True]
    assert shard.read_keys() == [f"key-{row}" for row in range(4)]
    offsets = shard.read_offsets()
    assert offsets[0] == 0
    assert offsets[-1] == shard.header.places["tokens"].shape[0]
    assert list(shard.damage()) == []


@pytest.mark.parametrize("name", ["valid", "keys", "offsets", "pooled", "checksums"])
def test_damaged_array_is_named(path, name):
    flip(path, Shard.open(path).header.places[name].offset)
    shard = Shard.open(path)
    with pytest.raises(ShardError, match=f"`{name}` is damaged"):
        shard.read(name)
    assert name in {one.array for one in shard.damage()}


def test_damaged_row_is_named(path):
    shard = Shard.open(path)
    place = shard.header.places["tokens"]
    for row in (0, 3):
        start = int(shard.read_offsets()[row])
        assert shard.read_offsets()[row + 1] > start, "the test needs rows with tokens"
        flip(path, place.offset + start * 8)
    assert [(one.array, one.row) for one in shard.damage()] == [("tokens", 0), ("tokens", 3)]


@pytest.mark.parametrize("piece_bytes", [1, 20, 24, 60, 2**21])  # a row has 24
@pytest.mark.parametrize("small_bytes", [0, 4096])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_threads_and_pieces_do_not_change_what_is_found(
    build, tmp_path, monkeypatch, modality, small_bytes, piece_bytes
):
    spec = build.make_spec(modality)
    content = build.make_content(spec, 64, seed=1)
    writer = build.start_set(tmp_path / "set", spec, content, rows_per_shard=64)
    path = build.write_shard(writer.folder, spec, content, writer.shards[0])
    shard = Shard.open(path)
    starts = shard.read_offsets() * 8
    broken = [row for row in (0, 1, 31, 63) if starts[row + 1] > starts[row]]
    for row in broken:
        flip(path, shard.header.places["tokens"].offset + int(starts[row + 1]) - 1)
    monkeypatch.setattr(shard_module, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(shard_module, "_UNIT_BYTES", 100)
    monkeypatch.setattr(shard_module, "_SMALL_ROW_BYTES", small_bytes)
    with ThreadPoolExecutor(3) as pool:
        for found in (shard.damage(), shard.damage(pool.map)):
            assert [(one.array, one.row) for one in found] == [("tokens", row) for row in broken]


def test_a_file_that_is_cut_while_it_is_read_is_an_error(path, monkeypatch):
    """Bytes of an earlier piece, still in the buffer, must not pass for those that are gone."""
    shard = Shard.open(path)
    preadv = os.preadv

    def cut(descriptor, buffers, offset):
        os.truncate(path, shard.header.places["tokens"].offset + 8)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ShardError, match="cannot be read: it became shorter meanwhile"):
        list(shard.damage())


def test_damage_between_arrays_is_found(path):
    place = Shard.open(path).header.places["valid"]
    flip(path, place.offset + place.size_bytes)
    assert [one.array for one in Shard.open(path).damage()] == ["rest"]


def test_replaced_shard_is_noticed(build, path):
    shard = Shard.open(path)
    block = bytearray(path.read_bytes())
    block[8191] ^= 1
    path.write_bytes(block)
    with pytest.raises(ShardError, match="replaced or changed"):
        shard.read("keys")


def test_what_is_no_shard_is_refused_in_words(tmp_path):
    with pytest.raises(ShardError, match="missing"):
        Shard.open(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ShardError, match="no regular file"):
        Shard.open(tmp_path / "pipe")
    with pytest.raises(ShardError, match="no regular file"):
        Shard.open(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ShardError, match="only 0 bytes"):
        Shard.open(tmp_path / "empty")


def reseal(path, name, content):
    """Write an array and make all checksums right again, as a forger would."""
    header = Shard.open(path).header
    block = path.read_bytes()
    length = int.from_bytes(block[12:16], "little")
    digests = dict(header.digests)
    digests[name] = xxhash.xxh3_64_intdigest(content)
    with path.open("r+b") as file:
        file.seek(header.places[name].offset)
        file.write(content)
        file.seek(0)
        file.write(pack_header(block[16 : 16 + length], list(digests.values())))


@pytest.mark.parametrize("change", [(0, -1), (1, 2**62), (2, -5), (3, 10**9), (4, 1), (4, 10**9)])
def test_forged_offsets_are_refused(path, change):
    offsets = Shard.open(path).read_offsets().copy()
    offsets[change[0]] = change[1]
    reseal(path, "offsets", offsets.tobytes())
    with pytest.raises(ShardError, match="do not lead through the tokens"):
        Shard.open(path).read_offsets()
    assert "offsets" in {one.array for one in Shard.open(path).damage()}


@pytest.mark.parametrize("key", [b"\xff\xfe\xfdab", b"other"])
def test_forged_keys_are_refused(path, key):
    reseal(path, "keys", key * 4)
    with pytest.raises(ShardError, match="not those that the header names"):
        Shard.open(path).read_keys()


@pytest.mark.parametrize("key", [b"\xff\xfe\xfdab", b"a\nb"])
def test_forged_keys_are_refused_though_their_hash_is_right(path, key):
    reseal(path, "keys", key.ljust(5, b"\0") * 4)
    shard = Shard.open(path)
    joined = b"\n".join([key] * 4)
    header = replace(shard.header, keys_hash=hashlib.sha256(joined).hexdigest()[:32])
    with pytest.raises(ShardError, match="not those that the header names"):
        replace(shard, header=header).read_keys()


def test_forged_flags_are_flags(path):
    reseal(path, "valid", b"\x00\x01\x02\xff")
    assert Shard.open(path).read("valid").tolist() == [False, True, True, True]


def test_rest_leaves_out_header_and_arrays_alone(path):
    header = Shard.open(path).header
    content = bytearray(path.read_bytes())
    keep = np.ones(len(content), dtype=bool)
    keep[: header.end] = False
    for place in header.places.values():
        keep[place.offset : place.offset + place.size_bytes] = False
    expected = xxhash.xxh3_64_intdigest(np.frombuffer(content, np.uint8)[keep].tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert digest_rest(descriptor, header.end, header.file_size, header.places) == expected
    finally:
        os.close(descriptor)


def test_shard_can_be_pickled(path):
    shard = Shard.open(path)
    assert pickle.loads(pickle.dumps(shard)).read_keys() == shard.read_keys()
