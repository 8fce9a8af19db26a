"""What went wrong with HDF5 files and their storage elsewhere: locks, workers, limits, layouts."""

import itertools
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import torch
from cache import building as build
from torch.utils.data import DataLoader, Dataset, RandomSampler

from featcache.cache.check import read_info, verify_feature_set
from featcache.cache.reader import Cache, FeatureSet
from featcache.errors import CacheError, ShardError
from featcache.loader.gather import TokenLoader, iterate_rows

NO_LOCKS = r"""
#include <errno.h>
#include <stdarg.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

int flock(int descriptor, int operation) { errno = 37; return -1; }

int fcntl(int descriptor, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) { errno = 37; return -1; }
    return syscall(SYS_fcntl, descriptor, command, argument);
}

int fcntl64(int descriptor, int command, void *argument) {
    return fcntl(descriptor, command, argument);
}
"""


def numbered(folder, rows, *, modality="image", rows_per_shard=4, **changes):
    """A set whose every value is the number of its row."""
    spec = build.make_spec(modality, **changes)
    content = build.make_content(spec, rows)
    content.tokens = [np.full((3, spec.dim), row, np.float32) for row in range(rows)]
    build.write_set(folder, spec, content, rows_per_shard=rows_per_shard)
    return FeatureSet.open(folder)


