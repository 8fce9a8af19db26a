"""ChestX-ray14 from synthetic trees whose truth is known, and from tables spoiled by hand."""

import shutil
from pathlib import Path

import pytest
from contracts.dataset_contract import DatasetContract
from PIL import Image

from featcache.config import load_config, read_json
from featcache.datasets import nih
from featcache.errors import ConfigError, ManifestError
from featcache.manifest.files import glance
from featcache.manifest.masks import decode_mask
from featcache.manifest.tree import SYNTHETIC_MARK, SYNTHETIC_NOTE
from featcache.synth.registry import synthesize


@pytest.fixture(scope="module")
def original(draw_tree) -> Path:
    return draw_tree("nih").path


@pytest.fixture(scope="module")
def truth(original) -> dict:
    return read_json(original.with_name("tree.truth.json"))["images"]


@pytest.fixture
def tree(original, tmp_path) -> Path:
    shutil.copy(original.with_name("tree.truth.json"), tmp_path)
    return Path(shutil.copytree(original, tmp_path / "tree"))


def read(tree: Path, *settings):
    options = load_config(nih.Options, overrides=settings)
    return nih.read(tree, tree.with_name("made") / "m", options=options)


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return nih

    @pytest.fixture
    def source(self, original):
        return original

    @pytest.fixture
    def options(self):
        return nih.Options()


def test_rows_labels_and_patients_are_those_of_the_truth(tree, truth):
    made = read(tree)
    there = {key: one for key, one in truth.items() if "missing" not in one["odd"]}
    assert made.keys == sorted(there)
    for row in made.images.to_pylist():
        one = there[row["key"]]
        assert row["subject_id"] == row["key"][:8]
        assert row["view_position"] == one["view"]
        assert {name for name in nih.LABELS if row[f"label:{name}"]} == set(one["findings"])
        assert row["label:No Finding"] == int(not one["findings"])
        assert (row["split"] == "test") == one["is_test"]
    assert set(made.splits()) == {"train", "validate", "test"}
    assert nih.NOTE_SPLIT not in made.meta.notes
    assert made.meta.notes == [SYNTHETIC_NOTE]
    assert len((made.folder / "missing_files.txt").read_text().split()) == 1


@pytest.mark.parametrize("switch", ["table-2017", "one-folder"])
def test_the_older_table_and_other_folders_change_nothing(tree, tmp_path, switch):
    made = read(tree)
    other = read(synthesize("nih", tmp_path / "other" / "t", switches=[switch]).path)
    names = [name for name in made.images.column_names if name != "image_path"]
    assert other.images.select(names).equals(made.images.select(names))


def test_of_an_image_that_lies_in_two_folders_the_first_is_taken(tree):
    path = next(tree.glob("images_002/images/*.png"))
    (tree / "images").mkdir()
    shutil.copy(path, tree / "images" / path.name)
    made = read(tree)
    paths = dict(zip(made.keys, made.images["image_path"].to_pylist(), strict=True))
    assert paths[path.name] == f"images/{path.name}"
    assert sum(one.startswith("images/") for one in paths.values()) == 1


def test_without_the_lists_the_splits_are_ours_and_said_to_be(tree):
    (tree / "test_list.txt").unlink()
    made = read(tree)
    assert nih.NOTE_SPLIT in made.meta.notes
    assert made.meta.policies["split"] == "by patient, 0.7/0.1/0.2 of them, seed 0"
    asked = read(tree, "split=patient")
    assert asked.meta.hash == made.meta.hash
    assert nih.NOTE_SPLIT not in asked.meta.notes


def test_images_in_no_list_are_dropped_and_in_both_refused(tree):
    train, test = tree / "train_val_list.txt", tree / "test_list.txt"
    _, *rest = train.read_text().split("\n")
    train.write_text("\r\n".join(rest))
    assert read(tree).meta.funnel[-1].dropped == {"in no official list": 1}
    test.write_text(test.read_text() + "\n" + rest[0])
    with pytest.raises(ManifestError, match="1 images are in both official lists"):
        read(tree)
    test.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="official list cannot be read"):
        read(tree)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("View Position", "View", "no column `View Position`"),
        ("00090001_000.png", "90001_000.png", "`Image Index` is not `00000001_000.png`: row 2"),
        (",90001,", ",90002,", "`Patient ID` is not the number in `Image Index`: row 2"),
        ("No Finding", "No Finding|Mass", "names No Finding beside a finding: row"),
        ("No Finding", "Infiltrate", "`Finding Labels` names none of Atelectasis"),
    ],
)
def test_a_table_that_is_not_what_it_should_be(tree, old, new, message):
    path = tree / "Data_Entry_2017_v2020.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ManifestError, match=message):
        read(tree)


