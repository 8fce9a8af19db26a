"""The question to libhdf5 whether it sees a shard as its header says, put in a child process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcache.cache.header import ATTRIBUTE
from featcache.cache.shard import Shard
from featcache.errors import ShardError

CHILD_TIMEOUT_S = 60.0
"""Time that libhdf5 gets to start and to open one group of shards."""
CHILD_SHARDS = 1_000
DEEP_BYTES_PER_S = 20e6
"""Slowest reading that a deep check allows for."""
_SCRIPT = Path(__file__).with_name("libhdf5_child.py")

Child = subprocess.Popen[bytes]


@contextmanager
def started_child() -> Iterator[Child]:
    """Start a child that waits for one group of shards; it is ended afterwards."""
    # One BLAS thread: each would take address space from the child's limit.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT)],  # -P: or our `format.py` and others hide packages
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def ask_libhdf5(
    paths: Sequence[Path], *, deep: bool, child: Child | None = None
) -> Iterator[tuple[Path, str]]:
    """Let libhdf5 open shards in a child process.

    Args:
        paths: Shards whose checksums are right.
        deep: Whether it reads all arrays too.
        child: One that has been started, so that its start costs no time here.

    Yields:
        Each shard that it cannot open, sees otherwise than the header, crashes on or takes too
        long for, and what happened.
    """
    questions: dict[Path, bytes] = {}
    for path in paths:
        try:
            questions[path] = _question(path)
        except ShardError as error:
            yield path, error.what
    left = list(questions)
    while left:
        group = left[:CHILD_SHARDS]
        lines = [json.dumps({"deep": deep}).encode() + b"\n", *(questions[path] for path in group)]
        timeout_s = CHILD_TIMEOUT_S
        if deep:
            timeout_s += sum(path.stat().st_size for path in group) / DEEP_BYTES_PER_S
        if child is None:
            with started_child() as started:
                answers, end = _ask(started, lines, timeout_s)
        else:
            answers, end = _ask(child, lines, timeout_s)
            child = None
        for path, answer in zip(group, answers, strict=False):
            if answer["problem"] is not None:
                yield path, str(answer["problem"])
        if len(answers) < len(group):  # the child ended at the first unanswered one
            yield group[len(answers)], f"libhdf5 {end} while it opened the shard"
        left = left[len(answers) + (len(answers) < len(group)) :]


def _question(path: Path) -> bytes:
    """What libhdf5 should see of a shard, as a line of JSON.

    Raises:
        ShardError: The header is damaged.
    """
    places = Shard.open(path).header.places
    arrays = {
        name: [place.offset, place.shape, place.numpy_type.str] for name, place in places.items()
    }
    values = {"path": str(path), "arrays": arrays, "attribute": ATTRIBUTE}
    return json.dumps(values).encode() + b"\n"


def _ask(child: Child, lines: list[bytes], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """Answers of one child, fewer than questions if it died, and how it ended."""
    try:
        output, _ = child.communicate(b"".join(lines), timeout=timeout_s)
        end = f"ended with code {child.returncode}"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"took longer than {timeout_s:.0f} s"
    answers = output.decode().split("\n")[:-1]  # what follows the last line feed is half a line
    return [json.loads(line) for line in answers], end
