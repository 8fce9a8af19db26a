"""The bytes of format version 1. A failure here means: the format changed, which needs version 2.

`python tests/golden/test_cache_v1.py` wrote the files under `cache_v1/`, once.
"""

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import FeatureSet
from featcache.cache.format import FeatureSetSpec, make_channel_scale, plan_shards
from featcache.cache.shard import Shard
from featcache.cache.writer import FeatureSetWriter, ShardWriter

GOLDEN = Path(__file__).parent / "cache_v1"
HDF5 = "2.0.0"
"""Version that wrote them: whole files are byte-identical for this one, rows for all."""
KEYS = ["key-0", "Übersicht", "key-2"]
LENGTHS = np.array([2, 0, 3])

IMAGE = FeatureSetSpec(
    modality="image",
    encoder="golden-image",
    source="timm:golden",
    library="timm",
    library_version="1.0.31",
    weights_sha256="01" * 32,
    preprocessing={"size": [32, 32], "mean": 0.485, "fit": "pad"},
    num_prefix_tokens=1,
    grid=(1, 2),
    num_tokens=3,
    dim=4,
    pooled_dim=2,
    batch_size=8,
)
TEXT = FeatureSetSpec(
    modality="text",
    encoder="golden-text",
    source="hf:golden",
    library="transformers",
    library_version="5.24.0",
    weights_sha256="02" * 32,
    tokenizer_sha256="03" * 32,
    max_tokens=8,
    dim=4,
    dtype="int8",
    batch_size=8,
    autocast="bfloat16",
)


def image_tokens():
    """N L D: eighths, which every float holds exactly."""
    return (np.arange(36, dtype=np.float32).reshape(3, 3, 4) - 18) / 8


def text_tokens():
    """S D, with one channel a hundred times as large as the others."""
    tokens = (np.arange(20, dtype=np.float32).reshape(5, 4) - 10) / 4
    return tokens * np.array([1, 1, 100, 1], dtype=np.float32)


def write_image_set(folder):
    hashes = ["00000000000000aa", "00000000000000bb", "00000000000000cc"]
    made = FeatureSetWriter.create(folder, IMAGE, plan_shards(IMAGE, KEYS, hashes), "golden")
    with ShardWriter(folder, IMAGE, made.shards[0]) as shard:
        pooled = np.array([[1, -2], [0.5, 65504]], dtype=np.float32)
        shard.write(np.array([2, 0]), image_tokens()[[2, 0]], pooled)
        shard.quarantine(1)
        shard.finish()


def write_text_set(folder):
    made = FeatureSetWriter.create(folder, TEXT, plan_shards(TEXT, KEYS, KEYS), "golden")
    tokens = text_tokens()
    scale = make_channel_scale(tokens)
    made.write_scale_channel(scale)
    with ShardWriter(folder, TEXT, made.shards[0], LENGTHS, scale) as shard:
        shard.write(np.arange(3), tokens)
        shard.finish()


WRITERS = {"image": write_image_set, "text": write_text_set}


def part(path, name):
    place = Shard.open(path).header.places[name]
    return path.read_bytes()[place.offset : place.offset + place.size_bytes]


@pytest.mark.parametrize("name", WRITERS)
def test_todays_writer_makes_the_golden_bytes(tmp_path, name):
    WRITERS[name](tmp_path)
    files = sorted(path.name for path in (GOLDEN / name).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for file in files:
        ours, golden = tmp_path / file, GOLDEN / name / file
        if not file.endswith(".h5") or h5py.version.hdf5_version == HDF5:
            assert ours.read_bytes() == golden.read_bytes()
        else:
            assert part(ours, "tokens") == part(golden, "tokens")
            assert part(ours, "checksums") == part(golden, "checksums")


@pytest.mark.parametrize("name", WRITERS)
def test_golden_sets_pass_every_check(name):
    assert verify_feature_set(GOLDEN / name, deep=True).ok


def test_golden_image_set_is_read():
    features = FeatureSet.open(GOLDEN / "image")
    assert features.spec == IMAGE
    assert features.fingerprint == "1cf6e6c7ec36743ea2e1d1de6d8f8b50"
    assert features.keys == KEYS
    assert features.valid.tolist() == [True, False, True]
    expected = image_tokens().astype(np.float16)
    expected[1] = 0
    tokens = features.read_tokens(np.arange(3), verify=True)
    assert tokens.tobytes() == expected.tobytes()
    assert features.pooled(np.arange(3)).tolist() == [[0.5, 65504], [0, 0], [1, -2]]


def test_golden_text_set_is_read():
    features = FeatureSet.open(GOLDEN / "text")
    assert features.spec == TEXT
    assert features.fingerprint == "482b37433e3412859a764fb61430c3a1"
    assert features.lengths.tolist() == [2, 0, 3]
    assert features.offsets.tolist() == [0, 2, 2]
    assert features.scale_channel.tolist() == [2.5, 2.25, 200, 2.25]
    tokens = features.read_tokens(np.arange(3), verify=True)
    assert np.abs(tokens - text_tokens()).max() < 0.5
    assert features.tokens_map(0)[0].tolist() == [-127, -127, -127, -99]


def test_golden_header_is_what_the_format_page_shows():
    block = (GOLDEN / "image" / "shard-000000.h5").read_bytes()[:8192]
    assert block[:12] == b"FEATCACH\1\0\0\0"
    values = json.loads(block[16 : 16 + int.from_bytes(block[12:16], "little")])
    assert values["format_version"] == 1
    assert values["arrays"]["tokens"] == {"dtype": "float16", "offset": 20480, "shape": [3, 3, 4]}
    assert values["arrays"]["keys"]["dtype"] == "S10"
    assert list(values["arrays"]) == ["checksums", "keys", "pooled", "tokens", "valid"]


if __name__ == "__main__":
    for name, write in WRITERS.items():
        if (GOLDEN / name).exists():
            sys.exit(f"{GOLDEN / name} exists: the bytes of a version are never made again")
        write(GOLDEN / name)
    shutil.rmtree(GOLDEN / "__pycache__", ignore_errors=True)