def test_patient_ids_with_leading_zeros_are_the_same(tree):
    before = read(tree).meta.hash
    path = tree / "Data_Entry_2017_v2020.csv"
    path.write_text(path.read_text().replace(",900", ",000900"))
    assert read(tree).meta.hash == before


def test_repeated_rows_missing_table_and_missing_images(tree):
    path = tree / "Data_Entry_2017_v2020.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert read(tree).meta.funnel[1].dropped == {"identical row": 1}
    other = lines[1].replace(",PA,", ",XX,").replace(",AP,", ",PA,").replace(",XX,", ",AP,")
    path.write_text("\n".join([*lines, other]) + "\n")
    with pytest.raises(ManifestError, match="the same `Image Index` and contradict each other"):
        read(tree)
    path.write_text("\n".join(lines) + "\n")
    for folder in tree.glob("images_*"):
        shutil.rmtree(folder)
    with pytest.raises(ManifestError, match=r"none of the \d+ listed images is there"):
        read(tree)
    path.unlink()
    with pytest.raises(ManifestError, match=r"Data_Entry_2017.csv\) is missing"):
        read(tree)


def test_completeness(tree, monkeypatch, truth):
    made = read(tree)
    have = f"a part, or an unknown version: {len(truth)} of 112,120 images, 60 of 30,805 patients"
    assert made.meta.policies["table"] == have
    monkeypatch.setattr(nih, "PUBLISHED", {"images": len(truth), "patients": 60})
    assert read(tree).meta.policies["table"] == "complete, as published"


def test_a_real_tree_carries_the_notes_of_the_real_set_and_no_other(tree):
    (tree / SYNTHETIC_MARK).unlink()
    made = read(tree)
    assert made.meta.notes == [nih.NOTE_TERMS, nih.NOTE_LABELS, nih.NOTE_OVERLAP]
    assert not made.meta.synthetic


def test_an_empty_file_counts_as_none_unless_another_folder_has_it(tree):
    first, second, *_ = sorted(tree.glob("images_002/images/*.png"))
    (tree / "images").mkdir()
    shutil.move(second, tree / "images_001" / "images" / second.name)
    second.write_bytes(b"")
    (tree / "images" / second.name).write_bytes(b"")
    first.write_bytes(b"")
    made = read(tree)
    step = next(step for step in made.meta.funnel if step.name == "images with a file")
    assert step.dropped == {"missing file": 1, "file of zero bytes": 1}
    assert first.name not in made.keys
    assert first.name in (made.folder / "missing_files.txt").read_text()
    paths = dict(zip(made.keys, made.images["image_path"].to_pylist(), strict=True))
    assert paths[second.name] == f"images_001/images/{second.name}"


def test_two_columns_that_differ_in_case_alone_are_refused(tree):
    path = tree / "Data_Entry_2017_v2020.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header}, finding labels", *(f"{line},x" for line in lines)]))
    with pytest.raises(ManifestError, match="`Finding Labels` and ` finding labels` have the same"):
        read(tree)


