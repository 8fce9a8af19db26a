import os

import numpy as np
import pytest

from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.cache.shard import Shard
from featcache.errors import ShardError

MUTATIONS = 5_000
KINDS = [("image", "float16"), ("image", "int8"), ("text", "float16"), ("text", "int8")]


def make(build, folder, modality, dtype):
    spec = build.make_spec(modality, dtype=dtype, pooled_dim=3)
    content = build.make_content(spec, 5, failed={1})
    return build.write_set(folder, spec, content, rows_per_shard=5).folder


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


@pytest.mark.parametrize(("modality", "dtype"), KINDS)
def test_no_mutation_passes_unnoticed(build, tmp_path, modality, dtype):
    path = make(build, tmp_path / "set", modality, dtype) / "shard-000000.h5"
    end = Shard.open(path).header.end
    assert not is_noticed(path)
    rng = np.random.default_rng([KINDS.index((modality, dtype)), 1])
    descriptor = os.open(path, os.O_RDWR)
    missed = []
    for _ in range(MUTATIONS // len(KINDS)):
        one = mutation(rng, path.stat().st_size, end)
        apply(descriptor, *one)
        if not is_noticed(path):
            missed.append(one)
        apply(descriptor, *one)
    os.close(descriptor)
    assert not missed
    assert not is_noticed(path)


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
