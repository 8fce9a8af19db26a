"""The reader of MIMIC-CXR-JPG against a synthetic tree whose truth is known, and handmade ones."""

import gzip
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from featcache.config import read_json, validate
from featcache.datasets.mimic.tables import read_labels
from featcache.datasets.mimic_cxr_jpg import LABELS, Options, read
from featcache.errors import ConfigError, FeatcacheError, ManifestError
from featcache.manifest.table import Manifest
from featcache.synth.registry import synthesize

IDENTIFIER = re.compile(r"19\d{6}|5\d{7}|[0-9a-f]{8}-[0-9a-f]{8}")
USELESS = {"missing", "zero byte"}
NO_TEXT = {"no report file", "comparison only", "report without images"}


@pytest.fixture(scope="module")
def original(mimic_cxr_jpg_tree) -> Path:
    return mimic_cxr_jpg_tree


@pytest.fixture(scope="module")
def truth(original) -> dict:
    return read_json(original.with_name("tree.truth.json"))


@pytest.fixture(scope="module")
def manifest(original, tmp_path_factory) -> Manifest:
    return read(original, tmp_path_factory.mktemp("out") / "mimic", options=Options())


@pytest.fixture
def tree(original, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "tree"))


def read_tree(tree: Path, **options) -> Manifest:
    return read(tree, tree.parent / "manifest", options=validate(Options, options))


def edit_table(tree: Path, kind: str, edit, *, packed: bool = True) -> None:
    """Rewrite a table's lines."""
    path = next(tree.glob(f"mimic-cxr-*-{kind}.csv.gz"))
    lines = edit(gzip.decompress(path.read_bytes()).decode().splitlines())
    content = "".join(f"{line}\n" for line in lines).encode()
    path.unlink()
    (path if packed else path.with_suffix("")).write_bytes(
        gzip.compress(content) if packed else content
    )


def failure(tree: Path, **options) -> FeatcacheError:
    """The error of reading a tree; it never shows an identifier."""
    with pytest.raises(ManifestError) as caught:
        read_tree(tree, **options)
    assert not IDENTIFIER.search(str(caught.value))
    return caught.value


def expected_keys(truth: dict, *, frontal: bool = True) -> list[str]:
    kept = []
    for key, image in truth["images"].items():
        study = truth["studies"][image["study_id"]]
        is_wanted = image["view"] in ("AP", "PA") or not frontal
        if is_wanted and not USELESS & set(image["odd"]) and not NO_TEXT & set(study["odd"]):
            kept.append(key)
    return sorted(kept)


def test_rows_are_the_frontal_pictures_with_file_and_text(manifest, truth):
    assert manifest.keys == expected_keys(truth)
    assert set(manifest.images["view_position"].to_pylist()) == {"AP", "PA"}
    damaged = {k for k, image in truth["images"].items() if "truncated" in image["odd"]}
    assert damaged <= set(manifest.keys)


def test_funnel_closes_and_names_every_reason(manifest, truth):
    steps = manifest.meta.funnel
    for before, after in pairwise(steps):
        assert before.count == after.count + sum(after.dropped.values())
    assert steps[0].count == len(truth["images"])
    assert steps[-1].count == len(manifest.keys)
    reasons = {reason for step in steps for reason in step.dropped}
    assert reasons == {
        "missing file",
        "file of zero bytes",
        "blank view",
        "another view",
        "no report file",
        "no usable section",
    }


def test_identity_split_and_path(manifest, truth):
    for row in manifest.images.to_pylist():
        image = truth["images"][row["key"]]
        study = truth["studies"][image["study_id"]]
        assert (row["study_id"], row["subject_id"], row["split"]) == (
            image["study_id"],
            study["subject_id"],
            study["split"],
        )
    assert all(manifest.image_file(row).stat().st_size for row in range(len(manifest.keys)))
    assert set(manifest.splits()) == {"train", "validate", "test"}


