"""Sets of random numbers are real sets."""

from featcache.bench.sets import write_random_set
from featcache.cache.check import verify_feature_set
from featcache.cache.feature_set import FeatureSet


def test_a_random_set_is_complete_and_its_checksums_are_right(tmp_path):
    write_random_set(tmp_path / "set", rows=10, num_tokens=3, dim=4, shard_rows=4)
    features = FeatureSet.open(tmp_path / "set")
    assert (features.num_rows, features.num_shards) == (10, 3)
    assert verify_feature_set(tmp_path / "set").ok
