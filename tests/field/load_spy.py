"""Loaded by a Dask worker: notes the process id for every network that is built."""

import os
from pathlib import Path

from featcache.encoders import task

_load_encoder = task.load_encoder


def load_and_tell(*arguments, **options):
    with Path(os.environ["LOAD_LOG"]).open("a") as log:
        log.write(f"{os.getpid()}\n")
    return _load_encoder(*arguments, **options)


def dask_setup(worker):
    task.load_encoder = load_and_tell
