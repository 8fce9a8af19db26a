"""What libhdf5 sees in shards: a script for a child process, never imported by the package.

One changed byte can make that library crash or loop for ever, so it runs nowhere else on files that
exist already. The script imports nothing of this package, which would double its time to start.

It reads JSON lines: first `{"deep": bool}`, then one per shard, of `libhdf5.ask_libhdf5`. It
answers each shard with a line `{"path": ..., "problem": sentence or null}`.
"""

import json
import os
import sys
from math import prod
from typing import Any

import h5py
import numpy as np

CHILD_MEMORY_BYTES = 4 * 2**30
CHILD_CPU_S = 3_600
_HEADER_BYTES = 8_192
_PIECE_BYTES = 8 * 2**20


def look(path: str, arrays: dict[str, Any], attribute: str, *, deep: bool) -> str | None:
    """Let libhdf5 open a shard and compare what it sees with the header.

    Args:
        path: The shard.
        arrays: For each array of the header its offset in bytes, shape and numpy type.
        attribute: Name of the attribute that repeats the header's JSON.
        deep: Whether to read every array through libhdf5 too and compare the bytes.

    Returns:
        The first difference in words, None when there is none.
    """
    with h5py.File(path, "r", locking=False) as file, open(path, "rb") as plain:  # noqa: PTH123
        if set(file) != set(arrays):
            return f"HDF5 names the arrays {sorted(file)}"
        text = bytes(file.attrs[attribute])
        if not text or text not in plain.read(_HEADER_BYTES):
            return f"the attribute `{attribute}` is not the header's JSON"
        for name, (offset, shape, dtype) in arrays.items():
            array = file[name]
            if not isinstance(array, h5py.Dataset):
                return f"HDF5 sees `{name}` as something else than an array"
            same = array.shape == tuple(shape) and array.dtype == np.dtype(dtype)
            if not same or (0 not in shape and array.id.get_offset() != offset):
                return f"HDF5 sees `{name}` as {array.dtype} {array.shape}, or elsewhere"
            if deep and not _equal_bytes(array, plain.fileno(), offset):
                return f"HDF5 reads other values of `{name}` than stand at its place"
    return None


def _equal_bytes(array: Any, descriptor: int, offset: int) -> bool:
    """Whether libhdf5 gives the very bytes that stand at an array's place."""
    row_bytes = prod(array.shape[1:]) * array.dtype.itemsize
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(0, array.shape[0], step):
        seen = array[start : start + step].tobytes()
        if seen != os.pread(descriptor, len(seen), offset + start * row_bytes):
            return False
    return True


def limit_resources() -> None:
    """Bound this process, so that a file that misleads libhdf5 cannot eat the machine."""
    import resource  # noqa: PLC0415  (absent on Windows, where the child still has its time limit)

    for kind, limit in (
        (resource.RLIMIT_AS, CHILD_MEMORY_BYTES),
        (resource.RLIMIT_CPU, CHILD_CPU_S),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (allowed, hard))


def main() -> None:
    """Answer the requests on stdin, one line on stdout for each."""
    first = sys.stdin.readline()
    if not first:  # nobody had a question
        return
    deep = json.loads(first)["deep"]
    limit_resources()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            problem = look(request["path"], request["arrays"], request["attribute"], deep=deep)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
            problem = f"libhdf5 cannot read it ({type(error).__name__})"
        sys.stdout.write(json.dumps({"path": request["path"], "problem": problem}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is flushed; to take numpy and h5py apart takes 20 ms
