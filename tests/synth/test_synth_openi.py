"""The synthetic Open-I: one set of pictures and reports in three forms."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from featcache.config import read_json
from featcache.encoders.decode import Preprocessing, decode_image
from featcache.synth.openi import SIZES, plan
from featcache.synth.registry import synthesize

PLAIN = Preprocessing(image_size=(96, 96), mean=(0.0,), std=(1.0,))


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("synth")
    return {
        form: synthesize("openi", root / form, switches=() if form == "dicom" else [form]).path
        for form in ("dicom", "png", "kaggle")
    }


@pytest.fixture(scope="module")
def truth(trees) -> dict:
    return read_json(trees["dicom"].with_name("dicom.truth.json"))["reports"]


def dicom_files(tree: Path) -> dict[str, Path]:
    return {f"CXR{path.stem}": path for path in tree.rglob("*.dcm")}


def test_headers_say_what_the_truth_says(trees, truth):
    files, bits = dicom_files(trees["dicom"]), Counter()
    for report in truth.values():
        for name, image in report["images"].items():
            if "missing" in image["odd"]:
                assert name not in files
                continue
            header = pydicom.dcmread(files[name], stop_before_pixels=True)
            assert (header.ViewPosition or "") == image["view"]
            assert header.PhotometricInterpretation in image["odd"]
            assert header.BitsAllocated == 16
            bits[header.BitsStored] += 1
    assert set(bits) == {12, 15}
    assert bits[12] > 2 * bits[15]


def test_an_inverted_file_shows_the_same_picture_as_the_png(trees, truth):
    kinds = Counter()
    for name, path in sorted(dicom_files(trees["dicom"]).items())[:24]:
        if not (trees["png"] / f"{name}.png").exists():
            continue
        grey = decode_image(path, PLAIN).astype(float)
        want = decode_image(trees["png"] / f"{name}.png", PLAIN).astype(float)
        if np.ptp(want) == 0:
            continue
        assert np.corrcoef(grey.ravel(), want.ravel())[0, 1] > 0.98
        kinds[pydicom.dcmread(path, stop_before_pixels=True).PhotometricInterpretation] += 1
    assert set(kinds) == {"MONOCHROME1", "MONOCHROME2"}


def test_reports_have_all_four_sections_and_their_images(trees, truth):
    for uid, report in truth.items():
        path = trees["dicom"] / "ecgen-radiology" / f"{uid.removeprefix('CXR')}.xml"
        if "damaged file" in report["odd"]:
            with pytest.raises(ElementTree.ParseError):
                ElementTree.parse(path)
            continue
        tree = ElementTree.parse(path)
        sections = {part.get("Label"): part.text or "" for part in tree.iter("AbstractText")}
        assert list(sections) == ["COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION"]
        odd = set(report["odd"])
        assert bool(sections["FINDINGS"]) == (not odd & {"no findings", "neither section"})
        assert bool(sections["IMPRESSION"]) == (not odd & {"no impression", "neither section"})
        if "removed words" in odd and not odd & {"identical text", "identical letters"}:
            assert "XXXX" in sections["FINDINGS"] or not sections["FINDINGS"]
        assert [image.get("id") for image in tree.iter("parentImage")] == list(report["images"])


def test_the_repack_names_its_files_and_leaves_out_reports_without_an_image(trees, truth):
    with (trees["kaggle"] / "indiana_reports.csv").open(newline="") as file:
        reports = list(csv.DictReader(file))
    with (trees["kaggle"] / "indiana_projections.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert {f"CXR{row['uid']}" for row in reports} == {
        uid for uid, report in truth.items() if report["images"]
    }
    for row in images:
        assert re.fullmatch(r"\d+_IM-\d{4}-\d{4}\.dcm\.png", row["filename"])
        image = truth[f"CXR{row['uid']}"]["images"][
            "CXR" + row["filename"].removesuffix(".dcm.png")
        ]
        assert row["projection"] == ("Frontal" if image["is_frontal"] else "Lateral")
        there = (trees["kaggle"] / "images" / "images_normalized" / row["filename"]).exists()
        assert there == ("missing" not in image["odd"])
    assert not list(trees["kaggle"].rglob("*.xml"))


def test_findings_are_seen_in_the_pictures(trees, truth):
    """A heart that is said to be large is broader on average than one that is not."""
    middle = {0: [], 1: []}
    for report in truth.values():
        label = int(report["said"].get("Cardiomegaly") == 1)
        for name, image in report["images"].items():
            path = trees["png"] / f"{name}.png"
            if image["is_frontal"] and path.exists():
                grey = np.asarray(Image.open(path).resize((64, 64)), dtype=float)
                grey = (grey - grey.mean()) / grey.std()
                middle[label].append(grey[34:46, 40:46].mean())
    assert min(map(len, middle.values())) > 4
    assert np.mean(middle[1]) > np.mean(middle[0]) + 0.1


def test_rates_of_a_larger_tree():
    plans = plan(SIZES["small"], 0)
    counts = Counter(len(one.pictures) for one in plans)
    assert counts[2] > 700
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    views = Counter(picture.view for one in plans for picture in one.pictures)
    assert 0.3 < views[""] / sum(views.values()) < 0.4
    odd = Counter(name for one in plans for name in one.odd)
    assert odd["no findings"] == 130
    assert 0.3 < odd["removed words"] / len(plans) < 0.5
    numbers = [one.number for one in plans]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] - numbers[0] > len(numbers)  # gaps
