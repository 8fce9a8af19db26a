"""Contestants in turn, and whose memory is whose."""

import os
import subprocess
import sys

import numpy as np
from reliability.kit import wait_until

from featcache.bench.case import Setting
from featcache.bench.timing import (
    anonymous_memory,
    in_fresh_process,
    in_turn,
    median_interval,
    paired,
    watch_memory,
    without_notes,
)
from featcache.console import is_quiet, note

HOLD_64_MB = "b = bytearray(64 * 2**20); import sys; sys.stdin.read()"


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
    command = [sys.executable, "-c", HOLD_64_MB]
    with watch_memory() as memory, subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        wait_until(lambda: memory.child_bytes >= 64 * 2**20)
        child.stdin.close()
    assert child.returncode == 0
    assert memory.child_bytes >= 64 * 2**20
    assert memory.own_bytes > 0


def test_mapped_files_are_not_counted_as_allocated(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * 2**20))
    before = anonymous_memory()
    with watch_memory() as memory:
        mapped = np.memmap(path, mode="r")
        assert mapped.sum() == 0
    assert memory.anonymous_bytes < before + 48 * 2**20
    with watch_memory() as memory:
        allocated = np.ones(64 * 2**20, dtype=np.uint8)
    assert memory.anonymous_bytes >= before + 48 * 2**20
    assert len(allocated) == len(mapped)


def test_a_fresh_process_has_another_number_and_gives_back_what_it_found():
    assert in_fresh_process(os.getpid) != os.getpid()
    assert in_fresh_process(divmod, 7, 2) == (3, 1)


def test_an_interval_surrounds_the_median_and_narrows_with_more_repeats():
    figures = np.random.default_rng(0).normal(2.0, 0.1, 200).tolist()
    low, high = median_interval(figures)
    assert low < np.median(figures) < high
    few = median_interval(figures[:10])
    assert high - low < few[1] - few[0]
    assert median_interval([3.0, 3.0]) == (3.0, 3.0)
    assert median_interval(figures) == (low, high)


def test_ratios_are_those_of_the_same_repeat():
    assert paired([1.0, 9.0], [2.0, 3.0]) == [0.5, 3.0]


def test_notes_are_back_after_something_ran_without_them(capsys):
    with without_notes():
        note("inside")
        assert is_quiet()
    note("after")
    assert capsys.readouterr().err == "after\n"
