"""Stage one on a real Dask cluster: a scheduler and workers that are processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest_extract import shard_hashes
from distributed import Client
from distributed.protocol import pickle
from encoders.conftest import stir
from reliability.kit import CONFIG, draw, key_of, partials, wait_until, write_rows
from timm.models import save_for_hf

from featcache import cluster
from featcache.cli import main
from featcache.extract import passes
from featcache.extract.command import extract
from featcache.workspace import Workspace

ROWS = 24
# 257 tokens of 384 channels: 4 rows of float16 are a shard of 1 MiB at most.
VIT = {"img_size": 64, "patch_size": 4, "depth": 1, "embed_dim": 384, "num_heads": 6}
DASK = Path(sys.executable).with_name("dask")
COUNTING = Path(__file__).with_name("counting.py")


class Dask:
    """A scheduler and workers, started as on a cluster and in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = folder / "scheduler.json"
        self.started: list[subprocess.Popen] = []
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.address = json.loads(wait_until(self._read))["address"]

    def _read(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def _start(self, command: str, *options: str, **environment: str) -> subprocess.Popen:
        with (self._folder / f"{len(self.started)}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    [DASK, command, "--scheduler-file", self._file, *options],
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                )
            )
        return self.started[-1]

    def worker(self, **environment: str) -> subprocess.Popen:
        options = ("--no-nanny", "--nthreads", "2", "--memory-limit", "0", "--no-dashboard")
        host = ("--host", "127.0.0.1", "--local-directory", str(self._folder))
        return self._start("worker", *options, *host, "--preload", str(COUNTING), **environment)

    def ask(self, question):
        """What a function gives on each worker."""
        with Client(self.address) as client:
            return list(client.run(question).values())

    def wait_for(self, workers: int) -> None:
        with Client(self.address) as client:
            client.wait_for_workers(workers, timeout=300)

    def close(self) -> None:
        for process in reversed(self.started):
            process.kill()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    made = Dask(tmp_path_factory.mktemp("dask"))
    made.worker()
    made.worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twenty-four pictures and an encoder."""
    root = tmp_path_factory.mktemp("files")
    for row in range(ROWS):
        draw(root / f"{key_of(row)}.jpg", row)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    save_for_hf(stir(network), root / "vit", safe_serialization=True)
    return root


def make(files, root, **settings):
    workspace = write_rows(Workspace.open(root), files, range(ROWS), texts=0)
    config = CONFIG.model_copy(update=settings)
    return workspace, extract(workspace, config, backbones=[str(files / "vit")])


@pytest.fixture(scope="module")
def local(files, tiny, tmp_path_factory):
    """The shards of one local worker, as a run without a scheduler starts it."""
    root = tmp_path_factory.mktemp("local")
    hashes = shard_hashes(make(files, root, scheduler=tiny.scheduler)[0])
    assert len(hashes) == 6
    return hashes


def test_the_command_on_a_cluster_makes_the_bytes_of_a_local_run(dask, files, local, tmp_path):
    dask.wait_for(2)
    workspace = write_rows(Workspace.open(tmp_path), files, range(ROWS), texts=0)
    before = sum(dask.ask(lambda: len(sys.modules["counting"].opened)))
    code = main(
        [
            *("extract", "--backbone", str(files / "vit"), "--scheduler", dask.address),
            *("--root", str(tmp_path), "--device", "cpu", "--quiet"),
            *("--set=batch_size=4", "--set=shard_mb=1", "--set=threads=1"),
        ]
    )
    assert code == 0
    assert shard_hashes(workspace) == local
    seen = dask.ask(lambda: (len(sys.modules["counting"].opened), Path.cwd()))
    assert sum(opened for opened, _ in seen) - before == ROWS, "each picture is read once"
    assert Path.cwd() not in [folder for _, folder in seen]


def test_weights_are_loaded_once_per_worker_and_do_not_travel(dask, files, tmp_path, monkeypatch):
    dask.wait_for(2)
    sent = []

    def run_tasks(client, tasks, on_rows):
        sent.extend(tasks)
        return cluster.run_tasks(client, tasks, on_rows)

    monkeypatch.setattr(passes, "run_tasks", run_tasks)
    for name in ("one", "two"):
        make(files, tmp_path / name, scheduler=dask.address)
    assert dask.ask(lambda: sys.modules["counting"].loaded) == [["vit"], ["vit"]]
    assert len(sent) == 12
    assert max(len(pickle.dumps(task)) for task in sent) < 100_000


def test_two_workers_share_one_scale_of_int8(dask, files, tiny, tmp_path):
    dask.wait_for(2)
    one, two = (
        make(files, tmp_path / name, scheduler=address, dtype="int8")[0]
        for name, address in (("one", tiny.scheduler), ("two", dask.address))
    )
    assert shard_hashes(two) == shard_hashes(one)
    assert len(shard_hashes(two)) == 3


def test_a_worker_that_is_killed_does_not_matter(dask, files, local, tmp_path):
    victim = dask.worker(DIES_AT="2")
    dask.wait_for(3)
    workspace, _ = make(files, tmp_path, scheduler=dask.address)
    assert victim.wait(timeout=300) == -signal.SIGKILL
    assert shard_hashes(workspace) == local
    assert not partials(workspace)


def test_no_scheduler_at_the_address_is_one_clear_error(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "ANSWER_S", 1)
    write_rows(Workspace.open(tmp_path), files, range(ROWS), texts=0)
    code = main(
        [
            *("extract", "--backbone", str(files / "vit"), "--scheduler", "tcp://127.0.0.1:9"),
            *("--root", str(tmp_path), "--device", "cpu", "--quiet"),
        ]
    )
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: no Dask scheduler answers",
        "  at: tcp://127.0.0.1:9",
        "  try: dask scheduler, then try again",
    ]
