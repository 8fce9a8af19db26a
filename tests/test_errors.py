import pickle

from featcache.errors import ConfigError, FeatcacheError, ShardError, nearest


def test_an_error_prints_what_where_and_what_to_do():
    error = FeatcacheError("a differs from b", where="file.h5", fix="featcache repair")
    assert str(error) == "a differs from b\n  at: file.h5\n  try: featcache repair"


def test_an_error_crosses_a_process_border_whole():
    error = ShardError("damaged", where="shard-00001.h5", fix="featcache repair")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is ShardError
    assert (twin.what, twin.where, twin.fix) == (error.what, error.where, error.fix)


def test_usage_errors_exit_with_two_and_failures_with_one():
    assert ConfigError("x").exit_code == 2
    assert ShardError("x").exit_code == 1


def test_close_spellings_are_offered_and_far_ones_listed():
    assert nearest("vitb", ["vit-b", "swin-b"]) == "did you mean `vit-b`?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "there is none"
