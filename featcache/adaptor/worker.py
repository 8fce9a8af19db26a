"""A rank above 0: `python -m featcache.adaptor.worker`, started by `Workers` and by nobody else."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from featcache.adaptor.run import RunConfig
from featcache.adaptor.signals import SIGNALS
from featcache.adaptor.trainer import Job, train_rank
from featcache.cache.reader import FeatureSet
from featcache.console import set_quiet
from featcache.errors import FeatcacheError
from featcache.manifest.table import open_manifest


def main() -> int:
    """Do one rank's share of the training that a line on stdin describes.

    Returns:
        0, or 1 after the error was written to stdout as a line of JSON.
    """
    for number in SIGNALS:  # Slurm sends SIGTERM to all processes of a job; rank 0 decides
        signal.signal(number, signal.SIG_IGN)
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_rank_0, daemon=True).start()
    set_quiet(True)
    try:
        job = Job(
            FeatureSet.open(Path(asked["images"])),
            FeatureSet.open(Path(asked["texts"])),
            open_manifest(Path(asked["manifest"])),
            Path(asked["folder"]),
            RunConfig.model_validate(asked["config"]),
            asked["device"],
        )
        train_rank(job, asked)
    except FeatcacheError as error:
        words = {"what": error.what, "where": error.where, "fix": error.fix}
        sys.stdout.write(json.dumps(words) + "\n")
        sys.stdout.flush()
        return 1
    return 0


def _leave_with_rank_0() -> None:
    """End this process when the other end of its stdin is closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
