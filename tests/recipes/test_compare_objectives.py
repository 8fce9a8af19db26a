"""The recipe that compares objectives: what it types, and a small one from end to end."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "pipelines" / "compare-objectives.sh"
SETTINGS = (
    "--set seeds=1 --set learning_rates=[1e-3] --set base.epochs=1 "
    "--set base.adaptor.dim=32 --set base.adaptor.feedforward=32"
)
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word"; done >> "$RECORD"
echo >> "$RECORD"
"""


def lines_of(tmp_path, **variables) -> list[list[str]]:
    """What the recipe types into a program that only writes it down."""
    program = tmp_path / "bin" / "featcache"
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)
    record = tmp_path / "record"
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "RECORD": str(record),
        "FEATCACHE_ROOT": str(tmp_path / "a b"),
    }
    subprocess.run(["sh", RECIPE], env=environment | variables, check=True)
    return [line.rstrip("\t").split("\t") for line in record.read_text().splitlines()]


def test_it_compares_on_the_synthetic_set_and_on_the_sample(tmp_path):
    lines = lines_of(tmp_path, SETTINGS="--set seeds=2")
    assert [line[0] for line in lines] == ["synth", "manifest", "extract", *["sweep"] * 2, "demo",
                                           "sweep"]  # fmt: skip
    root = f"{tmp_path}/a b/compare-objectives"
    first, second, last = (line for line in lines if line[0] == "sweep")
    settings = ["--set", "seeds=2"]
    assert first == ["sweep", "objectives", "--root", f"{root}/synthetic", *settings]
    assert second == ["sweep", "losses-and-tokens", "--root", f"{root}/synthetic", *settings]
    features = f"{tmp_path}/a b/features"
    assert last == [
        *("sweep", "objectives", "--set", "label=class", "--root", f"{root}/sample", *settings),
        *("--backbone", f"{features}/image/lite0-demo"),
        *("--manifest", f"{tmp_path}/a b/manifests/demo"),
        *("--text-encoder", f"{features}/text/minilm-demo"),
    ]


def test_a_table_of_ones_own_is_compared_too(tmp_path):
    *_, manifest, extract, sweep = lines_of(tmp_path, REAL="my table.csv")
    root = f"{tmp_path}/a b/compare-objectives/real"
    assert manifest == ["manifest", "spreadsheet", "my table.csv", "--root", root]
    assert (extract[0], extract[-1]) == ("extract", root)
    assert sweep == ["sweep", "objectives", "--root", root]


@pytest.mark.weights
@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was(clone, tiny):
    line = f"SETTINGS={shlex.quote(SETTINGS)} make -o .venv/.demo compare-objectives"
    first, second = clone.type(line), clone.type(line)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.count("Sweep ") == 3
    assert first.stdout[-2000:] == second.stdout[-2000:]
    assert "epochs in" not in second.stderr
