"""libhdf5 itself is given broken structures, by files whose every checksum is right."""

import os
import random

import pytest
from hostile.lookup3 import lookup3
from hostile.test_forged_shards import forge, path, reseal

from featcache.cache.check import verify_feature_set
from featcache.cache.libhdf5 import ask_libhdf5
from featcache.cache.shard import Shard
from featcache.errors import ShardError

__all__ = ["path"]

MUTANTS = 300


def structures(content):
    """First byte of each superblock and object header, and the place of its checksum."""
    found = [(8192, 8192 + 44)]
    start = content.find(b"OHDR", 8192)
    while start > 0:
        flags = content[start + 5]
        first = start + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        size = int.from_bytes(content[first : first + width], "little")
        found.append((start, first + width + size))
        start = content.find(b"OHDR", start + 4)
    return found


def mutate(rng, content):
    """Change a structure but neither its signature nor our attribute's text; seal it."""
    start, end = rng.choice(structures(content))
    text = content[16 : 16 + int.from_bytes(content[12:16], "little")]
    ours = content.index(text, 8192)
    places = [place for place in range(start + 4, end) if not ours <= place < ours + 2048]
    for _ in range(rng.choice([1, 1, 2, 8])):
        change = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        content[rng.choice(places)] = change
    content[end : end + 4] = lookup3(bytes(content[start:end])).to_bytes(4, "little")


def test_broken_structures_end_a_child_at_most(path, tmp_path):
    """Sealed on all levels: each is answered for, and none takes a sound shard's answer along."""
    original = path.read_bytes()
    parts = structures(original)
    assert len(parts) == 1 + 1 + len(Shard.open(path).header.places)
    for start, end in parts:
        assert lookup3(original[start:end]).to_bytes(4, "little") == original[end : end + 4]
    rng = random.Random(1)
    mutants = []
    while len(mutants) < MUTANTS:
        content = bytearray(original)
        mutate(rng, content)
        if content == original:
            continue
        mutants.append(tmp_path / f"{len(mutants)}.h5")
        mutants[-1].write_bytes(content)
        reseal(mutants[-1])
    sound = tmp_path / "sound.h5"
    sound.write_bytes(original)
    answers = dict(ask_libhdf5([*mutants, sound], deep=True))
    assert sound not in answers
    assert not [what for what in answers.values() if "ended with code 1 " in what]  # by an error
    assert len(answers) > MUTANTS / 2  # the others changed what has no meaning
    for mutant in mutants:
        assert next(Shard.open(mutant).damage(), None) is None  # only libhdf5 could notice


@pytest.mark.parametrize("kept", [0, 1, 8, 47])
def test_a_cut_superblock_is_refused_though_the_header_agrees(path, kept):
    os.truncate(path, 8192 + kept)
    forge(path, lambda values: values.update(file_size=8192 + kept))
    with pytest.raises(ShardError, match="header"):
        Shard.open(path)
    (problem,) = verify_feature_set(path.parent).problems
    assert (problem.shard, problem.array) == (0, None)
