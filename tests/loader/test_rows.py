"""Which bytes of a row are read, and how."""

import numpy as np
import pytest

from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError, UsageError
from featcache.loader.gather import TokenLoader, iterate_rows

ROWS = np.array([5, 0, 22, 5, 13, 8, 19, 2])


def gathered(features, rows=ROWS, **options):
    """Tokens of all rows, batch by batch, in one array."""
    batches = iterate_rows(features, rows, 3, **options)
    return np.concatenate([tokens.clone().numpy() for _, tokens, _ in batches])


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_prefix_and_grid_are_slices_of_the_row(make_cache, dtype, io):
    features = make_cache(dtype).cache.images
    whole = features.read_tokens(ROWS).astype(np.float16)
    np.testing.assert_array_equal(gathered(features, tokens="prefix", io=io), whole[:, :1])
    np.testing.assert_array_equal(gathered(features, tokens="grid", io=io), whole[:, 1:])


def test_pooled_is_the_encoders_own_vector_as_one_token(made):
    got = gathered(made.cache.images, tokens="pooled")
    np.testing.assert_array_equal(got[:, 0], made.pooled[0][ROWS])
    assert got.shape == (8, 1, 5)
    for batch in TokenLoader(made.cache, 12, tokens="pooled"):
        np.testing.assert_array_equal(batch.text_tokens[:, 0], made.pooled[1][batch.text_rows])
        assert batch.text_valid.shape == (12, 1)
        assert batch.text_valid.all()


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_random_keeps_the_prefix_and_draws_patches_per_batch(make_cache, dtype, io):
    features = make_cache(dtype).cache.images
    whole = features.read_tokens(np.arange(23)).astype(np.float16)
    drawn = set()
    for some, tokens, _ in iterate_rows(features, np.arange(23), 3, tokens="random:4", io=io):
        assert tokens.shape[1:] == (5, 8)
        places = [
            [place for place in range(7) if (tokens[n, t].numpy() == whole[row, place]).all()]
            for n, row in enumerate(some)
            for t in range(5)
        ]
        columns = np.array(places).reshape(len(some), 5)  # each token is found in one place
        assert (columns == columns[0]).all()
        assert columns[0, 0] == 0
        assert (np.diff(columns[0]) > 0).all()
        drawn.add(tuple(columns[0].tolist()))
    assert len(drawn) > 2


def test_a_random_budget_is_the_same_on_every_rank_and_in_every_run(made):
    def widths(**options):
        loader = TokenLoader(made.cache, 12, seed=3, tokens="random:2", **options)
        return [batch.image_tokens.clone() for batch in loader]

    whole = widths()
    halves = zip(widths(rank=0, world_size=2), widths(rank=1, world_size=2), strict=True)
    for one, (a, b) in zip(whole, halves, strict=True):
        np.testing.assert_array_equal(one, np.concatenate([a, b]))


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_text_tokens_bounds_each_text_and_no_image(make_cache, dtype, io):
    cache = make_cache(dtype).cache
    for limit in (1, 4, 100):
        for batch in TokenLoader(cache, 12, text_tokens=limit, io=io):
            lengths = np.minimum(cache.texts.lengths[batch.text_rows], limit)
            assert batch.image_tokens.shape[1] == 7
            assert batch.text_tokens.shape[1] == lengths.max() == batch.text_valid.shape[1]
            assert batch.text_valid.sum(1).tolist() == lengths.tolist()
            for place, (row, length) in enumerate(zip(batch.text_rows, lengths, strict=True)):
                whole = cache.texts.read_tokens(np.array([row])).astype(np.float16)
                np.testing.assert_array_equal(batch.text_tokens[place, :length], whole[:length])
                assert not batch.text_tokens[place, length:].any()


def test_text_tokens_goes_with_every_budget_of_images(made):
    for tokens in ("prefix", "grid", "random:2", "pooled"):
        batch = next(iter(TokenLoader(made.cache, 12, tokens=tokens, text_tokens=2)))
        assert batch.text_valid.shape[1] == (1 if tokens == "pooled" else 2)


def test_texts_keep_all_tokens_under_an_images_budget(made):
    for batch in TokenLoader(made.cache, 12, tokens="prefix"):
        assert batch.image_tokens.shape[1] == 1
        assert batch.text_tokens.shape[1] == made.cache.texts.lengths[batch.text_rows].max()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("prefix", "budget is `prefix`, but image/tiny has no prefix tokens"),
        ("grid", "has no grid of patch tokens"),
        ("random:2", "has only 0 patch tokens"),
        ("pooled", "has no pooled vectors"),
    ],
)
def test_a_budget_that_a_set_cannot_give_is_refused(build, tmp_path, tokens, message):
    spec = build.make_spec()
    build.write_set(tmp_path, spec, build.make_content(spec, 6))
    with pytest.raises(UsageError, match=message):
        list(iterate_rows(FeatureSet.open(tmp_path), np.arange(6), 3, tokens=tokens))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("tokens", "share"), [("all", 1), ("prefix", 1 / 65), ("grid", 64 / 65), ("random:8", 9 / 65)]
)
def test_a_pass_reads_the_bytes_of_its_budget_and_no_more(
    build, tmp_path, tokens, share, dtype, bytes_read_by
):
    spec = build.make_spec(num_tokens=65, num_prefix_tokens=1, grid=(8, 8), dim=64, dtype=dtype)
    build.write_set(tmp_path, spec, build.make_content(spec, 40), rows_per_shard=20)
    features = FeatureSet.open(tmp_path)
    gathered(features, np.arange(40), tokens=tokens, io="pread")  # small arrays are read once
    rows = np.arange(40).repeat(5)
    assert len(gathered(features, rows, tokens=tokens, io="pread")) == 200
    taken = bytes_read_by(lambda: gathered(features, rows, tokens=tokens, io="pread"))
    wanted = 200 * 65 * 64 * np.dtype(dtype).itemsize * share
    headers = 2 * 8_192
    assert wanted <= taken < 1.02 * wanted + headers + 10_000


def test_a_pass_reads_the_first_tokens_of_each_text_and_no_more(build, tmp_path, bytes_read_by):
    spec = build.make_spec("text", max_tokens=120, dim=256)
    build.write_set(tmp_path, spec, build.make_content(spec, 40), rows_per_shard=20)
    features = FeatureSet.open(tmp_path)
    list(iterate_rows(features, np.arange(40), 3, io="pread"))  # small arrays are read once
    rows = np.arange(40).repeat(5)
    taken = bytes_read_by(lambda: list(iterate_rows(features, rows, 3, text_tokens=32, io="pread")))
    wanted = np.minimum(features.lengths[rows], 32).sum() * 512
    assert wanted < 0.6 * features.lengths[rows].sum() * 512
    assert wanted <= taken < 1.02 * wanted + 2 * 8_192 + 10_000


def test_an_int8_value_beyond_float16_is_refused(build, tmp_path):
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 6)
    content.tokens[3][1] *= 1e5 / np.abs(content.tokens[3][1]).max()
    build.write_set(tmp_path, spec, content)
    features = FeatureSet.open(tmp_path)
    assert len(gathered(features, np.array([0, 1, 2, 4, 5]))) == 5
    with pytest.raises(CacheError, match="int8 set is larger than 65504, which float16"):
        gathered(features, np.arange(6))
