"""Our finished results beside the paper's tables."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from heads.conftest import build_run
from heads.kit_masks import masked_toy

from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import FACTS
from featcache.cli import main
from featcache.errors import WorkspaceError
from featcache.heads import classify, protocol, reproduction_results, segment_study
from featcache.heads.classify import ProbeConfig, finetune_workspace
from featcache.heads.paper import read_paper
from featcache.heads.reproduction import reproduce
from featcache.heads.reproduction_page import page
from featcache.heads.segment import SegmentConfig, segment_workspace
from featcache.workspace import Workspace

QUICK = {"subsets": 1, "seeds": 1, "draws": 100, "random_encoder": False}
PROBES = ProbeConfig(label="pneumonia", weight_decays=(0.1,), **QUICK)
MASKS = SegmentConfig(learning_rates=(1e-2,), steps=5, epochs=1, fractions=(10, 100), **QUICK)
PAPERS = "paper, best †"


def with_label(columns):
    columns["label:pneumonia"] = ["yes" if mask else "no" for mask in columns["mask"]]


def build(root: Path, *, synthetic: bool) -> Workspace:
    """A run, and its results on an "RSNA" of made-up tokens in a workspace below, as recipes do."""
    below = Workspace(root / "finetune-rsna")
    toy = masked_toy(below.root, dataset="rsna", synthetic=synthetic, edit=with_label)
    below.use(manifest="toy", image="toy")
    build_run(root / "runs" / "mine", toy)
    main_one = Workspace(root)
    main_one.use(run="mine")
    finetune_workspace(below, PROBES, run=str(root))
    if not synthetic:
        segment_workspace(below, MASKS, run=str(root))
    return main_one


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return build(tmp_path_factory.mktemp("real"), synthetic=False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return build(tmp_path_factory.mktemp("drawn"), synthetic=True)


def section_of(text: str, title: str) -> str:
    (found,) = (part for part in text.split("\n## ") if part.startswith(title))
    return found


def table_after(text: str, word: str) -> list[list[str]]:
    """Cells of the first table whose head has the word."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| ") and word in line)
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return [cells[0], *cells[2:]]


def test_real_pictures_stand_beside_the_paper_with_the_trivial_row(real):
    text = reproduce(real).to_markdown()
    head, *lines = table_after(section_of(text, "Pneumonia on RSNA, AUROC"), PAPERS)
    shown = dict(zip(head, lines[-1], strict=True))
    assert [line[0] for line in lines] == ["1 %", "10 %", "100 %"]
    assert shown["majority class"].startswith("50.0")
    assert shown[PAPERS] == "86.8"
    assert shown["paper, mean †"] == "86.6"
    assert shown["paper's trivial"] == "50.0"
    assert "[" in shown["Adaptor"]
    assert "[" in shown["raw backbone"]
    assert "† The protocols differ: another split" in text
    assert "(R8)" in text
    assert "- Split test: 30 images of 30 patients (no 14, yes 16)." in text


def test_figures_are_those_of_the_results(real):
    values = reproduce(real).to_json()
    first = values["tables"][0]
    (ours,) = first["ours"]
    kept = json.loads((real.root / ours["results"] / "results.json").read_text())
    for row in ours["rows"]:
        (same,) = (
            one
            for one in kept["rows"]
            if (one["method"], one["percent"]) == (row["method"], row["percent"])
        )
        assert row["figures"] == same["figures"]
    assert {row["method"] for row in ours["rows"]} == {
        "majority class",
        "raw backbone",
        "Adaptor",
        "Adaptor minus raw backbone",
    }


def test_a_stand_in_is_said_and_no_figure_of_the_paper_stands_beside_it(drawn):
    text = reproduce(drawn).to_markdown()
    part = section_of(text, "Pneumonia on RSNA, AUROC")
    assert PAPERS not in text
    assert "**Synthetic stand-in**" in part
    assert "RSNA=/path make reproduce-paper" in part
    figures = table_after(part.partition("of the real pictures:")[2], "100 %")
    assert figures[1] == ["DINOv2-B, best of 5 text encoders on test", "84.4", "85.6", "86.8"]
    assert "figures †, of the real pictures" in part
    assert figures[-1] == ["any constant answer", "50.0", "50.0", "50.0"]


