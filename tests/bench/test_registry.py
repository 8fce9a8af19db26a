"""Benches are found by the file they stand in."""

from importlib import import_module
from pathlib import Path

import pytest

from featcache.bench.registry import all_benches, choose_benches
from featcache.errors import UsageError

PROMISED = {
    "decode_vs_plain": 3.3,
    "extract_vs_limit[encoder]": 0.95,
    "extract_vs_limit[decode]": 0.95,
    "multi_encoder": 1.05,
    "workers_2": 1.8,
    "extract_scaling": 1.15,
    "manifest_million[seconds]": 120,
    "manifest_million[gb]": 2,
    "verify_vs_memcpy": 0.5,
    "int8_bytes": 0.51,
    "int8_probe_flips": 1.0,
    "help_s": 0.5,
    "open_1000_shards_s": 1.0,
    "gather_vs_memcpy": 0.9,
    "gather_vs_peers": 8,
    "gather_vs_batch_peers": 1.0,
    "cold_vs_sequential": 0.8,
    "gather_scaling": 1.15,
    "train_memory_gb": 1,
    "step_vs_memory": 0.98,
    "online_vs_cached": 0.8,
    "allpairs_cost[memory]": 1.0,
    "allpairs_cost[step]": 0.1,
}


def test_every_bench_is_found_again_by_the_process_that_measures_it():
    for bench in all_benches():
        assert bench in import_module(bench.group).BENCHES


def test_every_promise_has_its_bench_with_its_goal():
    goals = {bench.name: bench.goal for bench in all_benches()}
    assert PROMISED.items() <= goals.items()


def test_names_are_unique_and_each_says_what_in_one_line():
    benches = all_benches()
    assert len({bench.name for bench in benches}) == len(benches)
    assert all(bench.what and "\n" not in bench.what for bench in benches)


def test_a_family_stands_for_all_its_variants():
    names = [bench.name for bench in choose_benches(["extract_vs_limit"])]
    assert names == ["extract_vs_limit[encoder]", "extract_vs_limit[decode]"]
    assert choose_benches([]) == all_benches()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown bench `decode_vs_plane`.*`decode_vs_plain`"):
        choose_benches(["help_s", "decode_vs_plane"])


def test_every_bench_has_its_section_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    titles = "\n".join(line for line in page.splitlines() if line.startswith("## "))
    for bench in all_benches():
        assert f"`{bench.name}`" in titles
        assert f"{bench.goal:g}" in page
