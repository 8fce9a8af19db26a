import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.cache import format as layout
from featcache.config import write_json
from featcache.errors import CacheError, ConfigError, StaleFeatureSetError

CHANGES = {
    "modality": "text",
    "encoder": "other",
    "source": "hf:other",
    "library": "transformers",
    "weights_sha256": "cd" * 32,
    "preprocessing": {"size": [518, 518], "mean": 0.5},
    "tokenizer_sha256": "ef" * 32,
    "num_prefix_tokens": 1,
    "grid": (1, 3),
    "num_tokens": 7,
    "max_tokens": 8,
    "dim": 5,
    "pooled_dim": 6,
    "dtype": "int8",
    "batch_size": 3,
    "autocast": "bfloat16",
}


def test_fingerprint_covers_every_field_but_the_library_version(build):
    base = build.make_spec()
    same = build.make_spec(library_version="2.0")
    assert base.fingerprint == same.fingerprint
    others = {build.make_spec(**{name: value}).fingerprint for name, value in CHANGES.items()}
    assert len(others | {base.fingerprint}) == len(CHANGES) + 1
    untested = set(type(base).model_fields) - set(CHANGES)
    assert untested == {"format_version", "library_version"}


def test_spec_survives_its_file(build, tmp_path):
    spec = build.make_spec(grid=(1, 2), num_prefix_tokens=1, pooled_dim=2)
    write_json(tmp_path / "feature_set.json", layout.spec_values(spec))
    assert layout.read_spec(tmp_path) == spec


def test_spec_refuses_a_layout_that_does_not_add_up(build):
    with pytest.raises(ValueError, match="1 prefix tokens and a grid of 2 x 2 make 5"):
        build.make_spec(grid=(2, 2), num_prefix_tokens=1, num_tokens=4)


def test_spec_refuses_numbers_that_no_json_can_hold(build):
    with pytest.raises(ValueError, match="not finite"):
        build.make_spec(preprocessing={"mean": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this featcache reads 1"),
        ({"dim": 5}, "changed after it was written"),
        ({"dim": "wide"}, "`dim`: "),
        ({"colour": 1}, "unknown key"),
    ],
)
def test_edited_spec_is_refused(build, tmp_path, change, message):
    write_json(tmp_path / "feature_set.json", {**layout.spec_values(build.make_spec()), **change})
    with pytest.raises(CacheError, match=message):
        layout.read_spec(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_damaged_spec_is_refused(tmp_path, content):
    (tmp_path / "feature_set.json").write_text(content)
    with pytest.raises(CacheError, match="damaged"):
        layout.read_spec(tmp_path)


def test_any_other_folder_is_no_feature_set(tmp_path):
    with pytest.raises(CacheError, match="no feature set"):
        layout.read_spec(tmp_path)


def test_difference_names_field_and_both_values(build, tmp_path):
    have = build.make_spec()
    want = build.make_spec(preprocessing={"size": [518, 518], "mean": 0.5}, library_version="2.0")
    error = layout.explain_difference(have, want, tmp_path)
    assert isinstance(error, StaleFeatureSetError)
    assert (
        "`preprocessing.size`: the cache has [224,224], this run asks for [518,518]" in error.what
    )
    assert "(also: `library_version`)" in error.what
    assert "--backbone tiny --root" in error.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_difference_shows_absent_values_in_words(build, tmp_path):
    error = layout.explain_difference(
        build.make_spec(), build.make_spec(autocast="bfloat16"), tmp_path
    )
    assert "the cache has nothing, this run asks for bfloat16" in error.what


def test_shards_have_a_power_of_two_of_rows_within_512_mib_or_65536_texts():
    keys = ["k"] * 70_000
    assert len(layout.plan_rows(keys, 302_592)[0]) == 1_024
    assert [len(r) for r in layout.plan_rows(keys, None)] == [65_536, 4_464]
    assert len(layout.plan_rows(keys[:3], 2**30)) == 3
    assert layout.plan_rows([], 10) == []


@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 400))
def test_plan_covers_every_row_once(num_rows, row_bytes, shard_bytes):
    ranges = layout.plan_rows(["k"] * num_rows, row_bytes, shard_bytes=shard_bytes)
    assert [row for one in ranges for row in one] == list(range(num_rows))
    assert all(len(one) == len(ranges[0]) for one in ranges[:-1])
    assert all(len(one) * row_bytes <= max(shard_bytes, row_bytes) for one in ranges)
    assert all(len(one).bit_count() == 1 for one in ranges[:-1])