def test_labels_are_the_studys_with_null_for_not_mentioned(tree, truth):
    manifest = read_tree(tree, views="all")
    assert manifest.keys == expected_keys(truth, frontal=False)
    assert sorted(manifest.label_names) == sorted(LABELS)
    seen = set()
    for row in manifest.images.to_pylist():
        study = truth["studies"][row["study_id"]]
        found = {name: row[f"label:{name}"] for name in LABELS if name != "No Finding"}
        if {"blank label row", "no label row"} & set(study["odd"]):
            assert set(found.values()) == {None}
        else:
            assert found == {name: study["said"].get(name) for name in found}
        seen |= set(found.values())
    assert seen == {1, 0, -1, None}


def test_other_labeller_and_none(tree, manifest):
    assert read_tree(tree, labels="negbio").meta.hash != manifest.meta.hash
    assert read_tree(tree, labels="none").label_names == []


def test_the_radiologists_labels_are_those_of_the_test_split(tree, truth):
    made = read_tree(tree, labels="radiologist")
    read = 0
    for row in made.images.to_pylist():
        said = truth["studies"][row["study_id"]]["said"]
        found = {name: row[f"label:{name}"] for name in LABELS if name != "No Finding"}
        is_test = row["split"] == "test"
        assert found == {name: said.get(name) if is_test else None for name in found}
        read += is_test
    assert read > 5


def test_text_is_impression_then_findings_in_one_line(manifest, truth):
    for row in manifest.texts.to_pylist():
        assert row["unit"] == "report"
        assert "___" not in row["text"]
        assert not re.search(r"[\r\n]|  ", row["text"])
    same = [s for s, study in truth["studies"].items() if "identical text" in study["odd"]]
    of_key = dict(zip(manifest.keys, manifest.images["study_id"].to_pylist(), strict=True))
    texts = {r["text"] for r in manifest.texts.to_pylist() if of_key[r["key"]] in same}
    assert texts == {
        "No acute cardiopulmonary process. The lungs are clear. There is no pleural effusion or "
        "pneumothorax. The heart size is normal."
    }


def test_decimals_and_removed_words(manifest):
    joined = " ".join(manifest.unique_texts()[1])
    assert "A 1.5 cm density overlies T12. Findings were called to Dr. _ at 3:10 p.m." in joined


def test_mark_of_removed_words_is_an_option(tree):
    joined = " ".join(read_tree(tree, deidentified="[NAME]").unique_texts()[1])
    assert "Findings were called to Dr. [NAME] at 3:10 p.m." in joined


def test_latin_1_is_read_and_counted(manifest, capsys, tree):
    joined = " ".join(manifest.unique_texts()[1])
    assert "Calibre 5 µm, aspect dégagé." in joined
    assert "naïve" in joined
    assert manifest.meta.policies["encoding"] == "UTF-8, else Latin-1 (in 1)"
    read_tree(tree)
    said = capsys.readouterr().err
    assert "read as Latin-1: 1" in said
    assert not IDENTIFIER.search(said)


def test_line_ends_of_windows_and_blanks_around_cells_change_nothing(tree, manifest):
    for path in tree.rglob("s*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\r", b"").replace(b"\n", b"\r\n"))
    edit_table(tree, "split", lambda lines: [line.replace(",", " , ") for line in lines])
    edit_table(tree, "metadata", lambda lines: [f"{line}\r" for line in lines])
    assert read_tree(tree).meta.hash == manifest.meta.hash


def test_last_paragraph_can_be_left_out(tree, truth, manifest):
    odd = [s for s, study in truth["studies"].items() if "last paragraph" in study["odd"]]
    assert set(odd) <= set(manifest.images["study_id"].to_pylist())
    without = read_tree(tree, last_paragraph=False)
    assert not set(odd) & set(without.images["study_id"].to_pylist())


def test_mgca_text_has_no_case_and_drops_short_reports(tree, truth, manifest):
    other = read_tree(tree, text="mgca")
    one_word = {s for s, study in truth["studies"].items() if "one word" in study["odd"]}
    assert not one_word & set(other.images["study_id"].to_pylist())
    assert all(re.fullmatch(r"[a-z0-9_ ]+", text) for text in other.unique_texts()[1])
    assert other.meta.funnel[-1].dropped["fewer than 3 words"] >= 1
    assert other.meta.hash != manifest.meta.hash


