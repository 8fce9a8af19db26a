"""The checks of a finished manifest, each against a case made by hand."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.cli import main
from featcache.datasets import spreadsheet
from featcache.datasets.registry import check_manifest, make_manifest
from featcache.encoders.look import look_at_pictures
from featcache.manifest.audit import _letters, audit
from featcache.manifest.finding import Finding
from featcache.manifest.table import Manifest, write_manifest
from featcache.workspace import Workspace

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)
JPG = b"\xff\xd8\xff" + bytes(32)


def made(tmp_path: Path, rows: list[dict], texts: list[tuple[str, str]] = (), **files) -> Manifest:
    """A manifest of rows with defaults; each image's file holds its name unless told otherwise."""
    root = tmp_path / "root"
    for number, row in enumerate(rows):
        row |= {"key": f"k{number}", **row}
        row |= {"image_path": f"{row['key']}.png", **row}
        path = root / row["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files.get(row["key"], PNG + row["key"].encode())
        if content is not None:
            path.write_bytes(content)
    defaults = {"subject_id": None, "study_id": None, "view_position": "PA", "split": "train",
                "source": "here"}  # fmt: skip
    names = [*dict.fromkeys([*defaults, *(name for row in rows for name in row)])]
    columns = {name: [row.get(name, defaults.get(name)) for row in rows] for name in names}
    columns["subject_id"] = [row.get("subject_id", f"p{i}") for i, row in enumerate(rows)]
    table = pa.table(
        {
            name: pa.array(values, pa.int8() if isinstance(values[0], int) else pa.string())
            for name, values in columns.items()
        }
    )
    said = pa.table(
        {
            "key": pa.array([key for key, _ in texts], pa.string()),
            "text": pa.array([text for _, text in texts], pa.string()),
            "unit": pa.array(["report"] * len(texts), pa.string()),
        }
    )
    return write_manifest(tmp_path / "m", table, said, dataset="test", image_root=root)


def found(findings: list[Finding], check: int, words: str) -> Finding:
    """The one finding of a check whose sentence holds some words."""
    [one] = [one for one in findings if one.check == check and words in one.text]
    return one


def test_a_clean_manifest_has_no_warning_and_every_check_a_count(tmp_path):
    rows = [{"label:a": 1, "label:class": "x"}, {"split": "test", "label:a": 0, "label:class": "y"}]
    findings = audit(made(tmp_path, rows, [("k0", "One."), ("k1", "Two words.")]))
    assert [one for one in findings if one.level == "warning"] == []
    numbers = [one.check for one in findings]
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 3, 6, 7, 8, 9, 11, 12, 13, 14, 16}


def test_files_are_counted_by_what_is_wrong_with_them(tmp_path):
    rows = [{} for _ in range(5)]
    manifest = made(tmp_path, rows, k0=b"", k1=b"<html>", k2=None, k3=JPG)
    (tmp_path / "root" / "extra.PNG").write_bytes(PNG)
    (tmp_path / "root" / "notes.txt").write_bytes(b"no image")
    findings = audit(manifest)
    assert found(findings, 6, "no byte").count == 1
    assert found(findings, 6, "web pages").count == 1
    assert found(findings, 6, "not there").count == 1
    assert found(findings, 6, "another kind").examples == ["k1.png", "k3.png"]
    extra = found(findings, 6, "in no row")
    assert (extra.count, extra.examples, extra.level) == (1, ["extra.PNG"], "info")


def test_a_folder_that_cannot_be_listed_stops_no_check(tmp_path):
    manifest = made(tmp_path, [{}])
    place = manifest.images.column_names.index("image_path")
    images = manifest.images.set_column(place, "image_path", pa.array([f"{'x' * 300}/a.png"]))
    findings = audit(dataclasses.replace(manifest, images=images))
    assert found(findings, 6, "files are not there").count == 1
    assert found(findings, 6, "are in no row").count == 0