def test_plan_survives_its_file(build, tmp_path):
    content = build.make_content(build.make_spec(), 10)
    plan = layout.SetPlan("m", layout.plan_shards(build.make_spec(), content.keys, content.keys))
    write_json(tmp_path / "shards.json", layout.plan_values(plan))
    assert layout.read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": "a\nc"}, "shard 0 contradicts itself"),
        ({"num_rows": 3}, "shard 0 contradicts itself"),
        ({"number": 1}, "shard 0 contradicts itself"),
        ({"row_hashes": "x"}, "shard 0 contradicts itself"),
        ({"keys": None}, "not the form of a list of shards"),
    ],
)
def test_damaged_plan_is_refused(tmp_path, change, message):
    plan = layout.SetPlan("m", [layout.ShardPlan(0, ["a", "b"], ["x", "y"])])
    values = layout.plan_values(plan)
    values["shards"][0] |= change
    (tmp_path / "shards.json").write_text(json.dumps(values))
    with pytest.raises(CacheError, match=message):
        layout.read_plan(tmp_path)


def test_row_hash_changes_with_each_part():
    base = ("k", "a.png", 10, 20)
    others = [("j", *base[1:]), ("k", "b.png", 10, 20), ("k", "a.png", 11, 20), (*base[:3], 21)]
    assert len({layout.row_hash(*one) for one in [base, *others]}) == 5
    assert layout.row_hash(*base) == "1841c0ac131bf475"


def make_tokens(seed, num_tokens, dim, outliers):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(num_tokens, dim)) * rng.choice([0.01, 1, 100], size=(num_tokens, 1))
    tokens[:, rng.permutation(dim)[:outliers]] *= 100
    return tokens.astype(np.float32)


@given(st.integers(0, 10_000), st.integers(0, 12), st.integers(1, 16), st.integers(0, 3))
def test_int8_is_right_within_half_a_step(seed, num_tokens, dim, outliers):
    tokens = make_tokens(seed, num_tokens, dim, outliers)
    channel = layout.make_channel_scale(tokens)
    stored, scale = layout.quantise(tokens, channel)
    back = layout.dequantise(stored, scale, channel)
    step = scale.astype(np.float64)[:, None] * channel
    assert stored.min(initial=0) >= -127
    assert (np.abs(back - tokens) <= 0.5 * step * (1 + 1e-5)).all()


def test_int8_keeps_other_channels_beside_outliers():
    tokens = make_tokens(0, 500, 384, 0)
    tokens[:, :4] *= 100
    quiet = tokens[:, 4:]
    channel = layout.make_channel_scale(tokens)

    def error(scales):
        back = layout.dequantise(*layout.quantise(tokens, scales), scales)[:, 4:]
        return np.linalg.norm(back - quiet) / np.linalg.norm(quiet)

    assert error(channel) < 0.01
    assert error(np.ones_like(channel)) > 0.1  # a scale per token alone loses them


def test_int8_does_not_let_a_dead_channel_coarsen_the_token():
    tokens = make_tokens(0, 50, 8, 0)
    tokens[:, 3] = 0
    channel = layout.make_channel_scale(tokens)
    assert channel[3] == np.median(np.delete(channel, 3))
    later = tokens.copy()
    later[:, 3] = 1
    back = layout.dequantise(*layout.quantise(later, channel), channel)
    assert np.abs(back - later).max() < 0.02 * np.abs(later).max()


def test_int8_of_zeros_is_zeros():
    zeros = np.zeros((2, 3, 4), np.float32)
    channel = layout.make_channel_scale(zeros)
    stored, scale = layout.quantise(zeros, channel)
    assert not stored.any()
    assert not scale.any()
    assert (channel == 1).all()


def test_int8_says_when_no_scale_is_large_enough():
    tokens = np.full((1, 2), 1e30, np.float32)
    assert np.isinf(layout.quantise(tokens, np.ones(2, np.float32))[1]).all()


def test_config_errors_do_not_escape_as_such(build, tmp_path):
    write_json(tmp_path / "feature_set.json", {"format_version": 1})
    with pytest.raises(CacheError) as caught:
        layout.read_spec(tmp_path)
    assert not isinstance(caught.value, ConfigError)
