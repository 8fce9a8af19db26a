"""The synthetic MIMIC-CXR-JPG: published names and columns, and every odd case at least once."""

import csv
import gzip
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.config import read_json
from featcache.datasets.mimic.sections import read_sections
from featcache.synth.mimic_plan import (
    LABEL_ROWS,
    LAYOUTS,
    PICTURES,
    SIZES,
    WORDINGS,
    Size,
    plan,
)


@pytest.fixture(scope="module")
def tree(mimic_cxr_jpg_tree) -> Path:
    return mimic_cxr_jpg_tree


@pytest.fixture(scope="module")
def truth(tree) -> dict:
    return read_json(tree.with_name("tree.truth.json"))


def table(path: Path) -> list[dict[str, str]]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    assert b"\r" not in content
    return list(csv.DictReader(io.StringIO(content.decode())))


def picture(tree: Path, key: str) -> Path:
    return next(tree.rglob(f"{key}.jpg"))


def with_odd(truth: dict, kind: str, name: str) -> list[str]:
    return [key for key, value in truth[kind].items() if name in value["odd"]]


def report(tree: Path, study_id: str) -> bytes:
    return next(tree.rglob(f"s{study_id}.txt")).read_bytes()


def test_files_carry_the_published_names(tree):
    assert sorted(path.name for path in tree.iterdir()) == [
        "IMAGE_FILENAMES",
        "LICENSE.txt",
        "README",
        "SHA256SUMS.txt",
        "SYNTHETIC.txt",
        "files",
        "mimic-cxr-2.0.0-chexpert.csv.gz",
        "mimic-cxr-2.0.0-metadata.csv.gz",
        "mimic-cxr-2.0.0-negbio.csv.gz",
        "mimic-cxr-2.0.0-split.csv.gz",
        "mimic-cxr-2.1.0-test-set-labeled.csv",
        "mimic-cxr-reports",
    ]
    assert {path.suffix for path in (tree / "files").rglob("*.*")} == {".jpg"}
    for path in (tree / "files").rglob("*.jpg"):
        assert re.fullmatch(
            r"p19/p199\d{5}/s599\d{5}/[0-9a-f]{8}(-[0-9a-f]{8}){4}\.jpg",
            path.relative_to(tree / "files").as_posix(),
        )


def test_tables_have_the_published_columns_and_cells(tree):
    metadata = table(tree / "mimic-cxr-2.0.0-metadata.csv.gz")
    assert list(metadata[0])[:5] == [
        "dicom_id",
        "subject_id",
        "study_id",
        "PerformedProcedureStepDescription",
        "ViewPosition",
    ]
    assert len(metadata[0]) == 12
    order = [(row["subject_id"], row["study_id"]) for row in metadata]
    assert order == sorted(order)
    assert {len(row["StudyTime"].partition(".")[0]) for row in metadata} >= {5, 6}
    splits = table(tree / "mimic-cxr-2.0.0-split.csv.gz")
    assert list(splits[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert {row["split"] for row in splits} == {"train", "validate", "test"}
    for kind in ("chexpert", "negbio"):
        labels = table(tree / f"mimic-cxr-2.0.0-{kind}.csv.gz")
        names = list(labels[0])
        assert names[:2] == ["subject_id", "study_id"]
        assert names[2:] == sorted(names[2:])
        assert len(names) == 16
        cells = {row[name] for row in labels for name in names[2:]}
        assert cells == {"1.0", "0.0", "-1.0", ""}
        assert {row["No Finding"] for row in labels} == {"1.0", ""}
        assert any(row["No Finding"] == row["Support Devices"] == "1.0" for row in labels)
    by_hand = table(tree / "mimic-cxr-2.1.0-test-set-labeled.csv")
    assert list(by_hand[0])[:2] == ["study_id", "Airspace Opacity"]
    records = table(tree / "mimic-cxr-reports" / "cxr-record-list.csv.gz")
    assert list(records[0]) == ["subject_id", "study_id", "dicom_id", "path"]


def test_pixel_sizes_are_those_of_the_table(tree, truth):
    useless = ("missing", "zero byte", "truncated", "HTML instead of JPEG")
    for row in table(tree / "mimic-cxr-2.0.0-metadata.csv.gz"):
        if not set(useless) & set(truth["images"][row["dicom_id"]]["odd"]):
            with Image.open(picture(tree, row["dicom_id"])) as image:
                assert (image.height, image.width) == (int(row["Rows"]), int(row["Columns"]))


def test_checksums_are_right(tree):
    for line in (tree / "SHA256SUMS.txt").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tree / name).read_bytes()).hexdigest() == digest


def test_every_odd_case_occurs(truth):
    studies = {name for name, _ in (*LAYOUTS, *WORDINGS, *LABEL_ROWS)}
    assert {odd for s in truth["studies"].values() for odd in s["odd"]} == studies
    images = {name for name, _ in PICTURES} | {
        "AP LLD",
        "AP AXIAL",
        "blank view",
        "near-identical",
        "byte-identical",
        "byte-identical across patients",
        "id that looks like a number",
    }
    assert {odd for i in truth["images"].values() for odd in i["odd"]} == images
    views = [image["view"] for image in truth["images"].values()]
    assert set(views) == {"PA", "AP", "LATERAL", "LL", "", "AP LLD", "AP AXIAL"}


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_odd_case_occurs_for_other_seeds(seed):
    studies = plan(SIZES["tiny"], seed, ())
    assert {odd for s in studies for odd in s.odd} == {
        name for name, _ in (*LAYOUTS, *WORDINGS, *LABEL_ROWS)
    }
    assert len({odd for s in studies for image in s.images for odd in image.odd}) == 17
    assert {s.split for s in studies} == {"train", "validate", "test"}


