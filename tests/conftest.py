"""Fixtures that several folders share."""

import logging
import os
from contextlib import suppress
from pathlib import Path

# Two test processes on two cores: busy-waiting threads of one would slow the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from conftest_extract import copied, extracted
from reliability.kit import finished, launcher, tiny
from synth.trees import covidx_tree, draw_tree, mimic_cxr_jpg_tree, rsna_tree, siim_tree

from featcache.console import set_quiet

__all__ = [
    "copied",
    "covidx_tree",
    "draw_tree",
    "extracted",
    "finished",
    "launcher",
    "mimic_cxr_jpg_tree",
    "rsna_tree",
    "siim_tree",
    "tiny",
]


@pytest.fixture(autouse=True)
def loud():
    """A command that ran in this process leaves no quiet and no log of its own to later tests."""
    set_quiet(False)
    logger = logging.getLogger("featcache")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(scope="session")
def open_files():
    """How many descriptors this process has of a file, or of the files in a folder.

    Others do not count: threads that an earlier test left open and close some all the time.
    """

    def count(place: Path) -> int:
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found += link.readlink().is_relative_to(place)
        return found

    if not Path("/proc/self/fd").exists():
        pytest.skip("the system does not list open files")
    return count


@pytest.fixture
def bytes_read_by():
    """Bytes that this process reads while a function runs: the least of three runs.

    The system counts for all threads, and one that an earlier test left may read meanwhile.
    """

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not count what is read")

    def measure(function):
        taken = []
        for _ in range(3):
            before = count()
            itself = count() - before
            before = count()
            function()
            taken.append(count() - before - itself)
        return min(taken)

    return measure


def pytest_collection_modifyitems(items):
    """Begin with the folder of the longest test, so that two processes end at about one time."""
    items.sort(key=lambda item: item.path.parent.name != "recipes")
