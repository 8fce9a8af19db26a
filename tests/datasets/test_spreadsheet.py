"""Tables that people really have."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts.dataset_contract import DatasetContract
from PIL import Image

from featcache.config import load_config
from featcache.datasets import spreadsheet
from featcache.errors import ConfigError, ManifestError, UsageError
from featcache.manifest.masks import decode_mask
from featcache.manifest.splits import split_by_subject
from featcache.manifest.table import text_id

NUM = 8


def base():
    """Eight images of four patients, as rows of a table."""
    return [
        {
            "key": f"k{n}",
            "subject_id": f"00{n // 2}",
            "study_id": f"5999990{n}",
            "view_position": "AP",
            "split": ("train", "train", "validate", "test")[n // 2],
            "image_path": f"images/p{n // 2}/{n}.png",
            "report": f"Study {n}.\nClear, no effusion.",
        }
        for n in range(NUM)
    ]


@pytest.fixture
def place(tmp_path):
    """A folder with the pictures."""
    for row in base():
        path = tmp_path / "data" / row["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
    return tmp_path / "data"


def save(place, rows, name="table.csv", encoding="utf-8", **dialect):
    path = place / name
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path, *settings, out="m"):
    options = load_config(spreadsheet.Options, overrides=settings)
    return spreadsheet.read(path, path.parent.parent / out, options=options)


def refused(path, *settings):
    with pytest.raises(ManifestError) as caught:
        read(path, *settings)
    message = str(caught.value)
    assert "effusion" not in message
    return message


def without(rows, *columns):
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


def funnel(manifest):
    return [(step.name, step.count, step.dropped) for step in manifest.meta.funnel]


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return spreadsheet

    @pytest.fixture
    def source(self, place):
        return save(place, base())

    @pytest.fixture
    def options(self):
        return spreadsheet.Options()


def test_a_table_becomes_a_manifest(place):
    made = read(save(place, base()))
    assert made.keys == [f"k{n}" for n in range(NUM)]
    assert made.images["subject_id"].to_pylist()[:3] == ["000", "000", "001"]
    assert made.images["study_id"].to_pylist()[0] == "59999900"
    assert made.images["source"].to_pylist() == ["spreadsheet"] * NUM
    assert made.splits() == ["train"] * 4 + ["validate"] * 2 + ["test"] * 2
    assert made.texts["text"].to_pylist()[0] == "Study 0.\nClear, no effusion."
    assert made.texts["unit"].to_pylist() == ["report"] * NUM
    assert made.image_file(0) == place / "images" / "p0" / "0.png"
    assert funnel(made) == [
        ("rows in the table", NUM, {}),
        ("images", NUM, {}),
        ("images with a file", NUM, {}),
        ("images with a report", NUM, {}),
    ]
    assert made.meta.notes == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["key", "subject_id"])
def test_a_byte_order_mark_changes_nothing(place, encoding, first):
    rows = [{first: row[first], **row} for row in base()]
    plain = read(save(place, rows), out="one/m")
    marked = read(save(place, rows, name="other.csv", encoding=encoding), out="two/m")
    for name in ("images.parquet", "texts.parquet", "manifest.json"):
        assert (plain.folder / name).read_bytes() == (marked.folder / name).read_bytes()


def test_tsv_semicolons_parquet_and_row_order_give_the_same_manifest(place):
    want = read(save(place, base())).meta.hash
    assert read(save(place, base(), name="t.tsv", delimiter="\t")).meta.hash == want
    assert read(save(place, base(), name="s.csv", delimiter=";")).meta.hash == want
    assert read(save(place, base()[::-1], name="r.csv")).meta.hash == want
    pq.write_table(pa.Table.from_pylist(base()), place / "t.parquet")
    assert read(place / "t.parquet").meta.hash == want


def test_names_are_compared_without_case_and_blanks(place):
    rows = [{f" {name.upper()} ": value for name, value in row.items()} for row in base()]
    assert read(save(place, rows)).meta.hash == read(save(place, base())).meta.hash


def test_a_blank_id_damages_no_other(place):
    rows = base()
    rows[1]["study_id"] = ""
    made = read(save(place, rows))
    assert made.images["study_id"].to_pylist()[:3] == ["59999900", None, "59999902"]


def test_a_float_id_in_parquet_is_refused(place):
    table = pa.Table.from_pylist(base())
    ids = pa.array([59999901.0, None] + [59999902.0] * 6)
    at = table.column_names.index("study_id")
    pq.write_table(table.set_column(at, "study_id", ids), place / "t.parquet")
    assert "`study_id` holds double" in refused(place / "t.parquet")


def test_rows_with_blank_ids_are_dropped_by_number(place, capsys):
    rows = base()
    rows[1]["key"] = " "
    rows[2]["subject_id"] = "NaN"
    rows[4]["image_path"] = rows[4]["key"] = ""
    made = read(save(place, rows))
    assert funnel(made)[:2] == [
        ("rows in the table", NUM, {}),
        (
            "rows with their ids",
            5,
            {"blank image_path": 1, "blank key": 1, "blank subject_id": 1},
        ),
    ]
    printed = capsys.readouterr().err
    assert "dropped for a blank `key`: row 3" in printed
    assert "dropped for a blank `subject_id`: row 4" in printed
    assert "dropped for a blank `image_path`: row 6" in printed


def test_an_image_without_report_is_kept_and_counted(place):
    rows = base()
    for row, report in zip(rows, ["", "  \n", "nan", "\u00a0"], strict=False):
        row["report"] = report
    made = read(save(place, rows))
    assert len(made.keys) == NUM
    assert made.texts["key"].to_pylist() == ["k4", "k5", "k6", "k7"]
    assert funnel(made)[-1] == (
        "images with a report",
        4,
        {"no report (kept without text)": 4},
    )


def test_several_texts_of_an_image_and_images_of_a_text(place):
    rows = base()
    rows[1]["report"] = rows[0]["report"]
    rows.append(rows[3] | {"report": "Second reader."})
    rows.append(rows[4] | {"report": ""})
    rows.append(dict(rows[5]))
    made = read(save(place, rows))
    assert len(made.keys) == NUM
    assert made.texts["key"].to_pylist().count("k3") == 2
    assert len(made.unique_texts()[0]) == NUM
    assert funnel(made)[:2] == [
        ("rows in the table", NUM + 3, {}),
        ("images", NUM, {"identical row": 1, "another text of the same image": 2}),
    ]
    assert funnel(made)[-1] == ("images with a report", NUM, {})


def test_white_space_around_a_text_is_no_difference(place):
    rows = base()
    rows.append(rows[0] | {"report": "\r\n  Study 0.\r\nClear, no effusion. "})
    made = read(save(place, rows))
    assert made.texts.num_rows == NUM
    assert made.texts["text_id"].to_pylist()[0] == text_id("Study 0.\nClear, no effusion.")


@pytest.mark.parametrize(
    "change", [{"image_path": "images/p3/7.png"}, {"label:class": "other"}, {"subject_id": "009"}]
)
def test_contradicting_rows_are_refused_with_both_numbers(place, change):
    rows = [row | {"label:class": "x"} for row in base()]
    rows.append(rows[2] | change)
    message = refused(save(place, rows))
    assert "rows 4 and 10 have the same `key` and contradict each other" in message
    assert "table.csv" in message


@pytest.mark.parametrize("affected", [range(NUM), [3]])
def test_paths_of_windows_are_resolved(place, affected):
    rows = base()
    for n in affected:
        rows[n]["image_path"] = ".\\" + rows[n]["image_path"].replace("/", "\\")
    assert read(save(place, rows)).meta.hash == read(save(place, base())).meta.hash


def test_absolute_paths_below_the_root_become_relative(place):
    rows = [row | {"image_path": str(place / row["image_path"])} for row in base()]
    assert read(save(place, rows)).meta.hash == read(save(place, base())).meta.hash


def test_paths_start_from_the_root_that_is_given(place, tmp_path):
    (tmp_path / "tables").mkdir()
    path = save(tmp_path / "tables", base())
    assert "none of the 8 image files is there" in refused(path)
    assert "--set image_root=FOLDER" in refused(path)
    made = read(path, f"image_root={place}")
    assert made.meta.image_root == str(place)


def test_missing_files_are_dropped_and_counted(place):
    (place / base()[0]["image_path"]).unlink()
    made = read(save(place, base()))
    assert made.keys == [f"k{n}" for n in range(1, NUM)]
    assert made.texts["key"].to_pylist() == made.keys
    assert ("images with a file", NUM - 1, {"missing file": 1}) in funnel(made)


def test_without_a_key_the_path_is_the_key(place):
    rows = without(base(), "key")
    made = read(save(place, rows))
    assert made.keys[0] == "images/p0/0.png"
    windows = [row | {"image_path": row["image_path"].replace("/", "\\")} for row in rows]
    assert read(save(place, windows)).keys == made.keys
    absolute = [row | {"image_path": str(place / row["image_path"])} for row in rows]
    assert read(save(place, absolute)).keys == made.keys


def test_a_path_too_long_for_a_key_is_hashed(place):
    folder = "d" * 120
    path = place / folder / "0123456.png"
    path.parent.mkdir()
    path.write_bytes(b"picture")
    rows = without(base(), "key")
    rows[0]["image_path"] = f"{folder}/0123456.png"
    key = next(key for key in read(save(place, rows)).keys if key.startswith("sha256:"))
    assert len(key) == 7 + 64


def test_without_splits_patients_are_split_whole(place):
    rows = without(base(), "split")
    made = read(save(place, rows))
    subjects = made.images["subject_id"].to_pylist()
    assert made.splits() == split_by_subject(subjects, seed=0)
    assert set(made.splits()) == {"train", "validate", "test"}
    assert made.meta.policies["split"] == "by patient, 0.7/0.1/0.2 of them, seed 0"
    blank = [row | {"split": ""} for row in base()]
    assert read(save(place, blank)).meta.hash == made.meta.hash
    other = read(save(place, rows), "seed=1", "fractions=[0.5, 0.0, 0.5]")
    assert "validate" not in other.splits()


def test_spellings_of_splits_are_understood(place):
    spelled = ["Train", "TRAIN", "train ", "train", "val", "valid", "test", ""]
    rows = [row | {"split": one} for row, one in zip(base(), spelled, strict=True)]
    assert read(save(place, rows)).splits() == ["train"] * 4 + ["validate"] * 2 + ["test", None]


def test_a_split_of_no_known_name_is_told_by_row_and_column_and_never_quoted(place):
    rows = [{"SET": row["split"], **without([row], "split")[0]} for row in base()]
    rows[2]["SET"] = "No effusion in the left hemithorax."
    rows[5]["SET"] = "0012"
    message = refused(save(place, rows), "columns.split=set")
    allowed = "train, validate, test, val, valid, validation or blank"
    assert f"the column `SET` is none of {allowed}: rows 4, 7" in message
    assert "hemithorax" not in message
    assert "0012" not in message


def test_a_patient_in_two_splits_is_refused_by_count(place):
    rows = base()
    rows[0]["split"] = "test"
    assert "1 patients are in more than one split" in refused(save(place, rows))


def test_without_patients_the_manifest_says_so(place):
    rows = without(base(), "subject_id", "study_id", "split")
    made = read(save(place, rows))
    assert made.images["subject_id"].to_pylist() == made.keys
    assert made.meta.notes == [spreadsheet.NOTE_NO_PATIENTS]


def test_without_patients_studies_stay_together(place):
    rows = [row | {"study_id": row["subject_id"]} for row in base()]
    rows[7]["study_id"] = ""
    made = read(save(place, without(rows, "subject_id", "split")))
    assert made.images["subject_id"].to_pylist() == [
        "000", "000", "001", "001", "002", "002", "003", "k7",
    ]  # fmt: skip
    assert made.meta.notes == [spreadsheet.NOTE_STUDIES]


def test_labels_are_findings_or_classes(place):
    rows = base()
    for n, row in enumerate(rows):
        row["label:Edema"] = ("1.0", "0", "-1.0", "")[n % 4]
        row["Finding"] = ("normal", "2", "10", "none")[n % 4]
        row["label:class"] = str(n % 2)
        row["stage"] = str(n % 3)
        row["ignored"] = "x"
    made = read(save(place, rows), "labels=[Finding, stage]")
    assert made.label_names == ["Edema", "Finding", "class", "stage"]
    assert made.images["label:Edema"].to_pylist()[:4] == [1, 0, -1, None]
    assert made.images["label:Edema"].type == pa.int8()
    assert made.images["label:Finding"].to_pylist()[:4] == ["normal", "2", "10", "none"]
    assert made.images["label:class"].to_pylist()[:2] == ["0", "1"]
    assert made.images["label:stage"].to_pylist()[:3] == ["0", "1", "2"]
    assert made.meta.policies["label:Edema"].startswith("1 present, 0 absent, -1 uncertain")
    assert made.meta.policies["label:class"].startswith("classes")


def test_findings_in_parquet_may_be_floats_with_gaps(place):
    table = pa.Table.from_pylist(base())
    edema = pa.array([1.0, 0.0, -1.0, None] * 2)
    pq.write_table(table.append_column("label:Edema", edema), place / "t.parquet")
    assert read(place / "t.parquet").images["label:Edema"].to_pylist()[:4] == [1, 0, -1, None]


def test_a_finding_outside_its_values_is_refused_by_number(place):
    rows = [row | {"label:Edema": value} for row, value in zip(base(), "10210210", strict=True)]
    rows[4]["label:Edema"] = "-1"
    message = refused(save(place, rows))
    assert "`label:Edema` holds -1, so it should hold 1, 0 and -1 only: rows 4, 7" in message


def test_an_empty_label_column_labels_nothing(place):
    made = read(save(place, [row | {"label:Edema": ""} for row in base()]))
    assert made.images["label:Edema"].to_pylist() == [None] * NUM


def test_masks_and_sources_are_taken(place, capsys):
    rows = [
        row | {"mask_path": "masks\\m.png" if n else "", "source": "here" if n else ""}
        for n, row in enumerate(base())
    ]
    (place / "masks").mkdir()
    Image.new("L", (4, 3), 255).save(place / "masks" / "m.png")
    made = read(save(place, rows))
    masks = made.images["mask"].to_pylist()
    assert masks[:2] == [None, "file:masks/m.png"]
    assert decode_mask(masks[1], Path(made.meta.image_root)).all()
    assert "mask_path" not in made.images.column_names
    assert "mask's file" not in capsys.readouterr().err
    (place / "masks" / "m.png").unlink()
    read(save(place, rows))
    assert "the mask's file is missing: rows 3, 4, 5, 6, 7 and 2 more" in capsys.readouterr().err
    outside = refused(save(place, [row | {"mask_path": "../m.png"} for row in base()]))
    assert "`mask` names no file below the image root: rows 2, 3, 4" in outside
    assert made.images["source"].to_pylist()[:2] == ["spreadsheet", "here"]


def test_a_missing_column_is_named_with_the_nearest(place):
    rows = [{**without([row], "image_path")[0], "img_path": row["image_path"]} for row in base()]
    path = save(place, rows)
    message = refused(path)
    assert "the column `image_path` is missing; did you mean `img_path`" in message
    assert "table.csv" in message
    assert "--set columns.image_path=NAME" in message
    assert (
        read(path, "columns.image_path=img_path").meta.hash == read(save(place, base())).meta.hash
    )


def test_everything_wrong_with_the_columns_is_said_at_once(place):
    rows = [row | {"text": "t", "Key": "x"} for row in base()]
    message = refused(
        save(place, rows), "labels=[vew_position]", "columns={imge: a, source: origin}"
    )
    assert "`key` and `Key` differ only in case or blanks" in message
    assert "both `report` and `text` are there" in message
    assert "the column `vew_position` is missing; did you mean `view_position`" in message
    assert "`columns.imge`: unknown field; did you mean `image_path`" in message
    assert "the column `origin` is missing" in message


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        (("label:Edema", "Edema"), "labels=[Edema]"),
        (("label:Edema", "Label: Edema"), "labels=[]"),
        (("label:Edema", "LABEL: edema"), "labels=[]"),
    ],
)
def test_two_columns_of_one_label_are_refused_by_name(place, columns, labels):
    rows = [row | dict.fromkeys(columns, "1") for row in base()]
    message = refused(save(place, rows), labels)
    assert f"the columns `{columns[0]}` and `{columns[1]}` are the same label" in message


def test_a_label_that_is_named_twice_is_one(place):
    path = save(place, [row | {"label:Edema": "1"} for row in base()])
    assert read(path, "labels=['label:Edema', 'LABEL:EDEMA']").label_names == ["Edema"]


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        (["k0", "images/p0/0.png", "train"], 2),
        (["pat7", "0012", "train"], 2),
        (
            [
                "pat7",
                "train",
                "The heart is normal in size. The lungs are clear, without effusion.",
            ],
            3,
        ),
    ],
)
def test_a_table_without_names_is_refused_and_its_first_row_not_quoted(place, row, cell):
    (place / "bare.csv").write_text(",".join(f'"{value}"' for value in row) + "\n")
    message = refused(place / "bare.csv")
    what = f"the first row looks like data, not like names of columns: cell {cell}"
    assert what in message.splitlines()[0]
    assert not [value for value in row if value in message.replace(", split,", "")]


def test_of_two_text_columns_one_can_be_chosen(place):
    path = save(place, [row | {"text": "t"} for row in base()])
    assert read(path, "columns.text=text").unique_texts()[1] == ["t"]


def test_a_table_without_images_is_no_manifest(place):
    path = place / "table.csv"
    path.write_text("key,image_path\n")
    assert "no image is left" in refused(path)


def test_a_key_that_cannot_be_is_refused_by_row_number(place):
    rows = base()
    rows[5]["key"] = "a\tb"
    rows[6]["key"] = "x" * 129
    message = refused(save(place, rows))
    assert "`key` holds a control character: row 7" in message
    assert "`key` is longer than 128 bytes: row 8" in message


def test_a_folder_is_no_table(place):
    with pytest.raises(UsageError, match="a table is needed, this is a folder"):
        read(place)


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="`label`: unknown key; did you mean `labels`"):
        load_config(spreadsheet.Options, overrides=["label=x"])


@pytest.mark.parametrize("marked", ["table", "images"])
def test_a_synthetic_tree_is_said_to_be_one(place, tmp_path, marked):
    (tmp_path / "tables").mkdir()
    path = save(tmp_path / "tables", base())
    (path.parent if marked == "table" else place).joinpath("SYNTHETIC.txt").touch()
    made = read(path, f"image_root={place}")
    assert made.meta.synthetic
    assert made.meta.notes[0].startswith("synthetic stand-in")


def test_folders_with_blanks_and_accents_work(tmp_path):
    place = tmp_path / "a b (1)" / "\u00fc"
    for row in base():
        path = place / row["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
    assert len(read(save(place, base())).keys) == NUM


def test_reports_are_cut_into_sentences_when_asked(place):
    path = save(place, base())
    manifest = read(path, "text_unit=sentence")
    assert manifest.texts.num_rows == 2 * NUM
    texts = {row["text"] for row in manifest.texts.to_pylist() if row["key"] == "k3"}
    assert texts == {"Study 3.", "Clear, no effusion."}
    assert len(manifest.unique_texts()[0]) == NUM + 1
    assert manifest.meta.hash != read(path, out="whole").meta.hash
    assert "there is no text to cut" in refused(
        save(place, without(base(), "report"), "silent.csv"), "text_unit=sentence"
    )