def test_unpacked_tables_and_row_order_change_nothing(tree, manifest):
    for kind in ("metadata", "split", "chexpert"):
        edit_table(tree, kind, lambda lines: [lines[0], *reversed(lines[1:])], packed=False)
    assert read_tree(tree).meta.hash == manifest.meta.hash


def test_header_may_have_blanks_capitals_and_a_byte_order_mark(tree, manifest):
    edit_table(tree, "split", lambda ls: ["\ufeffDICOM_ID, study_id ,Subject_Id,SPLIT", *ls[1:]])
    assert read_tree(tree).meta.hash == manifest.meta.hash


@pytest.mark.parametrize(
    "place", ["mimic-cxr-reports/files", "mimic-cxr-reports", "files", "elsewhere/files", "other"]
)
def test_reports_are_found_however_they_were_unpacked(tree, manifest, place):
    moved = tree.parent / "moved"
    (tree / "mimic-cxr-reports" / "files").rename(moved)
    shutil.rmtree(tree / "mimic-cxr-reports")
    shutil.copytree(moved, tree / place, dirs_exist_ok=True)
    is_apart = place.startswith(("elsewhere", "other"))
    options = {"reports": str(tree / place.partition("/")[0])} if is_apart else {}
    assert read_tree(tree, **options).meta.hash == manifest.meta.hash


def test_no_reports_is_an_error_that_says_where_it_looked(tree):
    shutil.rmtree(tree / "mimic-cxr-reports")
    error = failure(tree)
    assert re.fullmatch(r"0 of \d\d studies have a report", error.what)
    assert str(tree / "files") in error.where
    assert "--set reports=FOLDER" in error.fix
    error = failure(tree, reports=str(tree / "nowhere"))
    assert str(tree / "nowhere" / "files") in error.where


def test_missing_table_names_it(tree):
    next(tree.glob("*-split.csv.gz")).unlink()
    error = failure(tree)
    assert "mimic-cxr-*-split.csv.gz" in error.what
    assert error.where == str(tree)


def test_missing_label_table_offers_to_go_without(tree):
    next(tree.glob("*-chexpert.csv.gz")).unlink()
    assert "--set labels=none" in failure(tree).fix


def test_missing_column_names_what_was_seen(tree):
    edit_table(tree, "metadata", lambda ls: [ls[0].replace("ViewPosition", "View"), *ls[1:]])
    assert failure(tree).what.startswith("the table has no column `ViewPosition`; did you mean")


def test_a_header_that_is_none_and_a_label_table_without_rows(tree):
    edit_table(tree, "chexpert", lambda ls: ls[:1])
    labels = read_labels(tree, "chexpert")
    assert labels.num_rows == 0
    assert {str(labels[name].type) for name in LABELS} == {"int8"}
    edit_table(tree, "metadata", lambda ls: ["x" * 200_000])
    assert failure(tree).what.startswith("the table cannot be read")


def test_line_with_too_few_fields_is_named_by_its_number(tree):
    edit_table(tree, "split", lambda ls: [*ls[:3], "x,y", *ls[3:]])
    assert failure(tree).what == "row 4 has another number of fields than the header"
    edit_table(tree, "split", lambda ls: [ls[0], "", *ls[1:]])
    assert failure(tree).what == "row 5 has another number of fields than the header"


def test_a_quote_that_is_not_closed_takes_no_rows_with_it(tree):
    edit_table(tree, "split", lambda ls: [f"{line},x" for line in ls])
    read_tree(tree)
    edit_table(tree, "split", lambda ls: [*ls[:-3], ls[-3][:-1] + '"x', *ls[-2:]])
    assert failure(tree).what.startswith("a double quote is not closed, or stands inside a cell")


def test_a_table_that_is_not_utf_8_is_not_said_to_lack_fields(tree):
    path = next(tree.glob("*-split.csv.gz"))
    lines = gzip.decompress(path.read_bytes()).splitlines()
    lines += [line.replace(b"train", b"tr\xe9in") for line in lines if b"train" in line]
    while sum(map(len, lines)) < 20_000:  # more than is looked at for the header
        lines[1:1] = lines[1:3]
    path.write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines)))
    assert failure(tree).what.endswith("or not UTF-8")


