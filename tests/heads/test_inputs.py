"""What a head reads, and what it says about it."""

from pathlib import Path

import numpy as np
import pytest

from featcache.adaptor.saved import load_adaptor
from featcache.config import write_json
from featcache.errors import CacheError, WorkspaceError
from featcache.heads.inputs import (
    adaptor_notes,
    feature_folder,
    look_up,
    results_folder,
    run_if_any,
    source_facts,
)
from featcache.workspace import Workspace


def test_adaptor_trained_on_the_same_manifest_needs_no_warning(toy, make_run, tmp_path):
    run = make_run(tmp_path / "run", toy)
    trained = load_adaptor(run)
    assert "not recorded" in " ".join(adaptor_notes(trained, toy.manifest))
    inputs = {"manifest": "0" * 32}
    write_json(run / "run.json", {"identity": {"inputs": inputs}})
    assert "another manifest than this one" in " ".join(adaptor_notes(trained, toy.manifest))
    inputs["manifest"] = toy.manifest.meta.hash
    write_json(run / "run.json", {"identity": {"inputs": inputs}})
    assert adaptor_notes(trained, toy.manifest) == ["Adaptor: run `run`, objective allpairs."]


def test_facts_hold_no_path(toy, make_run, tmp_path):
    trained = load_adaptor(make_run(tmp_path / "run", toy))
    facts = source_facts(toy.manifest, trained, images=toy.images)
    assert facts["dataset"] == "toy (synthetic stand-in)"
    assert facts["features"]["images"]["fingerprint"] == toy.images.fingerprint
    assert str(tmp_path) not in str(facts)
    assert str(toy.root) not in str(facts)


def test_set_that_the_adaptor_reads_is_preferred_to_the_current_one(write_set, make_toy, tmp_path):
    own = make_toy(tmp_path)
    spec = own.images.spec.model_copy(update={"encoder": "other"})
    tokens = list(own.images.read_tokens(np.arange(3)))
    write_set(tmp_path / "features" / "image" / "other", spec, own.images.keys[:3], tokens)
    workspace = Workspace(tmp_path)
    workspace.use(image="other")
    assert feature_folder(workspace, "image", None, own.images.fingerprint).name == "toy"
    assert feature_folder(workspace, "image", None, None).name == "other"
    assert feature_folder(workspace, "image", "other", own.images.fingerprint).name == "other"
    assert feature_folder(workspace, "image", None, "f" * 32).name == "other"


def test_set_of_another_workspace_is_found_where_the_run_read_it(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path / "theirs")
    run = make_run(tmp_path / "run", toy)
    mine = Workspace(tmp_path / "mine")
    wanted = toy.images.fingerprint
    with pytest.raises(WorkspaceError):
        feature_folder(mine, "image", None, wanted, run)
    write_json(run / "run.json", {"images": {"folder": str(toy.images.folder)}})
    assert feature_folder(mine, "image", None, wanted, run) == toy.images.folder
    with pytest.raises(WorkspaceError):
        feature_folder(mine, "image", None, "f" * 32, run)
    write_json(run / "run.json", {"images": {"folder": str(tmp_path / "gone")}})
    with pytest.raises(WorkspaceError):
        feature_folder(mine, "image", None, wanted, run)


def test_nothing_current_is_said(tmp_path):
    with pytest.raises(WorkspaceError, match="no image feature set is current"):
        feature_folder(Workspace(tmp_path), "image", None, None)


def test_results_of_a_foreign_run_stay_out_of_its_folder(tmp_path):
    workspace = Workspace(tmp_path / "mine")
    own = workspace.runs / "first"
    assert results_folder(workspace, own) == own
    foreign = Path("elsewhere") / "runs" / "second"
    assert results_folder(workspace, foreign) == workspace.root / "results" / "second"
    assert results_folder(workspace, None) == workspace.root / "results" / "no-adaptor"


def test_look_up_finds_what_the_run_reads_and_where_results_go(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path)
    run = make_run(tmp_path / "runs" / "first", toy)
    workspace = Workspace(tmp_path)
    workspace.use(manifest="toy")
    found = look_up(workspace, run)
    assert found.images.folder == toy.images.folder
    assert found.manifest.name == "toy"
    assert found.trained.image_fingerprint == toy.images.fingerprint
    assert found.results == run
    alone = look_up(workspace, None, backbone="toy")
    assert alone.trained is None
    assert alone.results == tmp_path / "results" / "no-adaptor"


def test_run_is_optional_only_while_none_is_named_or_current(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path)
    workspace = Workspace(tmp_path)
    assert run_if_any(workspace, None) is None
    with pytest.raises(WorkspaceError):
        run_if_any(workspace, "first")
    run = make_run(tmp_path / "runs" / "first", toy)
    workspace.use(run="first")
    assert run_if_any(workspace, None) == run


def test_set_without_a_grid_is_refused_before_the_manifest_is_opened(write_set, make_toy, tmp_path):
    own = make_toy(tmp_path)
    spec = own.images.spec.model_copy(update={"encoder": "flat", "grid": None})
    tokens = list(own.images.read_tokens(np.arange(3)))
    write_set(tmp_path / "features" / "image" / "flat", spec, own.images.keys[:3], tokens)
    workspace = Workspace(tmp_path)
    with pytest.raises(CacheError, match="no grid of patch tokens"):
        look_up(workspace, None, backbone="flat", manifest="is-not-there", needs_grid=True)
    with pytest.raises(WorkspaceError):
        look_up(workspace, None, backbone="flat", manifest="is-not-there")
