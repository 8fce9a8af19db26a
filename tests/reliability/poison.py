"""Loaded by a Dask worker: pictures of some names kill the process that reads them."""

import os
import signal

from featcache.encoders import shard

_decode_images = shard.decode_images
_NAMES = os.environ.get("POISON_NAMES", "").split()


def decode_or_die(path, preprocessings):
    if path.name in _NAMES:
        os.kill(os.getpid(), signal.SIGKILL)
    return _decode_images(path, preprocessings)


def dask_setup(worker):
    shard.decode_images = decode_or_die
