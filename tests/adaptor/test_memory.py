import platform
import re
from pathlib import Path

import pytest
import torch

from featcache.adaptor.memory import StepMemory, largest, remedy, return_freed_blocks
from featcache.bench.timing import in_fresh_process


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_batch_of_the_size_that_was_measured_fits_exactly(world_size):
    assert largest(1e9, 1e9, 1000, world_size) == pytest.approx(1000 * world_size, abs=4)


def test_twice_the_memory_gives_at_most_twice_the_pairs():
    one, two = (largest(1e8, free, 100, 1) for free in (1e9, 2e9))
    assert one < two <= 2 * one
    # So many that what grows with the square of the batch is most of it.
    one, two = (largest(1e4, free, 100, 1) for free in (1e12, 4e12))
    assert two == pytest.approx(2 * one, rel=0.01)


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    layer = torch.nn.Linear(64, 64)
    found = []
    for rows in (10, 20):
        memory = StepMemory(rows, 1, layer)
        with memory.measured(torch.device("cpu")):
            hidden = layer(torch.rand(rows, 64, requires_grad=True))
            (hidden * hidden).sum()
        found.append(memory._needed)
    # The input and the hidden layer, which is used twice; no weights.
    assert found == [2 * rows * 64 * 4 for rows in (10, 20)]
    number = memory.largest_batch(torch.device("cpu"))
    assert number >= 1000
    assert str(number)[2:].strip("0") == ""


def test_the_remedy_is_a_setting_with_a_number():
    assert remedy(256, 256, None).startswith("--set gradient_cache=64 ")
    assert remedy(256, 128, 32) == "--set gradient_cache=16"
    assert remedy(256, 128, 1) == "--set batch_size=128"
    assert remedy(2, 1, None) == "--set batch_size=2"


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def kept_of_freed_blocks(first):
    """Bytes that a process keeps of 16 blocks of 16 MiB, freed all but the last."""
    if first is not None:
        first()
    torch.ones(5 << 20)  # 20 MiB that come and go: glibc would raise its bound
    before = anonymous_bytes()
    blocks = [torch.ones(4 << 20) for _ in range(16)]
    del blocks[:-1]
    return anonymous_bytes() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_go_back_to_the_system():
    kept = in_fresh_process(kept_of_freed_blocks, return_freed_blocks)
    plain = in_fresh_process(kept_of_freed_blocks, None)
    assert kept < 20e6
    assert plain > 200e6
