import json
import shutil
import subprocess
import sys

import pytest

from featcache.adaptor import comparison
from featcache.adaptor.comparison import NOT_COMPARABLE, compare_runs
from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.train import train
from featcache.cli import main
from featcache.config import read_json, write_json
from featcache.errors import TrainingError, WorkspaceError
from featcache.workspace import Workspace


@pytest.fixture(scope="module")
def grid(make_study, make_config, tmp_path_factory) -> Workspace:
    """Two image sets by two text sets, each pair trained, in a workspace of its own."""
    study = make_study(tmp_path_factory.mktemp("sets"), notes=["The tokens are made up."])
    root = study.workspace.features
    shutil.copytree(root / "image" / "made-image", root / "image" / "other-image")
    shutil.copytree(root / "text" / "made-text", root / "text" / "other-text")
    workspace = Workspace(study.workspace.root / "encoder-grid")
    before = study.workspace.names("run")
    for image in ("made-image", "other-image"):
        for text in ("made-text", "other-text"):
            train(
                workspace,
                make_config(epochs=1),
                backbone=str(root / "image" / image),
                text_encoder=str(root / "text" / text),
                manifest=str(study.manifest.folder),
                device="cpu",
            )
    assert study.workspace.names("run") == before
    return workspace


@pytest.fixture
def copy(grid, tmp_path) -> Workspace:
    shutil.copytree(grid.root, tmp_path / "copy")
    return Workspace(tmp_path / "copy")


def change(workspace, name, **facts):
    path = workspace.runs / name / RUN_FILE
    write_json(path, read_json(path) | facts)


def test_every_pair_is_a_row_and_the_best_comes_first(copy):
    names = copy.names("run")
    assert len(names) == 4
    for rank, name in enumerate(names):
        found = read_json(copy.runs / name / RUN_FILE)["validation"]
        change(copy, name, validation=found | {"mrr": 0.1 + 0.2 * rank})
    compared = compare_runs(copy)
    assert [run.name for run in compared.runs] == names[::-1]
    assert {(run.images, run.texts) for run in compared.runs} == {
        (image, text)
        for image in ("made-image", "other-image")
        for text in ("made-text", "other-text")
    }
    assert compared.runs[0].figures["mrr"] == pytest.approx(0.7)
    table = [line for line in compared.to_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({len(line) for line in table}) == 1
    assert "|  70.0 |" in table[2]


def test_figures_are_those_that_the_run_measured(grid):
    for run in compare_runs(grid).runs:
        found = read_json(grid.runs / run.name / RUN_FILE)
        assert run.figures["mrr"] == found["validation"]["mrr"]
        assert run.pairs == found["pairs"]["train"] == 42


def test_a_table_says_what_it_was_measured_on_and_carries_the_notes(grid):
    text = compare_runs(grid).to_text()
    assert "12 images and 12 texts of the split validate, after the last epoch" in text
    assert "R@5 of chance 41.7 and 41.7 %" in text
    assert text.count("The tokens are made up.") == 1
    assert text.splitlines()[0] == "4 runs on manifest made"


def test_settings_that_differ_are_columns_and_equal_ones_are_not(copy):
    name = copy.names("run")[0]
    identity = read_json(copy.runs / name / RUN_FILE)["identity"]
    identity["config"] |= {"lr": 0.5, "adaptor": identity["config"]["adaptor"] | {"heads": 4}}
    change(copy, name, identity=identity)
    compared = compare_runs(copy)
    assert compared.differing == ["adaptor.heads", "lr"]
    rows = {row["run"]: row["settings"] for row in compared.to_json()["runs"]}
    assert rows[name] == {"adaptor.heads": "4", "lr": "0.5"}
    head = next(line for line in compared.to_text().splitlines() if line.startswith("| image"))
    assert head.split("|")[3].strip() == "adaptor.heads"


@pytest.mark.parametrize("what", ["manifest", "candidates"])
def test_runs_on_other_pairs_are_said_to_be_no_comparison(copy, what):
    name = copy.names("run")[0]
    facts = read_json(copy.runs / name / RUN_FILE)
    if what == "manifest":
        facts["identity"]["inputs"]["manifest"] = "0" * 32
    else:
        facts["validation"]["images"] = 11
    change(copy, name, **facts)
    compared = compare_runs(copy)
    assert compared.notes[0] == NOT_COMPARABLE
    assert compared.to_json()["comparable"] is False


def test_an_unfinished_run_is_named_and_an_undefined_figure_comes_last(copy):
    first, second, *_ = copy.names("run")
    change(copy, first, status="started")
    found = read_json(copy.runs / second / RUN_FILE)["validation"]
    change(copy, second, validation=dict.fromkeys(found, None) | {"images": 12, "texts": 12})
    (copy.runs / "empty").mkdir()
    compared = compare_runs(copy)
    assert set(compared.unfinished) == {first, "empty"}
    assert compared.runs[-1].name == second
    assert "undefined" in compared.to_text()
    assert f"Not finished: empty, {first}." in compared.to_text()


def test_without_a_validation_split_it_says_so(copy):
    names = copy.names("run")
    for name in names:
        change(copy, name, validation=None)
    assert "nothing was measured" in compare_runs(copy).notes[0]


def test_runs_are_chosen_by_name_or_folder(grid):
    first, second, *_ = grid.names("run")
    chosen = compare_runs(grid, [first, str(grid.runs / second), first])
    assert {run.name for run in chosen.runs} == {first, second}
    with pytest.raises(WorkspaceError, match="no run `nowhere`"):
        compare_runs(grid, ["nowhere"])


def test_nothing_finished_and_no_description_are_refused(copy, tmp_path):
    with pytest.raises(WorkspaceError, match="no finished run to compare"):
        compare_runs(Workspace(tmp_path / "none"))
    first = copy.names("run")[0]
    write_json(copy.runs / first / RUN_FILE, ["no", "run"])
    with pytest.raises(TrainingError, match="does not describe a run"):
        compare_runs(copy)
    write_json(copy.runs / first / RUN_FILE, {"status": "finished"})
    with pytest.raises(TrainingError, match="lacks what this version writes"):
        compare_runs(copy)


def test_the_command_prints_one_table_or_one_object(grid, capsys):
    assert main(["compare", "--root", str(grid.root)]) == 0
    assert capsys.readouterr().out.count("made-image-made-text-allpairs") == 1
    assert main(["compare", "--root", str(grid.root), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 4
    assert result["comparable"] is True


def test_a_table_does_not_wait_for_torch():
    assert comparison.RUN_FILE == RUN_FILE
    code = "import featcache.adaptor.comparison, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
