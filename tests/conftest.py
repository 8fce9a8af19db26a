"""Fixtures that several folders share."""

import logging
import os

# Two test processes on two cores: busy-waiting threads of one would slow the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from conftest_extract import copied, extracted
from reliability.kit import finished, launcher, tiny
from synth.trees import covidx_tree, mimic_cxr_jpg_tree, rsna_tree, siim_tree

from featcache.console import set_quiet

__all__ = [
    "copied",
    "covidx_tree",
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
