"""The synthetic RSNA challenge: its tables, its files, and whether one can learn from them."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featcache.config import read_json
from featcache.synth import rsna
from featcache.synth.registry import synthesize


@pytest.fixture(scope="module")
def tree(rsna_tree) -> Path:
    return rsna_tree


@pytest.fixture(scope="module")
def truth(tree) -> dict:
    return read_json(tree.with_name("tree.truth.json"))["images"]


def table(tree, name):
    with (tree / name).open(newline="") as file:
        return list(csv.DictReader(file))


def path_of(tree, truth, key):
    return tree / rsna.FOLDERS[truth[key]["folder"]] / f"{key}.dcm"


def odd(truth, name):
    return [key for key, one in truth.items() if name in one["odd"]]


def whole(truth, folder="train"):
    return [key for key, one in truth.items() if one["folder"] == folder and not one["odd"]]


def test_label_table_has_a_row_for_each_box_and_blanks_for_negatives(tree, truth):
    text = (tree / rsna.LABELS).read_bytes()
    assert text.startswith(b"patientId,x,y,width,height,Target\n")
    assert b"\r" not in text
    assert b",,,,,0\n" in text
    rows = table(tree, rsna.LABELS)
    boxes = {}
    for row in rows:
        cells = [row[name] for name in ("x", "y", "width", "height")]
        assert all(cell == "" or cell.endswith(".0") for cell in cells)
        box = [[int(float(cell)) for cell in cells]] if cells[0] else []
        assert row["Target"] == str(len(box))
        boxes.setdefault(row["patientId"], []).extend(box)
    listed = {key: one["boxes"] for key, one in truth.items()
              if one["folder"] == "train" and "file without a row" not in one["odd"]}  # fmt: skip
    assert boxes == listed
    assert set(Counter(len(one) for one in boxes.values())) == {0, 1, 2, 3, 4}
    keys = list(dict.fromkeys(row["patientId"] for row in rows))
    assert keys != sorted(keys)
    for key, one in listed.items():
        for left, top, width, height in one:
            assert 0 <= left < left + width <= 128, key
            assert 0 <= top < top + height <= 128, key


def test_class_table_repeats_as_often_and_agrees(tree, truth):
    rows = table(tree, rsna.CLASS_INFO)
    labels = table(tree, rsna.LABELS)
    assert [row["patientId"] for row in rows] == [row["patientId"] for row in labels]
    assert {row["class"] for row in rows} == set(rsna.CLASSES)
    for row, label in zip(rows, labels, strict=True):
        assert row["class"] == truth[row["patientId"]]["class"]
        assert (row["class"] == "Lung Opacity") == (label["Target"] == "1")


def test_shares_of_classes_are_those_of_the_published_set(tree):
    images = {row["patientId"]: row["class"] for row in table(tree, rsna.CLASS_INFO)}
    shares = Counter(images.values())
    assert shares["Lung Opacity"] / len(images) == pytest.approx(0.225, abs=0.03)
    assert shares["Normal"] / len(images) == pytest.approx(0.332, abs=0.03)


def test_files_are_secondary_captures_in_jpeg_with_the_odd_header(tree, truth):
    views = Counter()
    for key in whole(truth)[:40]:
        dataset = pydicom.dcmread(path_of(tree, truth, key))
        assert dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
        assert dataset.SOPClassUID == SecondaryCaptureImageStorage
        assert dataset.PatientID == dataset.PatientName == key
        assert dataset.PatientAge.isdigit()
        assert (dataset.Modality, dataset.ConversionType) == ("CR", "WSD")
        assert (dataset.BitsStored, dataset.PhotometricInterpretation) == (8, "MONOCHROME2")
        assert dataset.SeriesDescription == f"view: {dataset.ViewPosition}"
        assert dataset.pixel_array.shape == (dataset.Rows, dataset.Columns) == (128, 128)
        views[dataset.ViewPosition] += 1
    assert set(views) == {"PA", "AP"}


def test_every_odd_file_is_what_the_truth_says(tree, truth):
    assert all(odd(truth, name) for name, _ in rsna._ODD)
    for key in odd(truth, "missing file"):
        assert not path_of(tree, truth, key).exists()
    for key in odd(truth, "zero bytes"):
        assert path_of(tree, truth, key).stat().st_size == 0
    for key in odd(truth, "PNG named dcm"):
        with pytest.raises(InvalidDicomError):
            pydicom.dcmread(path_of(tree, truth, key))
        with Image.open(path_of(tree, truth, key)) as image:
            assert image.format == "PNG"
    for key in odd(truth, "truncated"):
        path = path_of(tree, truth, key)
        assert pydicom.dcmread(path, stop_before_pixels=True).PatientID == key
        with pytest.warns(UserWarning, match="End of file"), pytest.raises(AttributeError):
            _ = pydicom.dcmread(path).pixel_array
    for key in odd(truth, "copy of another file"):
        source = path_of(tree, truth, truth[key]["copy_of"])
        assert path_of(tree, truth, key).read_bytes() == source.read_bytes()
        assert truth[truth[key]["copy_of"]]["class"] == truth[key]["class"]
    for key in odd(truth, "no view"):
        dataset = pydicom.dcmread(path_of(tree, truth, key))
        assert dataset.ViewPosition == dataset.SeriesDescription == ""
    for key in odd(truth, "age over 120"):
        assert 120 < int(pydicom.dcmread(path_of(tree, truth, key)).PatientAge) <= 155
    for key in odd(truth, "black"):
        assert pydicom.dcmread(path_of(tree, truth, key)).pixel_array.max() == 0
    rows = {row["patientId"] for row in table(tree, rsna.LABELS)}
    for key in odd(truth, "file without a row"):
        assert path_of(tree, truth, key).is_file()
        assert key not in rows


def test_the_test_folder_has_no_labels(tree, truth):
    tests = {path.stem for path in (tree / rsna.FOLDERS["test"]).iterdir()}
    assert tests == {key for key, one in truth.items() if one["folder"] == "test"}
    assert len(tests) == 24
    assert {row["patientId"] for row in table(tree, rsna.SUBMISSION)} == tests
    assert not tests & {row["patientId"] for row in table(tree, rsna.LABELS)}


def test_patients_are_hidden_and_the_mapping_reveals_them(tree, truth, tmp_path):
    entries = json.loads((tree / rsna.MAPPING).read_text())
    names = {entry["subset_img_id"]: entry["img_id"] for entry in entries}
    alone = {*odd(truth, "not in the mapping"), *odd(truth, "file without a row")}
    assert names == {key: one["nih_name"] for key, one in truth.items() if key not in alone}
    assert len(set(names.values())) == len(names)
    patients = Counter(name[:8] for name in names.values())
    assert max(patients.values()) >= 8
    assert len(patients) < len(names) / 2
    for key, name in names.items():
        others = {truth[k]["person"] for k, n in names.items() if n[:8] == name[:8]}
        assert others == {truth[key]["person"]}
    other = synthesize("rsna", tmp_path / "tree", switches=["no-mapping"]).path
    assert not (other / rsna.MAPPING).exists()
    assert (other / rsna.LABELS).read_bytes() == (tree / rsna.LABELS).read_bytes()


def pixels(tree, truth, key):
    return pydicom.dcmread(path_of(tree, truth, key)).pixel_array


def test_an_opacity_is_brighter_inside_its_box_than_the_same_place_is_in_others(tree, truth):
    normal = [key for key in whole(truth) if truth[key]["class"] == "Normal"]
    usual = np.mean([pixels(tree, truth, key) for key in normal], axis=0)
    usual /= usual.mean()
    brighter = []
    for key in whole(truth):
        picture = pixels(tree, truth, key)
        for left, top, width, height in truth[key]["boxes"]:
            box = (slice(top, top + height), slice(left, left + width))
            brighter.append(picture[box].mean() / picture.mean() > usual[box].mean())
    assert len(brighter) > 60
    assert np.mean(brighter) > 0.8


def test_pneumonia_can_be_learnt_from_pixels_but_not_perfectly(tree, truth):
    keys = whole(truth)
    features = []
    for key in keys:
        small = Image.fromarray(pixels(tree, truth, key)).resize((32, 32))
        features.append(np.asarray(small, np.float32).ravel() / 255)
    labels = np.array([bool(truth[key]["boxes"]) for key in keys])
    half = len(keys) // 2
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    classifier.fit(features[:half], labels[:half])
    score = roc_auc_score(labels[half:], classifier.decision_function(features[half:]))
    assert 0.65 < score < 0.99