def run(program, *arguments, **options):
    """Run Python in a child; it has the tests' own builder."""
    code = "import sys; sys.path[:0] = [sys.argv.pop(1)]\n" + textwrap.dedent(program)
    folder = str(Path(build.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, folder, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def test_a_file_system_without_locks_needs_no_setting(tmp_path):
    """NFS and Lustre without a lock service: everything that takes a lock fails with errno 37."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    source, library = tmp_path / "nolocks.c", tmp_path / "nolocks.so"
    source.write_text(NO_LOCKS)
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"the compiler makes no library here: {made.stderr.strip()[:200]}")
    program = """
        import fcntl
        from pathlib import Path
        import h5py, numpy as np
        from cache import building as build
        from featcache.cache.check import info, verify_feature_set
        from featcache.cache.feature_set import FeatureSet

        folder = Path(sys.argv[1])
        for lock in (fcntl.flock, fcntl.lockf):
            with open("/dev/null", "w") as file:
                try:
                    lock(file, fcntl.LOCK_EX)
                except OSError as error:
                    assert error.errno == 37
                else:
                    sys.exit(3)
        spec = build.make_spec(pooled_dim=2)
        content = build.make_content(spec, 9)
        build.write_set(folder, spec, content)
        try:
            h5py.File(folder / "shard-000000.h5", "r")
        except OSError as error:
            assert error.errno == 37, error
        else:
            sys.exit(3)
        rows = np.arange(9)
        tokens = FeatureSet.open(folder).read_tokens(rows, verify=True)
        assert tokens.tobytes() == build.expected_tokens(spec, content, rows).tobytes()
        assert info(folder)["complete_shards"] == 3
        report = verify_feature_set(folder, deep=True)
        assert report.ok, report.to_text()
        """
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    environment.pop("HDF5_USE_FILE_LOCKING", None)
    child = run(program, tmp_path / "set", env=environment)
    if child.returncode == 3:
        pytest.skip("locks cannot be taken away from h5py's library here")
    assert (child.returncode, child.stderr) == (0, "")


class Rows(Dataset):
    """The number that row i holds, read by whichever process is asked."""

    def __init__(self, features):
        self.features = features

    def __len__(self):
        return self.features.num_rows

    def __getitem__(self, row):
        return int(self.features.read_tokens(np.array([row]), verify=True)[0, 2, 3])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize(
    ("method", "workers"),
    [
        (None, 0),
        ("fork", 1),
        ("fork", 4),
        *(
            pytest.param(method, workers, marks=pytest.mark.slow)  # each worker imports torch anew
            for method, workers in itertools.product(["spawn", "forkserver"], [1, 4])
        ),
    ],
)
def test_workers_read_the_rows_they_were_asked_for(tmp_path, method, workers):
    features = numbered(tmp_path / "set", 40)
    features.read_tokens(np.arange(40))  # touched before the workers start
    order = torch.Generator().manual_seed(3)
    rows = Rows(features)
    loader = DataLoader(
        rows,
        batch_size=4,
        sampler=RandomSampler(rows, generator=order),
        num_workers=workers,
        multiprocessing_context=method,
    )
    found = torch.cat(list(loader)).tolist()
    same = torch.Generator().manual_seed(3)
    assert found == list(RandomSampler(rows, generator=same))
    assert sorted(found) == list(range(40))


def read_epoch(loader):
    """Pairs, and the image and text tokens' numbers, of a pass."""
    return [
        [
            one.tolist()
            for one in (batch.pairs, batch.image_tokens[:, 0, 0], batch.text_tokens[:, 0, 0])
        ]
        for batch in loader
    ]


def check_epoch(epoch, pairs):
    assert sorted(pair for batch, _, _ in epoch for pair in batch) == list(range(pairs))
    for batch, images, texts in epoch:
        assert images == batch
        assert texts == [(3 * pair) % pairs for pair in batch]


def read_in_child(pickled, answers):
    answers.put([batch for batch, _, _ in read_epoch(pickle.loads(pickled))])


@pytest.fixture
def pairs(tmp_path):
    """32 pairs: image i with text 3 i."""
    rows = np.arange(32)
    sets = numbered(tmp_path / "i", 32), numbered(tmp_path / "t", 32, modality="text")
    return Cache(*sets, rows, 3 * rows % 32, dropped={}, fingerprint="ab" * 16)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_threads_read_the_rows_they_were_asked_for(pairs, io):
    epochs = []
    for threads in (1, 4):
        loader = TokenLoader(pairs, 8, seed=5, threads=threads, prefetch=threads - 1, io=io)
        copy = pickle.loads(pickle.dumps(loader))
        epochs += [read_epoch(loader), read_epoch(copy)]
    for epoch in epochs:
        check_epoch(epoch, 32)
        assert [batch for batch, _, _ in epoch] == [batch for batch, _, _ in epochs[0]]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_loader_crosses_process_borders(pairs, method):
    loader = TokenLoader(pairs, 8, seed=5)
    mine = read_epoch(loader)
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    fresh = pickle.dumps(TokenLoader(pairs, 8, seed=5))
    child = context.Process(target=read_in_child, args=(fresh, answers))
    child.start()
    found = answers.get()
    child.join(60)
    assert found == [batch for batch, _, _ in mine]


def test_more_shards_than_descriptors(tmp_path):
    """200 shards, and 64 descriptors for all that the process has open."""
    program = """
        import resource
        from pathlib import Path
        import numpy as np
        from cache import building as build
        from featcache.cache.check import read_info, verify_feature_set
        from featcache.cache.feature_set import FeatureSet
        from featcache.loader.gather import iterate_rows

        spec = build.make_spec()
        content = build.make_content(spec, 200)
        content.tokens = [np.full((3, 4), row, np.float32) for row in range(200)]
        build.write_set(sys.argv[1], spec, content, rows_per_shard=1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        features = FeatureSet.open(Path(sys.argv[1]))
        assert features.num_shards == 200
        for io in ("mmap", "pread"):
            rows = np.random.default_rng(7).permutation(200)
            seen = []
            for number, tokens, _ in iterate_rows(features, rows, 16, io=io, threads=4):
                assert (tokens == tokens[:, :1, :1]).all()
                assert number.tolist() == tokens[:, 0, 0].int().tolist(), io
                seen += number.tolist()
            assert seen == rows.tolist()
        assert read_info(features.folder).complete_shards == 200
        assert verify_feature_set(features.folder).ok
        """
    child = run(program, tmp_path / "set")
    assert (child.returncode, child.stderr) == (0, "")


def test_a_shard_that_another_tool_rewrote_in_chunks_is_refused(tmp_path):
    """A thousand rows to a chunk would be read for every single row."""
    features = numbered(tmp_path / "set", 8)
    path = features.shards[1].path
    rewritten = tmp_path / "rewritten.h5"
    with h5py.File(path, "r") as old, h5py.File(rewritten, "w") as new:
        for name, array in old.items():
            new.create_dataset(name, data=array[:], chunks=array.shape, compression="gzip")
        new.attrs["featcache"] = old.attrs["featcache"]
    rewritten.replace(path)
    said = r"no shard of ours.*rewrote, e.g. with chunks"
    with pytest.raises(ShardError, match=said) as caught:
        FeatureSet.open(features.folder)
    assert caught.value.where == str(path)
    assert "featcache repair" in caught.value.fix
    (problem,) = verify_feature_set(features.folder).problems
    assert problem.shard == 1
    assert re.search(said, problem.what)


def test_an_epoch_reads_its_rows_and_little_else(tmp_path, bytes_read_by):
    features = numbered(tmp_path / "set", 64, rows_per_shard=16, num_tokens=3, dim=5000)
    row_bytes = 3 * 5000 * 2
    features.lengths  # noqa: B018  (offsets and the like are read once)
    rows = np.random.default_rng(0).permutation(64)

    for _ in iterate_rows(features, rows[:1], 1, io="pread"):
        pass

    def epoch():
        for _, tokens, _ in iterate_rows(features, rows, 8, io="pread"):
            assert tokens.shape == (8, 3, 5000)

    taken = bytes_read_by(epoch)
    assert 64 * row_bytes <= taken <= 1.1 * 64 * row_bytes


def check_readable(folder, rows):
    """Open, info, verify and read, as the commands do."""
    features = FeatureSet.open(folder)
    assert features.read_tokens(np.arange(rows), verify=True)[:, 0, 0].tolist() == [*range(rows)]
    assert [n.item() for n, _, _ in iterate_rows(features, np.arange(rows), 1)] == [*range(rows)]
    assert read_info(folder).stored_rows == rows
    if os.access(sys.executable, os.X_OK):  # not for the user `nobody` with an interpreter of root
        report = verify_feature_set(folder, deep=True)
        assert report.ok, report.to_text()


@pytest.mark.parametrize("name", ["a b (1)", "Röntgen-Bilder ü", "-dash", "'quotes\"", "l" * 200])
def test_folders_of_any_name(tmp_path, name):
    folder = tmp_path / name / "features" / "image" / name
    numbered(folder, 6)
    check_readable(folder, 6)
    (folder / "shard-000001.h5").unlink()
    report = verify_feature_set(folder)
    command = report.to_text().splitlines()[-1]
    command = command.removeprefix("next: ").partition(" makes")[0]
    assert shlex.split(command) == [
        *("featcache", "repair", f"image/{name}"),
        *("--root", str(tmp_path / name)),
    ]


@pytest.fixture
def open_folder():
    """A folder that every user of the machine can get to, unlike pytest's own."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_cache_that_may_only_be_read(open_folder):
    """Its permission bits do not stop root, so a child reads it that is not."""
    folder = open_folder / "set"
    numbered(folder, 6)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() != 0:
        check_readable(folder, 6)
        return
    nobody = 65_534
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(nobody)
            os.setuid(nobody)
            try:
                (folder / "new").touch()
                os._exit(3)
            except PermissionError:
                check_readable(folder, 6)
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that is mounted read-only."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(folder):
        for options in (["--bind", folder, place], ["-o", "remount,bind,ro", place]):
            made = subprocess.run(["mount", *map(str, options)], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"nothing may be mounted here: {made.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def test_a_cache_on_a_read_only_file_system(tmp_path, read_only):
    numbered(tmp_path / "set", 6)
    folder = read_only(tmp_path / "set")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "new").touch()
    check_readable(folder, 6)
    spec = build.make_spec()
    with pytest.raises(CacheError):
        build.write_set(folder / "deeper", spec, build.make_content(spec, 2))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_value_beyond_float16_is_refused_where_it_is_written(tmp_path, modality):
    """An encoder's rare channel reaches 70,000: stored as inf it is noticed weeks later."""
    spec = build.make_spec(modality)
    content = build.make_content(spec, 8)
    content.tokens[6] = np.zeros((3, spec.dim), np.float32)
    content.tokens[6][1, 2] = 7e4
    said = r"gave 70000 in channel 2 of row `key-6`, which float16 cannot hold"
    with pytest.raises(CacheError, match=said):
        build.write_set(tmp_path / "set", spec, content)
    assert not list((tmp_path / "set").glob("shard-000001*"))
    partly = FeatureSet.open(tmp_path / "set", allow_partial=True)
    assert np.isfinite(partly.read_tokens(np.arange(4))).all()
