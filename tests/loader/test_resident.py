"""Sets held in memory give the same batches as their files."""

import logging

import numpy as np
import pytest
import torch

from featcache.cache.reader import FeatureSet
from featcache.errors import CacheError, ConfigError, UsageError
from featcache.loader import resident
from featcache.loader.gather import TokenLoader
from featcache.loader.resident import HeldReader, OnDevice, choose_memory, hold
from featcache.loader.ring import Reading, open_readers

BUDGETS = ["all", "prefix", "grid", "pooled", "random:3"]


def values(batch):
    """All tensors of a batch, with tokens as float32, in memory of their own."""
    return [one.clone() for one in vars(batch.to("cpu", torch.float32)).values()]


def on_device(loader):
    """Let a loader gather as it would on a GPU, here in main memory."""
    reading, cache = loader.reading, loader.cache
    whole = {"tokens": "all"} if reading.tokens.startswith("random") else {}
    loading = reading.model_copy(update=whole)
    held, readers = [], []
    for features, rows in (
        (cache.images, cache.image_rows),
        (cache.texts, cache.text_rows),
    ):
        (files,) = open_readers([features], loading)
        held.append(hold(files, np.unique(rows), loading, "cpu"))
        readers.append(HeldReader(features, held[-1], reading, seed=loader.order.seed))
    loader._open = lambda: OnDevice(readers, held)
    return loader


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_batches_are_those_of_the_files(make_cache, dtype, tokens):
    cache = make_cache(dtype).cache
    options = {"seed": 3, "tokens": tokens, "text_tokens": 5}
    plain = TokenLoader(cache, 12, **options)
    ways = [TokenLoader(cache, 12, resident="cpu", **options)]
    ways.append(on_device(TokenLoader(cache, 12, **options)))
    for _ in range(2):
        want = [values(batch) for batch in plain]
        for way in ways:
            got = [values(batch) for batch in way]
            for a, b in zip(got, want, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resident_run_resumes_one_from_files(made):
    plain = TokenLoader(made.cache, 12, seed=1)
    whole = [values(batch) for batch in plain]
    other = TokenLoader(made.cache, 12, seed=1)
    next(iter(other))
    held = TokenLoader(made.cache, 12, seed=1, resident="cpu")
    held.load_state_dict(other.state_dict())
    rest = [values(batch) for batch in held]
    assert all(torch.equal(a, b) for a, b in zip(rest[0], whole[1], strict=True))
    assert len(rest) == 2


def test_a_set_is_read_once(made, bytes_read_by):
    loader = TokenLoader(made.cache, 12, resident="cpu")
    next(iter(loader))
    assert bytes_read_by(lambda: list(loader)) < 1_000


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_only_rows_of_the_run_are_held_and_each_once(make_cache, dtype):
    features = make_cache(dtype).cache.texts
    reading = Reading()
    (reader,) = open_readers([features], reading)
    rows = np.array([2, 3, 11])
    held = hold(reader, rows, reading, "cpu")
    assert len(held.tokens) == features.lengths[rows].sum() + 1
    assert held.tokens.dtype == {"float16": torch.float16, "int8": torch.int8}[dtype]
    assert held.first(np.array([11, 2])).tolist() == [features.lengths[[2, 3]].sum(), 0]
    assert not held.tokens[-1].any()
    assert (held.scales is None) == (dtype == "float16")


def test_large_rows_are_brought_in_piece_by_piece(made, monkeypatch):
    monkeypatch.setattr(resident, "PIECE_BYTES", 300)
    loader = TokenLoader(made.cache, 12, seed=2, resident="cpu")
    for batch, want in zip(loader, TokenLoader(made.cache, 12, seed=2), strict=True):
        assert torch.equal(batch.image_tokens, want.image_tokens)
        assert torch.equal(batch.text_tokens, want.text_tokens)


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("featcache.loader")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="featcache.loader")
    yield caplog
    logger.removeHandler(caplog.handler)


def test_it_says_whose_memory_holds_the_sets(made, log):
    next(iter(TokenLoader(made.cache, 12, resident="cpu")))
    assert "tokens of image/tiny and text/tiny: 2.9 kB, held in main memory" in log.text


def test_what_does_not_fit_is_refused_with_ways_out(made, monkeypatch):
    monkeypatch.setattr(resident, "available_memory", lambda: 1_000)
    with pytest.raises(UsageError, match="too much to be held in memory: main memory has") as error:
        next(iter(TokenLoader(made.cache, 12, resident="cpu")))
    assert "--dtype int8" in error.value.fix


def test_a_gpu_holds_what_half_of_its_free_memory_holds(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000, 20_000))
    assert choose_memory(5_000, "cuda") == "cuda"
    assert not log.text
    assert choose_memory(5_001, "cuda") == "cpu"
    assert "5.0 kB are too much for cuda, which has 10.0 kB free" in log.text
    monkeypatch.setattr(resident, "available_memory", lambda: 100)
    with pytest.raises(UsageError, match=r"100 B free, cuda has 10[.]0 kB free"):
        choose_memory(5_001, "cuda")


def test_a_device_that_is_not_there_is_refused(made):
    with pytest.raises(UsageError, match="there is no device `cuda:77` here"):
        next(iter(TokenLoader(made.cache, 12, resident="cuda:77")))
    with pytest.raises(ConfigError, match="`resident`"):
        TokenLoader(made.cache, 12, resident="gpu")


def test_a_value_beyond_float16_is_found_in_memory_too(build, made, tmp_path):
    spec = build.make_spec(dtype="int8")
    content = build.make_content(spec, 6)
    content.tokens[3][1] *= 1e5 / np.abs(content.tokens[3][1]).max()
    build.write_set(tmp_path, spec, content)
    features = FeatureSet.open(tmp_path)
    reading = Reading()
    (reader,) = open_readers([features], reading)
    assert hold(reader, np.arange(6), reading, "cpu").may_overflow
    assert not hold(reader, np.array([0, 1]), reading, "cpu").may_overflow


def test_quarantined_rows_are_refused_before_they_are_held(build, tmp_path):
    spec = build.make_spec()
    build.write_set(tmp_path, spec, build.make_content(spec, 6, failed=[4]))
    reading = Reading()
    (reader,) = open_readers([FeatureSet.open(tmp_path)], reading)
    with pytest.raises(CacheError, match="row 4, key key-4"):
        hold(reader, np.arange(6), reading, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_batches_from_a_gpu_are_those_of_the_files(make_cache, dtype, tokens):
    cache = make_cache(dtype).cache
    plain = TokenLoader(cache, 12, seed=3, tokens=tokens)
    held = TokenLoader(cache, 12, seed=3, tokens=tokens, resident="cuda")
    for batch, want in zip(held, plain, strict=True):
        assert batch.to("cuda").image_tokens.is_cuda
        assert batch.text_valid.is_cuda
        pairs = zip(values(batch), values(want), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
