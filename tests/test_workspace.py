from pathlib import Path

import pytest

from featcache.errors import UsageError, WorkspaceError
from featcache.workspace import Workspace


def make(root: Path, *folders: str) -> Workspace:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return Workspace.open(root)


def test_the_root_is_the_option_else_the_variable_else_here(tmp_path, monkeypatch):
    monkeypatch.delenv("FEATCACHE_ROOT", raising=False)
    assert Workspace.open().root == Path("featcache-data")
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "b"))
    assert Workspace.open().root == tmp_path / "b"
    assert Workspace.open(tmp_path / "a").root == tmp_path / "a"


def test_the_current_thing_is_what_was_made_current_whatever_its_age(tmp_path):
    workspace = make(tmp_path, "features/image/vit-b", "features/image/lite0-demo")
    workspace.use(image="vit-b")
    (tmp_path / "features/image/lite0-demo/new").touch()
    assert workspace.feature_set("image").name == "vit-b"
    workspace.use(image="lite0-demo")
    assert workspace.feature_set("image").name == "lite0-demo"


def test_making_one_thing_current_keeps_the_others(tmp_path):
    workspace = make(tmp_path, "features/image/a", "features/text/b")
    workspace.use(image="a")
    workspace.use(text="b")
    assert (workspace.current("image"), workspace.current("text")) == ("a", "b")


def test_without_anything_the_error_says_how_to_make_it(tmp_path):
    with pytest.raises(WorkspaceError, match="no manifest is current: there is none") as caught:
        Workspace.open(tmp_path).manifest()
    assert "featcache demo" in str(caught.value)


def test_with_several_and_none_current_the_error_lists_them(tmp_path):
    workspace = make(tmp_path, "manifests/a", "manifests/b")
    with pytest.raises(WorkspaceError, match="several: a, b") as caught:
        workspace.manifest()
    assert "featcache use --manifest a" in str(caught.value)


def test_an_unknown_name_offers_the_nearest(tmp_path):
    workspace = make(tmp_path, "runs/vit-b-allpairs")
    with pytest.raises(WorkspaceError, match="did you mean `vit-b-allpairs`"):
        workspace.run("vit-b-allpair")
    with pytest.raises(WorkspaceError):
        workspace.use(run="nothing")


def test_a_run_may_be_named_by_path_or_by_its_workspace(tmp_path):
    workspace = make(tmp_path / "main", "runs/r")
    workspace.use(run="r")
    other = Workspace.open(tmp_path / "other")
    assert other.run(str(tmp_path / "main")) == tmp_path / "main/runs/r"
    assert other.run(str(tmp_path / "main/runs/r")) == tmp_path / "main/runs/r"


def test_a_file_is_no_workspace(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        Workspace.open(tmp_path / "file")
