"""What people report about probes and their figures; masks and Dice are `segment`'s."""

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
from heads.conftest import CLASSES, build_run, build_toy

from featcache.cli import main
from featcache.config import read_json
from featcache.errors import ManifestError
from featcache.heads.answers import Answers
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.judge import Judge
from featcache.heads.labels import labelled_images, training_subsets, write_subsets
from featcache.heads.probe import train_probes
from featcache.manifest.table import write_manifest
from featcache.workspace import Workspace

QUICK = ProbeConfig(
    fractions=(1, 10), subsets=2, seeds=1, weight_decays=(0.1,), draws=200, poolings=("mean",)
)


def rows_of(results, method):
    return [line for line in results.values["rows"] if line["method"] == method]


# The AUROC of a label that never occurs


def test_label_absent_from_test_is_undefined_and_leaves_the_macro_mean_alone():
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]] * 4, dtype=np.int64)
    perfect = targets.astype(float)[None]
    judge = Judge(targets, [f"p{i}" for i in range(16)], ("a", "b", "c"), 200, seed=0)
    judged = judge.judge(Answers(perfect))
    assert judged.figures["auroc"].mean == 1.0
    assert judged.details["class_auroc"] == {"a": 1.0, "b": 1.0, "c": None}
    assert judge.undefined_classes() == {"c": (0, 16)}


def test_table_prints_undefined_with_the_counts(tmp_path):
    def edit(columns):
        kinds = columns["label:class"]
        for name in CLASSES:
            there = [int(kind == name) for kind in kinds]
            if name == "pneumonia":
                split = columns["split"]
                there = [0 if split[i] == "test" else one for i, one in enumerate(there)]
            columns[f"label:{name}"] = pa.array(there, pa.int8())

    toy = build_toy(tmp_path, edit=edit)
    config = QUICK.model_copy(update={"findings": "all", "fractions": (100,)})
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", config, device="cpu")
    line = rows_of(found, "raw backbone")
    assert line[0]["setting"]["finding"] == "mean of 2"
    assert line[0]["figures"]["auroc"]["mean"] > 0.9
    assert line[3]["remark"] == "undefined (0 of 36 images)"
    assert "| undefined |" in found.table.to_markdown()


# Class names sorted as text


def test_names_stand_for_themselves_whatever_their_order(tmp_path):
    names = {"effusion": "2", "normal": "10", "pneumonia": "Normal"}

    def edit(columns):
        columns["label:class"] = [names[kind] for kind in columns["label:class"]]

    toy = build_toy(tmp_path, edit=edit)
    rows = toy.manifest.images
    turned = write_manifest(
        tmp_path / "manifests" / "turned",
        rows.take(np.arange(rows.num_rows)[::-1]),
        dataset="spreadsheet",
        image_root=tmp_path,
    )
    config = QUICK.model_copy(update={"fractions": (100,)})
    first, second = (
        finetune(toy.images, one, None, tmp_path / "out" / one.name, config, device="cpu")
        for one in (toy.manifest, turned)
    )
    assert first.values["classes"] == second.values["classes"] == ["10", "2", "Normal"]
    [line], [other] = (rows_of(one, "raw backbone") for one in (first, second))
    assert line["figures"] == other["figures"]
    assert line["confusion"] == other["confusion"]
    assert list(line["confusion"]) == ["10", "2", "Normal"]
    for name, row in line["confusion"].items():
        assert max(row, key=row.get) == name


# One patient in all three splits


def test_patient_in_two_splits_is_refused_with_the_number_and_no_id(tmp_path):
    def edit(columns):
        columns["subject_id"][columns["split"].index("test")] = columns["subject_id"][0]

    with pytest.raises(ManifestError, match="1 patients are in more than one split") as caught:
        build_toy(tmp_path / "bad", edit=edit)
    assert "pat-" not in str(caught.value)

    toy = build_toy(tmp_path / "good")  # a manifest that was changed behind the checks
    subjects = toy.manifest.images.column("subject_id").to_pylist()
    subjects[toy.manifest.splits().index("test")] = subjects[0]
    place = toy.manifest.images.column_names.index("subject_id")
    images = toy.manifest.images.set_column(place, "subject_id", pa.array(subjects))
    manifest = dataclasses.replace(toy.manifest, images=images)
    with pytest.raises(ManifestError, match=r"1 patient\(s\) have images in more") as caught:
        finetune(toy.images, manifest, None, tmp_path / "out", QUICK, device="cpu")
    assert "pat-" not in str(caught.value)


def test_ids_that_differ_as_text_are_different_patients(tmp_path):
    def edit(columns):
        for place, name in zip(("train", "validate", "test"), ("23", "023", "p23"), strict=True):
            columns["subject_id"][columns["split"].index(place)] = name

    toy = build_toy(tmp_path, edit=edit)
    labelled = labelled_images(toy.images, toy.manifest, "class")
    assert {"23", "023", "p23"} <= set(labelled.subject_ids)


# Bootstrap draws without positives


