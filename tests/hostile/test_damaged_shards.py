import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featcache.cache.check import check_shard, verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.cache.format import read_plan, read_spec
from featcache.cache.shard import Shard
from featcache.errors import ShardError

MUTATIONS = 10_000
KINDS = [("image", "float16"), ("image", "int8"), ("text", "float16"), ("text", "int8")]


def make(build, folder, modality, dtype):
    spec = build.make_spec(modality, dtype=dtype, pooled_dim=3)
    content = build.make_content(spec, 5, failed={1})
    return build.write_set(folder, spec, content, rows_per_shard=8).folder


def mutation(rng, size, header_end):
    """A place, and bytes to be XORed there; at least one bit of them is set."""
    place = int(rng.integers(header_end if rng.random() < 0.4 else size))
    length = int(rng.choice([1, 1, 1, 2, 4, 16]))
    change = rng.integers(0, 256, length, dtype=np.uint8)
    if rng.random() < 0.5:
        change = (1 << rng.integers(0, 8, length)).astype(np.uint8)
    change[0] |= 1
    return place, change[: size - place].tobytes()


def apply(descriptor, place, change):
    """XOR; doing it twice undoes it."""
    old = os.pread(descriptor, len(change), place)
    new = bytes(a ^ b for a, b in zip(old, change, strict=True))
    os.pwrite(descriptor, new, place)


def is_noticed(path):
    try:
        return next(Shard.open(path).damage(), None) is not None
    except ShardError:
        return True


