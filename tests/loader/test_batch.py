"""Tokens of int8 sets: stored in the ring, numbers where they are asked for."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.cache import format as cache_format
from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError
from featcache.loader import batch as batch_module
from featcache.loader.batch import Batch, Int8Tokens, StoredBatch, as_float, dequantise
from featcache.loader.gather import TokenLoader, iterate_rows


@pytest.fixture(scope="module")
def int8(make_cache):
    return make_cache("int8").cache


def expected(features, row, dtype):
    """A row the plain way: float32 products, rounded once."""
    tokens = features.read_tokens(np.array([row])).reshape(-1, features.spec.dim)
    return torch.from_numpy(tokens).to(dtype)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32, torch.bfloat16])
def test_to_dequantises_in_the_dtype_that_is_wanted(int8, dtype, io):
    want = dtype or torch.float16
    for batch in TokenLoader(int8, 8, io=io, seed=3):
        moved = batch.to("cpu", dtype)
        assert type(moved) is Batch
        assert moved.image_tokens.dtype == moved.text_tokens.dtype == want
        for place, (image, text) in enumerate(zip(batch.image_rows, batch.text_rows, strict=True)):
            assert torch.equal(moved.image_tokens[place], expected(int8.images, int(image), want))
            one = expected(int8.texts, int(text), want)
            assert torch.equal(moved.text_tokens[place, : len(one)], one)
            assert not moved.text_tokens[place, len(one) :].any()
            assert moved.text_valid[place].sum() == len(one)


def test_tokens_read_without_to_are_float16_and_the_same_numbers(int8):
    for batch in TokenLoader(int8, 8):
        moved = batch.to("cpu")
        assert torch.equal(batch.image_tokens, moved.image_tokens)
        assert torch.equal(batch.text_tokens, moved.text_tokens)
        assert batch.image_tokens is batch.image_tokens  # once
        assert len(batch) == 8


def test_the_ring_holds_half_the_bytes(make_cache, int8):
    batch = next(iter(TokenLoader(int8, 8)))
    assert isinstance(batch, StoredBatch)
    assert batch.images.values.dtype == batch.texts.values.dtype == torch.int8
    (full,) = (next(iter(TokenLoader(make_cache("float16").cache, 8))),)
    assert batch.images.values.nbytes * 2 == full.image_tokens.nbytes
    assert batch.images.scale_token.shape == (8, 7)


def test_what_was_moved_outlives_the_buffer(int8):
    loader = TokenLoader(int8, 8, prefetch=0)
    kept = [batch.to("cpu", torch.float32) for batch in loader]
    again = TokenLoader(int8, 8, prefetch=0)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one.image_tokens, other.to("cpu", torch.float32).image_tokens)


@pytest.mark.parametrize("quantised", ["images", "texts"])
def test_one_set_may_be_int8_and_the_other_not(make_cache, int8, quantised):
    plain = make_cache("float32").cache
    cache = replace(plain, **{quantised: getattr(int8, quantised)})
    for batch in TokenLoader(cache, 8):
        moved = batch.to("cpu")
        kinds = {"images": moved.image_tokens.dtype, "texts": moved.text_tokens.dtype}
        assert kinds.pop(quantised) == torch.float16
        assert set(kinds.values()) == {torch.float32}
        row = int(batch.image_rows[5])
        assert torch.equal(
            moved.image_tokens[5], expected(cache.images, row, moved.image_tokens.dtype)
        )


def test_pooled_vectors_of_an_int8_set_are_floats(int8):
    batch = next(iter(TokenLoader(int8, 8, tokens="pooled")))
    assert type(batch) is Batch
    assert batch.image_tokens.dtype == torch.float16


def test_a_batch_of_stored_tokens_can_be_pickled(int8):
    batch = next(iter(TokenLoader(int8, 8)))
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.to("cpu").image_tokens, batch.image_tokens)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_dequantising_in_pieces_equals_the_formats_own_way(data):
    draw = data.draw
    shape = (draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.lognormal(0, 2, shape[:2]).astype(np.float16)
    channels = rng.lognormal(0, 2, shape[2]).astype(np.float32)
    want = torch.from_numpy(cache_format.dequantise(values, scales, channels))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "CPU_PIECE", draw(st.integers(1, 60)))
        tensors = [torch.from_numpy(one) for one in (values, scales, channels)]
        assert torch.equal(dequantise(*tensors, dtype), want.to(dtype))


@pytest.fixture
def loud(build, tmp_path):
    """6 rows, of which number 3 holds a value beyond float16."""
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 6)
    content.tokens[3][1] *= 1e5 / np.abs(content.tokens[3][1]).max()
    build.write_set(tmp_path / "loud", spec, content)
    return FeatureSet.open(tmp_path / "loud")


def test_a_value_beyond_float16_is_refused_only_where_float16_is_wanted(int8, loud):
    cache = replace(int8, images=loud, image_rows=np.full(8, 3), text_rows=np.arange(8))
    batch = next(iter(TokenLoader(cache, 8)))
    for read in (lambda: batch.image_tokens, lambda: batch.to("cpu")):
        with pytest.raises(CacheError, match="int8 set is larger than 65504") as caught:
            read()
        assert caught.value.where == str(loud.folder)
    moved = batch.to("cpu", torch.float32)
    assert moved.image_tokens[0].abs().max() > 9e4
    assert torch.isfinite(batch.to("cpu", torch.bfloat16).image_tokens).all()


def test_rows_beside_a_value_beyond_float16_are_fine(loud):
    others = np.array([0, 1, 2, 4, 5])
    (got,) = [tokens for _, tokens, _ in iterate_rows(loud, others, 5)]
    np.testing.assert_array_equal(got, loud.read_tokens(others).astype(np.float16))


def test_as_float_leaves_floats_as_they_are():
    tokens = torch.zeros(2, 3, 4)
    assert as_float(tokens) is tokens
    one = Int8Tokens(
        torch.full((1, 1, 2), 3, dtype=torch.int8),
        torch.full((1, 1), 0.5, dtype=torch.float16),
        torch.tensor([1.0, 2.0]),
        False,
        "a set",
    )
    assert as_float(one).tolist() == [[[1.5, 3.0]]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_dequantises_to_the_same_numbers(int8, dtype):
    for batch in TokenLoader(int8, 8):
        assert batch.images.values.is_pinned()
        there, here = batch.to("cuda", dtype), batch.to("cpu", dtype)
        assert torch.equal(there.image_tokens.cpu(), here.image_tokens)
        assert torch.equal(there.text_tokens.cpu(), here.text_tokens)
