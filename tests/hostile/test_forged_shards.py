"""Files with right checksums, made by somebody who read the format page."""

import json
import os
import re
import time

import h5py
import numpy as np
import pytest
import xxhash
from hostile.lookup3 import lookup3, sealed_part

from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.cache.header import ARRAY_ORDER, pack_header
from featcache.cache.shard import Shard, digest_rest
from featcache.config import canonical_json
from featcache.errors import ShardError


@pytest.fixture
def path(build, tmp_path):
    spec = build.make_spec("text", dtype="int8", pooled_dim=3)
    content = build.make_content(spec, 5)
    return build.write_set(tmp_path / "set", spec, content, rows_per_shard=5).folder / (
        "shard-000000.h5"
    )


def forge(path, change):
    """Change the header's values and make every checksum of it right."""
    block = path.read_bytes()[:8192]
    values = json.loads(block[16 : 16 + int.from_bytes(block[12:16], "little")])
    values = change(values) or values
    names = [name for name in ARRAY_ORDER if name in values["arrays"] and name != "tokens"]
    header = pack_header(canonical_json(values).encode(), [1] * (len(names) + 1))
    with path.open("r+b") as file:
        file.write(header.ljust(8192, b"\0"))


def place(name, **changes):
    return lambda values: values["arrays"][name].update(changes)


