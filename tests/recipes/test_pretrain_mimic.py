"""MIMIC-CXR from its folders to a retrieval table: what the recipe types, and a tiny one whole."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from recipes.conftest import TINY

from featcache.cli import app

RECIPE = Path(__file__).parents[2] / "pipelines" / "pretrain-mimic.sh"
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word"; done >> "$RECORD"
echo >> "$RECORD"
"""


def lines_of(tmp_path, **variables) -> list[list[str]]:
    """What the recipe types into a program that only writes it down."""
    program = tmp_path / "bin" / "featcache"
    program.parent.mkdir(exist_ok=True)
    program.write_text(RECORDER)
    program.chmod(0o755)
    record = tmp_path / "record"
    record.unlink(missing_ok=True)
    unset = ("MIMIC", "REPORTS", "BACKBONE", "TEXT_ENCODER", "EXTRACT", "SETTINGS", "SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "RECORD": str(record),
        "FEATCACHE_ROOT": str(tmp_path / "a b"),
    }
    subprocess.run(["sh", RECIPE], env=environment | variables, check=True)
    return [line.rstrip("\t").split("\t") for line in record.read_text().splitlines()]


def test_on_the_real_tree_it_types_four_stages(tmp_path):
    root = ["--root", f"{tmp_path}/a b/pretrain-mimic"]
    real = {"MIMIC": "/data/my jpg", "REPORTS": "/data/reports (1).zip"}
    settings = ["--set", "reports=/data/reports (1).zip"]
    assert lines_of(tmp_path, **real) == [
        ["manifest", "mimic-cxr-jpg", "/data/my jpg", *settings, *root],
        ["extract", "--backbone", "vit-b", "--text-encoder", "cxr-bert", *root],
        ["train-adaptor", *root],
        ["retrieve", *root],
    ]


def test_encoders_and_options_of_stages_are_the_users(tmp_path):
    manifest, extract, train, _ = lines_of(
        tmp_path,
        MIMIC="/data",
        BACKBONE="rad-dino",
        TEXT_ENCODER="bert",
        EXTRACT="--scheduler tcp://first:8786 --set threads=8",
        SETTINGS="--set epochs=5 --set devices=4",
    )
    assert manifest[:3] == ["manifest", "mimic-cxr-jpg", "/data"]
    assert extract[1:5] == ["--backbone", "rad-dino", "--text-encoder", "bert"]
    assert extract[5:9] == ["--scheduler", "tcp://first:8786", "--set", "threads=8"]
    assert train[1:5] == ["--set", "epochs=5", "--set", "devices=4"]


def test_a_stand_in_never_mixes_with_the_real_one(tmp_path):
    synth, manifest, extract, train, retrieve = lines_of(tmp_path)
    root = f"{tmp_path}/a b/pretrain-mimic-stand-in-small"
    assert synth == ["synth", "mimic-cxr-jpg", "--size", "small", "--out", f"{root}/tree"]
    assert manifest == ["manifest", "mimic-cxr-jpg", f"{root}/tree", "--root", root]
    assert extract[2:5] == ["lite0-demo", "--text-encoder", "minilm-demo"]
    assert extract[5:7] == ["--set", "max_failures=0.1"]
    assert train[1:3] == ["--config", "configs/runs/demo.yaml"]
    assert (RECIPE.parents[1] / train[2]).is_file()
    assert retrieve == ["retrieve", "--root", root]
    assert lines_of(tmp_path, SIZE="tiny")[0][3] == "tiny"


def test_a_manifest_that_is_there_stays(tmp_path):
    made = tmp_path / "a b" / "pretrain-mimic" / "manifests" / "mimic-cxr-jpg"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    commands = [line[0] for line in lines_of(tmp_path, MIMIC="/data")]
    assert commands == ["extract", "train-adaptor", "retrieve"]


@pytest.mark.parametrize("variables", [{}, {"MIMIC": "/data", "REPORTS": "/reports"}])
def test_every_command_that_it_types_is_one_with_its_options(tmp_path, variables):
    program = typer.main.get_command(app)
    for words in lines_of(tmp_path, **variables):
        command = program.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
        with command.make_context(words[0], words[1:]):
            pass


@pytest.mark.weights
@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was(clone):
    settings = " ".join(f"--set {one}" for one in TINY)
    line = f"SIZE=tiny SETTINGS={shlex.quote(settings)} make -o .venv/.demo pretrain-mimic"
    first = clone.type(line)
    assert first.returncode == 0, first.stderr
    assert "synthetic stand-in" in first.stdout
    stages = r"seconds: manifest \d+ extract \d+ train-adaptor \d+ retrieve \d+"
    assert re.fullmatch(stages, first.stdout.splitlines()[-1])
    root = clone.root / "pretrain-mimic-stand-in-tiny"
    made = [*root.rglob("*.h5"), *root.rglob("*.safetensors"), *root.rglob("*.parquet")]
    stamps = {path: path.stat().st_mtime_ns for path in made}
    shutil.rmtree(root / "features" / "text")
    second = clone.type(line)
    assert second.returncode == 0, second.stderr
    assert re.fullmatch(stages.replace(r" manifest \d+", ""), second.stdout.splitlines()[-1])
    assert second.stdout.count("nothing to do") >= 2
    changed = {path for path in made if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {path for path in made if (root / "features" / "text") in path.parents}