def answers_of(positives: int) -> tuple[Judge, Answers]:
    targets = np.zeros(60, dtype=np.int64)
    targets[:positives] = 1
    scores = np.random.default_rng(0).random((60, 1)) + 0.3 * targets[:, None]
    scores = np.c_[1.3 - scores, scores] / 1.3
    judge = Judge(targets, [f"p{i}" for i in range(60)], ("absent", "there"), 1000, seed=0)
    return judge, Answers(scores[None])


def test_draws_without_a_positive_are_left_out_and_counted():
    judge, answers = answers_of(3)
    figure = judge.judge(answers).figures["auroc"]
    # (1 - 3/60)^60 = 4.6 % of the draws
    assert figure.interval.undefined == pytest.approx(46, abs=20)
    assert figure.interval.draws == 1000
    assert figure.interval.low <= figure.mean <= figure.interval.high


@pytest.mark.parametrize("positives", [0, 1])
def test_no_positive_or_one_gives_no_interval(positives):
    judge, answers = answers_of(positives)
    figure = judge.judge(answers).figures["auroc"]
    assert figure.interval is None
    assert np.isnan(figure.mean) == (positives == 0)
    assert bool(judge.rare_classes()) == (positives == 1)
    assert bool(judge.undefined_classes()) == (positives == 0)


# A stratified subset with a class of one


def test_class_of_one_is_in_every_subset_and_the_lists_are_hashed(tmp_path):
    def edit(columns):
        kinds, splits = columns["label:class"], np.array(columns["split"])
        train = np.flatnonzero(splits == "train")
        for place, row in enumerate(train):
            kinds[row] = "pneumonia" if place == 0 else ("normal", "effusion")[place % 6 == 1]
        columns["subject_id"] = [f"one-{i}" for i in range(len(kinds))]

    toy = build_toy(tmp_path, patients=150, edit=edit)
    labelled = labelled_images(toy.images, toy.manifest, "class")
    assert labelled.class_counts(labelled.of("train"))["pneumonia"] == 1
    subsets = [s for p in (1, 10) for s in training_subsets(labelled, p, count=2, seed=0)]
    assert all(labelled.class_counts(one.members)["pneumonia"] == 1 for one in subsets)
    assert all(set(one.members) <= set(labelled.of("train")) for one in subsets)
    for one in write_subsets(tmp_path / "lists", labelled, subsets):
        content = (tmp_path / "lists" / one["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest().startswith(one["hash"])
        assert one["parent_hash"] == subsets[0].parent_hash != one["hash"]


def test_class_missing_from_training_is_said_with_the_result(tmp_path):
    def edit(columns):
        for row, split in enumerate(columns["split"]):
            if split == "train" and columns["label:class"][row] == "pneumonia":
                columns["label:class"][row] = "normal"

    toy = build_toy(tmp_path, edit=edit)
    found = finetune(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")
    text = found.table.to_markdown()
    assert "1 %, subset 0, 1: no training image of pneumonia" in text
    assert "10 %, subset 0, 1: no training image of pneumonia" in text
    [listed, *_] = read_json(tmp_path / "out" / "subsets" / "subsets.json")["subsets"]
    assert listed["missing_classes"] == ["pneumonia"]


# A probe that stops at the iteration limit


def test_probe_on_features_of_very_different_scale_converges():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(400, 768)).astype(np.float32)
    vectors[:, 7] *= 200
    targets = generator.integers(0, 2, 400)
    probes = train_probes(
        vectors, targets, [np.arange(400)], num_classes=2, decays=(1e-3, 1.0), seeds=(0,)
    )
    assert probes.converged.tolist() == [True, True]


def test_unconverged_probes_are_marked_in_the_table(tmp_path):
    toy = build_toy(tmp_path)
    run = build_run(tmp_path / "run", toy)
    config = QUICK.model_copy(update={"max_steps": 1, "fractions": (100,)})
    found = finetune(toy.images, toy.manifest, run, tmp_path / "out", config, device="cpu")
    [line] = rows_of(found, "raw backbone")
    assert line["converged"] == [False]
    assert line["remark"] == "1 of 1 probes not converged"
    assert "not converged" in found.table.to_markdown()


# The split that everything is chosen on must be able to choose


def test_blank_labels_are_no_negatives_unless_it_is_said(tmp_path, capsys):
    def edit(columns):
        there = [1 if kind == "effusion" else None for kind in columns["label:class"]]
        columns["label:Effusion"] = pa.array(there, pa.int8())

    toy = build_toy(tmp_path, edit=edit)
    with pytest.raises(ManifestError, match="all labelled images are of one class"):
        labelled_images(toy.images, toy.manifest, "Effusion")
    root = ["--root", str(tmp_path), "--quiet", "--json"]
    Workspace(tmp_path).use(manifest="toy", image="toy")
    settings = ["label=Effusion", "blank=negative", "fractions=[100]", "draws=100", "seeds=1"]
    assert main(["finetune", *root, *(x for s in settings for x in ("--set", s))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == ["Effusion", "no Effusion"]
    assert result["left_out"] == {}
