"""How the threads of PyTorch wait when the program runs."""

import os

import pytest

from featcache.cli import main


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_do_not_spin_unless_the_user_says_so(monkeypatch, before, after, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == after