def test_masks_have_both_dices_and_the_empty_row(real):
    part = section_of(reproduce(real).to_markdown(), "Lung opacity on RSNA, Dice")
    head, *lines = table_after(part, PAPERS)
    shown = dict(zip(head, lines[-1], strict=True))
    trivial = {"all empty", "mean training mask"}
    assert {*trivial, "raw backbone", "Adaptor minus raw", "Adaptor, positives"} <= set(head)
    assert shown["paper's trivial"] == "76.6"
    assert "up to 18.8 points" in part


def test_a_share_that_was_not_asked_for_is_said(real):
    part = section_of(reproduce(real).to_markdown(), "Lung opacity on RSNA, Dice")
    assert "Not measured: 1 % of the labels" in part
    _, first, *_ = table_after(part, PAPERS)
    assert first[2] == "not measured"


def test_what_is_missing_names_the_command_and_no_number(real):
    result = reproduce(real)
    part = section_of(result.to_markdown(), "COVIDx, accuracy")
    assert "**Not made yet**: `make finetune-covidx`" in part
    table = next(one for one in result.to_json()["tables"] if one["name"] == "covidx")
    assert (table["ours"], table["missing"]) == ([], "make finetune-covidx")


def test_every_command_that_is_named_exists():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for table in read_paper().tables:
        assert f"\n{table.recipe}:" in makefile
        assert (
            f"${{{table.tree}:-"
            in (Path(__file__).parents[2] / "pipelines" / f"{table.recipe}.sh").read_text()
        )


def test_parameters_stand_beside_the_papers(real):
    facts = json.loads((real.run() / "adaptor" / "adaptor.json").read_text())
    result = reproduce(real)
    rows = {row[0]: row for row in table_after(result.to_markdown(), "trainable")}
    count = sum(facts["parameters"].values())
    assert rows["ours: run `mine`"][1:3] == [f"{count:,}", "not recorded"]
    assert rows["Adaptor DINOv2-B"][1:3] == ["12,207,617", "208.3 M"]
    assert "rsna-segmentation, decoder `linear` 17." in result.to_markdown()  # 16 channels
    assert result.to_json()["parameters"]["ours"]["trainable"] == count


def test_parameters_of_the_encoders_come_from_the_run(real, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    counted = {"parameters": {"image_encoder": 1_000_000, "text_encoder": 2_000_000}}
    (copy.run() / RUN_FILE).write_text(json.dumps(counted))
    result = reproduce(copy)
    assert result.run.total == 3_000_000 + result.run.trainable


def test_results_of_other_adaptors_are_left_out_and_counted(real, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    facts = copy.run() / "adaptor" / "adaptor.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"weights_sha256": "0" * 64}))
    result = reproduce(copy)
    assert all(not section.ours for section in result.sections)
    assert result.notes == ("2 result(s) of other Adaptors are not shown.",)


def test_results_whose_manifest_was_made_anew_are_left_out(real, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    manifest = copy.root / "finetune-rsna" / "manifests" / "toy" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"hash": "0" * 32}))
    result = reproduce(copy)
    assert all(not section.ours for section in result.sections)
    assert "2 result(s)" in result.notes[0]
    assert "is gone, or made anew" in result.to_markdown()