def test_rows_are_numbered_as_a_spreadsheet_program_shows_them(tree):
    edit_table(tree, "metadata", lambda ls: [*ls[:3], "", "", "x" + ls[3], *ls[4:]])
    assert failure(tree).what == "`dicom_id` has not the published form: row 6"


@pytest.mark.parametrize("other", ["Split", " split "])
def test_two_columns_of_one_name_are_refused_with_both(tree, other):
    edit_table(
        tree, "split", lambda ls: [f"{ls[0]},{other}", *(f"{line},train" for line in ls[1:])]
    )
    said = failure(tree).what
    assert said == (
        f"the columns `split` and `{other}` have the same name, compared without case and blanks"
    )


def test_a_table_without_its_header_names_no_identifier(tree):
    edit_table(tree, "metadata", lambda ls: ls[1:])
    assert failure(tree).what.startswith("the table has no column `dicom_id`, `subject_id`")


@pytest.mark.parametrize("kept_bytes", [0, 7, 600])
def test_table_that_is_cut_off(tree, kept_bytes):
    path = next(tree.glob("*-metadata.csv.gz"))
    path.write_bytes(path.read_bytes()[:kept_bytes])
    error = failure(tree)
    assert re.search("cut off or damaged|has no column", error.what)


def test_identifiers_that_went_through_a_number(tree):
    def as_float(lines):
        parts = [line.split(",", 3) for line in lines]
        return [lines[0], *(f"{a},{b}.0,{c}.0,{d}" for a, b, c, d in parts[1:])]

    edit_table(tree, "metadata", as_float)
    error = failure(tree)
    assert "`subject_id` has not the published form: rows 2, 3, 4, 5, 6 and" in error.what
    assert "`study_id` has not the published form" in error.what
    assert "read these identifiers as numbers" in error.fix


def test_dicom_id_that_is_none(tree):
    edit_table(tree, "metadata", lambda ls: [ls[0], "x" + ls[1][1:], *ls[2:]])
    assert failure(tree).what == "`dicom_id` has not the published form: row 2"


def test_one_blank_identifier_is_named_by_its_row_and_damages_no_other(tree):
    def blank(lines):
        dicom, _, rest = lines[2].split(",", 2)
        return [*lines[:2], f"{dicom},,{rest}", *lines[3:]]

    edit_table(tree, "metadata", blank)
    error = failure(tree)
    assert error.what == "`subject_id` has not the published form: row 3"
    assert error.fix == "use the table as published"


def test_two_label_rows_of_one_study_are_merged_or_refused_and_never_multiply(tree, manifest):
    edit_table(tree, "chexpert", lambda ls: [*ls, ls[1]])
    assert read_tree(tree).meta.hash == manifest.meta.hash

    def other(lines):
        start, _, last = lines[1].rpartition(",")
        return [*lines[:-1], f"{start},{'0.0' if last != '0.0' else '1.0'}"]

    edit_table(tree, "chexpert", other)
    said = failure(tree).what
    assert re.fullmatch(r"rows 2 and \d+ have the same `study_id` and contradict each other", said)


def test_label_outside_the_allowed_values(tree):
    edit_table(tree, "chexpert", lambda ls: [ls[0], ls[1].rpartition(",")[0] + ",2.0", *ls[2:]])
    assert failure(tree).what == "`Support Devices` is none of 1.0, 0.0, -1.0, blank: row 2"


def test_one_picture_with_two_patients(tree):
    def twice(lines):
        dicom, subject, rest = lines[1].split(",", 2)
        return [*lines, f"{dicom},{int(subject) + 1},{rest}"]

    edit_table(tree, "metadata", twice)
    assert re.search("have the same `dicom_id` and contradict each other", failure(tree).what)


def test_one_study_with_two_patients(tree):
    def twice(lines):
        dicom, subject, rest = lines[1].split(",", 2)
        return [*lines, f"{dicom[::-1]},{int(subject) + 1},{rest}"]

    edit_table(tree, "metadata", twice)
    assert re.search("have the same `study_id` and contradict each other", failure(tree).what)


def test_split_table_of_another_release(tree):
    def other_study(lines):
        dicom, study, rest = lines[1].split(",", 2)
        return [lines[0], f"{dicom},{int(study) + 1},{rest}", *lines[2:]]

    edit_table(tree, "split", other_study)
    assert "give a picture another `study_id`: row 2" in failure(tree).what


