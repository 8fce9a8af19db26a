"""Phrases looked for in images: similarity maps, held against masks."""

import re

import numpy as np
import pytest
import yaml
from heads.kit_masks import SIDE, masked_toy
from heads.kit_sentences import open_bert, plain_run, write_texts
from PIL import Image

from featcache.errors import TrainingError, UsageError
from featcache.heads import grounding
from featcache.heads.grounding import GroundConfig, ground
from featcache.heads.prompts import Prompts
from featcache.loader.gather import iterate_rows
from featcache.workspace import Workspace

QUICK = GroundConfig(
    phrases=("opacity", "consolidation"), absent=("clear",), size=32, draws=100, untrained=2
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


def ask(masked, run, out, config=QUICK, texts=None):
    folder = (texts or masked.texts).folder
    return ground(masked.images, masked.manifest, run, folder, out, config, device="cpu")


@pytest.fixture(scope="module")
def pointing(masked, make_run, tmp_path_factory):
    """`ground` with maps that are known: the toy tokens' own signal; the phrase is not read."""

    def maps(study, reader):
        rows = study.masked.labelled.rows[study.numbers]
        blocks = iterate_rows(study.images, rows, 200)
        tokens = next(blocks)[1][:, 1:, 0].float().numpy().reshape(-1, 4, 4)
        noise = np.random.default_rng(0).normal(size=tokens.shape).astype(np.float32)
        return {
            grounding.UNTRAINED: [noise, noise[::-1].copy()],
            grounding.ABSENT: [-tokens],
            grounding.ADAPTOR: [tokens],
        }

    folder = tmp_path_factory.mktemp("pointing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grounding._Study, "maps", maps)
        patch.setattr(grounding, "open_prompt_reader", lambda texts, trained, device: None)
        return ask(masked, make_run(folder / "run", masked), folder / "out")


def figure(results, method, name):
    [line] = [line for line in results.values["rows"] if line["method"] == method]
    return line["figures"][name]["mean"]


def test_table_tells_a_map_that_points_from_one_that_does_not(pointing):
    assert [line["method"] for line in pointing.values["rows"]] == [
        "all empty",
        "mean training mask",
        "centre of the picture",
        "untrained Adaptor",
        "Adaptor, absence",
        "Adaptor",
        "Adaptor minus all empty",
        "Adaptor minus mean training mask",
        "Adaptor minus untrained",
    ]
    assert figure(pointing, "Adaptor", "pointing") > 0.9
    assert figure(pointing, "untrained Adaptor", "pointing") < 0.6
    assert figure(pointing, "Adaptor, absence", "pointing") < 0.3
    assert figure(pointing, "all empty", "pointing") == pytest.approx(0.25)
    assert figure(pointing, "Adaptor", "dice_positive_own") > 0.5
    assert figure(pointing, "Adaptor", "dice") > figure(pointing, "all empty", "dice") + 0.1
    gap = figure(pointing, "Adaptor minus untrained", "dice")
    expected = figure(pointing, "Adaptor", "dice") - figure(pointing, "untrained Adaptor", "dice")
    assert gap == pytest.approx(expected, abs=2e-6)


def test_table_says_that_validate_masks_chose_thresholds(pointing):
    text = (pointing.folder / "results.md").read_text()
    assert "No mask was trained on." in text
    assert "The masks of validate chose two thresholds" in text
    assert "opacity" not in text  # phrases stand in results.json alone
    assert pointing.values["config"]["phrases"] == ["opacity", "consolidation"]


def test_objective_without_places_is_refused(masked, make_run, tmp_path):
    run = make_run(tmp_path / "paper", masked, objective="paper")
    with pytest.raises(UsageError, match="knows one vector per image"):
        ask(masked, run, tmp_path / "out")


def test_no_phrase_is_a_usage_error(masked, make_run, tmp_path):
    run, silent = make_run(tmp_path / "run", masked), QUICK.model_copy(update={"phrases": ()})
    with pytest.raises(UsageError, match="no phrase was given"):
        ask(masked, run, tmp_path / "out", silent)


def test_prompts_of_several_findings_do_not_say_what_to_look_for():
    one = {"present": ["There is an opacity."], "absent": ["No opacity."]}
    single = Prompts(findings={"opacity": one})
    plain, both = GroundConfig(), Prompts(findings={"opacity": one, "effusion": one})
    made = grounding._with_phrases(plain, single, "a")
    assert (made.phrases, made.absent) == (("There is an opacity.",), ("No opacity.",))
    with pytest.raises(UsageError, match="not about one finding"):
        grounding._with_phrases(plain, both, "b")
    asked = GroundConfig(absent=("nothing there",))
    assert grounding._with_phrases(asked, single, "a").absent == ("nothing there",)


def test_differences_of_all_rows_are_written_down(pointing):
    named = {
        (one["first"], one["second"]): one["figures"] for one in pointing.values["differences"]
    }
    assert len(named) == 15  # of six rows
    gap = named["Adaptor", "mean training mask"]["pointing"]
    assert gap["mean"] == pytest.approx(
        figure(pointing, "Adaptor", "pointing")
        - figure(pointing, "mean training mask", "pointing"),
        abs=2e-6,
    )
    assert gap["low"] > 0
    assert len(named["Adaptor", "untrained Adaptor"]["dice"]["values"]) == 2


def test_trivial_rows_see_no_pixel(pointing):
    for row in ("all empty", "mean training mask", "centre of the picture"):
        assert figure(pointing, row, "presence_auroc") == 0.5
    assert figure(pointing, "mean training mask", "pointing") < 0.7
    assert figure(pointing, "centre of the picture", "dice_positive_own") > 0


# With a real text encoder, from a workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_run):
    """Pictures, masks, texts of a small BERT, and an Adaptor with fresh weights."""
    root = tmp_path_factory.mktemp("ground")
    toy = masked_toy(root)
    for number, key in enumerate(toy.manifest.keys):
        shade = np.full((SIDE, SIDE), number, dtype=np.uint8)
        Image.fromarray(shade).save(root / f"{int(key.removeprefix('img-'))}.png")
    encoder, request = open_bert(root / "bert")
    texts = write_texts(root / "features" / "text" / "bert", encoder, request, ["clear", "opacity"])
    run = plain_run(root / "runs" / "first", toy.images, texts)
    (run / "config.yaml").write_text("images: toy\ntexts: bert\n")
    found = Workspace(root)
    found.use(manifest="toy", image="toy", run="first")
    return found


def test_same_request_gives_the_same_bytes_and_is_left_alone(workspace, monkeypatch):
    first = grounding.ground_workspace(workspace, QUICK, device="cpu")
    assert first.folder == workspace.runs / "first" / "ground" / "toy-toy"
    content = (first.folder / "results.json").read_bytes()
    assert not grounding.ground_workspace(workspace, QUICK, device="cpu").is_new
    (first.folder / "results.json").unlink()
    again = grounding.ground_workspace(workspace, QUICK, device="cpu")
    assert again.is_new
    assert (first.folder / "results.json").read_bytes() == content
    other = QUICK.model_copy(update={"phrases": ("small opacity",)})
    with pytest.raises(TrainingError, match="by 1 other request"):
        grounding.ground_workspace(workspace, other, device="cpu")


def test_pictures_are_asked_for_and_change_no_figure(workspace):
    before = grounding.ground_workspace(workspace, QUICK, device="cpu")
    assert not (before.folder / "maps").exists()
    config = QUICK.model_copy(update={"save_maps": 3})
    after = grounding.ground_workspace(workspace, config, device="cpu")
    assert not after.is_new
    assert after.values == before.values
    pictures = sorted((after.folder / "maps").glob("*"))
    assert len(pictures) == 3
    assert all(re.fullmatch(r"row-\d{6}\.png", one.name) for one in pictures)
    with Image.open(pictures[0]) as picture:
        assert picture.size == (2 * SIDE, SIDE)
    content = [one.read_bytes() for one in pictures]
    grounding.ground_workspace(workspace, config, device="cpu")
    assert [one.read_bytes() for one in pictures] == content


def test_empty_phrase_is_a_usage_error(workspace):
    for phrases in ((" ",), ("opacity", "")):
        config = QUICK.model_copy(update={"phrases": phrases})
        with pytest.raises(UsageError, match="a phrase is empty"):
            grounding.ground_workspace(workspace, config, device="cpu")


def test_phrases_come_from_prompts_of_a_single_finding(workspace, tmp_path):
    plain = QUICK.model_copy(update={"phrases": (), "absent": ()})
    one = {"kind": "prompts", "findings": {"a": {"present": ["opacity"], "absent": ["clear"]}}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(one))
    # Whatever the name of the file: phrases must not be chosen on test.
    with pytest.raises(TrainingError, match="by 1 other request"):
        grounding.ground_workspace(workspace, plain, prompts=str(file), device="cpu")
    with pytest.raises(UsageError, match="no prompts are known for data set `spreadsheet`"):
        grounding.ground_workspace(workspace, plain, device="cpu")