def test_a_manifest_may_lie_in_another_of_the_workspaces(real, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    shutil.move(copy.root / "finetune-rsna" / "manifests", copy.root / "manifests")
    assert [len(one.ours) for one in reproduce(copy).sections] == [1, 0, 0, 1]


def test_the_same_result_in_two_workspaces_is_shown_once(real, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    shutil.copytree(copy.root / "finetune-rsna", copy.root / "segment-rsna")
    assert [len(one.ours) for one in reproduce(copy).sections] == [1, 0, 0, 1]


def test_a_stand_in_gives_way_to_real_pictures(real, drawn, tmp_path):
    copy = Workspace(shutil.copytree(real.root, tmp_path / "copy"))
    shutil.copytree(drawn.root / "finetune-rsna", copy.root / "stand-in-rsna")
    facts = "adaptor/adaptor.json"
    assert (copy.run() / facts).read_bytes() == (drawn.run() / facts).read_bytes()
    (shown,) = reproduce(copy).sections[0].ours
    assert shown.folder.startswith("finetune-rsna/")


def test_the_papers_own_split_is_no_difference(real):
    result = reproduce(real)
    section = result.sections[0]
    (measured,) = section.ours
    assert "another split" in page(result.run, [section], ())

    def shown(policy):
        meta = measured.meta.model_copy(update={"policies": {"split": policy}})
        made = page(result.run, [replace(section, ours=(replace(measured, meta=meta),))], ())
        return section_of(made, "Pneumonia").split("†")[-1]

    recomputed = "recomputed over sorted ids with scikit-learn 1.9"
    text = shown(f"mgca-cls, {recomputed}; the published lists, by their hashes")
    assert "another split" not in text
    assert "the text encoder is chosen on test (R8)" in text
    # of other pictures, or the split of the other task
    assert "another split" in shown(f"mgca-cls, {recomputed}; not the published lists")
    assert "another split" in shown(f"mgca-seg, {recomputed}; the published lists, by their hashes")


def test_shots_findings_and_other_labels_belong_to_no_table(real):
    (measured,) = reproduce(real).sections[0].ours
    table = read_paper().tables[0]
    assert measured.is_about(table)
    for change in ({"shots": 5}, {"findings": ["a"]}, {"label": "class"}):
        assert not replace(measured, config={**measured.config, **change}).is_about(table)


def test_the_page_is_written_with_its_list_of_defects(real):
    result = reproduce(real)
    assert result.folder == real.root / "runs" / "mine" / "reproduction"
    text = (result.folder / "reproduction.md").read_text()
    assert "**R1** The Dice of 76.5" in text
    kept = json.loads((result.folder / "reproduction.json").read_text())
    assert kept["schema"] == 1
    assert str(real.root) not in json.dumps(kept) + text
    assert "Made-up tokens." in text


def test_a_second_page_has_the_same_bytes(real):
    pages = [
        [(reproduce(real).folder / f"reproduction.{end}").read_bytes() for end in ("md", "json")]
        for _ in range(2)
    ]
    assert pages[0] == pages[1]


def test_no_run_and_no_adaptor_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(WorkspaceError, match="there is none") as told:
        reproduce(Workspace(tmp_path))
    assert told.value.fix == "featcache train-adaptor"
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match="no trained Adaptor"):
        reproduce(Workspace(tmp_path), run="mine")


def test_the_command_prints_the_page_or_one_object(real, capsys):
    assert main(["reproduce", "--root", str(real.root), "--quiet"]) == 0
    assert "## COVIDx, accuracy" in capsys.readouterr().out
    assert main(["reproduce", "--root", str(real.root), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "mine"


def test_names_are_those_of_the_heads():
    """They stand a second time in this module, which must not wait for torch."""
    assert reproduction_results.RUN_FILE == RUN_FILE
    assert f"adaptor/{FACTS}" == reproduction_results.ADAPTOR_FACTS
    assert reproduction_results.RESULTS_SCHEMA == protocol.SCHEMA
    ours = (reproduction_results.RAW, reproduction_results.ADAPTOR, reproduction_results.DIFFERENCE)
    assert ours == (classify.RAW, classify.ADAPTOR, classify.DIFFERENCE)
    assert ours[:2] == (segment_study.RAW, segment_study.ADAPTOR)
    assert reproduction_results.TRIVIAL == {
        "classify": (classify.MAJORITY, classify.SOURCE),
        "segment": (segment_study.NOTHING, segment_study.PRIOR),
    }


def test_a_page_does_not_wait_for_torch():
    code = "import featcache.heads.reproduction, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
