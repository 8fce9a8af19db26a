"""Contestants in turn, and whose memory is whose."""

import subprocess
import sys

from featcache.bench.case import Setting
from featcache.bench.timing import in_turn, watch_memory, without_notes
from featcache.console import is_quiet, note

HOLD_64_MB = "b = bytearray(64 * 2**20); import time; time.sleep(0.5)"


def test_contestants_take_turns_and_none_always_comes_first(tmp_path):
    order = []

    def contestant(name):
        return lambda: order.append(name) or float(len(order))

    taken = in_turn(
        Setting(tmp_path, repeats=3, quiet=True), {n: contestant(n) for n in ("a", "b")}
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert taken == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_the_memory_of_a_child_is_not_counted_as_ours():
    with watch_memory() as memory:
        subprocess.run([sys.executable, "-c", HOLD_64_MB], check=True)
    assert memory.child_bytes >= 64 * 2**20
    assert memory.own_bytes > 0
    with watch_memory() as later:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    # Other children of the test process may be alive all the time.
    assert 0 < later.child_bytes < memory.child_bytes - 32 * 2**20


def test_notes_are_back_after_something_ran_without_them(capsys):
    with without_notes():
        note("inside")
        assert is_quiet()
    note("after")
    assert capsys.readouterr().err == "after\n"
