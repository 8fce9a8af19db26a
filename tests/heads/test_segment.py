"""Segmentation, end to end on made-up tokens."""

import json
import shutil

import numpy as np
import pytest
from heads.conftest import image_spec
from heads.kit_masks import GRID, masked_toy

from featcache.config import read_json
from featcache.errors import CacheError, StaleFeatureSetError, TrainingError
from featcache.heads import segment_study
from featcache.heads.segment import SegmentConfig, segment, segment_workspace
from featcache.workspace import Workspace

QUICK = SegmentConfig(
    fractions=(10, 100),
    subsets=2,
    seeds=2,
    learning_rates=(0.01, 0.05),
    steps=30,
    epochs=1,
    batch_size=8,
    loss_scale=2,
    size=32,
    draws=100,
    random_encoder=False,
)


def row(results, method, percent):
    [line] = [
        line
        for line in results.values["rows"]
        if line["method"] == method and line["percent"] == percent and "published" not in line
    ]
    return line


def figure(results, method, percent, name="dice"):
    return row(results, method, percent)["figures"][name]["mean"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def run(masked, make_run):
    return make_run(masked.root / "runs" / "first", masked)


@pytest.fixture(scope="module")
def results(masked, run):
    return segment(masked.images, masked.manifest, run, masked.root / "out", QUICK, device="cpu")


def test_every_share_has_its_trivial_rows(results):
    expected = [
        "all empty",
        "mean training mask",
        "random encoder",
        "raw backbone",
        "Adaptor",
        "Adaptor minus raw backbone",
    ]
    for percent in (10.0, 100.0):
        found = [r["method"] for r in results.values["rows"] if r["percent"] == percent]
        assert found == expected


def test_all_empty_row_is_the_share_of_empty_images_of_that_split(results, masked):
    images = masked.manifest.images
    pairs = zip(images["split"].to_pylist(), images["mask"].to_pylist(), strict=True)
    test = [mask == "" for split, mask in pairs if split == "test"]
    assert figure(results, "all empty", 100) == pytest.approx(np.mean(test), abs=1e-6)
    assert figure(results, "all empty", 100, "dice_positive") == 0.0
    assert figure(results, "all empty", 100, "presence_auroc") == 0.5


def test_linear_decoder_finds_what_the_tokens_show(results):
    assert figure(results, "raw backbone", 100) > figure(results, "all empty", 100) + 0.15
    assert figure(results, "raw backbone", 100, "dice_positive_own") > 0.5
    assert figure(results, "raw backbone", 100, "presence_auroc") > 0.8
    assert figure(results, "mean training mask", 100, "dice_positive_own") < 0.5


def test_runs_are_subsets_times_seeds(results):
    line = row(results, "Adaptor", 10)
    assert line["runs"] == len(line["figures"]["dice"]["values"]) == 4
    assert line["configurations_tried"] == 8
    assert len(line["chosen"]) == 2
    assert len(line["thresholds"]) == 4
    assert results.table.configurations == 2 * (8 + 4)


def test_difference_is_the_difference_of_the_means(results):
    expected = figure(results, "Adaptor", 100) - figure(results, "raw backbone", 100)
    gap = figure(results, "Adaptor minus raw backbone", 100)
    assert gap == pytest.approx(expected, abs=2e-6)


def test_table_says_stand_in_notes_and_rules(results):
    text = (results.folder / "results.md").read_text()
    assert text.index("Made-up tokens.") < text.index("| data set |")
    assert "none stand beside this synthetic stand-in" in text
    assert "empty on empty = 1" in text
    assert "The test split was read once" in text
    body = [line for line in text.splitlines() if line.startswith("| toy")]
    assert len(body) == 12
    assert all("(synthetic stand-in)" in line for line in body)


def test_scratch_tokens_are_gone_and_decoders_stay(results):
    names = sorted(path.name for path in (results.folder / "decoders").iterdir())
    assert names == [
        *(f"adaptor-{one}.safetensors" for one in ("10-0", "10-1", "100-0")),
        *(f"raw-{one}.safetensors" for one in ("10-0", "10-1", "100-0")),
    ]
    assert not (results.folder / "tokens").exists()


def test_finished_result_is_returned_untouched(results, masked, run):
    before = {p.name: p.stat().st_mtime_ns for p in results.folder.iterdir()}
    again = segment(masked.images, masked.manifest, run, results.folder, QUICK, device="cpu")
    assert not again.is_new
    assert {p.name: p.stat().st_mtime_ns for p in results.folder.iterdir()} == before


def test_stopped_call_goes_on_to_the_same_bytes(results, masked, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train, calls = segment_study.fit_subset, []

    def stop_at_fourth(*given):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(given)
        return train(*given)

    monkeypatch.setattr(segment_study, "fit_subset", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        segment(masked.images, masked.manifest, run, out, QUICK, device="cpu")
    assert not (out / "test_reads.json").exists()
    assert len(list((out / "decoders").iterdir())) == 3
    done = len(calls)
    monkeypatch.setattr(
        segment_study, "fit_subset", lambda *given: calls.append(given) or train(*given)
    )
    resumed = segment(masked.images, masked.manifest, run, out, QUICK, device="cpu")
    assert len(calls) - done == 3
    assert (out / "results.json").read_bytes() == (results.folder / "results.json").read_bytes()
    assert resumed.is_new


def test_another_request_may_not_read_the_test_split(results, masked, run, tmp_path):
    shutil.copytree(results.folder, tmp_path / "out")
    other = QUICK.model_copy(update={"seed": 1, "fractions": (100.0,)})
    arguments = (masked.images, masked.manifest, run, tmp_path / "out", other)
    with pytest.raises(TrainingError, match="the test split was read before") as caught:
        segment(*arguments, device="cpu")
    assert "--again" in str(caught.value)
    allowed = segment(*arguments, device="cpu", again=True)
    assert "had been read by 1 other request" in (allowed.folder / "results.md").read_text()


def test_set_without_grid_is_refused_before_anything_is_read(tmp_path):
    toy = masked_toy(tmp_path)
    features = toy.root / "features" / "image" / "toy"
    spec = image_spec(grid=None, num_tokens=17, dim=12)
    values = json.loads(json.dumps(spec.model_dump(mode="json"))) | {
        "fingerprint": spec.fingerprint
    }
    (features / "feature_set.json").write_text(json.dumps(values))
    (features / "shards.json").unlink()  # opening the set would fail on it
    workspace = Workspace.open(tmp_path)
    with pytest.raises(CacheError, match="has no grid of patch tokens") as caught:
        segment_workspace(workspace, QUICK, backbone="toy", manifest="toy")
    assert "featcache extract" in str(caught.value)


def test_foreign_adaptor_is_refused(masked, make_run, tmp_path):
    foreign = make_run(tmp_path / "foreign", masked, image="f" * 32)
    with pytest.raises(StaleFeatureSetError, match="was trained on image features"):
        segment(masked.images, masked.manifest, foreign, tmp_path / "out", QUICK, device="cpu")


def test_paper_objective_has_no_places_and_keeps_its_row(masked, make_run, tmp_path):
    paper = make_run(tmp_path / "paper", masked, objective="paper")
    quick = QUICK.model_copy(update={"fractions": (100.0,), "seeds": 1, "steps": 2})
    found = segment(masked.images, masked.manifest, paper, tmp_path / "out", quick, device="cpu")
    assert row(found, "Adaptor", 100)["figures"] == {}
    assert "one vector per image" in row(found, "Adaptor", 100)["remark"]


def test_conv_decoder_learns_too(masked, tmp_path):
    config = QUICK.model_copy(
        update={"decoder": "conv", "fractions": (100.0,), "seeds": 1, "learning_rates": (0.01,)}
    )
    found = segment(masked.images, masked.manifest, None, tmp_path / "out", config, device="cpu")
    assert figure(found, "raw backbone", 100, "dice_positive_own") > 0.5
    assert "No run was given" in (found.folder / "results.md").read_text()


def test_published_figures_stand_beside_real_pictures_alone(tmp_path):
    toy = masked_toy(tmp_path, dataset="rsna", synthetic=False)
    quick = QUICK.model_copy(update={"fractions": (100.0,), "seeds": 1, "steps": 2})
    found = segment(toy.images, toy.manifest, None, tmp_path / "out", quick, device="cpu")
    published = [line for line in found.values["rows"] if line.get("published")]
    assert {line["method"] for line in published} >= {"predict nothing", "MGCA ViT-B/16"}
    assert all("other protocol" in line["remark"] for line in published)
    assert published[0]["figures"]["dice"]["mean"] == 0.766
    assert "another protocol than ours" in (found.folder / "results.md").read_text()


def test_decoders_that_predict_nothing_are_counted(tmp_path):
    toy = masked_toy(tmp_path, positive_every=3)
    quick = QUICK.model_copy(
        update={"fractions": (100.0,), "seeds": 1, "steps": 1, "learning_rates": (1e-9,)}
    )
    found = segment(toy.images, toy.manifest, None, tmp_path / "out", quick, device="cpu")
    line = row(found, "raw backbone", 100)
    test_images = sum(split == "test" for split in toy.manifest.splits())
    assert line["empty_predictions"] == [test_images]
    assert line["remark"] == "1 of 1 runs predict nothing on test"
    assert line["figures"]["dice"] == row(found, "all empty", 100)["figures"]["dice"]


def test_grid_of_the_kit_is_what_the_set_says(masked):
    assert masked.images.spec.grid == GRID


def test_request_covers_the_masks(masked, results):
    assert results.values["manifest"]["hash"] == masked.manifest.meta.hash
    assert read_json(results.folder / "test_reads.json")["reads"][0]["request"]
