"""Phrases looked for in images: similarity maps, held against masks."""

import numpy as np
import pytest
import torch
import yaml
from heads.kit_masks import masked_toy

from featcache.adaptor.saved import load_adaptor
from featcache.encoders.request import EncoderRequest
from featcache.errors import UsageError
from featcache.heads import grounding
from featcache.heads.grounding import GroundConfig, ground, phrase_maps
from featcache.heads.prompts import Prompts
from featcache.heads.protocol import Results, Table
from featcache.workspace import Workspace

REQUEST = EncoderRequest(modality="text", name="toy-text")
QUICK = GroundConfig(
    phrases=("opacity", "consolidation"), absent=("clear",), size=32, draws=100, untrained=2
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


@pytest.mark.parametrize("objective", ["allpairs", "dual"])
def test_map_of_one_phrase_is_the_objectives_similarity_map(masked, make_run, tmp_path, objective):
    trained = load_adaptor(make_run(tmp_path / "run", masked, objective=objective))
    torch.manual_seed(0)
    images, words = torch.randn(3, 17, 12), torch.randn(1, 4, 8)
    valid = torch.ones(1, 4, dtype=torch.bool)
    text = trained.objective.encode_texts(trained.adaptor, words, valid)
    expected = trained.objective.similarity_map(
        trained.adaptor, images, words.expand(3, -1, -1), valid.expand(3, -1), (4, 4)
    )
    torch.testing.assert_close(phrase_maps(trained, images, text, (4, 4)), expected)
    twice = phrase_maps(trained, images, torch.cat([text, text]), (4, 4))
    torch.testing.assert_close(twice, expected)


@pytest.fixture
def pointing(monkeypatch, masked, make_run, tmp_path):
    """`ground` with maps that are known: the toy tokens' own signal; the phrase is not read."""

    def maps(study, encoder, request):
        rows = study.masked.labelled.rows[study.numbers]
        blocks = grounding.iterate_rows(study.images, rows, 200)
        tokens = next(blocks)[1][:, 1:, 0].float().numpy().reshape(-1, 4, 4)
        noise = np.random.default_rng(0).normal(size=tokens.shape).astype(np.float32)
        return {
            grounding.UNTRAINED: [noise, noise[::-1].copy()],
            grounding.ABSENT: [-tokens],
            grounding.ADAPTOR: [tokens],
        }

    monkeypatch.setattr(grounding._Study, "maps", maps)
    monkeypatch.setattr(grounding, "locate_all", lambda requests: [None])
    monkeypatch.setattr(grounding, "load_encoder", lambda located, device: None)
    run = make_run(tmp_path / "run", masked)
    return ground(
        masked.images, masked.manifest, run, REQUEST, tmp_path / "out", QUICK, device="cpu"
    )


def figure(results, method, name):
    [line] = [line for line in results.values["rows"] if line["method"] == method]
    return line["figures"][name]["mean"]


def test_table_tells_a_map_that_points_from_one_that_does_not(pointing):
    assert [line["method"] for line in pointing.values["rows"]] == [
        "all empty",
        "mean training mask",
        "untrained Adaptor",
        "Adaptor, absence",
        "Adaptor",
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
        ground(masked.images, masked.manifest, run, REQUEST, tmp_path / "out", QUICK, device="cpu")


def test_no_phrase_is_a_usage_error(masked, make_run, tmp_path):
    run, silent = make_run(tmp_path / "run", masked), QUICK.model_copy(update={"phrases": ()})
    with pytest.raises(UsageError, match="no phrase was given"):
        ground(masked.images, masked.manifest, run, REQUEST, tmp_path / "out", silent, device="cpu")


def test_other_phrases_are_another_request_to_the_same_folder(
    monkeypatch, masked, make_run, tmp_path
):
    run = make_run(masked.images.folder.parents[2] / "runs" / "first", masked)
    monkeypatch.setattr(grounding, "run_request", lambda *_: REQUEST)
    nothing = Table("", (), (), (), 0)
    monkeypatch.setattr(
        grounding, "ground", lambda *given, **_: Results(given[4], {}, nothing, is_new=True)
    )
    workspace = Workspace(run.parents[1])
    one = {"kind": "prompts", "findings": {"a": {"present": ["opacity"], "absent": ["clear"]}}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(one))
    options = {"run": "first", "manifest": "toy", "backbone": "toy"}
    plain = QUICK.model_copy(update={"phrases": ()})
    found = grounding.ground_workspace(workspace, QUICK, **options)
    assert found.folder == run / "ground" / "toy-toy"
    other = grounding.ground_workspace(workspace, plain, prompts=str(file), **options)
    assert other.folder == found.folder


def test_prompts_of_several_findings_do_not_say_what_to_look_for():
    one = {"present": ["There is an opacity."], "absent": ["No opacity."]}
    single = Prompts(findings={"opacity": one})
    assert grounding._phrases_of(single, "a")["phrases"] == ("There is an opacity.",)
    with pytest.raises(UsageError, match="not about one finding"):
        grounding._phrases_of(Prompts(findings={"opacity": one, "effusion": one}), "b")
