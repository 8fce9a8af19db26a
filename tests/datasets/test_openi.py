"""Open-I from synthetic trees of all three forms, whose truth is known, and from spoiled ones."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from contracts.dataset_contract import DatasetContract

from featcache.config import read_json, validate
from featcache.datasets import openi
from featcache.datasets.indiana.reports import Report, parse_report, plain_name
from featcache.errors import ConfigError, ManifestError
from featcache.manifest.splits import split_by_subject
from featcache.synth.registry import synthesize

FORMS = ("dicom", "png", "kaggle")


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("synth")
    return {
        form: synthesize("openi", root / form, switches=() if form == "dicom" else [form]).path
        for form in FORMS
    }


@pytest.fixture(scope="module")
def truth(trees) -> dict:
    return read_json(trees["dicom"].with_name("dicom.truth.json"))["reports"]


@pytest.fixture
def tree(trees, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trees["png"], tmp_path / "tree"))


def read_tree(tree: Path, out: Path, **options):
    return openi.read(tree, out / "m", options=validate(openi.Options, options))


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return openi

    @pytest.fixture(params=FORMS)
    def source(self, trees, request):
        return trees[request.param]

    @pytest.fixture
    def options(self):
        return openi.Options()


def with_text(report: dict) -> bool:
    return not {"neither section", "damaged file"} & set(report["odd"])


def expected_keys(truth: dict, form: str, *, frontal: bool) -> list[str]:
    keys = []
    for report in truth.values():
        for key, image in report["images"].items():
            is_wanted = {
                "dicom": image["view"] in ("AP", "PA"),
                "png": True,
                "kaggle": image["is_frontal"],
            }[form]
            is_there = "missing" not in image["odd"]
            text = with_text(report) or (form == "kaggle" and "damaged file" in report["odd"])
            if is_there and text and (is_wanted or not frontal):
                keys.append(key)
    return sorted(keys)


@pytest.mark.parametrize("frontal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_images_with_file_view_and_text(trees, truth, tmp_path, form, frontal):
    made = read_tree(trees[form], tmp_path, views="frontal" if frontal else "all")
    assert made.keys == expected_keys(truth, form, frontal=frontal)
    assert (openi.NOTE_NO_VIEWS in made.meta.notes) == (form == "png")
    assert (openi.NOTE_VIEWS in made.meta.notes) == (form == "dicom")


def test_every_odd_case_is_in_the_tree(truth):
    odd = {name for report in truth.values() for name in report["odd"]}
    odd |= {name for one in truth.values() for i in one["images"].values() for name in i["odd"]}
    assert odd == {
        "no image", "one image", "three images", "four images", "five images", "no findings",
        "no impression", "neither section", "identical text", "identical letters", "not indexed",
        "damaged file", "removed words", "blank view", "missing", "LARGE LATERAL", "RL",
        "MONOCHROME1", "MONOCHROME2",
    }  # fmt: skip
    numbers = Counter(len(report["images"]) for report in truth.values())
    assert set(numbers) == {0, 1, 2, 3, 4, 5}


def test_what_was_dropped_is_counted_and_named(trees, truth, tmp_path, capsys):
    made = read_tree(trees["dicom"], tmp_path, views="all")
    dropped = {k: v for step in made.meta.funnel for k, v in step.dropped.items()}
    images = [image for one in truth.values() if "damaged file" not in one["odd"]
              for image in one["images"].values()]  # fmt: skip
    missing = sum("missing" in image["odd"] for image in images)
    silent = sum(len(one["images"]) for one in truth.values() if "neither section" in one["odd"])
    assert dropped == {"missing file": missing, "no usable section": silent}
    assert len((made.folder / "missing_files.txt").read_text().split()) == missing > 0
    assert len((made.folder / "unread_reports.txt").read_text().split()) == 1
    said = capsys.readouterr().err
    assert "1 report files cannot be read" in said
    assert "CXR" not in said
    policies = made.meta.policies
    numbers = Counter(len(one["images"]) for one in truth.values()
                      if "damaged file" not in one["odd"])  # fmt: skip
    assert policies["images_per_report"] == ", ".join(f"{n}: {numbers[n]}" for n in range(6))
    inverted = sum("MONOCHROME1" in image["odd"] for image in images)
    assert f"MONOCHROME1 {inverted}" in policies["photometric"]
    assert policies["empty_sections"] == "findings {}, impression {}".format(
        *(
            sum(bool({case, "neither section"} & set(one["odd"])) for one in truth.values())
            for case in ("no findings", "no impression")
        )
    )


def test_equal_texts_never_cross_splits(trees, truth, tmp_path):
    seen = Counter()
    for seed in range(4):
        made = read_tree(trees["png"], tmp_path, seed=seed)
        split = dict(zip(made.images["study_id"].to_pylist(), made.splits(), strict=True))
        same = {
            split[uid]
            for uid, one in truth.items()
            if {"identical text", "identical letters"} & set(one["odd"]) and uid in split
        }
        assert len(same) == 1
        seen.update(same)
        texts = {}
        for row in made.texts.to_pylist():
            uid = row["key"].partition("_")[0]
            assert texts.setdefault(row["text_id"], split[uid]) == split[uid]
    assert len(seen) > 1  # not always the same split


def test_texts_that_are_equal_once_cleaned_stay_together_too():
    written = ["b", "a", "c", "d", "e"]
    cleaned = ["one", "two", "ONE 2.", "three", "two"]
    assert openi.group_texts(written, cleaned) == ["b", "a", "b", "d", "a"]
    turned = openi.group_texts(written[::-1], cleaned[::-1])
    assert turned == ["a", "d", "b", "a", "b"]
    chain = openi.group_texts(["a", "b", "b", "c"], ["x", "x", "y", "y"])
    assert chain == ["a", "a", "a", "a"]


def test_the_same_images_have_the_same_keys_texts_and_splits_in_all_forms(trees, tmp_path):
    made = [read_tree(trees[form], tmp_path / form, views="all") for form in FORMS]
    rows = [
        {row["key"]: (row["split"], row["label:normal"]) for row in one.images.to_pylist()}
        for one in made
    ]
    texts = [{row["key"]: row["text"] for row in one.texts.to_pylist()} for one in made]
    assert rows[0] == rows[1]
    assert texts[0] == texts[1]
    shared = rows[0].keys() & rows[2].keys()
    assert len(shared) > 80
    assert {key: texts[0][key] for key in shared} == {key: texts[2][key] for key in shared}
    assert {key: rows[0][key][1] for key in shared} == {key: rows[2][key][1] for key in shared}


def test_normal_is_what_the_index_calls_so(trees, truth, tmp_path):
    made = read_tree(trees["png"], tmp_path)
    values = Counter()
    for row in made.images.to_pylist():
        one = truth[row["study_id"]]
        want = None if "not indexed" in one["odd"] else int(1 not in one["said"].values())
        assert row["label:normal"] == want
        values[want] += 1
    assert set(values) == {0, 1, None}


def test_removed_words_are_replaced_and_counted(trees, truth, tmp_path):
    made = read_tree(trees["png"], tmp_path)
    assert not any("XXXX" in text for text in made.unique_texts()[1])
    assert any("Comparison with _ _ is" in text for text in made.unique_texts()[1])
    other = read_tree(trees["png"], tmp_path / "b", deidentified="[NAME]")
    assert any("Comparison with [NAME] [NAME] is" in text for text in other.unique_texts()[1])
    assert other.meta.hash != made.meta.hash
    mgca = read_tree(trees["png"], tmp_path / "c", text="mgca")
    assert any("comparison with xxxx xxxx is" in text for text in mgca.unique_texts()[1])


def test_licence_and_unknown_patients_stand_in_the_notes(tree, tmp_path):
    assert not any("CC BY-NC-ND" in one for one in read_tree(tree, tmp_path).meta.notes)
    (tree / "SYNTHETIC.txt").unlink()
    notes = read_tree(tree, tmp_path).meta.notes
    assert notes[:2] == list(openi.NOTES)
    assert "CC BY-NC-ND 4.0" in notes[0]
    assert "Open-I names no patients" in notes[1]


def test_images_may_lie_elsewhere_and_reports_below_their_archives_name(tree, tmp_path):
    made = read_tree(tree, tmp_path)
    apart = tmp_path / "pictures" / "deep"
    apart.mkdir(parents=True)
    for path in tree.glob("*.png"):
        path.rename(apart / path.name)
    (tree / "NLMCXR_reports").mkdir()
    (tree / "ecgen-radiology").rename(tree / "NLMCXR_reports" / "ecgen-radiology")
    other = read_tree(tree, tmp_path / "b", images=str(tmp_path / "pictures"))
    assert other.keys == made.keys
    with pytest.raises(ManifestError, match=r"0 of 9\d images have a file") as caught:
        read_tree(tree, tmp_path / "b")
    assert "--set images=FOLDER" in caught.value.fix


def test_images_behind_a_link_are_found_and_no_circle_is_walked(trees, tree, tmp_path):
    expected = read_tree(trees["png"], tmp_path / "plain").images
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in list(tree.rglob("*.png")):
        path.rename(elsewhere / path.name)
    (elsewhere / "circle").symlink_to(tmp_path)
    (tree / "back").symlink_to(tree)
    (tree / "pictures").symlink_to(elsewhere)
    (tree / "pictures again").symlink_to(elsewhere)
    images = read_tree(tree, tmp_path / "linked").images
    assert images.drop_columns("image_path").equals(expected.drop_columns("image_path"))
    assert all(path.startswith("pictures/") for path in images["image_path"].to_pylist())


def test_no_reports_says_what_is_wanted(tmp_path):
    with pytest.raises(ManifestError, match=r"ecgen-radiology/\*.xml and no indiana_reports.csv"):
        read_tree(tmp_path, tmp_path)


@pytest.mark.parametrize("form", ["xml", "kaggle"])
def test_a_form_can_be_asked_for(trees, tmp_path, form):
    other = trees["kaggle" if form == "xml" else "png"]
    with pytest.raises(ManifestError, match="there are no"):
        read_tree(other, tmp_path, form=form)
    assert read_tree(trees["png" if form == "xml" else "kaggle"], tmp_path, form=form).keys


def test_a_report_that_stands_there_twice_is_refused(tree, tmp_path):
    first = sorted((tree / "ecgen-radiology").glob("*.xml"))[0]
    shutil.copy(first, first.with_name("9999.xml"))
    with pytest.raises(ManifestError, match="1 reports stand there twice"):
        read_tree(tree, tmp_path)


def test_tables_of_the_repack_name_what_is_wrong(trees, tmp_path):
    tree = Path(shutil.copytree(trees["kaggle"], tmp_path / "k"))
    table = tree / "indiana_projections.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "1,1_IM-0001-1001.dcm.png,Frontal"]) + "\n")
    with pytest.raises(ManifestError, match=r"images of no report in .*: row \d+"):
        read_tree(tree, tmp_path)
    table.write_text("\n".join(["uid,filename,view", *lines[1:]]) + "\n")
    with pytest.raises(ManifestError, match="no column `projection`; known: filename, uid"):
        read_tree(tree, tmp_path)
    table.write_text("\n".join(lines) + "\n")
    reports = tree / "indiana_reports.csv"
    header, first, *rest = reports.read_text().splitlines()
    number, comma, cells = first.partition(",")
    reports.write_text("\n".join([header, f"{number}.0{comma}{cells}", *rest]) + "\n")
    with pytest.raises(ManifestError, match="`uid` is no whole number: row 2"):
        read_tree(tree, tmp_path)


def test_one_image_has_one_name_in_all_forms():
    for name in ("CXR1_IM-0001-4001.png", "a/1_IM-0001-4001.dcm", "1_IM-0001-4001.dcm.png"):
        assert plain_name(name) == "CXR1_IM-0001-4001"


def test_what_is_no_report():
    assert parse_report(b"<a>") is None
    assert parse_report(b"<a/>") is None
    assert parse_report(b"\xff\xfe\x00") is None
    bomb = b'<!DOCTYPE a [<!ENTITY x "y">]><a><uId id="CXR1"/></a>'
    assert parse_report(bomb) is None
    assert parse_report(b'<a><uId id="CXR1"/></a>') == Report("CXR1", {}, (), ())


def test_mgca_texts_cannot_be_cut():
    with pytest.raises(ConfigError, match="no full stops left"):
        validate(openi.Options, {"text": "mgca", "text_unit": "sentence"})


def test_a_report_file_that_cannot_be_read_is_counted_and_listed(tree, tmp_path, capsys):
    before = len(read_tree(tree, tmp_path).keys)
    (tree / "ecgen-radiology" / "9999.xml").mkdir()
    (tree / "ecgen-radiology" / "9998.xml").symlink_to(tree / "nowhere.xml")
    made = read_tree(tree, tmp_path)
    assert len(made.keys) == before
    assert "3 report files cannot be read and were left out" in capsys.readouterr().err
    listed = (made.folder / "unread_reports.txt").read_text().split()
    assert {"9998.xml", "9999.xml"} < set(listed)


def test_an_empty_or_missing_image_moves_no_other_to_another_split(tree, tmp_path):
    whole = read_tree(tree, tmp_path)
    split = dict(zip(whole.keys, whole.splits(), strict=True))
    paths = whole.images["image_path"].to_pylist()
    (tree / paths[0]).write_bytes(b"")
    (tree / paths[5]).unlink()
    made = read_tree(tree, tmp_path)
    assert set(split) - set(made.keys) == {whole.keys[0], whole.keys[5]}
    assert made.splits() == [split[key] for key in made.keys]
    step = next(step for step in made.meta.funnel if step.name == "images with a file")
    assert step.dropped["file of zero bytes"] == 1


def test_a_missing_image_moves_no_report_of_the_same_text(tree, tmp_path):
    """Two reports with one text go where the name of the first leads, be its image there or not."""
    dummies = [f"d{number}" for number in range(300)]
    for word in map("abcdefghijklmnopqrstuvwxyz".__getitem__, range(26)):
        names = [f"apex {word} clear", f"{word} clear apex"]
        first, other, *_ = split_by_subject([*sorted(names), *dummies], seed=0)
        if first != other:
            break
    whole = read_tree(tree, tmp_path)
    pair = sorted(set(whole.images["study_id"].to_pylist()))[:2]
    for report, said in zip(pair, ((f"apex {word}", "clear"), (word, "clear apex")), strict=True):
        path = tree / "ecgen-radiology" / f"{report.removeprefix('CXR')}.xml"
        text = path.read_text()
        for name, words in zip(("FINDINGS", "IMPRESSION"), said, strict=True):
            text = re.sub(rf'(Label="{name}")[^/]*(/>|>.*?</AbstractText>)',
                          rf"\1>{words}</AbstractText>", text)  # fmt: skip
        path.write_text(text)
    before = read_tree(tree, tmp_path)
    rows = before.images.to_pylist()
    splits = {row["study_id"]: row["split"] for row in rows}
    assert splits[pair[0]] == splits[pair[1]] == first
    for report in pair:
        for row in rows:
            if row["study_id"] == report:
                (tree / row["image_path"]).rename(tree / f"{row['image_path']}.away")
        made = read_tree(tree, tmp_path)
        assert {r["split"] for r in made.images.to_pylist() if r["study_id"] in pair} == {first}
        for path in tree.rglob("*.away"):
            path.rename(path.with_suffix(""))


def test_texts_without_letters_are_not_one_text():
    written = ["a", "b", "c", "d"]
    assert openi.group_texts(written, ["", "7.", "", "7."]) == written
    assert openi.group_texts(written, ["x 1", "y", "x 2", "7."]) == ["a", "b", "a", "d"]


def test_two_columns_of_the_repack_that_differ_in_case_alone_are_refused(trees, tmp_path):
    tree = Path(shutil.copytree(trees["kaggle"], tmp_path / "k"))
    table = tree / "indiana_projections.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},UID", *(f"{line},1" for line in lines)]) + "\n")
    with pytest.raises(ManifestError, match="`uid` and `UID` have the same name"):
        read_tree(tree, tmp_path)
