"""A tiny workspace, and stage one on it: in this process, as forks, or as the real command."""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.manifest.table import write_manifest
from featcache.workspace import Workspace

ROWS = 40
SHARD_ROWS = 8
# 257 tokens of 192 channels: 8 rows of float16 are a shard of 1 MiB at most, 16 of int8.
VIT = {"img_size": 64, "patch_size": 4, "depth": 1, "embed_dim": 192, "num_heads": 4}
CONFIG = ExtractConfig(batch_size=4, threads=1, shard_mb=1, device="cpu")
WORDS = [
    "no",
    "acute",
    "effusion",
    "small",
    "left",
    "right",
    "lungs",
    "are",
    "clear",
    "heart",
    "size",
    "is",
    "normal",
    "edema",
]


def draw(path: Path, seed: int) -> Path:
    """A small grey JPEG: noise, blown up."""
    levels = np.random.default_rng(seed).integers(0, 256, (8, 7), np.uint8)
    Image.fromarray(np.kron(levels, np.ones((6, 6), np.uint8))).save(path, quality=90)
    return path


def key_of(row: int) -> str:
    return f"study{row:03d}"


def words_of(number: int) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, 3 + number % 9))


def write_rows(workspace, pictures, rows, *, name="few", texts=5) -> Workspace:
    """A manifest over some numbered pictures, with several texts of each."""
    rows = list(rows)
    keys = [key_of(row) for row in rows]
    columns = {
        "key": keys,
        "subject_id": keys,
        "study_id": keys,
        "view_position": ["PA"] * len(rows),
        "split": ["train"] * len(rows),
        "source": ["tiny"] * len(rows),
        "image_path": [f"{key}.jpg" for key in keys],
    }
    sentences = [
        (key_of(row), f"{words_of(10 * row + n)} {row}.{n}", f"sentence{n}")
        for row in rows
        for n in range(texts)
    ]
    table = pa.table(
        {
            "key": [key for key, _, _ in sentences],
            "text": [text for _, text, _ in sentences],
            "unit": ["report"] * len(sentences),
        }
    )
    write_manifest(
        workspace.manifests / name,
        pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()}),
        table if texts else None,
        dataset="tiny",
        image_root=pictures,
    )
    workspace.use(manifest=name)
    return workspace


@dataclass
class Tiny:
    """What all of these tests share.

    Attributes:
        pictures: Folder of `ROWS` pictures and ten more.
        vit: Folder of an image encoder.
        bert: Folder of a text encoder.
        scheduler: Address of a running scheduler with one worker.
    """

    pictures: Path
    vit: Path
    bert: Path
    scheduler: str

    def workspace(self, root, rows=range(ROWS), **options) -> Workspace:
        return write_rows(Workspace.open(root), self.pictures, rows, **options)

    def extract(self, workspace, *, images=True, texts=False, **settings):
        """Stage one in this process, on the running scheduler."""
        config = CONFIG.model_copy(update={"scheduler": self.scheduler} | settings)
        return extract(
            workspace,
            config,
            backbones=[str(self.vit) if images else "none"],
            text_encoders=[str(self.bert) if texts else "none"],
        )

    def arguments(self, workspace, *options, texts=False) -> list[str]:
        """The command line of the same."""
        settings = [f"--set={key}={getattr(CONFIG, key)}" for key in ("batch_size", "threads")]
        return [
            *("extract", "--backbone", str(self.vit), "--set=shard_mb=1", "--device", "cpu"),
            *("--text-encoder", str(self.bert) if texts else "none", *settings),
            *("--root", str(workspace.root), *options),
        ]


def content(workspace) -> dict[str, str]:
    """The hash of every file of every feature set, but for the figures of a run."""
    return {
        str(path.relative_to(workspace.features)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workspace.features.rglob("*"))
        if path.is_file() and path.name != "quality.json"
    }


def partials(workspace) -> list[str]:
    """Files that somebody has not finished writing.

    After an error another worker may be at its task for a moment: its file is given ten seconds.
    """
    until = time.monotonic() + 10
    while True:
        found = [path.name for path in workspace.root.rglob("*") if ".partial" in path.name]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def times(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


def children(pid: int) -> list[int]:
    """Processes whose ancestor is this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found, new = [], [pid]
    while new:
        new = [one for one, parent in parents.items() if parent in new and one not in found]
        found += new
    return found


def wait_until(fact, limit_s=300.0, every_s=0.01):
    """What a function gives as soon as it is true."""
    deadline = time.monotonic() + limit_s
    while not (value := fact()):
        if time.monotonic() > deadline:
            raise TimeoutError("it never came true")
        time.sleep(every_s)
    return value


@dataclass
class Command:
    """A running command of the launcher, the leader of its own process group."""

    pid: int
    error_file: Path
    ended: "queue.Queue[int]" = field(default_factory=queue.Queue)

    def wait(self, limit_s=300.0) -> tuple[int, str]:
        """Exit code, and what it said."""
        code = self.ended.get(timeout=limit_s)
        return code, self.error_file.read_text()

    def kill(self) -> None:
        """Kill its whole process group, unless it has just ended by itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Launcher:
    """See `launcher.py`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launcher.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._started: queue.Queue[int] = queue.Queue()
        self._running: dict[int, Command] = {}
        self._count = 0
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._lock = threading.Lock()
        self._early: dict[int, int] = {}

    def _listen(self) -> None:
        for line in self._process.stdout:
            pid, code = json.loads(line)
            if code is None:
                self._started.put(pid)
                continue
            with self._lock:
                command = self._running.get(pid)
                if command is None:
                    self._early[pid] = code
            if command is not None:
                command.ended.put(code)

    def start(self, arguments, **environment) -> Command:
        self._count += 1
        error = self._folder / f"{self._count}.txt"
        order = {"arguments": arguments, "environment": environment, "error": str(error)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        command = Command(self._started.get(timeout=300), error)
        with self._lock:
            self._running[command.pid] = command
            if command.pid in self._early:
                command.ended.put(self._early.pop(command.pid))
        return command

    def run(self, arguments, **environment) -> tuple[int, str]:
        return self.start(arguments, **environment).wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._reader.join()
        self._process.stdout.close()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    made = Launcher(tmp_path_factory.mktemp("launcher"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Pictures, two encoders with random weights, and a scheduler with one worker."""
    import timm
    from encoders.conftest import save_bert, stir
    from timm.models import save_for_hf

    from featcache.cluster import connect, local_workers

    root = tmp_path_factory.mktemp("tiny")
    pictures = root / "pictures"
    pictures.mkdir()
    for row in range(ROWS + 10):
        draw(pictures / f"{key_of(row)}.jpg", row)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    save_for_hf(stir(network), root / "vit", safe_serialization=True)
    save_bert(root / "bert")
    with connect(None, local_workers("cpu", 1, 1)) as client:
        yield Tiny(pictures, root / "vit", root / "bert", client.scheduler.address)


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Workspace:
    """Forty pictures in five shards and two hundred texts in two, made without disturbance."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("finished"))
    tiny.extract(workspace, texts=True)
    return workspace
