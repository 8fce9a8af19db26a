"""The processes of a training that is shared by several: one rank each, on this machine.

The process that was asked to train is rank 0. It starts the others itself, as
`python -m featcache.adaptor.worker`, and tells each in one line of JSON what to do; nothing is
pickled, and a script or a notebook is not run twice. When rank 0 goes, however it goes, its end of
the pipe closes and the others leave at once.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

import featcache
from featcache.errors import FeatcacheError, TrainingError

PATIENCE_S = 30.0
"""After another rank died, this one gets so long to notice by itself: on a GPU it may not."""
LAST_WORDS_S = 10.0
"""How long to wait for a process that should be ending."""
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class OneMachine(ClusterEnvironment):
    """Ranks that were started by `Workers`; no variable of the environment has a say.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        port: Where rank 0 listens.
    """

    def __init__(self, rank: int, world_size: int, port: int):
        self._rank, self._world_size, self._port = rank, world_size, port

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning need not start any."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Never found by itself."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Fixed."""

    def global_rank(self) -> int:
        """Of this process."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed."""

    def local_rank(self) -> int:
        """Of this process on its machine."""
        return self._rank

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


class Workers:
    """The other ranks, running inside its `with` block.

    Args:
        job: What they all do, in plain values; each gets its `rank` besides.
        world_size: Number of processes with this one.
    """

    def __init__(self, job: Mapping[str, Any], world_size: int):
        self.port = _free_port()
        self._job = {**job, "world_size": world_size, "port": self.port}
        self._world_size = world_size
        self._running: list[subprocess.Popen[str]] = []
        self._ended = threading.Event()

    def __enter__(self) -> "Workers":
        source = str(Path(featcache.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        for rank in range(1, self._world_size):
            worker = subprocess.Popen(
                [sys.executable, "-m", "featcache.adaptor.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in a terminal is for rank 0 alone
            )
            self._running.append(worker)
            if worker.stdin is not None:
                worker.stdin.write(json.dumps({**self._job, "rank": rank}) + "\n")
                worker.stdin.flush()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for worker in self._running:
            if kind is None:
                _wait(worker)
            if worker.stdin is not None:
                worker.stdin.close()
            if _wait(worker) is None:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()

    def failure(self) -> FeatcacheError | None:
        """Why one of them stopped, None if none of them did, or without a word of its own."""
        for rank, worker in enumerate(self._running, start=1):
            code = _wait(worker)
            if code:
                words = worker.stdout.read() if worker.stdout is not None else ""
                return _from_words(words, rank, code)
        return None

    def _watch(self) -> None:
        """End this process when another rank died and this one waits for it for ever."""
        while not self._ended.wait(1.0):
            if any(worker.poll() for worker in self._running):
                if not self._ended.wait(PATIENCE_S):
                    sys.stderr.write(f"error: {self.failure()}\n")
                    os._exit(1)
                return


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back the variables and the number of threads that distributed training changes."""
    before = {name: os.environ.get(name) for name in (*VARIABLES, "OMP_NUM_THREADS")}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(threads)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _wait(worker: "subprocess.Popen[str]") -> int | None:
    try:
        return worker.wait(LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        return None


def _from_words(words: str, rank: int, code: int) -> FeatcacheError:
    """The error that a process wrote before it ended."""
    try:
        said = json.loads(words.splitlines()[-1])
        return TrainingError(said["what"], where=said["where"], fix=said["fix"])
    except (ValueError, IndexError, KeyError, TypeError):
        return TrainingError(
            f"process {rank} of the training ended with code {code}",
            fix="its own message stands above; --set devices=1 trains in one process",
        )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
