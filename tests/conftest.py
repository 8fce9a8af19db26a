"""Fixtures that several folders share."""

import os

# Two test processes on two cores: busy-waiting threads of one would slow the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from conftest_extract import copied, extracted
from reliability.kit import finished, launcher, tiny

__all__ = ["copied", "extracted", "finished", "launcher", "tiny"]
