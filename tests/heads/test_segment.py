"""Segmentation, end to end on made-up tokens."""

import json
import shutil

import numpy as np
import pytest
from heads.conftest import image_spec
from heads.kit_masks import GRID, masked_toy
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from featcache.adaptor.saved import load_adaptor
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
    return masked_toy(tmp_path_factory.mktemp("masked"), dataset="rsna")


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
        "Adaptor minus all empty",
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


def test_every_pair_of_rows_is_compared_on_the_same_draws(results):
    pairs = [one for one in results.values["differences"] if one["labels"] == "10 %"]
    methods = ["all empty", "mean training mask", "raw backbone", "Adaptor"]
    expected = {(b, a) for n, a in enumerate(methods) for b in methods[n + 1 :]}
    assert {(one["first"], one["second"]) for one in pairs} == expected
    assert len(pairs) == len(expected)
    for one in pairs:
        gap = figure(results, one["first"], 10) - figure(results, one["second"], 10)
        assert one["figures"]["dice"]["mean"] == pytest.approx(gap, abs=3e-6)
        assert one["figures"]["dice"]["low"] <= one["figures"]["dice"]["high"]
    shown = row(results, "Adaptor minus all empty", 10)
    [same] = [one for one in pairs if (one["first"], one["second"]) == ("Adaptor", "all empty")]
    assert shown["figures"]["dice"] == same["figures"]["dice"]
    assert len(shown["figures"]["dice"]["values"]) == shown["runs"] == 4


def test_where_every_picture_has_a_mask_the_mean_mask_is_the_one_to_beat(make_run, tmp_path):
    toy = masked_toy(tmp_path, positive_every=1)
    run = make_run(tmp_path / "run", toy)
    quick = QUICK.model_copy(update={"fractions": (100.0,), "seeds": 1, "steps": 2})
    found = segment(toy.images, toy.manifest, run, tmp_path / "out", quick, device="cpu")
    methods = [line["method"] for line in found.values["rows"]]
    assert methods[-2:] == ["Adaptor minus raw backbone", "Adaptor minus mean training mask"]
    expected = figure(found, "Adaptor", 100) - figure(found, "mean training mask", 100)
    gap = figure(found, "Adaptor minus mean training mask", 100)
    assert gap == pytest.approx(expected, abs=2e-6)


def test_table_says_stand_in_notes_and_rules(results):
    text = (results.folder / "results.md").read_text()
    assert text.index("Made-up tokens.") < text.index("| data set |")
    assert "none stand beside this synthetic stand-in" in text
    assert "empty on empty = 1" in text
    assert "The test split was read once" in text
    body = [line for line in text.splitlines() if line.startswith("| toy")]
    assert len(body) == 14
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


@pytest.fixture
def stopped(results, tmp_path):
    """A folder with all decoders, as a call that was stopped right after them left it."""
    out = tmp_path / "stopped"
    shutil.copytree(results.folder / "decoders", out / "decoders")
    return out


@pytest.mark.parametrize("fact", ["request", "features", "subset", "settings", "masks"])
def test_decoders_of_anything_else_are_made_anew(stopped, results, masked, run, monkeypatch, fact):
    path = stopped / "decoders" / "adaptor-10-1.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) + 1.0 for name in file.keys()}  # noqa: SIM118
    assert set(metadata) == {"request", "features", "subset", "settings", "masks", "fit"}
    path.write_bytes(save(tensors, metadata | {fact: "of something else"}))
    train, calls = segment_study.fit_subset, []
    monkeypatch.setattr(
        segment_study, "fit_subset", lambda *given: calls.append(given[1]) or train(*given)
    )
    segment(masked.images, masked.manifest, run, stopped, QUICK, device="cpu")
    assert [(subset.percent, subset.number) for subset in calls] == [(10.0, 1)]
    assert (stopped / "results.json").read_bytes() == (results.folder / "results.json").read_bytes()


def test_decoders_say_which_features_and_images_they_are_of(results, masked, run):
    def facts_of(name):
        with safe_open(results.folder / "decoders" / f"{name}.safetensors", "pt") as file:
            return file.metadata()

    adaptor, raw, other = (facts_of(one) for one in ("adaptor-10-0", "raw-10-0", "raw-10-1"))
    assert masked.images.fingerprint in raw["features"]
    assert load_adaptor(run).facts.weights_sha256 in adaptor["features"]
    assert adaptor["subset"] == raw["subset"] != other["subset"]
    assert json.loads(raw["settings"])["learning_rates"] == [0.01, 0.05]


def test_changed_mask_file_is_another_request(tmp_path):
    files = tmp_path / "masks"
    files.mkdir()
    inside = np.zeros((32, 32), dtype=np.uint8)
    inside[8:24, 8:24] = 255

    def in_files(columns):
        for number, text in enumerate(columns["mask"]):
            if text:
                Image.fromarray(inside).save(files / f"{number}.png")
                columns["mask"][number] = f"file:masks/{number}.png"

    toy = masked_toy(tmp_path, edit=in_files)
    quick = QUICK.model_copy(update={"fractions": (100.0,), "seeds": 1, "steps": 2})
    arguments = (toy.images, toy.manifest, None, tmp_path / "out", quick)
    first = segment(*arguments, device="cpu")
    assert not segment(*arguments, device="cpu").is_new
    images = toy.manifest.images
    pairs = zip(images["split"].to_pylist(), images["mask"].to_pylist(), strict=True)
    changed = next(mask for split, mask in pairs if split == "test" and mask)
    inside[20:] = 0
    Image.fromarray(inside).save(tmp_path / changed.removeprefix("file:"))
    with pytest.raises(TrainingError, match="the test split was read before"):
        segment(*arguments, device="cpu")
    second = segment(*arguments, device="cpu", again=True)
    assert second.values["mask_files"] != first.values["mask_files"]
    assert figure(second, "mean training mask", 100) != figure(first, "mean training mask", 100)


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