def test_patient_in_two_splits_stops_with_a_count(tmp_path):
    switched = synthesize("mimic-cxr-jpg", tmp_path / "t", switches=["subject-in-two-splits"])
    assert "1 patients are in more than one split" in failure(switched.path).what


def test_repeated_row_is_merged_and_row_without_split_dropped(tmp_path, manifest):
    switches = ["duplicate-metadata-row", "row-without-split"]
    switched = synthesize("mimic-cxr-jpg", tmp_path / "t", switches=switches)
    steps = read_tree(switched.path).meta.funnel
    assert steps[0].count == manifest.meta.funnel[0].count + 1
    assert steps[1].dropped == {"identical row": 1}
    assert steps[2].dropped == {"not in the split table": 1}


def test_no_pictures_at_all(tree):
    shutil.rmtree(tree / "files")
    assert re.search(r"0 of 102 listed images have a file", failure(tree).what)


def test_nothing_frontal(tree):
    edit_table(tree, "metadata", lambda ls: [re.sub(",(AP|PA)(?= |,)", ",LL", x) for x in ls])
    assert failure(tree).fix == "--set views=all"


def test_synthetic_tree_is_marked_and_a_real_one_carries_its_terms(tree, manifest, capsys):
    assert manifest.meta.synthetic
    assert "synthetic stand-in" in manifest.meta.notes[0]
    (tree / "SYNTHETIC.txt").unlink()
    real = read_tree(tree)
    assert not real.meta.synthetic
    assert "credentialed" in real.meta.notes[0]
    assert "102 of 377,110 images" in capsys.readouterr().err


def test_study_with_a_published_exception_uses_its_rule(tree, truth):
    study_id = next(s for s, v in truth["studies"].items() if not v["odd"])
    renamed = "51410602"
    for kind in ("metadata", "split", "chexpert"):
        edit_table(tree, kind, lambda ls: [line.replace(study_id, renamed) for line in ls])
    for path in sorted(tree.rglob(f"s{study_id}*")):
        path.rename(path.with_name(path.name.replace(study_id, renamed)))
    report = next(tree.rglob(f"s{renamed}.txt")).read_text()
    manifest = read_tree(tree)
    key = manifest.keys[manifest.images["study_id"].to_pylist().index(renamed)]
    text = next(r["text"] for r in manifest.texts.to_pylist() if r["key"] == key)
    assert text == " ".join(report[47:320].replace("___", "_").split())
    assert "published exception: 1" in manifest.meta.policies["text_origins"]


def test_sentences_of_a_study_do_not_run_across_its_sections(tree, truth, manifest):
    chosen = next(
        path
        for path in sorted(tree.rglob("s5*.txt"))
        if truth["studies"][path.stem[1:]]["split"] == "train"
        and not truth["studies"][path.stem[1:]]["odd"]
    )
    chosen.write_text(
        " REPORT\n IMPRESSION:\n \n 1. No acute process\n 2. Tube of 1.5\n cm\n \n FINDINGS: Clear"
    )
    cut = read_tree(tree, text_unit="sentence")
    assert cut.keys == manifest.keys
    rows = dict(zip(cut.keys, cut.images["study_id"].to_pylist(), strict=True))
    found = {row["text"] for row in cut.texts.to_pylist() if rows[row["key"]] == chosen.stem[1:]}
    assert found == {"No acute process", "Tube of 1.5 cm", "Clear"}


def test_sentences_say_what_the_reports_say(tree, manifest):
    cut = read_tree(tree, text_unit="sentence")
    assert cut.meta.funnel == manifest.meta.funnel
    reports = dict(
        zip(*(manifest.texts[name].to_pylist() for name in ("key", "text")), strict=True)
    )
    assert all(row["text"] in reports[row["key"]] for row in cut.texts.to_pylist())
    assert set(cut.texts["key"].to_pylist()) == set(cut.keys)
    assert cut.meta.policies["text_unit"].startswith("sentence")


def test_text_without_full_stops_is_not_cut(tree):
    with pytest.raises(ConfigError, match="no full stops left"):
        read_tree(tree, text="mgca", text_unit="sentence")