def box_table(tree: Path, *rows: str) -> None:
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows]
    (tree / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("finding", ["Effusion", "Infiltration"])
def test_boxes_of_one_finding_become_masks_in_the_size_of_each_picture(tree, finding):
    boxes = read_json(tree.with_name("tree.truth.json"))["boxes"]
    made = read(tree, f"boxes={finding}", "split=patient")
    number = 0
    for row in made.images.to_pylist():
        box = boxes.get(row["key"], {}).get(finding)
        assert (row["mask"] is None) == (box is None)
        if box is not None:
            number += 1
            mask = decode_mask(row["mask"], tree)
            side = glance(str(tree / row["image_path"])).height
            assert mask.shape == (side, side)
            left, top, width, height = (one * side / 1024 for one in box)
            assert mask.sum() == pytest.approx(width * height, abs=2 * (width + height) + 4)
            centre = int(top + height / 2), int(left + width / 2)
            assert mask[centre]
    assert number > 0
    assert made.meta.policies["boxes"].endswith(f"{number} here")
    assert made.meta.policies["boxes"].startswith(f"{finding}: ")


def test_without_the_setting_boxes_are_not_read(tree):
    (tree / "BBox_List_2017.csv").write_text("nothing")
    made = read(tree)
    assert "mask" not in made.images.column_names
    assert made.meta.policies["boxes"] == "not read"


def test_several_boxes_trailing_commas_and_unknown_images(tree, truth):
    name = next(key for key, one in truth.items() if "Mass" in one["findings"])
    box_table(tree, f"{name},Mass,0,0,10,20,,,", "", f" {name} , Mass ,1000.5,0.0,23.5,1024",
              "00000001_000.png,Mass,1,1,2,2", f"{name},Nodule,1,1,2,2")  # fmt: skip
    made = read(tree, "boxes=Mass")
    mask = dict(zip(made.keys, made.images["mask"].to_pylist(), strict=True))
    assert [key for key, text in mask.items() if text] == [name]
    assert mask[name].count(";") == 1
    assert made.meta.policies["boxes"] == "Mass: 3 boxes in 2 images, 1 here"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("{name},Effusion,1,1,2", "a row is not `image,finding,x,y,w,h`: row 3"),
        ("{name},Effusion,1,1,2,2,2", "a row is not `image,finding,x,y,w,h`: row 3"),
        ("1_000.png,Effusion,1,1,2,2", "`Image Index` is not `00000001_000.png`: row 3"),
        ("{name},Fibrosis,1,1,2,2", "`Finding Label` is none of Atelectasis"),
        ("{name},Effusion,x,1,2,2", "`Bbox` holds what is no number: row 3"),
        ("{name},Effusion,1,1,0,2", "`Bbox` has no area: row 3"),
        ("{name},Effusion,nan,1,2,2", "`Bbox` has no area: row 3"),
        ("{name},Effusion,1000,1,25,2", "`Bbox` leaves its image of 1024 x 1024: row 3"),
        ("{name},Effusion,-1,1,25,2", "`Bbox` leaves its image of 1024 x 1024: row 3"),
        ("{other},Effusion,1,1,2,2", "boxes around Effusion in images that are not labelled"),
    ],
)
def test_boxes_that_cannot_be_are_refused_by_row(tree, truth, cells, message):
    name = next(key for key, one in truth.items() if "Effusion" in one["findings"])
    other = next(key for key, one in truth.items() if "Effusion" not in one["findings"])
    box_table(tree, f"{name},Effusion,1,1,2,2", cells.format(name=name, other=other))
    with pytest.raises(ManifestError, match=message):
        read(tree, "boxes=Effusion")


def test_a_missing_or_another_table_of_boxes(tree, tmp_path):
    path = tree / "BBox_List_2017.csv"
    path.write_text("Image,Label,x,y,w,h\n")
    with pytest.raises(ManifestError, match="the header is not `Image Index,Finding Label"):
        read(tree, "boxes=Mass")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="cannot be read as CSV"):
        read(tree, "boxes=Mass")
    path.unlink()
    with pytest.raises(ManifestError, match=r"the table BBox_List_2017.csv is missing"):
        read(tree, "boxes=Mass")
    with pytest.raises(ConfigError, match="boxes"):
        read(tree, "boxes=Fibrosis")


def test_a_picture_with_a_box_has_to_be_square(tree):
    made = read(tree, "boxes=Mass")
    row = next(row for row in made.images.to_pylist() if row["mask"])
    Image.new("L", (64, 80), 9).save(tree / row["image_path"])
    with pytest.raises(ManifestError, match=r"boxes in pictures that are no squares: row \d+"):
        read(tree, "boxes=Mass")
    (tree / row["image_path"]).write_bytes(b"no picture")
    again = read(tree, "boxes=Mass")
    assert dict(zip(again.keys, again.images["mask"].to_pylist(), strict=True))[row["key"]] is None
