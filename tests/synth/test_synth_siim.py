"""The synthetic SIIM challenge: its table in two spellings, its files, and its masks."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGBaseline8Bit

from featcache.config import read_json
from featcache.manifest.masks import decode_mask
from featcache.synth import siim
from featcache.synth.registry import synthesize

UID = r"1\.2\.276\.0\.7230010\.3\.1\.{level}\.9999999\.\d+\.\d+\.[1-9]\d*"


@pytest.fixture(scope="module")
def tree(siim_tree) -> Path:
    return siim_tree


@pytest.fixture(scope="module")
def truth(tree) -> dict:
    return read_json(tree.with_name("tree.truth.json"))["images"]


def table(tree) -> dict[str, list[str]]:
    """Cells of each image, in order."""
    cells = defaultdict(list)
    for line in (tree / siim.TABLE).read_text().splitlines()[1:]:
        key, cell = line.split(",")
        cells[key].append(cell)
    return cells


def decode(cell: str, side: int) -> np.ndarray:
    """One cell, run by run."""
    flat, at = np.zeros(side * side, bool), 0
    numbers = [int(number) for number in cell.split()]
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        assert length > 0
        at += gap
        flat[at : at + length] = True
        at += length
    assert at <= flat.size
    return flat.reshape(side, side).T


def odd(truth, name):
    return [key for key, one in truth.items() if name in one["odd"]]


def test_the_first_release_has_blanks_and_the_later_one_has_none(tree, tmp_path):
    text = (tree / siim.TABLE).read_text()
    assert text.startswith("ImageId, EncodedPixels\n")
    lines = text.splitlines()[1:]
    assert all(re.fullmatch(r"[\d.]+, (-1|\d+ .*\d)", line) for line in lines)
    later = synthesize("siim", tmp_path / "tree", switches=["rereleased"]).path
    assert (later / siim.TABLE).read_text() == text.replace(", ", ",")


def test_images_lie_in_a_study_and_a_series_of_their_own(tree, truth):
    keys = set()
    for path in tree.rglob("*.dcm"):
        place = path.relative_to(tree)
        assert len(place.parts) == 4
        assert place.parts[0] in siim.FOLDERS.values()
        names = (*place.parts[1:3], path.stem)
        for level, name in zip((2, 3, 4), names, strict=True):
            assert re.fullmatch(UID.format(level=level), name)
        assert truth[path.stem]["path"] == place.as_posix()
        keys.add(path.stem)
    assert keys == truth.keys() - set(odd(truth, "row without a file"))


def test_negatives_have_one_row_and_positives_one_to_ten(tree, truth):
    cells = table(tree)
    listed = {key for key, one in truth.items()
              if one["folder"] == "train" and "file without a row" not in one["odd"]}  # fmt: skip
    assert cells.keys() == listed
    assert list(cells) != sorted(cells)
    counts = set()
    for key, rows in cells.items():
        assert len(rows) == truth[key]["rows"]
        if truth[key]["pneumothorax"]:
            assert " -1" not in rows
            counts.add(len(rows))
        else:
            assert rows == [" -1"]
    assert counts >= {1, 2, 3, 4, 10}
    share = np.mean([truth[key]["pneumothorax"] for key in listed])
    assert share == pytest.approx(0.223, abs=0.03)


def test_the_union_of_the_rows_is_the_hidden_mask_and_some_overlap(tree, truth):
    overlaps = []
    for key, rows in table(tree).items():
        one = truth[key]
        if not one["pneumothorax"]:
            assert one["mask"] == ""
            continue
        masks = np.array([decode(row, 128) for row in rows])
        assert np.array_equal(masks.any(axis=0), decode_mask(one["mask"], tree))
        assert masks.any(axis=(1, 2)).all()
        is_overlapping = bool((masks.sum(axis=0) > 1).any())
        assert is_overlapping == (one["overlapping"] and len(rows) > 1)
        overlaps.append(is_overlapping)
    assert 0 < sum(overlaps) < sum(len(rows) > 1 for rows in table(tree).values())


def test_masks_are_in_the_upper_half_more_often_than_in_the_lower(tree, truth):
    masks = [decode_mask(one["mask"], tree) for one in truth.values() if one["mask"]]
    upper = [np.argwhere(mask)[:, 0].mean() < 64 for mask in masks]
    assert np.mean(upper) > 0.75
    assert 0.001 < np.median([mask.mean() for mask in masks]) < 0.15


def test_every_odd_file_is_what_the_truth_says(tree, truth):
    assert all(odd(truth, name) for name, _ in siim._ODD)
    cells = table(tree)
    for key in odd(truth, "row without a file"):
        assert key in cells
        assert not (tree / truth[key]["path"]).exists()
    for key in odd(truth, "file without a row"):
        assert key not in cells
        assert (tree / truth[key]["path"]).is_file()
    for key in odd(truth, "zero bytes"):
        assert (tree / truth[key]["path"]).stat().st_size == 0
    for key in odd(truth, "truncated"):
        with pytest.warns(UserWarning, match="End of file"), pytest.raises(AttributeError):
            _ = pydicom.dcmread(tree / truth[key]["path"]).pixel_array
    for key in odd(truth, "no view"):
        assert pydicom.dcmread(tree / truth[key]["path"]).ViewPosition == ""
    tests = [one for one in truth.values() if one["folder"] == "test"]
    assert len(tests) == 24
    assert not any(key in cells for key, one in truth.items() if one["folder"] == "test")


def test_headers_are_those_of_the_published_files(tree, truth):
    whole = [(key, one) for key, one in truth.items() if not one["odd"]]
    patients = set()
    for key, one in whole[:40]:
        dataset = pydicom.dcmread(tree / one["path"])
        assert dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
        assert dataset.SOPInstanceUID == key
        assert dataset.StudyInstanceUID in one["path"]
        assert dataset.SeriesInstanceUID in one["path"]
        assert dataset.StudyDate == "19010101"
        assert dataset.PatientID == dataset.PatientName
        assert dataset.pixel_array.shape == (dataset.Rows, dataset.Columns) == (128, 128)
        patients.add(dataset.PatientID)
    assert len(patients) == 40
    persons = [one["person"] for _, one in whole]
    assert len(set(persons)) < 0.7 * len(persons)


def test_a_pneumothorax_is_darker_than_the_same_place_of_the_other_lung(tree, truth):
    darker = []
    for one in truth.values():
        if one["mask"] and not one["odd"]:
            grey = pydicom.dcmread(tree / one["path"]).pixel_array.astype(float)
            mask = decode_mask(one["mask"], tree)
            darker.append(grey[mask].mean() < grey[:, ::-1][mask].mean())
    assert len(darker) > 50
    assert np.mean(darker) > 0.9
