"""RSNA from tables made by hand and from a synthetic tree whose truth is known."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from contracts.dataset_contract import DatasetContract
from sklearn.model_selection import train_test_split

from featcache.config import load_config, read_json
from featcache.datasets import rsna
from featcache.datasets.challenge import rsna_splits
from featcache.datasets.challenge.rsna_tables import CLASS_INFO as CLASS_INFO_FILE
from featcache.datasets.challenge.rsna_tables import LABELS_FILE
from featcache.encoders.decode import decode_image
from featcache.encoders.preprocessing import Preprocessing
from featcache.errors import ConfigError, ImageError, ManifestError
from featcache.manifest.masks import decode_mask
from featcache.synth.secondary_capture import Header, encode_dicom

NORMAL, ABNORMAL, OPACITY = "Normal", "No Lung Opacity / Not Normal", "Lung Opacity"
LABELS = "patientId,x,y,width,height,Target\n"
CLASS_INFO = "patientId,class\n"
SHAPE = (8, 12)
READABLE = ("truncated", "copy of another file", "no view", "age over 120", "black")


def uuid(number):
    return f"{number:08x}-0000-0000-0000-{number:012x}"


def make(folder, rows, classes=None, mapping=None, shape=SHAPE):
    """A tree of rows `(number, box or None)`; the class is Normal where there is no box."""
    images = folder / rsna.TRAIN_FOLDER
    images.mkdir(parents=True)
    lines, infos = [], []
    for number, box in rows:
        cells = ",".join(f"{side:.1f}" for side in box) if box else ",,,"
        lines.append(f"{uuid(number)},{cells},{int(box is not None)}\n")
        infos.append(f"{uuid(number)},{OPACITY if box else NORMAL}\n")
        header = Header(uuid(number), "1.2.1", "1.2.2", f"1.2.3.{number}", "PA", "F", "62", 0.1)
        (images / f"{uuid(number)}.dcm").write_bytes(
            encode_dicom(np.full(shape, number, np.uint8), header)
        )
    (folder / LABELS_FILE).write_text(LABELS + "".join(lines))
    (folder / CLASS_INFO_FILE).write_text(CLASS_INFO + "".join(classes or infos))
    if mapping is not None:
        (folder / rsna.MAPPING).write_text(json.dumps(mapping))
    return folder


def read(folder, *settings, out="m"):
    options = load_config(rsna.Options, overrides=settings)
    return rsna.read(folder, folder.parent / out / "made", options=options)


def refused(folder, *settings):
    with pytest.raises(ManifestError) as caught:
        read(folder, *settings)
    assert uuid(1)[:8] not in str(caught.value)
    return str(caught.value)


def rewrite(folder, old, new, table=LABELS_FILE):
    path = folder / table
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


BOX = (2.0, 1.0, 4.0, 3.0)
ROWS = [(9, BOX), (1, None), (9, (5.0, 2.0, 7.0, 6.0)), *((n, None) for n in range(2, 8)),
        (8, (0.0, 0.0, 12.0, 8.0))]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    return make(tmp_path / "rsna", ROWS)


@pytest.fixture(scope="module")
def synthetic(rsna_tree):
    return rsna_tree


@pytest.fixture(scope="module")
def truth(synthetic):
    return read_json(synthetic.with_name("tree.truth.json"))["images"]


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory):
    return rsna.read(synthetic, tmp_path_factory.mktemp("out") / "m", options=rsna.Options())


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return rsna

    @pytest.fixture
    def source(self, synthetic):
        return synthetic

    @pytest.fixture
    def options(self):
        return rsna.Options(unlabelled=True)


def kept(truth, folder="train"):
    """Images that have to be in the manifest, by what the generator says."""
    return {
        key: one
        for key, one in truth.items()
        if one["folder"] == folder and all(odd in (*READABLE, "not in the mapping")
                                           for odd in one["odd"])
    }  # fmt: skip


def test_the_synthetic_tree_is_read_as_its_truth_says(made, truth):
    expected = kept(truth)
    assert made.keys == sorted(expected)
    for row in made.images.to_pylist():
        one = expected[row["key"]]
        assert row["label:class"] == one["class"]
        assert row["label:pneumonia"] == int(one["class"] == OPACITY) == int(bool(one["boxes"]))
        mask = np.zeros((128, 128), bool)
        for left, top, width, height in one["boxes"]:
            mask[top : top + height, left : left + width] = True
        found = decode_mask(row["mask"], made.folder)
        assert np.array_equal(found if found is not None else np.zeros_like(mask), mask)
        assert (row["view_position"] is None) == ("no view" in one["odd"])
    assert made.meta.synthetic
    assert made.meta.notes[0].startswith("synthetic stand-in")
    assert rsna.NOTE_UNKNOWN not in made.meta.notes


def test_every_odd_file_is_dropped_for_its_reason_or_kept(made, truth, synthetic):
    odd = defaultdict(list)
    for key, one in truth.items():
        for name in one["odd"]:
            odd[name].append(key)
    steps = {step.name: step for step in made.meta.funnel}
    boxes = sum(max(len(one["boxes"]), 1) for one in truth.values() if one["folder"] == "train")
    boxes -= len(odd["file without a row"])
    assert made.meta.funnel[0].count == boxes
    listed = [key for key, one in truth.items() if one["folder"] == "train"]
    listed = [key for key in listed if key not in odd["file without a row"]]
    assert steps["images"].dropped == {"further box of an image": boxes - len(listed)}
    assert steps["images with a file"].dropped == {"missing file": len(odd["missing file"])}
    assert steps["images with a DICOM header"].dropped == {
        "file is no DICOM": len(odd["PNG named dcm"]),
        "file of zero bytes": len(odd["zero bytes"]),
    }
    assert all(odd[name] for name in (*READABLE, "missing file", "zero bytes", "PNG named dcm",
                                      "file without a row", "not in the mapping"))  # fmt: skip
    preprocessing = Preprocessing(image_size=(64, 64), mean=(0.0,), std=(1.0,))
    for name in READABLE:
        for key in odd[name]:
            path = synthetic / rsna.TRAIN_FOLDER / f"{key}.dcm"
            if name == "truncated":
                with pytest.raises(ImageError, match="truncated"):
                    decode_image(path, preprocessing)
            else:
                assert (decode_image(path, preprocessing).max() == 0) == (name == "black")


def test_what_is_odd_is_counted_in_words(synthetic, truth, tmp_path, capsys):
    rsna.read(synthetic, tmp_path / "m", options=rsna.Options())
    printed = capsys.readouterr().err
    odd = Counter(name for one in truth.values() for name in one["odd"])
    assert "not the complete set: " in printed
    assert f"{odd['file without a row']} files of stage_2_train_images are in no table" in printed
    copies = odd["copy of another file"]
    assert f"rsna: {copies} headers have another patient's id than the file's name" in printed
    assert "24 images without labels are not read" in printed
    for split in ("train", "validate", "test"):
        assert f"rsna: {split} has an opacity in " in printed
    assert not any(key in printed for key in truth)


def test_patients_are_those_of_the_mapping_and_stay_together(made, truth):
    rows = made.images.to_pylist()
    persons = {}
    for row in rows:
        one = truth[row["key"]]
        if "not in the mapping" in one["odd"]:
            assert row["subject_id"] == row["key"]
        else:
            assert row["subject_id"] == one["nih_name"][:8]
            persons.setdefault(one["person"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in persons.values())
    assert len(persons) < len(rows) / 2
    share = Counter((row["split"], row["label:class"]) for row in rows)
    for name in (NORMAL, ABNORMAL, OPACITY):
        total = sum(share[split, name] for split in ("train", "validate", "test"))
        assert share["validate", name] == pytest.approx(0.15 * total, abs=7)
        assert share["test", name] == pytest.approx(0.15 * total, abs=7)


def test_without_a_mapping_the_patients_are_said_to_be_unknown(tree):
    made = read(tree)
    assert made.images["subject_id"].to_pylist() == made.keys
    assert rsna.NOTE_UNKNOWN in made.meta.notes
    assert made.meta.policies["patients"] == "unknown, each image by itself"
    assert "image, for patients are unknown, and class" in made.meta.policies["split"]


@pytest.mark.parametrize(
    ("name", "size", "seed", "by_class", "halves"),
    [
        ("mgca-cls", 0.3, 0, False, ("test", "validate")),
        ("mgca-seg", 10_674 / 26_684, 0, False, ("test", "validate")),
        ("benchx", 0.3, 42, True, ("validate", "test")),
    ],
)
def test_published_splits_follow_their_recipe_and_count_shared_patients(
    name, size, seed, by_class, halves, synthetic, truth, tmp_path
):
    made = rsna.read(synthetic, tmp_path / "m", options=rsna.Options(split=name))
    listed = {
        key: bool(one["boxes"])
        for key, one in sorted(truth.items())
        if one["folder"] == "train" and "file without a row" not in one["odd"]
    }

    def cut(ids, share):
        strata = [listed[key] for key in ids] if by_class else None
        return train_test_split(ids, test_size=share, random_state=seed, stratify=strata)

    train, rest = cut(list(listed), size)
    expected = dict.fromkeys(train, "train")
    for half, ids in zip(halves, cut(rest, 0.5), strict=True):
        expected |= dict.fromkeys(ids, half)
    found = dict(zip(made.keys, made.splits(), strict=True))
    assert found == {key: expected[key] for key in made.keys}
    person = {key: (one["person"], "not in the mapping" in one["odd"] and key)
              for key, one in truth.items()}  # fmt: skip
    seen = {person[key] for key, split in found.items() if split == "train"}
    tests = [key for key, split in found.items() if split == "test"]
    shared = sum(person[key] in seen for key in tests)
    assert shared > 0
    note = next(one for one in made.meta.notes if one.startswith("The split"))
    assert f"{shared} of {len(tests)} test images ({shared / len(tests):.1%})" in note
    assert made.images["subject_id"].to_pylist() == made.keys
    assert made.meta.policies["split"].endswith("not the published lists, for other images")


def test_a_complete_set_has_to_give_the_published_lists(monkeypatch, capsys):
    keys = [uuid(n) for n in range(40)]
    targets = {key: str(n % 2) for n, key in enumerate(keys)}
    monkeypatch.setattr(rsna_splits, "NUM_IDS", 40)
    monkeypatch.setattr(rsna_splits, "ALL_IDS", rsna_splits.hash_in_order(keys))
    with pytest.raises(ManifestError, match="came out otherwise than published") as caught:
        rsna_splits.recompute("mgca-cls", keys, targets)
    assert "(train, test, validate)" in str(caught.value)
    train, test, validate = rsna_splits.cut_twice(keys, size=0.3, seed=0)
    hashes = {"train": train, "test": test, "validate": validate}
    hashes = {name: rsna_splits.hash_in_order(ids) for name, ids in hashes.items()}
    recipe = rsna_splits.RECIPES["mgca-cls"]._replace(hashes=hashes)
    monkeypatch.setitem(rsna_splits.RECIPES, "mgca-cls", recipe)
    splits, how = rsna_splits.recompute("mgca-cls", keys, targets)
    assert how.endswith("the published lists, by their hashes")
    assert sorted(splits) == keys
    assert "68.4 % of its test images" in rsna_splits.known_sharing("mgca-cls", splits)[0]
    assert capsys.readouterr().err == ""


def test_a_published_split_without_a_mapping_says_what_is_known(tree):
    notes = read(tree, "split=mgca-cls").meta.notes
    assert rsna.NOTE_UNKNOWN in notes
    assert any("mgca-cls is by image, so that patients have to be assumed" in one for one in notes)
    assert not any("%" in one for one in notes)


def test_boxes_of_one_image_make_one_row_with_one_mask(tree):
    made = read(tree)
    rows = {row["key"]: row for row in made.images.to_pylist()}
    assert len(rows) == 9
    assert rows[uuid(9)]["mask"] == "boxes:8x12:2,1,4,3;5,2,7,6"
    assert rows[uuid(8)]["mask"] == "boxes:8x12:0,0,12,8"
    assert rows[uuid(1)]["mask"] == ""
    assert Counter(row["label:class"] for row in rows.values()) == {NORMAL: 7, OPACITY: 2}
    assert made.meta.funnel[1].dropped == {"further box of an image": 1}
    assert made.meta.policies["labels"].startswith("10 rows, 9 images, 2 with an opacity; publish")


def test_the_order_of_rows_is_of_no_matter(tree, tmp_path):
    other = make(tmp_path / "other" / "rsna", ROWS[::-1])
    for split in ("ours", "mgca-cls"):
        first = read(tree, f"split={split}")
        second = read(other, f"split={split}")
        assert first.meta.hash == second.meta.hash


def test_a_missing_file_moves_no_other_image(tree):
    before = read(tree)
    (tree / rsna.TRAIN_FOLDER / f"{uuid(2)}.dcm").unlink()
    after = read(tree)
    assert after.meta.funnel[2].dropped == {"missing file": 1}
    splits = dict(zip(before.keys, before.splits(), strict=True))
    assert dict(zip(after.keys, after.splits(), strict=True)) == {
        key: split for key, split in splits.items() if key != uuid(2)
    }


def test_images_without_labels_are_read_on_request(synthetic, truth, tmp_path):
    made = rsna.read(synthetic, tmp_path / "m", options=rsna.Options(unlabelled=True))
    rows = [row for row in made.images.to_pylist() if row["mask"] is None]
    assert {row["key"] for row in rows} == set(kept(truth, "test"))
    for row in rows:
        assert (row["split"], row["label:pneumonia"], row["label:class"]) == (None, None, None)
        assert row["image_path"] == f"{rsna.TEST_FOLDER}/{row['key']}.dcm"
    tests = {truth[key]["person"] for key, split in zip(made.keys, made.splits(), strict=True)
             if split == "test"}  # fmt: skip
    seen = sum(truth[row["key"]]["person"] in tests for row in rows)
    assert f"{seen} of the images without labels show a patient of the test split." in (
        made.meta.notes
    )


def test_the_class_table_may_be_missing(tree, capsys):
    (tree / CLASS_INFO_FILE).unlink()
    assert read(tree).label_names == ["pneumonia"]
    assert "there are no three classes" in capsys.readouterr().err


def test_the_same_box_twice_is_counted(tmp_path, capsys):
    made = read(make(tmp_path / "rsna", [*ROWS, (8, (0.0, 0.0, 12.0, 8.0))]))
    assert made.meta.funnel[1].dropped == {"further box of an image": 2}
    assert "1 images have the same box twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{uuid(1)},,,,,0", f"{uuid(9)},,,,,0", "an image has the targets 0 and 1: row 3"),
        (f"{uuid(1)},,,,,0", f"{uuid(1)},1.0,,,,0", "`Target` is 0 and there is a box: row 3"),
        (f"{uuid(1)},,,,,0", f"{uuid(1)},,,,,1", "`Target` is 1 and the box is blank or no b"),
        (f"{uuid(1)},,,,,0", f"{uuid(1)},,,,,", "`Target` is neither 0 nor 1: row 3"),
        (f"{uuid(1)},,,,,0", f"{uuid(1)},,,,0", "row 3 has another number of fields"),
        (f"{uuid(1)},,", "1.0,,", "`patientId` has not the published form: row 3"),
        ("0.0,0.0,12.0,8.0", "0.0,0.0,0.0,8.0", "the box is blank or no box: row 11"),
        ("0.0,0.0,12.0,8.0", "0.0,nan,12.0,8.0", "the box is blank or no box: row 11"),
        ("0.0,0.0,12.0,8.0", "1.0,0.0,12.0,8.0", "a box that leaves the image: row 11"),
        ("0.0,0.0,12.0,8.0", "0.0,-1.0,12.0,8.0", "a box that leaves the image: row 11"),
        ("patientId,x", "patient,x", "no column `patientId`; did you mean `patient`"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_are_refused_by_row(tree, old, new, message):
    rewrite(tree, old, new)
    assert message in refused(tree)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{uuid(1)},Normal", f"{uuid(1)},Lung Opacity", "contradict each other: row 3"),
        (f"{uuid(1)},Normal", f"{uuid(2)},{ABNORMAL}", "an image has two classes: row 5"),
        (f"{uuid(1)},Normal", f"{uuid(1)},normal", "`class` is none of Normal, No Lung"),
        (f"{uuid(1)},Normal\n", "", "1 images of stage_2_train_labels.csv have no class here"),
    ],
)
def test_classes_that_cannot_be_are_refused_by_row(tree, old, new, message):
    rewrite(tree, old, new, CLASS_INFO_FILE)
    assert message in refused(tree)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([{"subset_img_id": uuid(50), "img_id": "00000001_000.png"}], "knows none of the images"),
        ([{"subset_img_id": uuid(1), "img_id": "1.png"}], "entry 1 is not like 00012345_006.png"),
        ([{"subset_img_id": uuid(1)}], "no JSON list of objects"),
        ({"a": 1}, "no JSON list of objects"),
        (
            [{"subset_img_id": uuid(1), "img_id": f"0000000{n}_000.png"} for n in (1, 2)],
            "entry 2 gives an image a second patient",
        ),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(tmp_path, mapping, message):
    assert message in refused(make(tmp_path / "rsna", ROWS, mapping=mapping))


@pytest.mark.parametrize("split", ["mgca-cls", "mgca-seg", "benchx"])
def test_a_published_split_of_too_few_images_is_refused(tmp_path, split):
    few = make(tmp_path / "rsna", [(1, None), (2, BOX)])
    assert "cannot be made of so few: 2" in refused(few, f"split={split}")


def test_a_mapping_elsewhere_is_used_and_a_missing_one_refused(tree, tmp_path):
    path = tmp_path / "elsewhere.json"
    assert "the mapping is missing" in refused(tree, f"nih_mapping={path}")
    assert "the mapping cannot be read" in refused(tree, f"nih_mapping={tmp_path}")
    entries = [{"subset_img_id": uuid(n), "img_id": f"0009000{n // 2}_00{n}.png"}
               for n in range(2, 10)]  # fmt: skip
    path.write_text(json.dumps(entries))
    made = read(tree, f"nih_mapping={path}")
    assert len(set(made.images["subject_id"].to_pylist())) == 5
    assert made.meta.policies["patients"] == "of the NIH mapping; 1 images not in it by themselves"


def test_folders_that_are_none_say_what_is_wanted(tmp_path, tree):
    assert "the table stage_2_train_labels.csv is missing" in refused(tmp_path)
    for path in (tree / rsna.TRAIN_FOLDER).iterdir():
        path.unlink()
    assert "none of the 9 labelled images is there" in refused(tree)


def test_shares_that_leave_no_training_images_are_refused():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        load_config(rsna.Options, overrides=["validate_fraction=0.5", "test_fraction=0.5"])