def test_odd_cases_keep_their_shares_in_a_larger_tree():
    studies = plan(Size(1_000, 320, 512), 0, ())
    images = [image for study in studies for image in study.images]
    lateral = sum(image.view in ("LATERAL", "LL") for image in images) / len(images)
    assert 0.28 < lateral < 0.38
    count = {name: sum(name in study.odd for study in studies) for name, _ in LAYOUTS}
    assert count["findings only"] == 120
    assert count["last paragraph"] == 50
    assert count["wet read"] == 10
    doubts = [s.value for study in studies for s in study.statements]
    assert 0.05 < doubts.count(-1) / len(doubts) < 0.25
    patients = {}
    for study in studies:
        patients.setdefault(study.subject_id, set()).add(study.split)
    assert all(len(splits) == 1 for splits in patients.values())
    assert len({study.study_id for study in studies}) == 1_000


def test_damaged_files_are_damaged_as_named(tree, truth):
    def content(odd):
        return picture(tree, with_odd(truth, "images", odd)[0]).read_bytes()

    [missing] = with_odd(truth, "images", "missing")
    assert not list(tree.rglob(f"{missing}.jpg"))
    assert content("zero byte") == b""
    assert b"<html>" in content("HTML instead of JPEG")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(content("truncated"))).load()
    assert Image.open(io.BytesIO(content("one pixel wide"))).width == 1
    assert np.ptp(np.asarray(Image.open(io.BytesIO(content("constant"))))) == 0
    assert Image.open(io.BytesIO(content("RGB"))).mode == "RGB"
    assert Image.open(io.BytesIO(content("EXIF rotated"))).getexif()[0x0112] == 6


def test_repeated_pictures(tree, truth):
    digests = {}
    for path in (tree / "files").rglob("*.jpg"):
        digests.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path)
    repeated = [paths for paths in digests.values() if len(paths) > 1]
    same_patient = {len({path.parent.parent.name for path in paths}) == 1 for paths in repeated}
    assert same_patient == {True, False}
    [key] = with_odd(truth, "images", "near-identical")
    others = [path for path in picture(tree, key).parent.iterdir() if path.stem != key]
    grey = np.asarray(Image.open(picture(tree, key)), dtype=float)
    near = [np.asarray(Image.open(path), dtype=float) for path in others]
    assert any(n.shape == grey.shape and 0 < np.abs(n - grey).mean() < 12 for n in near)


def test_ordinary_pictures_are_grey_equalised_and_of_both_formats(tree, truth):
    shapes = set()
    for key, image in truth["images"].items():
        if image["view"] in ("AP", "PA") and not image["odd"]:
            opened = Image.open(picture(tree, key))
            assert opened.mode == "L"
            shapes.add(opened.height > opened.width)
            spread = np.quantile(np.asarray(opened), (0.1, 0.5, 0.9))
            assert np.all(np.abs(spread - (25, 128, 230)) < 25)
    assert shapes == {True, False}


def test_reports_start_every_line_with_one_space(tree, truth):
    for study_id, study in truth["studies"].items():
        if "no report file" in study["odd"]:
            assert not list(tree.rglob(f"s{study_id}.txt"))
            continue
        text = report(tree, study_id).decode("latin-1").replace("\r\n", "\n")
        assert text.count(" " * 33 + "FINAL REPORT\n") == 1
        assert all(line.startswith(" ") for line in text.splitlines())


def test_odd_wordings_are_in_the_files(tree, truth):
    def first(odd):
        return report(tree, with_odd(truth, "studies", odd)[0])

    assert first("CRLF").count(b"\r\n") > 5
    with pytest.raises(UnicodeDecodeError):
        first("Latin-1 bytes").decode("utf-8")
    assert "\ufffd\ufffd" in first("not ASCII").decode("utf-8")
    assert b" 1.5 cm" in first("decimals")
    assert b"\n 2. " in first("numbered list")
    assert b"WET READ: " in first("wet read")
    assert b"____________________" in first("wet read")
    assert b" FINDINGS:\n IMPRESSION: " in first("swallowed impression")
    assert len(first("over 112 tokens").split()) > 112
    assert len(first("over 512 tokens").split()) > 512
    assert b" CHEST, 2 VIEWS: " in first("unseen header")
    identical = {
        read_sections(report(tree, s).decode(), s).label_text
        for s in with_odd(truth, "studies", "identical text")
    }
    assert len(identical) == 1
    assert len(with_odd(truth, "studies", "identical text")) > 3


def test_reports_say_what_the_truth_says(tree, truth):
    """A denied effusion is denied in words, a present one is not."""
    seen = set()
    for study_id, study in truth["studies"].items():
        value = study["said"].get("Pleural Effusion")
        if value is None or set(study["odd"]) - {"findings only", "over 112 tokens"}:
            continue
        text = " ".join(report(tree, study_id).decode().split()).lower()
        sentences = [s for s in text.split(".") if "effusion" in s]
        assert sentences
        is_denied = all(re.search(r"\bno\b", s) for s in sentences)
        is_doubtful = any(re.search(r"possible|excluded", s) for s in sentences)
        assert (value == 0, value == -1) == (is_denied, is_doubtful)
        seen.add(value)
    assert {0, 1} <= seen


def test_truth_has_a_box_for_each_finding_with_a_place(truth):
    for image in truth["images"].values():
        present = truth["studies"][image["study_id"]]["present"]
        labels = {box[0] for box in image["boxes"]}
        if image["view"] in ("AP", "PA") and "across" not in " ".join(image["odd"]):
            assert labels == set(present) - {"Cardiomegaly", "Enlarged Cardiomediastinum"}
        for _, left, top, right, bottom in image["boxes"]:
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
