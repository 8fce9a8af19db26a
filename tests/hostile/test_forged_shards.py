"""Files with right checksums, made by somebody who read the format page."""

import json
import time

import h5py
import numpy as np
import pytest
import xxhash

from featcache.cache.header import ARRAY_ORDER, pack_header
from featcache.cache.shard import Shard
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


def test_hdf5_links_elsewhere_are_never_followed(path, tmp_path):
    """The reader does not look at HDF5's own structures, and `verify` covers them by a checksum."""
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["tokens"] = np.ones(3)
    before = Shard.open(path).read_keys()
    with h5py.File(path, "r+") as file:
        del file["tokens"]
        file["tokens"] = h5py.ExternalLink(str(secret), "/tokens")
    if path.stat().st_size == claimed_size(path):
        assert Shard.open(path).read_keys() == before
        assert "rest" in {one.array for one in Shard.open(path).damage()}
    else:
        with pytest.raises(ShardError, match="its header says"):
            Shard.open(path)


def claimed_size(path):
    block = path.read_bytes()[:8192]
    return json.loads(block[16 : 16 + int.from_bytes(block[12:16], "little")])["file_size"]


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
