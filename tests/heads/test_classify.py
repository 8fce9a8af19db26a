"""Linear probes, end to end on made-up tokens."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from featcache.config import read_json
from featcache.errors import ManifestError, StaleFeatureSetError, TrainingError, UsageError
from featcache.heads import vectors
from featcache.heads.classify import ProbeConfig, finetune, finetune_workspace
from featcache.heads.labels import labelled_images
from featcache.loader.gather import iterate_rows
from featcache.manifest.splits import list_hash
from featcache.workspace import Workspace

QUICK = ProbeConfig(
    fractions=(10, 100), subsets=2, seeds=2, weight_decays=(0.01, 0.1, 1.0), draws=200
)


def rows_of(results, method, percent):
    return [
        line
        for line in results.values["rows"]
        if line["method"] == method and line["percent"] == percent
    ]


def accuracy(results, method, percent):
    [line] = rows_of(results, method, percent)
    return line["figures"]["accuracy"]["mean"]


@pytest.fixture(scope="module")
def run(toy, make_run):
    return make_run(toy.root / "runs" / "first", toy)


@pytest.fixture(scope="module")
def results(toy, run):
    return finetune(toy.images, toy.manifest, run, toy.root / "out", QUICK, device="cpu")


def test_every_share_has_its_trivial_rows(results):
    expected = [
        "majority class",
        "random encoder",
        "raw backbone",
        "Adaptor",
        "Adaptor minus raw backbone",
    ]
    for percent in (10.0, 100.0):
        found = [r["method"] for r in results.values["rows"] if r["percent"] == percent]
        assert found == expected


def test_probe_learns_what_the_tokens_hold(results):
    assert accuracy(results, "raw backbone", 100) > 0.8
    assert accuracy(results, "majority class", 100) == pytest.approx(1 / 3, abs=0.02)


def test_majority_class_has_no_say_in_ranking(results):
    [line] = rows_of(results, "majority class", 10)
    assert line["figures"]["auroc"]["mean"] == 0.5
    assert line["figures"]["balanced_accuracy"]["mean"] == pytest.approx(1 / 3)


def test_runs_are_subsets_times_seeds(results):
    [line] = rows_of(results, "Adaptor", 10)
    assert line["runs"] == len(line["figures"]["accuracy"]["values"]) == 4
    assert line["configurations_tried"] == 12
    assert len(line["converged"]) == 4
    assert rows_of(results, "Adaptor", 100)[0]["runs"] == 2
    # The raw backbone has three poolings: mean, class token, both.
    assert results.table.configurations == (3 + 1) * (12 + 6)


def test_difference_is_the_difference_of_the_means(results):
    [gap] = rows_of(results, "Adaptor minus raw backbone", 100)
    expected = accuracy(results, "Adaptor", 100) - accuracy(results, "raw backbone", 100)
    assert gap["figures"]["accuracy"]["mean"] == pytest.approx(expected, abs=2e-6)
    assert gap["figures"]["accuracy"]["low"] is not None


def test_encoder_that_cannot_be_rebuilt_keeps_its_row_with_the_reason(results):
    [line] = rows_of(results, "random encoder", 100)
    assert line["figures"] == {}
    assert "not computed: unknown" in line["remark"]
    assert "toy" in line["remark"]


def test_table_says_stand_in_notes_and_protocol(results):
    text = (results.folder / "results.md").read_text()
    assert text.index("Made-up tokens.") < text.index("| data set |")
    body = [line for line in text.splitlines() if line.startswith("| toy")]
    assert len(body) == 10
    assert all(line.startswith("| toy (synthetic stand-in) |") for line in body)
    assert "Configurations tried and compared on validation: 72." in text
    assert "trained on a manifest that is not recorded here" in text


def test_subset_lists_hash_to_their_names(results, toy):
    listed = read_json(results.folder / "subsets" / "subsets.json")["subsets"]
    assert [(one["percent"], one["number"]) for one in listed] == [(10, 0), (10, 1), (100, 0)]
    train = labelled_images(toy.images, toy.manifest, "class").of("train")
    for one in listed:
        content = (results.folder / "subsets" / one["file"]).read_bytes()
        keys = content.decode().splitlines()
        assert keys == sorted(keys)
        assert one["hash"] == hashlib.sha256(content).hexdigest()[:16] == list_hash(keys)
        assert all(count >= 1 for count in one["classes"].values())
    assert listed[2]["hash"] == listed[0]["parent_hash"] == listed[1]["parent_hash"]
    assert listed[2]["images"] == len(train)


def test_finished_result_is_returned_untouched(results, toy, run):
    before = {p.name: p.stat().st_mtime_ns for p in results.folder.iterdir()}
    again = finetune(toy.images, toy.manifest, run, results.folder, QUICK, device="cpu")
    assert not again.is_new
    assert again.table.to_markdown() == results.table.to_markdown()
    assert {p.name: p.stat().st_mtime_ns for p in results.folder.iterdir()} == before
    assert len(read_json(results.folder / "test_reads.json")["reads"]) == 1


def test_same_seed_gives_the_same_bytes(results, toy, run, tmp_path):
    finetune(toy.images, toy.manifest, run, tmp_path, QUICK, device="cpu")
    for name in ("results.json", "results.md", "subsets/subsets.json"):
        assert (tmp_path / name).read_bytes() == (results.folder / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()


def test_other_question_to_the_same_folder_is_refused(results, toy, run):
    before = (results.folder / "results.json").read_bytes()
    other = QUICK.model_copy(update={"weight_decays": (0.1,)})
    with pytest.raises(TrainingError, match="read before for this folder, by 1 other request"):
        finetune(toy.images, toy.manifest, run, results.folder, other, device="cpu")
    assert (results.folder / "results.json").read_bytes() == before


def test_asking_again_is_said_in_the_table(toy, tmp_path):
    small = QUICK.model_copy(update={"fractions": (100,)})
    finetune(toy.images, toy.manifest, None, tmp_path, small, device="cpu")
    other = small.model_copy(update={"seed": 1})
    found = finetune(toy.images, toy.manifest, None, tmp_path, other, device="cpu", again=True)
    assert "by 1 other request(s) before" in found.table.to_markdown()


def test_adaptor_of_another_encoder_is_refused(toy, make_run, tmp_path):
    foreign = make_run(tmp_path / "foreign", toy, image="f" * 32)
    with pytest.raises(StaleFeatureSetError, match="fingerprint " + "f" * 32) as caught:
        finetune(toy.images, toy.manifest, foreign, tmp_path / "out", QUICK, device="cpu")
    assert "featcache extract --run" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_without_a_run_there_is_no_adaptor_row(toy, tmp_path):
    small = QUICK.model_copy(update={"fractions": (100,)})
    found = finetune(toy.images, toy.manifest, None, tmp_path, small, device="cpu")
    assert {line["method"] for line in found.values["rows"]} == {
        "majority class",
        "random encoder",
        "raw backbone",
    }
    assert "No run was given" in found.table.to_markdown()


def test_source_that_tells_the_class_gets_a_row(make_toy, tmp_path):
    toy = make_toy(tmp_path, sources=("north", "south", "east"))
    small = QUICK.model_copy(update={"fractions": (100,)})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", small, device="cpu")
    [line] = rows_of(found, "source only", 100)
    assert line["figures"]["accuracy"]["mean"] == 1.0
    assert "sees no pixel" in line["remark"]


def test_quarantined_and_unlabelled_images_are_counted_and_left_out(make_toy, tmp_path):
    def edit(columns):
        columns["label:class"][0] = None
        columns["split"][1] = None

    toy = make_toy(tmp_path, bad=("img-002", "img-003"), edit=edit)
    small = QUICK.model_copy(update={"fractions": (100,)})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", small, device="cpu")
    assert found.values["left_out"] == {
        "in no split": 1,
        "quarantined (could not be read)": 2,
        "without a (certain) label": 1,
    }
    assert "Left out: 2 images quarantined" in found.table.to_markdown()


def test_class_absent_from_test_is_named(make_toy, tmp_path):
    def edit(columns):
        for row, split in enumerate(columns["split"]):
            if split == "test" and columns["label:class"][row] == "pneumonia":
                columns["label:class"][row] = "normal"

    toy = make_toy(tmp_path, edit=edit)
    small = QUICK.model_copy(update={"fractions": (100,)})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", small, device="cpu")
    assert "AUROC of class pneumonia is undefined (0 of 36" in found.table.to_markdown()
    [line] = rows_of(found, "raw backbone", 100)
    assert line["class_auroc"]["pneumonia"] is None


def test_missing_validation_split_is_refused_with_the_way_out(make_toy, tmp_path):
    def edit(columns):
        columns["split"] = ["train" if s == "validate" else s for s in columns["split"]]

    toy = make_toy(tmp_path, edit=edit)
    with pytest.raises(ManifestError, match="no labelled image with features in split `validate`"):
        finetune(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")


def test_validation_of_one_class_cannot_choose_by_auroc(make_toy, tmp_path):
    def edit(columns):
        for row, split in enumerate(columns["split"]):
            if split == "validate":
                columns["label:class"][row] = "normal"

    toy = make_toy(tmp_path, edit=edit)
    with pytest.raises(ManifestError, match="one class only, `normal`: AUROC cannot choose"):
        finetune(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")


def test_unknown_label_is_refused_with_the_known_ones(toy, tmp_path):
    config = QUICK.model_copy(update={"label": "clas"})
    with pytest.raises(UsageError, match="no label `clas`; did you mean `class`"):
        finetune(toy.images, toy.manifest, None, tmp_path, config, device="cpu")


def test_binary_findings_leave_uncertain_ones_out(make_toy, tmp_path):
    def edit(columns):
        kinds = columns.pop("label:class")
        values = np.array([1 if kind == "effusion" else 0 for kind in kinds], dtype=np.int8)
        values[:4] = -1
        columns["label:Effusion"] = values

    toy = make_toy(tmp_path, edit=edit)
    found = labelled_images(toy.images, toy.manifest, "Effusion")
    assert found.classes == ("Effusion", "no Effusion")
    assert found.left_out == {"without a (certain) label": 4}
    assert found.class_counts(np.arange(len(found.keys)))["Effusion"] == 38


def test_label_with_its_prefix_is_the_same_question():
    assert ProbeConfig(label="label:pneumonia") == ProbeConfig(label="pneumonia")


def test_class_numbers_follow_names_not_rows(make_toy, tmp_path):
    def edit(columns):
        names = {"effusion": "10", "normal": "2", "pneumonia": "Normal"}
        columns["label:class"] = [names[kind] for kind in columns["label:class"]]

    toy = make_toy(tmp_path, edit=edit)
    found = labelled_images(toy.images, toy.manifest, "class")
    assert found.classes == ("10", "2", "Normal")
    assert [found.classes[t] for t in found.targets[:6:2]] == ["10", "2", "Normal"]


def test_workspace_finds_the_features_that_the_run_reads(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path)
    make_run(tmp_path / "runs" / "first", toy)
    workspace = Workspace(tmp_path)
    workspace.use(manifest="toy", run="first")
    small = QUICK.model_copy(update={"fractions": (100,)})
    found = finetune_workspace(workspace, small, device="cpu")
    assert found.folder == tmp_path / "runs" / "first" / "finetune" / "toy-class-toy"
    assert json.loads(json.dumps(found.to_json()))["folder"] == str(found.folder)
    text = found.to_text()
    assert "macro AUROC %" in text
    assert "results.md" in text.splitlines()[-1]


def test_shots_take_the_place_of_shares(toy, tmp_path):
    config = QUICK.model_copy(update={"shots": 2, "subsets": 3, "seeds": 1})
    found = finetune(toy.images, toy.manifest, None, tmp_path, config, device="cpu")
    line = next(r for r in found.values["rows"] if r["method"] == "raw backbone")
    assert line["setting"] == {"labels": "2 shots", "images": "6"}
    assert (line["subsets"], line["runs"]) == (3, 3)
    listed = read_json(tmp_path / "subsets" / "subsets.json")["subsets"]
    assert [one["file"] for one in listed] == [f"train-2-shots-{i}.txt" for i in range(3)]
    assert len({one["hash"] for one in listed}) == 3
    assert listed[0]["classes"] == {"effusion": 2, "normal": 2, "pneumonia": 2}


def test_mlp_is_named_as_such_and_chooses_its_learning_rate(toy, run, tmp_path):
    changed = {"head": "mlp", "hidden": 32, "epochs": 10, "fractions": (100,), "seeds": 1}
    changed |= {"learning_rates": (1e-3, 1e-2), "poolings": ("mean",), "mlp_weight_decays": (0.1,)}
    config = QUICK.model_copy(update=changed)
    found = finetune(toy.images, toy.manifest, run, tmp_path, config, device="cpu")
    text = found.table.to_markdown()
    assert text.startswith("# MLP heads: toy")
    assert "Published probes are linear" in text
    [line] = rows_of(found, "raw backbone", 100)
    assert line["learning_rates"][0] in config.learning_rates
    assert "converged" not in line
    assert line["figures"]["accuracy"]["mean"] > 0.8


def test_validation_chooses_the_pooling(make_toy, tmp_path):
    toy = make_toy(tmp_path)
    small = QUICK.model_copy(update={"fractions": (100,), "seeds": 1})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", small, device="cpu")
    [line] = rows_of(found, "raw backbone", 100)
    assert line["poolings"][0] in ("mean", "both")  # the class token was drawn without the class
    text = found.table.to_markdown()
    assert "or first prefix token (the class token), or mean and class token" in text
    alone = small.model_copy(update={"poolings": ("prefix",)})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "prefix", alone, device="cpu")
    assert accuracy(found, "raw backbone", 100) < 0.6


def test_every_pair_of_rows_is_compared_on_the_same_draws(results):
    pairs = results.values["differences"]
    of_all = [one for one in pairs if one["labels"] == "100 %"]
    assert [(one["first"], one["second"]) for one in of_all] == [
        ("raw backbone", "majority class"),
        ("Adaptor", "majority class"),
        ("Adaptor", "raw backbone"),
    ]
    [gap] = rows_of(results, "Adaptor minus raw backbone", 100)
    assert of_all[2]["figures"]["auroc"] == gap["figures"]["auroc"]
    first = of_all[0]["figures"]["accuracy"]
    expected = accuracy(results, "raw backbone", 100) - accuracy(results, "majority class", 100)
    assert first["mean"] == pytest.approx(expected, abs=2e-6)
    assert first["low"] < first["mean"] < first["high"]


def test_published_figures_stand_beside_real_data_alone(toy, make_toy, tmp_path):
    small = QUICK.model_copy(update={"fractions": (1, 100), "subsets": 1, "seeds": 1})
    covidx = {"dataset": "covidx"}
    for is_real in (True, False):
        meta = toy.manifest.meta.model_copy(update={**covidx, "synthetic": not is_real})
        manifest = dataclasses.replace(toy.manifest, meta=meta)
        out = tmp_path / str(is_real)
        found = finetune(toy.images, manifest, None, out, small, device="cpu")
        published = [line for line in found.values["rows"] if line.get("published")]
        text = found.table.to_markdown()
        if is_real:
            [mgca] = [r for r in published if r["method"] == "MGCA ViT-B/16" and r["percent"] == 1]
            assert mgca["figures"]["accuracy"]["mean"] == pytest.approx(0.748)
            assert "other protocol; table of MGCA" in mgca["remark"]
            assert "Published rows follow another protocol than ours" in text
        else:
            assert not published
            assert "none stand beside this synthetic stand-in" in text


def test_note_about_published_rows_stands_beside_rows_alone(make_toy, tmp_path):
    toy = make_toy(tmp_path)
    meta = toy.manifest.meta.model_copy(update={"dataset": "covidx", "synthetic": False})
    manifest = dataclasses.replace(toy.manifest, meta=meta)
    small = QUICK.model_copy(update={"subsets": 1, "seeds": 1, "draws": 100})
    for number, (changed, is_noted) in enumerate(
        [({"fractions": (20,)}, False), ({"shots": 2}, False), ({"fractions": (20, 1)}, True)]
    ):
        config = small.model_copy(update=changed)
        found = finetune(toy.images, manifest, None, tmp_path / str(number), config, device="cpu")
        has_rows = any(line.get("published") for line in found.values["rows"])
        assert has_rows == is_noted
        assert ("Published rows follow" in found.table.to_markdown()) == is_noted


def test_cache_is_read_once_for_all_probes(toy, run, tmp_path, monkeypatch):
    read = []

    def spy(features, rows, batch_size, **reading):
        read.extend(rows.tolist())
        return iterate_rows(features, rows, batch_size, **reading)

    monkeypatch.setattr(vectors, "iterate_rows", spy)
    config = QUICK.model_copy(update={"fractions": (10, 50, 100), "draws": 100})
    finetune(toy.images, toy.manifest, run, tmp_path, config, device="cpu")
    assert sorted(read) == list(range(toy.images.num_rows))
