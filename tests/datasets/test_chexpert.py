"""CheXpert from a synthetic tree whose truth is known, and from tables spoiled by hand."""

import shutil
from pathlib import Path

import pytest
from contracts.dataset_contract import DatasetContract

from featcache.config import load_config, read_json
from featcache.datasets import chexpert
from featcache.errors import ManifestError
from featcache.synth.registry import synthesize


@pytest.fixture(scope="module")
def original(draw_tree) -> Path:
    return draw_tree("chexpert").path


@pytest.fixture(scope="module")
def truth(original) -> dict:
    return read_json(original.with_name("tree.truth.json"))["images"]


@pytest.fixture
def tree(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tree"))


def read(tree: Path, *settings):
    options = load_config(chexpert.Options, overrides=settings)
    return chexpert.read(tree, tree.with_name("made") / "m", options=options)


def edit(tree: Path, old: str, new: str, name="train.csv") -> None:
    path = tree / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return chexpert

    @pytest.fixture
    def source(self, original):
        return original

    @pytest.fixture
    def options(self):
        return chexpert.Options()


def test_rows_labels_views_and_patients_are_those_of_the_truth(tree, truth):
    made = read(tree, "views=all")
    there = {key: one for key, one in truth.items() if "missing" not in one["odd"]}
    assert made.keys == sorted(there)
    seen = set()
    for row in made.images.to_pylist():
        one = there[row["key"]]
        assert row["view_position"] == one["view"]
        assert row["key"].split("/")[1] == row["subject_id"]
        assert row["study_id"] == "/".join(row["key"].split("/")[1:3])
        found = {name: row[f"label:{name}"] for name in chexpert.LABELS}
        assert found == one["labels"]
        seen |= set(found.values())
    assert seen == {1, 0, -1, None}
    odd = {name for one in truth.values() for name in one["odd"]}
    assert odd == {"missing", "frontal called LL", "frontal called RL"}


def test_frontal_is_what_the_column_says_also_where_the_view_is_odd(tree, truth):
    made = read(tree)
    assert set(made.images["view_position"].to_pylist()) == {"AP", "PA", "LL", "RL"}
    lateral = sum(one["view"] == "LATERAL" for one in truth.values())
    dropped = {k: v for step in made.meta.funnel for k, v in step.dropped.items()}
    assert dropped == {"missing file": 1, "another view": lateral}
    assert len((made.folder / "missing_files.txt").read_text().split()) == 1


def test_valid_is_test_and_validation_comes_from_train_by_patient(tree):
    made = read(tree, "validate_fraction=0.3")
    for row in made.images.to_pylist():
        assert (row["split"] == "test") == row["key"].startswith("valid/")
    assert {"train", "validate", "test"} == set(made.splits())
    assert chexpert.NOTE_VALIDATE in made.meta.notes
    assert made.meta.hash != read(tree, "validate_fraction=0.3", "seed=1").meta.hash


def test_published_splits_are_kept_on_request(tree):
    made = read(tree, "split=published")
    assert set(made.splits()) == {"train", "validate"}
    assert chexpert.NOTE_VALIDATE not in made.meta.notes


def test_a_test_table_of_paths_and_labels_is_the_test_split(tmp_path):
    tree = synthesize("chexpert", tmp_path / "t", switches=["test-table", "duplicate-row"]).path
    made = read(tree)
    for row in made.images.to_pylist():
        assert (row["split"] == "test") == row["key"].startswith("test/")
        if row["key"].startswith("valid/"):
            assert row["split"] == "validate"
    assert made.meta.funnel[1].dropped == {"identical row": 1}


def test_paths_may_begin_with_either_name_or_none(tree):
    before = read(tree).meta.hash
    for name in ("train.csv", "valid.csv"):
        path = tree / name
        path.write_text(path.read_text().replace("CheXpert-v1.0-small/", "CheXpert-v1.0/"))
    assert read(tree).meta.hash == before
    for name in ("train.csv", "valid.csv"):
        path = tree / name
        path.write_text(path.read_text().replace("CheXpert-v1.0/", ""))
    assert read(tree).meta.hash == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Pleural Other", "Other", "no column `Pleural Other`"),
        ("/patient9", "/person9", "`Path` is not `train/patient00001/study1/view1_frontal.jpg`"),
        ("-1.0", "2.0", r"is none of 1.0, 0.0, -1.0, blank: row \d+"),
        ("Frontal/Lateral", "View", "no column `Frontal/Lateral`"),
        (",Frontal,", ",,", "`Frontal/Lateral` is neither of the two: row 2"),
    ],
)
def test_a_table_that_is_not_what_it_should_be(tree, old, new, message):
    edit(tree, old, new)
    with pytest.raises(ManifestError, match=message) as caught:
        read(tree)
    assert "patient90" not in str(caught.value)


def test_rows_are_counted_with_blank_lines(tree):
    edit(tree, "\n", "\n\n\n")
    edit(tree, ",Frontal,", ",Oblique,")
    with pytest.raises(ManifestError, match=r"neither of the two: row 4\n"):
        read(tree)


def test_contradicting_rows_and_missing_tables_and_images(tree):
    lines = (tree / "train.csv").read_text().splitlines()
    other = lines[1].rpartition(",")[0] + ",-1.0"
    (tree / "train.csv").write_text("\n".join([*lines, other]) + "\n")
    with pytest.raises(ManifestError, match="the same `Path` and contradict each other"):
        read(tree)
    (tree / "train.csv").write_text("\n".join(lines) + "\n")
    shutil.rmtree(tree / "train")
    shutil.rmtree(tree / "valid")
    with pytest.raises(ManifestError, match=r"none of the \d+ listed images is there"):
        read(tree)
    (tree / "valid.csv").unlink()
    with pytest.raises(ManifestError, match=r"the table valid.csv is missing"):
        read(tree)


def test_completeness_and_terms(tree, monkeypatch):
    assert read(tree).meta.policies["tables"].startswith("a part, or an unknown version: ")
    rows = [len((tree / f"{name}.csv").read_text().splitlines()) - 1 for name in chexpert.PUBLISHED]
    monkeypatch.setattr(chexpert, "PUBLISHED", dict(zip(chexpert.PUBLISHED, rows, strict=True)))
    assert read(tree).meta.policies["tables"].startswith("complete")
    (tree / "SYNTHETIC.txt").unlink()
    assert "Stanford" in read(tree).meta.notes[0]


def test_an_empty_file_is_dropped_and_listed(tree):
    path = sorted((tree / "train").rglob("*_frontal.jpg"))[0]
    path.write_bytes(b"")
    made = read(tree)
    step = next(step for step in made.meta.funnel if step.name == "images with a file")
    assert step.dropped == {"missing file": 1, "file of zero bytes": 1}
    listed = (made.folder / "missing_files.txt").read_text().split()
    assert path.relative_to(tree).as_posix() in listed


def test_two_columns_that_differ_in_case_alone_are_refused(tree):
    edit(tree, "Sex", "EDEMA ")
    with pytest.raises(ManifestError, match=r"`EDEMA ` and `Edema` have the same name"):
        read(tree)