def test_no_mutation_passes_unnoticed_crashes_or_eats_memory(build, tmp_path):
    """10,000 in a process of bounded memory and time that may start, import or run nothing."""
    shards = []
    for modality, dtype in KINDS:
        folder = make(build, tmp_path / f"{modality}-{dtype}", modality, dtype)
        shards.append(str(folder / "shard-000000.h5"))
    script = Path(__file__).with_name("fuzz.py")
    child = subprocess.run(
        [sys.executable, str(script), str(MUTATIONS), "1", *shards],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (child.returncode, child.stderr) == (0, "")
    said = json.loads(child.stdout)
    assert (said["done"], said["sound"], said["missed"]) == (MUTATIONS, [True] * 4, [])


def problems_of(folder, number=0):
    """What `verify` finds in one shard, without libhdf5, which sees only sound ones."""
    plan = read_plan(folder).shards[number]
    return check_shard(folder, read_spec(folder), plan, map)


@pytest.mark.parametrize(("modality", "dtype"), KINDS)
def test_a_flipped_byte_of_a_row_is_named_by_shard_and_key(build, tmp_path, modality, dtype):
    folder = make(build, tmp_path / "set", modality, dtype)
    path = folder / "shard-000000.h5"
    shard = Shard.open(path)
    place = shard.header.places["tokens"]
    ends = shard.read_offsets() * (place.shape[-1] * place.numpy_type.itemsize)
    rng = np.random.default_rng(3)
    flips = rng.integers(path.stat().st_size, size=125).tolist()
    flips += (place.offset + rng.integers(place.size_bytes, size=125)).tolist()
    descriptor = os.open(path, os.O_RDWR)
    for flipped in flips:
        change = bytes([int(rng.integers(1, 256))])
        apply(descriptor, flipped, change)
        found = [(one.shard, one.array, one.key) for one in problems_of(folder)]
        inside = flipped - place.offset
        if 0 <= inside < place.size_bytes:
            row = int(np.searchsorted(ends, inside, side="right")) - 1
            assert found == [(0, "tokens", f"key-{row}")]
        else:
            assert found
            assert all(one[0] == 0 and one[1:] != ("tokens", None) for one in found)
        apply(descriptor, flipped, change)
    os.close(descriptor)
    assert problems_of(folder) == []


def test_each_way_to_lose_a_shard_is_named(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 28)
    folder = build.write_set(tmp_path / "set", spec, content).folder
    other = build.make_spec(weights_sha256="cd" * 32)
    strange = build.write_set(tmp_path / "other", other, content).folder
    path = [folder / f"shard-{number:06d}.h5" for number in range(7)]
    path[0].unlink()
    os.truncate(path[1], path[1].stat().st_size - 200)
    with path[2].open("ab") as file:
        file.write(bytes(200))
    path[3].write_bytes((strange / path[3].name).read_bytes())
    path[4].write_bytes(path[5].read_bytes())
    tokens = Shard.open(path[5]).header.places["tokens"].offset
    descriptor = os.open(path[5], os.O_RDWR)
    os.pwrite(descriptor, bytes(48), tokens + 20)  # from the middle of row 0 to that of row 2
    os.close(descriptor)
    report = verify_feature_set(folder)
    assert report.damaged_shards == [0, 1, 2, 3, 4, 5]
    sentences = [f"{p.shard} {p.key} {p.what}" for p in report.problems]
    for said, pattern in zip(
        sentences,
        [
            "0 None the shard is missing",
            r"1 None the file has \d+ bytes, its header says \d+",
            r"2 None the file has \d+ bytes, its header says \d+",
            "3 None .* not the planned one: its fingerprint is",
            "4 None .* not the planned one: its keys is",
            *(f"5 key-{row} the row's tokens differ" for row in (20, 21, 22)),
        ],
        strict=True,
    ):
        assert re.match(pattern, said)


def test_a_cut_at_any_length_is_named(build, tmp_path):
    folder = make(build, tmp_path / "set", "image", "int8")
    path = folder / "shard-000000.h5"
    content = path.read_bytes()
    for length in np.random.default_rng(4).integers(len(content), size=100).tolist():
        path.write_bytes(content[:length])
        (problem,) = problems_of(folder)
        assert (problem.shard, problem.array) == (0, None)
        assert re.search(f"the file has (only )?{length} bytes", problem.what)


@pytest.mark.parametrize(("modality", "dtype"), KINDS)
def test_mutated_set_gives_the_truth_or_an_error(build, tmp_path, modality, dtype):
    folder = make(build, tmp_path / "set", modality, dtype)
    path = folder / "shard-000000.h5"
    end = Shard.open(path).header.end
    rows = np.arange(5)

    def read():
        features = FeatureSet.open(folder)
        return (
            features.keys,
            features.valid.tolist(),
            features.lengths.tolist(),
            features.pooled(rows).tobytes(),
            features.read_tokens(rows, verify=True).tobytes(),
        )

    truth = read()
    rng = np.random.default_rng([KINDS.index((modality, dtype)), 2])
    descriptor = os.open(path, os.O_RDWR)
    for _ in range(100):
        one = mutation(rng, path.stat().st_size, end)
        apply(descriptor, *one)
        try:
            found = read()
        except ShardError:
            found = truth
        assert found == truth  # an error, or the damage lies where nothing was read
        apply(descriptor, *one)
    os.close(descriptor)


def test_no_truncation_or_growth_passes_unnoticed(build, tmp_path):
    path = make(build, tmp_path / "set", "text", "int8") / "shard-000000.h5"
    content = path.read_bytes()
    sizes = [0, 1, 15, 16, 100, 8191, 8192, *range(8193, len(content), 997), len(content) - 1]
    for size in sizes:
        os.truncate(path, size)
        with pytest.raises(ShardError, match=r"header says|less than a header"):
            Shard.open(path)
        path.write_bytes(content)
    path.write_bytes(content + b"\0")
    with pytest.raises(ShardError, match="header says"):
        Shard.open(path)


@pytest.mark.parametrize("block", [0, 3, 4, 7, 12])
def test_zeroed_blocks_are_noticed_by_verify(build, tmp_path, block):
    folder = make(build, tmp_path / "set", "image", "float16")
    path = folder / "shard-000000.h5"
    content = bytearray(path.read_bytes())
    content[block * 4096 : (block + 1) * 4096] = bytes(4096)
    assert content != path.read_bytes()
    path.write_bytes(content[: path.stat().st_size])
    report = verify_feature_set(folder)
    assert report.damaged_shards == [0]


def test_swapped_halves_of_two_shards_are_noticed(build, tmp_path):
    spec = build.make_spec()
    content = build.make_content(spec, 8)
    folder = build.write_set(tmp_path / "set", spec, content).folder
    first, second = folder / "shard-000000.h5", folder / "shard-000001.h5"
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(a[:20480] + b[20480:])
    assert is_noticed(first)
