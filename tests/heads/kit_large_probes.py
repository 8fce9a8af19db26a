"""Trains 64 probes on many made-up vectors that lie in a file, and tells the memory it took.

A process of its own, so that nothing else counts: `python kit_large_probes.py ROWS WIDTH FOLDER`.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from featcache.heads.probe import train_probes
from featcache.heads.vector_file import VectorFile

DECAYS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 3e-2, 3e-1)
PIECE = 5_000


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else float("nan")


class Peak:
    """The largest such memory while it is open."""

    def __enter__(self) -> "Peak":
        self.value, self.done = anonymous_mb(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            self.value = max(self.value, anonymous_mb())
            time.sleep(0.003)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(rows: int, width: int, folder: Path) -> dict[str, float]:
    """Megabytes before and at most, after 2 steps of 64 probes on all rows."""
    generator = np.random.default_rng(0)
    with VectorFile(folder, rows) as file:
        for start in range(0, rows, PIECE):
            size = (min(PIECE, rows - start), width)
            file.add(generator.normal(size=size).astype(np.float32))
        vectors = file.finish()
    targets = generator.integers(0, 3, rows)
    before = anonymous_mb()
    with Peak() as peak:
        probes = train_probes(
            vectors,
            targets,
            [np.arange(rows)],
            num_classes=3,
            decays=DECAYS,
            seeds=range(8),
            max_steps=2,
        )
        probes.probabilities(vectors, [0])
    return {"before_mb": before, "peak_mb": peak.value}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
