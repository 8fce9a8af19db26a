"""Labelled images and their training subsets."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from featcache.config import read_json
from featcache.errors import ManifestError
from featcache.heads.labels import (
    LabelledImages,
    labelled_images,
    training_subsets,
    write_subsets,
)


def labelled(counts, *, classes=("common", "rare", "single", "absent"), per_patient=1):
    """Training images by class count, then one image of each class in validate and in test."""
    targets = np.repeat(np.arange(len(counts)), counts)
    train = len(targets)
    rest = np.arange(len(classes))
    targets = np.concatenate([targets, rest, rest])
    keys = [f"k{i:04d}" for i in range(len(targets))]
    return LabelledImages(
        keys=tuple(keys),
        rows=np.arange(len(keys)),
        subject_ids=tuple(f"p{i // per_patient}" for i in range(len(keys))),
        splits=("train",) * train + ("validate",) * len(rest) + ("test",) * len(rest),
        sources=("clinic",) * len(keys),
        targets=targets.astype(np.int64),
        classes=tuple(classes),
        left_out={},
    )


@pytest.mark.parametrize("percent", [1, 10])
def test_class_with_a_single_image_is_in_every_subset(percent):
    images = labelled([250, 49, 1])
    for subset in training_subsets(images, percent, count=3, seed=0):
        counts = images.class_counts(subset.members)
        assert counts["single"] == 1
        assert counts["rare"] >= 1
        assert counts["common"] == pytest.approx(250 * percent / 100, abs=1)
        assert subset.missing == ("absent",)


def test_subsets_hold_training_images_only_and_differ():
    images = labelled([100, 100, 20])
    subsets = training_subsets(images, 10, count=3, seed=5)
    assert len({subset.hash for subset in subsets}) == 3
    for subset in subsets:
        assert {images.splits[number] for number in subset.members} == {"train"}


def test_one_percent_lies_inside_ten_percent_of_the_same_seed():
    images = labelled([300, 200, 100])
    small = training_subsets(images, 1, count=2, seed=3)
    large = training_subsets(images, 10, count=2, seed=3)
    for inner, outer in zip(small, large, strict=True):
        assert set(inner.members) < set(outer.members)


def test_patients_are_taken_whole():
    images = labelled([120, 90, 60], per_patient=3)
    [subset, _] = training_subsets(images, 10, count=2, seed=0)
    chosen = {images.subject_ids[number] for number in subset.members}
    whole = [number for number, name in enumerate(images.subject_ids) if name in chosen]
    assert set(whole) == set(subset.members)


def test_all_labels_are_one_subset(tmp_path):
    images = labelled([30, 20, 10])
    [subset] = training_subsets(images, 100, count=3, seed=0)
    assert len(subset.members) == 60
    assert subset.hash == subset.parent_hash
    [listed] = write_subsets(tmp_path, images, [subset])
    assert listed["missing_classes"] == ["absent"]
    assert listed["patients"] == 60
    assert read_json(tmp_path / "subsets.json")["subsets"] == [listed]
    assert (tmp_path / "train-100-percent-0.txt").read_text().splitlines() == sorted(
        images.keys[:60]
    )


def test_patient_in_two_splits_is_refused_with_the_number_alone(toy):
    table = toy.manifest.images
    subjects = table["subject_id"].to_pylist()
    test_row = table["split"].to_pylist().index("test")
    subjects[test_row] = subjects[0]
    place = table.column_names.index("subject_id")
    mixed = table.set_column(place, "subject_id", pa.array(subjects))
    manifest = dataclasses.replace(toy.manifest, images=mixed)
    with pytest.raises(
        ManifestError, match=r"1 patient\(s\) have images in more than one split"
    ) as e:
        labelled_images(toy.images, manifest, "class")
    assert subjects[0] not in str(e.value)


def test_image_without_features_is_counted(toy):
    table = toy.manifest.images
    keys = table["key"].to_pylist()
    keys[0] = "new-image"
    place = table.column_names.index("key")
    manifest = dataclasses.replace(
        toy.manifest, images=table.set_column(place, "key", pa.array(keys))
    )
    found = labelled_images(toy.images, manifest, "class")
    assert found.left_out == {"not in the feature set": 1}
    assert list(found.keys) == sorted(keys)[:-1]
    assert [toy.images.keys[row] for row in found.rows] == list(found.keys)


def test_single_class_is_refused(make_toy, tmp_path):
    def edit(columns):
        columns["label:class"] = ["normal"] * len(columns["key"])

    toy = make_toy(tmp_path, patients=20, edit=edit)
    with pytest.raises(ManifestError, match="all labelled images are of one class, `normal`"):
        labelled_images(toy.images, toy.manifest, "class")
