"""A small clone in which everything was trained once, as `make demo` leaves it."""

import io
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import timm
import torch
from conftest_extract import CONFIG, sample_rows, write_sample_manifest
from safetensors.torch import save_file

from featcache.adaptor.train import load_run_config, train
from featcache.cli import main
from featcache.datasets.sample import sample_folder
from featcache.extract.command import extract

SOURCE = Path(__file__).parents[2]
COUNTS = {"train": 2, "validate": 1, "test": 2}  # of each class
TINY = ["epochs=1", "batch_size=6", "adaptor.dim=32", "adaptor.heads=4", "adaptor.feedforward=32"]


def balanced_rows() -> list[dict[str, str]]:
    """A few rows of each class and split."""
    rows, taken = [], {}
    for row in sample_rows(1290):
        place = (row["split"], row["finding"])
        if taken.get(place, 0) < COUNTS[row["split"]]:
            taken[place] = taken.get(place, 0) + 1
            rows.append(row)
    return rows


@pytest.fixture(scope="session")
def trained_root(tmp_path_factory, tiny) -> Path:
    """A workspace with the demo's encoders, 15 radiographs and a barely trained Adaptor."""
    root = tmp_path_factory.mktemp("trained") / "featcache-data"
    rows = balanced_rows()
    workspace = write_sample_manifest(root, rows, image_root=sample_folder(), name="demo")
    config = CONFIG.model_copy(update={"scheduler": tiny.scheduler})
    extract(workspace, config, backbones=["lite0-demo"], text_encoders=["minilm-demo"])
    train(workspace, load_run_config(None, TINY))
    return root


@pytest.fixture(scope="session")
def hub_with_vit_b(tmp_path_factory) -> Path:
    """A hub cache as a download leaves it. The numbers in it are random: only the way is tested."""
    home = tmp_path_factory.mktemp("hub")
    repo = home / "hub" / "models--timm--vit_base_patch16_224.augreg_in21k"
    (repo / "snapshots" / "0").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_base_patch16_224.augreg_in21k", num_classes=0)
    save_file(network.state_dict(), repo / "snapshots" / "0" / "model.safetensors")
    return home


@pytest.fixture(scope="session")
def small_covidx(covidx_tree, tmp_path_factory) -> Path:
    """The synthetic COVIDx tree with few of its lines."""
    tree = shutil.copytree(covidx_tree, tmp_path_factory.mktemp("small") / "tree")
    for name, step in (("train", 15), ("test", 10)):
        (path,) = tree.rglob(f"{name}_COVIDx9A.txt")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::step]))
    return tree


class Clone:
    """A folder with the recipes and a workspace, and a shell in it; this process works there."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.root = folder / "featcache-data"

    def type(self, line: str) -> subprocess.CompletedProcess:
        """Run one line as a user types it."""
        return subprocess.run(
            line, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )

    def call(self, line: str) -> subprocess.CompletedProcess:
        """Run a line of `featcache` in this process, which has imported everything."""
        program, *words = shlex.split(line)
        assert program == "featcache"
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as told:
            code = main(words)
        return subprocess.CompletedProcess(line, code, said.getvalue(), told.getvalue())


@pytest.fixture
def clone(tmp_path, monkeypatch, trained_root, hub_with_vit_b, small_covidx) -> Clone:
    folder = tmp_path / "a b (1)"
    folder.mkdir()
    shutil.copytree(trained_root, folder / "featcache-data")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(SOURCE / name, folder / name)
    shutil.copytree(SOURCE / "pipelines", folder / "pipelines")
    (folder / ".venv").symlink_to(sys.prefix)
    environment = os.environ | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "HF_HOME": str(hub_with_vit_b),
        "COVIDX": str(small_covidx),
    }
    environment.pop("FEATCACHE_ROOT", None)
    environment.pop("HF_HUB_CACHE", None)
    monkeypatch.delenv("FEATCACHE_ROOT", raising=False)
    monkeypatch.chdir(folder)
    return Clone(folder, environment)
