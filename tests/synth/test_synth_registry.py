"""Synthetic trees as a whole: the same bytes for the same arguments, and nothing overwritten."""

import hashlib
from importlib import import_module
from pathlib import Path

import pytest

from featcache.config import read_json
from featcache.datasets.registry import make_manifest
from featcache.errors import UsageError
from featcache.manifest.tree import is_synthetic
from featcache.synth.registry import DATASETS, SynthResult, stand_in, synthesize
from featcache.workspace import Workspace

SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", params=DATASETS)
def made(request, draw_tree) -> SynthResult:
    return draw_tree(request.param)


def test_equal_seeds_give_equal_bytes_and_others_do_not(made, tmp_path):
    second = synthesize(made.dataset, tmp_path / "b" / "tree")
    other = synthesize(made.dataset, tmp_path / "c" / "tree", seed=1)
    assert hashes(made.path) == hashes(second.path)
    assert made.truth.read_bytes() == second.truth.read_bytes()
    mine, theirs = hashes(made.path), hashes(other.path)
    pictures = {name for name in mine if name.lower().endswith(SUFFIXES)}
    assert pictures
    assert not {mine[name] for name in pictures} & set(theirs.values()) - {
        hashlib.sha256(b"").hexdigest(),
        next((mine[n] for n in pictures if b"<html>" in (made.path / n).read_bytes()), ""),
    }


def test_tree_is_marked_and_its_truth_lies_outside(made):
    assert is_synthetic(made.path)
    assert made.truth == made.path.with_name("tree.truth.json")
    assert not list(made.path.rglob("*truth*"))
    truth = read_json(made.truth)
    assert (truth["num_images"], truth["num_studies"]) == (made.images, made.studies)
    files = [p for p in made.path.rglob("*") if p.suffix.lower() in SUFFIXES]
    assert len(files) == made.images


def test_every_set_has_a_module_of_its_own_with_its_switches():
    for dataset in DATASETS:
        module = import_module(f"featcache.synth.{dataset.replace('-', '_')}")
        assert isinstance(module.SWITCHES, tuple)
        assert module.write.__module__ == module.__name__


def test_every_set_can_be_read_as_it_is(made, tmp_path):
    manifest = make_manifest(Workspace.open(tmp_path), made.dataset, made.path)
    assert manifest.meta.synthetic
    assert manifest.keys


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> SynthResult:
    return synthesize("nih", tmp_path_factory.mktemp("synth") / "tree")


def test_equal_tree_is_kept_untouched(first):
    before = (first.path / "SYNTHETIC.txt").stat().st_mtime_ns
    again = synthesize("nih", first.path)
    assert (first.is_new, again.is_new) == (True, False)
    assert again._replace(is_new=True) == first
    assert (first.path / "SYNTHETIC.txt").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="already holds a synthetic tree that was made otherwise"):
        synthesize("nih", first.path, seed=1)


def test_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds something else"):
        synthesize("nih", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_remains_of_a_stopped_run_are_replaced(tmp_path):
    partial = tmp_path / "tree.partial"
    partial.mkdir()
    (partial / "SYNTHETIC.txt").write_text("half")
    (partial / "left.png").write_text("half")
    result = synthesize("nih", tmp_path / "tree")
    assert not partial.exists()
    assert not (result.path / "left.png").exists()


def test_foreign_folder_of_the_partial_name_is_an_error(tmp_path):
    (tmp_path / "tree.partial").mkdir()
    with pytest.raises(UsageError, match="the folder cannot be made: File exists"):
        synthesize("nih", tmp_path / "tree")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "covid"}, "no synthetic data set is called `covid`; did you mean `covidx`"),
        ({"dataset": "covidx", "size": "tinny"}, "no size `tinny`; did you mean `tiny`"),
        ({"dataset": "covidx", "seed": -1}, "whole number from 0, got -1"),
        (
            {"dataset": "covidx", "switches": ["confound"]},
            "covidx has no switch `confound`; did you mean `no-confound`",
        ),
    ],
)
def test_unknown_names(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        synthesize(out=tmp_path / "tree", **arguments)
    assert not list(tmp_path.iterdir())


def test_result_speaks_to_people_and_to_programs(first):
    assert first.to_json()["path"] == str(first.path)
    assert first.to_text().endswith(f"next: featcache manifest nih {first.path}")


def test_stand_in_lies_in_the_workspace(tmp_path):
    path = stand_in(Workspace.open(tmp_path / "work"), "nih")
    assert path == tmp_path / "work" / "synthetic" / "nih"
    assert stand_in(Workspace.open(tmp_path / "work"), "nih") == path
