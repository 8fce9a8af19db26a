"""ChestX-ray14 from synthetic trees whose truth is known, and from tables spoiled by hand."""

import shutil
from pathlib import Path

import pytest
from contracts.dataset_contract import DatasetContract

from featcache.config import load_config, read_json
from featcache.datasets import nih
from featcache.errors import ManifestError
from featcache.synth.registry import synthesize


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return synthesize("nih", tmp_path_factory.mktemp("synth") / "tree").path


@pytest.fixture(scope="module")
def truth(original) -> dict:
    return read_json(original.with_name("tree.truth.json"))["images"]


@pytest.fixture
def tree(original, tmp_path) -> Path:
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
    assert nih.NOTE_OVERLAP in made.meta.notes
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
