"""The synthetic CheXpert, ChestX-ray14 and MIMIC-CXR: their tables and files as published."""

import csv
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from featcache.config import read_json
from featcache.encoders.decode import Preprocessing, decode_image
from featcache.errors import ImageError
from featcache.synth import chexpert, nih
from featcache.synth.mimic_cxr import encode_picture
from featcache.synth.mimic_plan import PICTURES, SIZES, plan
from featcache.synth.registry import synthesize

PLAIN = Preprocessing(image_size=(64, 64), mean=(0.0,), std=(1.0,))


@pytest.fixture(scope="module")
def trees(draw_tree) -> dict[str, Path]:
    return {name: draw_tree(name).path for name in ("chexpert", "nih", "mimic-cxr")}


def test_chexpert_has_the_published_columns_numbers_and_paths(trees):
    with (trees["chexpert"] / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:5] == ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"]
    assert rows[0][5:] == list(chexpert.LABELS)
    path = r"CheXpert-v1.0-small/train/patient9\d{4}/study\d/view\d_(frontal|lateral).jpg"
    assert all(re.fullmatch(path, row[0]) for row in rows[1:])
    assert {cell for row in rows[1:] for cell in row[5:]} == {"", "0.0", "1.0", "-1.0"}
    assert {row[3]: row[4] for row in rows[1:]}["Lateral"] == ""
    assert ("Unknown", "0") in {(row[1], row[2]) for row in rows[1:]}
    no_finding = {row[5] for row in rows[1:]}
    assert no_finding == {"", "1.0"}


def test_nih_has_the_published_header_and_lists(trees):
    lines = (trees["nih"] / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    names = next(csv.reader(io.StringIO(lines[0])))
    assert len(names) == 11
    assert names[7:] == ["OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"]
    lists = {
        name: (trees["nih"] / f"{name}_list.txt").read_text().split("\n")
        for name in ("train_val", "test")
    }
    listed = lists["train_val"] + lists["test"]
    assert sorted(listed) == sorted(line.split(",")[0] for line in lines[1:])
    assert not {n[:8] for n in lists["train_val"]} & {n[:8] for n in lists["test"]}
    labels = {part for line in lines[1:] for part in line.split(",")[1].split("|")}
    assert labels <= {*nih.LABELS, "No Finding"}
    assert any("|" in line.split(",")[1] for line in lines[1:])


def test_the_table_of_2017_has_a_comma_too_many(tmp_path):
    tree = synthesize("nih", tmp_path / "t", switches=["table-2017"]).path
    lines = (tree / "Data_Entry_2017.csv").read_text().splitlines()
    assert all(line.endswith(",") for line in lines)
    assert ",Patient Gender," in lines[0]


def test_patients_have_several_images_and_pictures_of_their_own(trees):
    for name, pattern in (("chexpert", "*.jpg"), ("nih", "*.png")):
        paths = sorted(trees[name].rglob(pattern))
        people = Counter(re.search(r"patient\d+|\d{8}", str(path))[0] for path in paths)
        assert max(people.values()) >= 3
        pictures = [Image.open(io.BytesIO(path.read_bytes())) for path in paths]
        is_square = {picture.height == picture.width for picture in pictures}
        assert is_square == ({True} if name == "nih" else {True, False})
        assert len({picture.size for picture in pictures}) > 25
        assert {picture.mode for picture in pictures} == {"L"}


def test_dicom_files_of_mimic_are_what_the_plan_says(trees):
    truth = read_json(trees["mimic-cxr"].with_name("tree.truth.json"))["images"]
    files = {path.stem: path for path in trees["mimic-cxr"].rglob("*.dcm")}
    odd = Counter(name for image in truth.values() for name in image["odd"])
    assert set(odd) >= {name for name, _ in PICTURES} - {"RGB", "EXIF rotated", "border", "marker"}
    kinds = Counter()
    for name, image in truth.items():
        if "missing" in image["odd"]:
            assert name not in files
        elif {"zero byte", "HTML instead of JPEG", "truncated"} & set(image["odd"]):
            with pytest.raises(ImageError):
                decode_image(files[name], PLAIN)
        else:
            header = pydicom.dcmread(files[name], stop_before_pixels=True)
            assert (header.ViewPosition or "") == image["view"]
            assert header.BitsStored == 12
            kinds[header.PhotometricInterpretation] += 1
    assert min(kinds["MONOCHROME1"], kinds["MONOCHROME2"]) > 20


def test_equal_pictures_are_equal_files_in_dicom_too():
    studies = plan(SIZES["tiny"], 0, ())
    images = {image.dicom_id: image for study in studies for image in study.images}
    [copy] = [one for one in images.values() if "byte-identical across patients" in one.odd]
    original = images[copy.picture.name]
    made = [encode_picture(one.picture, "PA", 0) for one in (copy, original)]
    assert made[0] == made[1]
    assert np.frombuffer(made[0], np.uint8).size > 10_000


def test_boxes_of_nih_have_the_published_header_and_lie_around_what_was_drawn(trees):
    lines = (trees["nih"] / "BBox_List_2017.csv").read_text().splitlines()
    assert lines[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    truth = read_json(trees["nih"].with_name("tree.truth.json"))
    rows = [line.split(",") for line in lines[1:]]
    assert {row[1] for row in rows} == {*nih._BOXED.values()} - {"Cardiomegaly"}  # has no place
    for name, label, *numbers in rows:
        finding = {"Infiltrate": "Infiltration"}.get(label, label)
        left, top, width, height = map(float, numbers)
        assert finding in truth["images"][name]["findings"]
        assert min(left, top, width, height) >= 0
        assert max(left + width, top + height) <= 1024.001
        assert truth["boxes"][name][finding] == [left, top, width, height]
    assert {truth["images"][row[0]]["is_test"] for row in rows} == {True, False}
