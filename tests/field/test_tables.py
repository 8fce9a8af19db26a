"""Tables as people hand them in: marks, blanks, back-slashes, repeats, and reports elsewhere."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reliability.kit import key_of

from featcache.cache.folder import read_failures
from featcache.cache.reader import FeatureSet
from featcache.cli import main
from featcache.config import read_json
from featcache.datasets import mimic_cxr_jpg, siim
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

ROWS = 40
IDENTIFIER = re.compile(r"19\d{6}|5\d{7}|[0-9a-f]{8}-[0-9a-f]{8}")


def base() -> list[dict[str, str]]:
    """Forty images of twenty patients."""
    return [
        {
            "key": key_of(row),
            "subject_id": f"patient{row // 2}",
            "study_id": str(59_999_900 + row),
            "view_position": "PA",
            "split": ("train", "train", "train", "validate", "test")[row // 2 % 5],
            "image_path": f"images/{key_of(row)}.jpg",
            "report": f"No effusion in study {row}.",
        }
        for row in range(ROWS)
    ]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with forty files named as in the table; the manifest does not decode them."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for row in range(ROWS):
        (folder / "images" / f"{key_of(row)}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([row]) * 99)
    return folder


def save(place: Path, rows: list[dict[str, str]], encoding="utf-8") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = place / "table.csv"
    path.write_text(text.getvalue(), encoding=encoding, newline="")
    return path


def run(table: Path, name="m", *options: str) -> int:
    """The command, into a workspace beside the data."""
    root = table.parent.parent / "w"
    return main(
        ["manifest", "spreadsheet", str(table), "--name", name, "--root", str(root), *options]
    )


def made(table: Path, name="m") -> Manifest:
    return open_manifest(table.parent.parent / "w" / "manifests" / name)


def contents(manifest: Manifest) -> list[bytes]:
    return [(manifest.folder / f"{name}.parquet").read_bytes() for name in ("images", "texts")]


@pytest.mark.parametrize("first", ["subject_id", "key"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(place, first):
    rows = [{first: row[first], **row} for row in base()]
    assert run(save(place, rows), "plain") == 0
    assert run(save(place, rows, encoding="utf-8-sig"), "marked") == 0
    plain, marked = made(place / "table.csv", "plain"), made(place / "table.csv", "marked")
    assert contents(plain) == contents(marked)
    assert plain.meta.model_copy(update={"name": "marked"}) == marked.meta


def test_one_blank_id_makes_no_number_of_the_others(place, capsys):
    rows = base()[:3]
    rows[1]["study_id"] = ""
    assert run(save(place, rows)) == 0
    manifest = made(place / "table.csv")
    assert manifest.images["study_id"].to_pylist() == ["59999900", None, "59999902"]
    assert "blank `study_id`, 1 in all: row 3" in capsys.readouterr().err
    rows[1]["subject_id"] = " "
    assert run(save(place, rows)) == 0
    printed = capsys.readouterr()
    assert "dropped for a blank `subject_id`: row 3" in printed.err
    assert "-1    blank subject_id" in printed.out
    assert made(place / "table.csv").keys == [key_of(0), key_of(2)]


def test_ids_that_became_floats_are_refused_and_not_repaired(place, capsys):
    rows = base()[:3]
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    columns["study_id"] = pa.array([59_999_900.0, None, 59_999_902.0])
    path = place / "table.parquet"
    pq.write_table(pa.table(columns), path)
    assert run(path) == 1
    said = capsys.readouterr().err
    assert "the column `study_id` holds double, text is needed" in said
    assert "save ids as text" in said


def test_reports_without_a_word_are_counted_and_reach_no_encoder(place, tiny, tmp_path, capsys):
    rows = base()
    for row, text in ((3, ""), (11, "   \t"), (20, "nan"), (31, "\n \r\n")):
        rows[row]["report"] = text
    assert run(save(place, rows)) == 0
    assert "-4    no report (kept without text)" in capsys.readouterr().out
    manifest = made(place / "table.csv")
    assert len(manifest.keys) == ROWS
    assert manifest.texts.num_rows == ROWS - 4
    workspace = Workspace.open(tmp_path / "w")
    tiny.extract(workspace, images=False, texts=True)
    folder = next((workspace.root / "features" / "text").iterdir())
    assert read_failures(folder) == []
    assert main(["info", "--root", str(workspace.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    texts = FeatureSet.open(folder)
    assert len(texts.keys) == ROWS - 4


def test_a_report_file_of_no_byte_is_no_text(mimic_cxr_jpg_tree, tmp_path):
    tree = Path(shutil.copytree(mimic_cxr_jpg_tree, tmp_path / "tree"))
    before = mimic_cxr_jpg.read(tree, tmp_path / "a", options=mimic_cxr_jpg.Options())
    study = before.images["study_id"][0].as_py()
    next(tree.rglob(f"s{study}.txt")).write_bytes(b"")
    after = mimic_cxr_jpg.read(tree, tmp_path / "b", options=mimic_cxr_jpg.Options())
    lost = before.images["study_id"].to_pylist().count(study)
    assert len(after.keys) == len(before.keys) - lost
    reasons = [one.meta.funnel[-1].dropped["no usable section"] for one in (before, after)]
    assert reasons[1] == reasons[0] + lost


@pytest.mark.parametrize("affected", [range(ROWS), [7]])
def test_paths_with_back_slashes_are_resolved(place, affected):
    assert run(save(place, base()), "plain") == 0
    rows = base()
    for row in affected:
        rows[row]["image_path"] = rows[row]["image_path"].replace("/", "\\")
    assert run(save(place, rows), "turned") == 0
    table = place / "table.csv"
    assert contents(made(table, "plain")) == contents(made(table, "turned"))


def test_paths_that_lead_nowhere_are_one_sentence_before_any_encoder(place, capsys):
    rows = [{**row, "image_path": f"D:\\scans\\{row['key']}.jpg"} for row in base()]
    assert run(save(place, rows)) == 1
    said = capsys.readouterr().err
    assert "none of the 40 image files is there" in said
    assert "--set image_root=FOLDER" in said
    assert len(said.strip().splitlines()) == 3


def test_repeated_keys_are_merged_when_equal_and_refused_when_not(place, capsys):
    rows = base()
    rows.append(dict(rows[7]))
    assert run(save(place, rows)) == 0
    assert "-1    identical row" in capsys.readouterr().out
    assert len(made(place / "table.csv").keys) == ROWS
    rows.append({**rows[9], "image_path": rows[12]["image_path"]})
    assert run(save(place, rows)) == 1
    said = capsys.readouterr().err
    assert "rows 11 and 43 have the same `key` and contradict each other" in said
    assert key_of(9) not in said


def test_two_labels_of_one_image_are_refused(place, capsys):
    rows = [{**row, "label:edema": "1"} for row in base()]
    rows.append({**rows[4], "label:edema": "0"})
    assert run(save(place, rows)) == 1
    assert "rows 6 and 42 have the same `key`" in capsys.readouterr().err


def test_reports_that_are_not_in_the_tree_are_said_at_once(mimic_cxr_jpg_tree, tmp_path, capsys):
    tree = Path(shutil.copytree(mimic_cxr_jpg_tree, tmp_path / "tree"))
    reports = tree / "mimic-cxr-reports"
    moved = tmp_path / "moved"
    (reports / "files").rename(moved)
    line = ["manifest", "mimic-cxr-jpg", str(tree), "--root", str(tmp_path / "w")]
    assert main(line) == 1
    said = capsys.readouterr().err
    assert re.search(r"0 of \d+ studies have a report", said)
    assert "--set reports=FOLDER" in said
    assert not IDENTIFIER.search(said.replace(str(tree), ""))
    assert not (tmp_path / "w" / "manifests" / "mimic-cxr-jpg").exists()
    shutil.copytree(moved, tree / "files", dirs_exist_ok=True)
    assert main(line) == 0
    truth = read_json(mimic_cxr_jpg_tree.with_name("tree.truth.json"))
    made_here = open_manifest(tmp_path / "w" / "manifests" / "mimic-cxr-jpg")
    assert set(made_here.images["study_id"].to_pylist()) <= set(truth["studies"])
    assert made_here.texts.num_rows == len(made_here.keys) > 0


def test_a_blank_before_the_mask_column_or_in_its_cells_changes_nothing(tmp_path, siim_tree):
    read = []
    for name, blank in (("first", " "), ("later", "")):
        tree = Path(shutil.copytree(siim_tree, tmp_path / name / "tree"))
        table = tree / "train-rle.csv"
        lines = [line.replace(", ", ",") for line in table.read_text().splitlines()]
        table.write_text("".join(f"{line.replace(',', ',' + blank, 1)}\n" for line in lines))
        read.append(siim.read(tree, tmp_path / name / "m", options=siim.Options()))
    assert contents(read[0]) == contents(read[1])
    empty = read[0].images["mask"].to_pylist().count("")
    assert 0 < empty < len(read[0].keys)