LIES = {
    "tokens beyond the end": place("tokens", offset=2**40),
    "tokens at a negative place": place("tokens", offset=-8192),
    "offset that overflows 64 bits": place("tokens", offset=2**64),
    "sum that overflows 64 bits": place("tokens", offset=2**64 - 4096),
    "product that overflows 64 bits": place("tokens", shape=[2**32, 2**32]),
    "product that overflows to the truth": place("tokens", shape=[2**62, 4]),
    "axis longer than the file": place("tokens", shape=[10**9, 4]),
    "tokens over the header": place("tokens", offset=0),
    "tokens over other arrays": place("pooled", offset=20480),
    "more keys than there are": place("keys", shape=[10**6]),
    "object type": place("keys", dtype="object"),
    "pointer type": place("keys", dtype="O8"),
    "structured type": place("keys", dtype="f4,f4"),
    "shape that is no list": place("tokens", shape="3"),
    "nested shape": place("tokens", shape=[[3], 4]),
    "shape of floats": place("tokens", shape=[1e300, 4]),
    "four axes": place("tokens", shape=[1, 1, 1, 1]),
    "array that the format does not know": lambda v: v["arrays"].update(evil=v["arrays"]["keys"]),
    "size that is not the file's": lambda v: v.update(file_size=v["file_size"] + 1),
    "more keys in the JSON": lambda v: v.update(link="http://example.org"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_refused_at_once(path, lie):
    forge(path, LIES[lie])
    started = time.perf_counter()
    with pytest.raises(ShardError, match="header"):
        Shard.open(path)
    assert time.perf_counter() - started < 5


def test_zero_axes_do_not_hide_huge_ones(path):
    forge(path, place("tokens", shape=[0, 10**30]))
    with pytest.raises(ShardError, match="more than a file"):
        Shard.open(path)


def test_exchanged_arrays_fail_their_checksum(path):
    header = Shard.open(path).header

    def exchange(values):
        arrays = values["arrays"]
        keys, valid = arrays["keys"]["offset"], arrays["valid"]["offset"]
        arrays["keys"]["offset"], arrays["valid"]["offset"] = valid, keys

    forge(path, exchange)
    shard = Shard.open(path)
    assert shard.header.places["keys"].offset == header.places["valid"].offset
    with pytest.raises(ShardError, match="`keys` is damaged"):
        shard.read("keys")


def test_forged_length_of_the_json_cannot_reach_beyond_the_block(path):
    with path.open("r+b") as file:
        file.seek(12)
        file.write((2**32 - 1).to_bytes(4, "little"))
    with pytest.raises(ShardError, match="its length says 4294967295 bytes"):
        Shard.open(path)


def reseal(path):
    """Make the file's size, its attribute and every checksum right, whatever else was changed."""
    content = path.read_bytes()
    old = content[16 : 16 + int.from_bytes(content[12:16], "little")]
    values = json.loads(old)
    values["file_size"] = path.stat().st_size
    text = canonical_json(values).encode()
    place = content.index(old, 8192)
    if text != old:  # libhdf5 has a checksum over the attribute, too
        first, end = sealed_part(content, place, 2048)
        content = content[:place] + text.ljust(2048, b"\0") + content[place + 2048 :]
        seal = lookup3(content[first:end]).to_bytes(4, "little")
        path.write_bytes(content[:end] + seal + content[end + 4 :])
    names = [name for name in ARRAY_ORDER if name in values["arrays"] and name != "tokens"]

    def seal(digests):
        with path.open("r+b") as file:
            file.write(pack_header(text, digests).ljust(8192, b"\0"))

    seal([0] * (len(names) + 1))
    header, content = Shard.open(path).header, path.read_bytes()
    places = [header.places[name] for name in names]
    arrays = [content[one.offset : one.offset + one.size_bytes] for one in places]
    descriptor = os.open(path, os.O_RDONLY)
    rest = digest_rest(descriptor, header.end, header.file_size, header.places)
    os.close(descriptor)
    seal([*map(xxhash.xxh3_64_intdigest, arrays), rest])


def hard_link_to_itself(file, _):
    file["loop"] = file["/"]


def soft_links_in_a_circle(file, _):
    del file["tokens"]
    file["tokens"] = h5py.SoftLink("/tokens")


def external_link(file, secret):
    del file["tokens"]
    file["tokens"] = h5py.ExternalLink(str(secret), "/tokens")


def external_storage(file, secret):
    del file["tokens"]
    file.create_dataset("tokens", (2, 4), "i1", external=[(str(secret), 0, 8)])


def virtual_array(file, secret):
    del file["tokens"]
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "tokens", (3,))
    file.create_virtual_dataset("tokens", layout)


def texts_of_any_length(file, _):
    del file["keys"]
    file.create_dataset("keys", data=["a"] * 4, dtype=h5py.string_dtype())


def references(file, _):
    del file["keys"]
    file.create_dataset("keys", data=[file.ref] * 4, dtype=h5py.ref_dtype)


def groups_that_hold_each_other(file, _):
    del file["valid"]
    inner = file.create_group("valid/inner")
    inner["outer"] = file["valid"]


def more_rows_than_bytes(file, _):
    del file["tokens"]
    file.create_dataset("tokens", (2**40, 4), "i1", chunks=(1024, 4))


TRICKS = [
    groups_that_hold_each_other,
    more_rows_than_bytes,
    hard_link_to_itself,
    soft_links_in_a_circle,
    external_link,
    external_storage,
    virtual_array,
    texts_of_any_length,
    references,
]


@pytest.mark.parametrize("trick", TRICKS)
def test_hdf5_tricks_do_not_reach_the_reader_and_are_named_by_verify(path, tmp_path, trick):
    """With right checksums all through: what libhdf5 would follow has no say in what we read."""
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["tokens"] = np.ones(3)

    def read():
        features = FeatureSet.open(path.parent)
        return features.keys, features.read_tokens(np.arange(4)).tobytes()

    truth = read()
    size = path.stat().st_size
    with h5py.File(path, "r+") as file:
        trick(file, secret)
    report = verify_feature_set(path.parent)
    (problem,) = report.problems
    if path.stat().st_size == size:
        assert problem.array == "rest"
    else:
        assert "its header says" in problem.what
    reseal(path)
    assert read() == truth
    (problem,) = verify_feature_set(path.parent).problems
    assert (problem.shard, problem.array) == (0, None)
    assert re.search("HDF5 (sees|names)|libhdf5 cannot read it", problem.what)


@pytest.mark.parametrize("kept", [0, 1, 7, 20, 47])
def test_a_broken_superblock_is_named_by_verify(path, kept):
    content = bytearray(path.read_bytes())
    assert content[8192:8200] == b"\x89HDF\r\n\x1a\n"
    content[8192 + kept : 8192 + 48] = b"\xff" * (48 - kept)
    path.write_bytes(content)
    (problem,) = verify_feature_set(path.parent).problems
    assert problem.array == "rest"
    reseal(path)
    (problem,) = verify_feature_set(path.parent).problems
    assert "libhdf5 cannot read it" in problem.what


def test_a_pickle_inside_is_never_opened(path):
    """Nothing but fixed-size numbers and text is ever made from a shard's bytes."""
    canary = b"cos\nsystem\n(S'touch canary'\ntR."
    header = Shard.open(path).header
    keys = header.places["keys"]
    content = canary[: keys.size_bytes].ljust(keys.size_bytes, b"\0")
    block = path.read_bytes()
    digests = {**header.digests, "keys": xxhash.xxh3_64_intdigest(content)}
    length = int.from_bytes(block[12:16], "little")
    with path.open("r+b") as file:
        file.write(pack_header(block[16 : 16 + length], list(digests.values())))
        file.seek(keys.offset)
        file.write(content)
    with pytest.raises(ShardError, match="not those that the header names"):
        Shard.open(path).read_keys()
