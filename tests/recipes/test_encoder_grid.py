"""Every pair of image and text features, in one table."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from featcache.adaptor.comparison import compare_runs
from featcache.workspace import Workspace

RECIPE = Path(__file__).parents[2] / "pipelines" / "encoder-grid.sh"
SETTINGS = "--set epochs=1 --set batch_size=6 --set adaptor.dim=32 --set adaptor.heads=4"
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word"; done >> "$RECORD"
echo >> "$RECORD"
[ "$1" != use ] || printf 'current in x\\nmanifest  made\\nimage     -\\n'
"""


def lines_of(tmp_path, **variables) -> list[list[str]]:
    """What the recipe types, in a workspace of three image and five text sets."""
    root = tmp_path / "a b (1)"
    for kind, names in (("image", "abc"), ("text", "vwxyz")):
        for name in names:
            (root / "features" / kind / name).mkdir(parents=True)
    program = tmp_path / "bin" / "featcache"
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)
    record = tmp_path / "record"
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "RECORD": str(record),
        "FEATCACHE_ROOT": str(root),
    }
    subprocess.run(["sh", RECIPE], env=environment | variables, check=True)
    return [line.rstrip("\t").split("\t") for line in record.read_text().splitlines()]


def test_it_types_one_training_for_each_pair_and_one_table(tmp_path):
    demo, use, *trainings, compare = lines_of(tmp_path, SETTINGS="--set epochs=5 --seed 1")
    root = str(tmp_path / "a b (1)")
    grid = ["--root", f"{root}/encoder-grid"]
    assert demo == ["demo", "--unless-trained", "--root", root]
    assert use == ["use", "--root", root]
    assert compare == ["compare", *grid]
    features = f"{root}/features"
    rest = ["--manifest", f"{root}/manifests/made", *grid, "--set", "epochs=5", "--seed", "1"]
    for line in trainings:
        assert (line[0], line[1], line[3]) == ("train-adaptor", "--backbone", "--text-encoder")
        assert line[5:] == rest
    assert [(line[2], line[4]) for line in trainings] == [
        (f"{features}/image/{image}", f"{features}/text/{text}")
        for image in "abc"
        for text in "vwxyz"
    ]


def test_some_of_the_sets_can_be_chosen(tmp_path):
    _, _, *trainings, _ = lines_of(tmp_path, IMAGES="c a", TEXTS="w")
    chosen = [(Path(line[2]).name, Path(line[4]).name) for line in trainings]
    assert chosen == [("c", "w"), ("a", "w")]


def grid(clone):
    done = clone.type(f"SETTINGS={shlex.quote(SETTINGS)} make -o .venv/.demo encoder-grid")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.weights
@pytest.mark.slow
def test_one_more_text_encoder_costs_its_extraction_and_its_pairs(clone, tiny):
    before = (clone.root / "workspace.json").read_bytes()
    first = grid(clone)
    assert (first.count("wrote "), first.count("nothing to do")) == (1, 0)
    assert "1 runs on manifest demo" in first
    assert (clone.root / "workspace.json").read_bytes() == before
    made = Workspace(clone.root / "encoder-grid")
    kept = [*made.runs.rglob("*.safetensors"), *(clone.root / "features").rglob("*.h5")]
    stamps = [path.stat().st_mtime_ns for path in kept]

    done = clone.type(f"featcache extract --backbone none --text-encoder '{tiny.bert}'")
    assert done.returncode == 0, done.stderr
    second = grid(clone)
    assert (second.count("wrote "), second.count("nothing to do")) == (1, 1)
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    pairs = {(run.images, run.texts) for run in compare_runs(made).runs}
    assert pairs == {("lite0-demo", "minilm-demo"), ("lite0-demo", tiny.bert.name)}
    assert len([line for line in second.splitlines() if line.startswith("|")]) == 2 + 2
