"""Small caches with known content."""

import importlib.util
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from featcache.cache.reader import Cache, FeatureSet


@pytest.fixture(scope="session")
def build():
    path = Path(__file__).parents[1] / "cache" / "building.py"
    place = importlib.util.spec_from_file_location("featcache_test_building", path)
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@dataclass
class Made:
    """A cache and what was written into it."""

    cache: Cache
    images: list
    texts: list
    pooled: tuple


@pytest.fixture(scope="session")
def make_cache(build, tmp_path_factory):
    """Build a cache: 23 images of 1 + 2 x 3 tokens, 17 texts of 1 to 9, 41 pairs, many shards."""

    def make(dtype="float16", num_images=23, num_texts=17, num_pairs=41, **changes):
        folder = tmp_path_factory.mktemp("cache")
        image = {"num_tokens": 7, "num_prefix_tokens": 1, "grid": (2, 3), "dim": 8}
        image |= {"pooled_dim": 5, "dtype": dtype, **changes}
        specs = (
            build.make_spec("image", **image),
            build.make_spec("text", dim=6, pooled_dim=3, dtype=dtype),
        )
        sets, contents = [], []
        for spec, count in zip(specs, (num_images, num_texts), strict=True):
            content = build.make_content(spec, count, seed=count)
            if spec.is_ragged:
                content.tokens = [one if len(one) else np.ones((1, 6)) for one in content.tokens]
            build.write_set(folder / spec.modality, spec, content, rows_per_shard=4)
            sets.append(FeatureSet.open(folder / spec.modality))
            contents.append(content)
        rng = np.random.default_rng(5)
        rows = [rng.integers(0, len(one.keys), num_pairs) for one in contents]
        cache = Cache(*sets, *rows, dropped={}, fingerprint="ab" * 16)
        pooled = tuple(one.pooled.astype(np.float16) for one in contents)
        return Made(cache, contents[0].tokens, contents[1].tokens, pooled)

    return make


@pytest.fixture(scope="session")
def made(make_cache):
    return make_cache()


@pytest.fixture
def loader_threads():
    """Names of our threads that are alive, once those that were told to stop have."""

    def alive():
        for _ in range(100):
            names = [t.name for t in threading.enumerate() if t.name.startswith("featcache-loader")]
            if not names:
                break
            time.sleep(0.01)
        return names

    return alive