def test_equal_files_are_told_apart_by_patient_and_split(tmp_path):
    same = {f"k{number}": PNG + b"a" for number in (0, 1)} | {
        f"k{number}": PNG + b"b" for number in (2, 3, 4)
    }
    rows = [{"subject_id": "p"}, {"subject_id": "p"}, {"subject_id": "q"}, {"subject_id": "r"},
            {"subject_id": "s", "split": "test"}]  # fmt: skip
    findings = audit(made(tmp_path, rows, **same))
    assert found(findings, 8, "byte for byte").text.startswith("3 files repeat another")
    assert found(findings, 8, "more than one of the patients").count == 1
    crossing = found(findings, 8, "more than one of the splits")
    assert (crossing.count, crossing.examples) == (1, ["k2.png"])


def test_texts_with_the_same_letters_across_splits(tmp_path):
    rows = [{}, {"split": "test"}, {}, {"split": "validate"}, {}]
    texts = [("k0", "Clear lungs."), ("k1", "CLEAR  lungs, 2"), ("k2", "Effusion"),
             ("k3", "Mass ___"), ("k4", "Effusion")]  # fmt: skip
    findings = audit(made(tmp_path, rows, texts))
    crossing = found(findings, 8, "same letters")
    assert (crossing.count, crossing.level) == (1, "warning")
    assert found(findings, 8, "belongs to").text == (
        "a text belongs to 1.2 images on average, 2 at most"
    )
    assert found(findings, 13, "different texts").text == (
        "4 different texts, words: median 2, 95 % 2, most 3"
    )
    assert found(findings, 13, "mark ___").count == 1


def test_images_without_a_split_cross_none(tmp_path):
    rows = [{}, {"split": None}, {"split": None}]
    texts = [(f"k{number}", "Clear lungs.") for number in range(3)]
    findings = audit(made(tmp_path, rows, texts, k0=PNG, k1=PNG))
    assert found(findings, 8, "same letters").count == 0
    assert found(findings, 8, "more than one of the splits").count == 0
    assert found(findings, 8, "more than one of the patients").count == 1


def test_views_that_are_blank_or_not_frontal(tmp_path):
    views = ("PA", "AP Supine", "frontal (by eye)", None, "LATERAL", "AP AXIAL", "LL", "PADDED")
    findings = audit(made(tmp_path, [{"view_position": view} for view in views]))
    assert found(findings, 12, "no view").text == "1 of 8 images have no view (12.5%)"
    assert found(findings, 12, "neither AP").count == 4


def test_labels_are_counted_with_their_blanks(tmp_path):
    rows = [{"label:a": value, "label:class": one} for value, one in
            ((1, "x"), (0, None), (-1, "y"), (None, "y"))]  # fmt: skip
    findings = audit(made(tmp_path, rows))
    assert found(findings, 11, "label a").text == "label a: 1 1, 0 1, -1 1, blank 1"
    assert found(findings, 11, "label class").text == "label class: 2 classes, 1 blank"


def test_a_source_that_tells_the_class_is_a_warning(tmp_path):
    rows = [{"source": source, "split": split, "label:class": one}
            for split in ("train", "test") for source, one in
            (("a", "ill"), ("a", "ill"), ("b", "well"))]  # fmt: skip
    findings = audit(made(tmp_path, rows))
    alone = found(findings, 14, "source alone")
    assert alone.level == "warning"
    assert alone.text == (
        "class: guessed from the source alone 100.0% of the test images are right, 66.7% by the "
        "commonest class"
    )
    assert found(findings, 14, "by source").text == "class by source: a (ill 4); b (well 2)"


def test_a_source_with_many_values_is_not_listed(tmp_path):
    rows = [{"source": f"s{number}", "label:class": "x"} for number in range(30)]
    findings = audit(made(tmp_path, rows))
    assert found(findings, 14, "by source").text == (
        "class by source: 30 different values, too many to list"
    )


