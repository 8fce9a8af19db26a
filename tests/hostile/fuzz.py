"""A child process that reads mutated shards: `fuzz.py COUNT SEED SHARD...`; it answers in JSON.

Half of the mutations are bytes anywhere in the file. The others change the header's text and make
every checksum of the header right again, so that what believes the header is reached.
"""

import json
import os
import random
import resource
import sys
from pathlib import Path

import numpy as np

from featcache.cache.header import ARRAY_ORDER, USER_BLOCK, pack_header
from featcache.cache.shard import Shard
from featcache.errors import ShardError

MEMORY_BYTES = 256 * 2**20  # above what the imports take
WORDS = ["0", "-1", "1", "4096", "8192", "1e999", "NaN", "null", "true", "[]", "{}", '""', "9" * 30]
WORDS += ["18446744073709551616", "18446744073709547520", '"O8"', '"S128"', '"float64"', "[1,1]"]
FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess", "pickle", "socket", "ctypes.dlopen")


def limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))


def refuse(event, _):
    """Reading a shard runs, imports, starts and connects to nothing."""
    if event.startswith(FORBIDDEN):
        sys.stderr.write(f"the reader did `{event}`\n")
        sys.stderr.flush()
        os._exit(99)


def flip(rng, content, header_end):
    size = header_end if rng.random() < 0.4 else len(content)
    place = rng.randrange(size)
    for byte in range(place, min(place + rng.choice([1, 1, 1, 2, 4, 16]), len(content))):
        content[byte] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)


def forge(rng, content):
    length = int.from_bytes(content[12:16], "little")
    text = bytes(content[16 : 16 + length]).decode()
    for _ in range(rng.choice([1, 1, 2, 3])):
        if rng.random() < 0.5:  # a number becomes something else
            starts = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isalnum()]
            start = rng.choice(starts)
            end = start
            while text[end].isdigit():
                end += 1
            text = text[:start] + rng.choice(WORDS) + text[end:]
        else:
            place = rng.randrange(len(text))
            text = text[:place] + chr(rng.randrange(32, 127)) + text[place + 1 :]
    digests = [rng.getrandbits(64) for name in ARRAY_ORDER if f'"{name}"' in text]
    head = pack_header(text.encode(), digests)[:USER_BLOCK]
    content[: len(head)] = head


def read_all(path):
    """All that the reader gives of a shard; True when it refuses some of it."""
    try:
        shard = Shard.open(path)
        refused = next(shard.damage(), None) is not None
    except ShardError:
        return True
    for name in shard.header.places:
        try:
            array = shard.read(name) if name != "tokens" else shard.map(name, check=False)
            np.asarray(array).view(np.uint8).sum()
        except ShardError:
            refused = True
    return refused


def main():
    count, seed, *paths = sys.argv[1:]
    rng = random.Random(int(seed))
    originals = [Path(path).read_bytes() for path in paths]
    ends = [Shard.open(Path(path)).header.end for path in paths]
    sound = [not read_all(Path(path)) for path in paths]
    limit()
    sys.addaudithook(refuse)
    missed = []
    for number in range(int(count)):
        which = number // 2 % len(paths)
        content = bytearray(originals[which])
        if number % 2:
            forge(rng, content)
        else:
            flip(rng, content, ends[which])
        path = Path(paths[which])
        path.write_bytes(content)
        if not read_all(path) and bytes(content) != originals[which]:
            missed.append(number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"done": int(count), "sound": sound, "missed": missed, "peak_kb": peak}))  # noqa: T201


main()
