"""MIMIC-CXR (DICOM) against synthetic trees, with and without the tables of MIMIC-CXR-JPG."""

import gzip
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from contracts.dataset_contract import DatasetContract

from featcache.config import read_json, validate
from featcache.datasets import mimic_cxr, mimic_cxr_jpg
from featcache.errors import ManifestError

USELESS = {"missing", "zero byte"}
NO_TEXT = {"no report file", "comparison only", "report without images"}


@pytest.fixture(scope="module")
def bare(draw_tree) -> Path:
    return draw_tree("mimic-cxr").path


@pytest.fixture(scope="module")
def jpg(mimic_cxr_jpg_tree) -> Path:
    return mimic_cxr_jpg_tree


@pytest.fixture(scope="module")
def truth(bare) -> dict:
    return read_json(bare.with_name("tree.truth.json"))


@pytest.fixture
def tree(bare, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bare, tmp_path / "tree"))


def read_tree(tree: Path, out: Path, **options):
    return mimic_cxr.read(tree, out / "m", options=validate(mimic_cxr.Options, options))


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return mimic_cxr

    @pytest.fixture
    def source(self, bare):
        return bare

    @pytest.fixture
    def options(self):
        return mimic_cxr.Options()


def test_without_tables_views_come_from_the_headers_and_splits_are_ours(bare, truth, tmp_path):
    made = read_tree(bare, tmp_path)
    wanted = sorted(
        key
        for key, image in truth["images"].items()
        if image["view"] in ("AP", "PA")
        and not {*USELESS, "HTML instead of JPEG"} & set(image["odd"])
        and not NO_TEXT & set(truth["studies"][image["study_id"]]["odd"])
    )
    assert made.keys == wanted
    assert made.label_names == []
    assert mimic_cxr.NOTE_SPLIT in made.meta.notes
    assert made.meta.policies["view_position"] == "from the DICOM headers (1 unreadable)"
    assert made.meta.policies["study_list"] == "1 studies with images are not in it"
    assert all(made.image_file(row).suffix == ".dcm" for row in range(len(made.keys)))


def test_with_tables_the_rows_are_those_of_the_jpg_project(bare, jpg, tmp_path):
    made = read_tree(bare, tmp_path, tables=str(jpg))
    other = mimic_cxr_jpg.read(jpg, tmp_path / "jpg", options=mimic_cxr_jpg.Options())
    assert made.texts.equals(other.texts)
    for name in other.images.column_names:
        if name not in ("source", "image_path"):
            assert made.images[name].equals(other.images[name]), name
    assert mimic_cxr.NOTE_SPLIT not in made.meta.notes
    assert made.meta.policies["split"] == "official"


def test_reports_are_read_from_an_archive_as_from_a_folder(tree, tmp_path):
    packed = read_tree(tree, tmp_path / "a")
    archive = tree / "mimic-cxr-reports.zip"
    apart = tmp_path / "apart"
    apart.mkdir()
    archive.rename(apart / "reports.zip")
    named = read_tree(tree, tmp_path / "b", reports=str(apart / "reports.zip"))
    with zipfile.ZipFile(apart / "reports.zip") as opened:
        opened.extractall(tree)
    unpacked = read_tree(tree, tmp_path / "c")
    assert packed.meta.hash == named.meta.hash == unpacked.meta.hash


@pytest.mark.parametrize("kept_bytes", [0, 100, -400])
def test_an_archive_that_is_cut_off_is_named(tree, tmp_path, kept_bytes):
    archive = tree / "mimic-cxr-reports.zip"
    archive.write_bytes(archive.read_bytes()[:kept_bytes])
    with pytest.raises(ManifestError, match="archive of reports cannot be read"):
        read_tree(tree, tmp_path)


def test_an_archive_with_a_damaged_or_locked_member_is_named(tree, tmp_path):
    archive = tree / "mimic-cxr-reports.zip"
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
    start = members[3].header_offset + 30 + len(members[3].filename)
    damaged = whole[:start] + b"\xff" * 20 + whole[start + 20 :]
    locked = bytearray(whole)
    at = -1
    for _ in members:  # the flag of an encrypted member, in both of its headers
        at = locked.index(b"PK\x01\x02", at + 1)
        locked[at + 8] |= 1
    for one in members:
        locked[one.header_offset + 6] |= 1
    for content in (damaged, bytes(locked)):
        archive.write_bytes(content)
        with pytest.raises(ManifestError, match="archive of reports cannot be read"):
            read_tree(tree, tmp_path)


def test_a_list_of_studies_of_another_form_stops_nothing(tree, tmp_path, capsys):
    path = tree / "cxr-study-list.csv.gz"
    assert path.is_file()
    before = read_tree(tree, tmp_path / "a")
    path.unlink()
    (tree / "cxr-study-list.csv").write_text("subject,study,path\n1,2,3\n")
    made = read_tree(tree, tmp_path / "b")
    assert made.images.equals(before.images)
    assert made.meta.policies["study_list"] == "not readable"
    assert "cxr-study-list.csv was not compared with the images" in capsys.readouterr().err


def test_no_reports_and_no_list_say_so(tree, tmp_path):
    (tree / "mimic-cxr-reports.zip").unlink()
    with pytest.raises(ManifestError, match=r"0 of \d\d studies have a report") as caught:
        read_tree(tree, tmp_path)
    assert "mimic-cxr-reports.zip" in caught.value.where
    (tree / "cxr-record-list.csv.gz").unlink()
    with pytest.raises(ManifestError, match=r"cxr-record-list.csv.gz \(or .csv\) is missing"):
        read_tree(tree, tmp_path)


def test_tables_of_another_patient_are_refused(tree, jpg, tmp_path):
    path = tree / "cxr-record-list.csv.gz"
    head, first, *rest = gzip.decompress(path.read_bytes()).decode().splitlines()
    subject, study, tail = first.split(",", 2)
    changed = f"{int(subject) + 1},{int(study) + 1},{tail}"
    path.write_bytes(gzip.compress("\n".join([head, changed, *rest]).encode()))
    with pytest.raises(ManifestError, match="give a picture another `study_id`: row 2") as caught:
        read_tree(tree, tmp_path, tables=str(jpg))
    assert not re.search(r"19\d{6}|5\d{7}", str(caught.value))


def test_fixed_sections_read_what_the_official_rules_lose(bare, jpg, truth, tmp_path):
    def texts(**options):
        made = read_tree(bare, tmp_path, tables=str(jpg), views="all", **options)
        studies = dict(zip(made.keys, made.images["study_id"].to_pylist(), strict=True))
        return {studies[row["key"]]: row["text"] for row in made.texts.to_pylist()}, made

    official, _ = texts()
    fixed, made = texts(sections="fixed")
    assert made.meta.policies["sections"] == ("fixed (other than the official ones in 2 reports)")
    differing = {study for study in fixed if fixed[study] != official.get(study)}
    odd = {name for study in differing for name in truth["studies"][study]["odd"]}
    assert odd & {"swallowed impression", "unseen header"}
    _, mgca = texts(text="mgca")
    assert re.fullmatch(r"mgca \(decimals falsified in \d+ reports\)", mgca.meta.policies["text"])