def test_names_shared_with_another_data_set(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mine = made(tmp_path / "a", [{"image_path": f"x/{one}.dcm"} for one in "pqr"])
    other = made(tmp_path / "b", [{"image_path": f"{one}.dcm.png"} for one in "qrs"])
    findings = audit(mine, {"other": other.folder})
    shared = found(findings, 9, "manifest other")
    assert (shared.count, shared.examples, shared.level) == (2, ["q", "r"], "warning")
    (other.folder / "images.parquet").write_bytes(b"PAR1")
    for _ in range(2):
        lost = found(audit(mine, {"other": other.folder}), 9, "manifest other")
        assert "cannot be read" in lost.text
        (other.folder / "images.parquet").unlink(missing_ok=True)


def test_masks_are_counted(tmp_path):
    rows = [{"mask": "boxes:8x8:1,1,2,2"}, {"mask": ""}, {"mask": None}]
    text = found(audit(made(tmp_path, rows)), 10, "annotated").text
    assert text == "2 images are annotated, 1 of them with nothing"


def test_the_synthetic_tree_is_found_out(mimic_cxr_jpg_tree, tmp_path):
    truth = json.loads(mimic_cxr_jpg_tree.with_name("tree.truth.json").read_text())["images"]
    workspace = Workspace.open(tmp_path / "w")
    manifest = make_manifest(
        workspace, "mimic-cxr-jpg", mimic_cxr_jpg_tree, overrides=["views=all"]
    )
    checked = check_manifest(workspace, manifest, decoded=look_at_pictures(manifest))

    def those(*odd: str) -> int:
        return sum(bool(set(odd) & set(truth[key]["odd"])) for key in manifest.keys)

    assert found(checked.findings, 6, "web pages").count == those("HTML instead of JPEG")
    assert found(checked.findings, 8, "byte for byte").count == (
        those("byte-identical", "byte-identical across patients")
    )
    assert found(checked.findings, 8, "of the patients").count == (
        those("byte-identical across patients")
    )
    assert found(checked.findings, 12, "no view").count == those("blank view")
    assert found(checked.findings, 6, "cannot be decoded").count == (
        those("HTML instead of JPEG", "truncated")
    )
    twins = ("near-identical", "byte-identical", "byte-identical across patients")
    assert found(checked.findings, 8, "look like another one").count == 2 * those(*twins)
    assert found(checked.findings, 8, "look like one of another patient").count == (
        2 * those("byte-identical across patients")
    )
    assert found(checked.findings, 6, "of their table").text.startswith("0 of ")


def test_the_command_prints_checks_and_shows_names_only_on_request(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.png").write_bytes(PNG)
    table = tmp_path / "in" / "t.csv"
    table.write_text("image_path,subject_id\na.png,p1\nb.png,p2\n")
    line = ["manifest", "spreadsheet", str(table), "--root", str(tmp_path / "w")]
    assert main(line) == 0
    plain = capsys.readouterr().out
    assert "! check  8: 1 files repeat another byte for byte, in 1 groups\n" in plain
    assert plain.endswith("next: featcache extract --backbone NAME\n")
    assert main([*line, "--show-ids"]) == 0
    assert "in 1 groups (a.png)\n" in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert not any("examples" in one for one in checks)
    kept = json.loads((tmp_path / "w" / "manifests" / "spreadsheet" / "checks.json").read_text())
    assert [one["text"] for one in kept["checks"]] == [one["text"] for one in checks]
    assert main([*line, "--no-checks"]) == 0
    assert "check " not in capsys.readouterr().out


@pytest.mark.parametrize("pieces", [1, 2, 100])
def test_reports_are_never_all_python_objects_at_once(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr("featcache.manifest.audit._PIECE_ROWS", pieces)
    rows = [{} for _ in range(5)]
    texts = [(f"k{number}", "word " * (number + 1)) for number in range(5)]
    text = found(audit(made(tmp_path, rows, texts)), 13, "different").text
    assert text == "5 different texts, words: median 3, 95 % 4, most 5"


def test_a_table_without_patients_still_passes(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(PNG + name.encode())
    (tmp_path / "t.csv").write_text("image_path\na.png\nb.png\n")
    manifest = spreadsheet.read(tmp_path / "t.csv", tmp_path / "m", options=spreadsheet.Options())
    assert found(audit(manifest), 7, "stands for them").count == 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_letters_are_told_by_bytes_as_by_characters(text):
    plain = "".join(one for one in text.lower() if one.isalpha())
    assert _letters(text.encode()) == plain.encode()
    assert _letters(b"No Effusion, 5 mm.") == _letters(b"no effusion\n(mm)")
