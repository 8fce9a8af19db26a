"""Buffers and threads: what is reused, what is bounded, and how everything ends."""

import gc
import logging
import os
import resource
import signal
import threading
import time
import weakref

import numpy as np
import pytest

from featcache.cache.reader import FeatureSet
from featcache.errors import ShardError, UsageError
from featcache.loader import ring
from featcache.loader.gather import TokenLoader, iterate_rows
from featcache.loader.ring import available_memory, choose_io


def copy_set(features, folder):
    """The same set in files of its own, to be damaged."""
    folder.mkdir()
    for path in features.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return FeatureSet.open(folder)


def in_a_fork(function, timeout_s=30):
    """Run in a forked process: its exit status, 0 when `function` returned True."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_batch_stays_valid_until_the_next_one_is_asked_for(made, prefetch):
    loader = TokenLoader(made.cache, 4, prefetch=prefetch, threads=3)
    for batch in loader:
        images, texts = batch.image_tokens.clone(), batch.text_tokens.clone()
        time.sleep(0.01)  # time enough for all that may be filled ahead
        assert batch.image_tokens.equal(images)
        assert batch.text_tokens.equal(texts)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_buffers_are_reused(made, prefetch):
    loader = TokenLoader(made.cache, 4, prefetch=prefetch)
    used = {batch.image_tokens.data_ptr() for _ in range(3) for batch in loader}
    assert len(used) == prefetch + 2


def test_buffers_start_where_copying_is_fast(made, make_cache):
    for cache in (made.cache, make_cache("int8").cache):
        ring = TokenLoader(cache, 4)._open()
        for slot in ring._slots:
            assert all(one.tokens.data_ptr() % 64 == 0 for one in slot.buffers)


@pytest.fixture(scope="module")
def large(build, tmp_path_factory):
    """6 rows of 256 KiB."""
    folder = tmp_path_factory.mktemp("large")
    spec = build.make_spec(num_tokens=64, dim=2048)
    build.write_set(folder, spec, build.make_content(spec, 6))
    return FeatureSet.open(folder)


def test_the_bound_holds_two_batches_at_least(large):
    def buffers(buffer_mb):
        batches = iterate_rows(large, np.arange(6).repeat(8), 4, buffer_mb=buffer_mb, prefetch=6)
        return len({tokens.data_ptr() for _, tokens, _ in batches})

    assert buffers(1) == buffers(2) == 2  # a batch is 1 MiB
    assert buffers(3) == 3
    assert buffers(512) == 8


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_memory_does_not_grow_with_what_is_read(large, io):
    def anonymous_bytes():
        with open("/proc/self/status") as file:  # noqa: PTH123
            status = dict(line.split(":", 1) for line in file)
        return int(status["RssAnon"].split()[0]) * 1024

    batches = iterate_rows(large, np.arange(6).repeat(200), 4, io=io)  # 315 MB
    for _ in range(10):
        next(batches)
    before = anonymous_bytes()
    assert sum(1 for _ in batches) == 290
    assert anonymous_bytes() - before < 50e6


def test_a_full_pass_ends_its_threads(made, loader_threads):
    list(TokenLoader(made.cache, 4))
    assert loader_threads() == []


def test_leaving_a_pass_early_ends_its_threads(made, loader_threads):
    loader = TokenLoader(made.cache, 4)
    for _ in loader:
        break
    assert loader_threads() == []


def test_closing_an_iterator_ends_its_threads(made, loader_threads):
    batches = iterate_rows(made.cache.images, np.arange(20), 4)
    next(batches)
    assert any(t.name.startswith("featcache-loader") for t in threading.enumerate())
    batches.close()
    assert loader_threads() == []


def test_a_new_pass_ends_the_one_before(made, loader_threads):
    loader = TokenLoader(made.cache, 4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert next(first, None) is None
    assert len(list(second)) == len(loader)
    assert loader_threads() == []


def test_a_dropped_loader_is_collected_with_threads_and_files(made, loader_threads, open_files):
    loader = TokenLoader(made.cache, 4, io="pread")
    iterator = iter(loader)
    next(iterator)
    folder = made.cache.images.folder
    before = open_files(folder)
    gone = weakref.ref(loader)
    del loader, iterator
    gc.collect()
    assert gone() is None
    assert loader_threads() == []
    assert open_files(folder) < before


def test_an_error_in_a_thread_reaches_the_consumer(made, tmp_path, loader_threads):
    features = copy_set(made.cache.images, tmp_path / "set")
    batches = iterate_rows(features, np.arange(23), 1, io="pread", prefetch=0)
    next(batches)
    path = features.shards[0].path
    os.truncate(path, features.token_place(0).offset + 100)  # its file is open by now
    with pytest.raises(ShardError, match="the file ends at byte") as caught:
        list(batches)
    assert caught.value.where == str(path)
    assert loader_threads() == []
    assert next(batches, None) is None


class Stop(BaseException):
    """What no library would catch."""


def test_whatever_kills_a_thread_is_raised_and_nothing_hangs(made, loader_threads, monkeypatch):
    loader = TokenLoader(made.cache, 4)
    next(iter(loader))
    reader = loader._opened[1]._readers[1]

    def die(*_):
        raise Stop

    monkeypatch.setattr(reader, "fill", die)
    with pytest.raises(Stop):
        list(loader)
    assert loader_threads() == []


@forks
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_fork_reads_the_right_rows_though_the_parent_has_files_open(made, io):
    loader = TokenLoader(made.cache, 4, io=io, seed=1)
    expected = [batch.image_tokens.clone() for batch in loader]
    loader = TokenLoader(made.cache, 4, io=io, seed=1)
    iterator = iter(loader)
    next(iterator)
    state = TokenLoader(made.cache, 4, seed=1).state_dict()

    def child():
        loader.load_state_dict(state)
        right = [a.image_tokens.equal(b) for a, b in zip(loader, expected, strict=True)]
        return all(right) and loader._opened[0] == os.getpid()

    assert in_a_fork(child) == 0
    assert sum(1 for _ in iterator) == len(loader) - 1  # and the parent goes on undisturbed


@forks
def test_a_pass_that_was_forked_in_the_middle_is_refused_instead_of_hanging(made):
    iterator = iter(TokenLoader(made.cache, 4, prefetch=1))
    next(iterator)

    def child():
        with pytest.raises(UsageError, match="forked in the middle of a pass"):
            next(iterator)
        return True

    assert in_a_fork(child) == 0


@pytest.fixture(scope="module")
def many_shards(build, tmp_path_factory):
    """70 shards of a row each, and what row r holds."""
    folder = tmp_path_factory.mktemp("many")
    spec = build.make_spec()
    content = build.make_content(spec, 70)
    build.write_set(folder, spec, content, rows_per_shard=1)
    return folder, build.expected_tokens(spec, content, range(70)).reshape(70, 3, 4)


@forks
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_more_shards_than_file_descriptors(many_shards, io):
    folder, expected = many_shards
    rows = np.random.default_rng(0).permutation(70)

    def child():
        os.closerange(3, 4096)  # what other tests hold open counts, too
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        features = FeatureSet.open(folder)
        got = [tokens.clone().numpy() for _, tokens, _ in iterate_rows(features, rows, 7, io=io)]
        return np.array_equal(np.concatenate(got), expected[rows])

    assert in_a_fork(child) == 0


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("featcache.loader")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger="featcache.loader")
    yield caplog
    logger.removeHandler(caplog.handler)


def test_auto_maps_what_fits_in_memory_and_says_so(made, log):
    sets = (made.cache.images, made.cache.texts)
    assert choose_io(sets, "auto") == "mmap"
    assert "tokens of image/tiny and text/tiny: 3." in log.text
    assert "they are mapped" in log.text


def test_training_says_aloud_how_it_reads(made, log):
    list(iterate_rows(made.cache.images, np.arange(4), 2))
    assert {record.levelname for record in log.records} == {"DEBUG"}
    log.clear()
    next(iter(TokenLoader(made.cache, 4)))
    assert {record.levelname for record in log.records} == {"INFO"}
    assert "they are mapped" in log.text


def test_auto_reads_what_does_not_fit_and_says_so(made, log, monkeypatch):
    monkeypatch.setattr(ring, "available_memory", lambda: 3_000)
    assert choose_io((made.cache.images,), "auto") == "pread"
    assert "available memory: 3.0 kB; they would not stay in memory" in log.text


def test_a_named_way_of_reading_is_taken_as_it_is(made, log):
    assert choose_io((made.cache.images,), "pread") == "pread"
    assert choose_io((made.cache.images,), "mmap") == "mmap"
    assert not log.records


def test_available_memory_is_that_of_a_machine():
    assert 2**20 < available_memory() < 2**50
