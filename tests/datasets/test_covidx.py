"""COVIDx from lists made by hand and from a synthetic tree whose truth is known."""

import hashlib
from collections import Counter

import pytest
from contracts.dataset_contract import DatasetContract
from sklearn.model_selection import train_test_split

from featcache.config import load_config, read_json
from featcache.datasets import covidx
from featcache.datasets.covid import published
from featcache.errors import ManifestError, UsageError

TRAIN = """\
n1 n1-a.png normal rsna
n1 n1-b.png normal rnsa
n2 n2.JPG normal cohen
p1 p1.png pneumonia rsna
p2 p2.jpeg pneumonia rsna
COVID 216 COVID(216).png COVID-19 sirm
c1 c1-a.png COVID-19 ricord
c1 c1-b.png COVID-19 ricord
c2 c2.png COVID-19 stonybrook
"""
TEST = """\
t1 t1.png normal rsna
t2 t2.png pneumonia
t3 t3.png COVID-19 ricord
"""


def make(folder, train=TRAIN, test=TEST, version="_COVIDx9A", missing=(), lists_in=""):
    for name, content in (("train", train), ("test", test)):
        place = folder / lists_in
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}{version}.txt").write_text(content)
        (folder / name).mkdir(exist_ok=True)
        for line in content.splitlines():
            file = next((field for field in line.split() if "." in field), None)
            if file and file not in missing:
                (folder / name / file).write_bytes(b"picture")
    return folder


def read(folder, *settings, out="m"):
    options = load_config(covidx.Options, overrides=settings)
    return covidx.read(folder, folder.parent / out, options=options)


def refused(folder, *settings, kind=ManifestError):
    with pytest.raises(kind) as caught:
        read(folder, *settings)
    return str(caught.value)


@pytest.fixture
def tree(tmp_path):
    return make(tmp_path / "covidx")


@pytest.fixture(scope="module")
def synthetic(covidx_tree):
    return covidx_tree


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return covidx

    @pytest.fixture
    def source(self, synthetic):
        return synthetic

    @pytest.fixture
    def options(self):
        return covidx.Options()


def test_the_synthetic_tree_is_read_as_its_truth_says(synthetic, tmp_path):
    made = covidx.read(synthetic, tmp_path / "m", options=covidx.Options())
    truth = read_json(synthetic.with_name("tree.truth.json"))["images"]
    there = {key: one for key, one in truth.items() if "missing" not in one["odd"]}
    assert made.keys == sorted(there)
    for row in made.images.to_pylist():
        one = there[row["key"]]
        source = {"rnsa": "rsna"}.get(one["source"], one["source"])
        assert row["label:class"] == one["class"]
        assert row["source"] == ("unknown" if "three fields" in one["odd"] else source)
        assert (row["image_path"] == row["key"]) == ("renamed on disk" not in one["odd"])
    missing = sorted(truth.keys() - there.keys())
    assert (tmp_path / "m" / "missing_files.txt").read_text().splitlines() == missing
    assert sum(made.meta.funnel[-1].dropped.values()) == len(missing) > 0
    assert made.meta.synthetic
    assert made.meta.notes[0].startswith("synthetic stand-in")


def test_fields_are_read_from_the_end():
    assert covidx.parse_line("1 a.png normal rsna") == ("1", "a.png", "normal", "rsna")
    assert covidx.parse_line("1 a.png normal") == ("1", "a.png", "normal", "unknown")
    assert covidx.parse_line("COVID 216 COVID(216).png COVID-19 sirm") == (
        "COVID 216", "COVID(216).png", "COVID-19", "sirm",
    )  # fmt: skip
    assert covidx.parse_line("COVID 216 COVID(216).png COVID-19") == (
        "COVID 216", "COVID(216).png", "COVID-19", "unknown",
    )  # fmt: skip
    assert covidx.parse_line("1 a.png pneumonia rnsa") == ("1", "a.png", "pneumonia", "rsna")
    assert covidx.parse_line("1 a.png positive RICORD") == ("1", "a.png", "positive", "ricord")
    for broken in ("", "a.png normal", "a.png normal rsna", "1 a.png covid rsna", "normal"):
        assert covidx.parse_line(broken) is None


def test_a_tree_becomes_a_manifest(tree):
    made = read(tree)
    rows = {row["key"]: row for row in made.images.to_pylist()}
    assert len(rows) == 12
    assert rows["train/COVID(216).png"]["subject_id"] == "COVID 216"
    assert rows["train/n1-b.png"]["source"] == "rsna"
    assert rows["train/n2.JPG"]["source"] == "cohen"
    assert rows["test/t2.png"]["source"] == "unknown"
    assert rows["test/t3.png"]["label:class"] == "COVID-19"
    assert made.label_names == ["class"]
    assert not made.has_texts
    assert not (made.folder / "missing_files.txt").exists()
    assert made.meta.policies["task"] == "three classes"
    assert made.meta.policies["lists"] == "version 9A, 9 + 3 lines of the published 30,130 + 400"


def test_the_published_test_list_stays_and_validation_is_by_patient(tree):
    made = read(tree)
    split = Counter()
    of_patient = {}
    for row in made.images.to_pylist():
        split[row["split"]] += 1
        assert (row["split"] == "test") == row["key"].startswith("test/")
        assert of_patient.setdefault(row["subject_id"], row["split"]) == row["split"]
    assert split["test"] == 3
    validate = [row for row in made.images.to_pylist() if row["split"] == "validate"]
    assert {row["label:class"] for row in validate} == set(covidx.CLASSES["three"])
    assert covidx.NOTE_VALIDATE in made.meta.notes


def test_the_seed_moves_validation_only(synthetic, tmp_path):
    def splits(**options):
        chosen = covidx.Options(**options)
        made = covidx.read(synthetic, tmp_path / "m", options=chosen)
        return dict(zip(made.keys, made.splits(), strict=True)), made.meta.hash

    first, hash_first = splits()
    other, hash_other = splits(seed=1)
    assert hash_first != hash_other
    assert {k for k, s in first.items() if s == "test"} == {
        k for k, s in other.items() if s == "test"
    }
    half, _ = splits(validate_fraction=0.5)
    counts = Counter(half.values())
    assert counts["validate"] == pytest.approx(counts["train"], abs=12)


def test_the_source_note_carries_its_figures(tree):
    # rsna -> normal or pneumonia (2 : 2, the first by name), ricord -> COVID-19, unknown -> the
    # commonest class of all, which is COVID-19: right for t1 and t3, apart for t1 and t3.
    note = next(one for one in read(tree).meta.notes if one.startswith("The source predicts"))
    assert "66.7% of the test images get the right class, and 66.7% are told apart" in note


def test_rsna_ids_are_said_to_name_images(tmp_path):
    assert covidx.NOTE_RSNA in read(make(tmp_path / "a")).meta.notes
    other = make(tmp_path / "b", TRAIN.replace("rsna", "x").replace("rnsa", "x"),
                 TEST.replace("rsna", "x"))  # fmt: skip
    assert covidx.NOTE_RSNA not in read(other).meta.notes


@pytest.mark.parametrize("name", ["c2.png", "n2.JPG", "c1-a.png"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_missing_or_empty_file_moves_no_other_to_another_split(tmp_path, name, is_empty):
    lines = TRAIN + "".join(f"p{n} x{n}.png COVID-19 cohen\n" for n in range(20))
    whole = read(make(tmp_path / "a", lines), "validate_fraction=0.4")
    tree = make(tmp_path / "b", lines, missing=[] if is_empty else [name])
    if is_empty:
        (tree / "train" / name).write_bytes(b"")
    made = read(tree, "validate_fraction=0.4")
    split = dict(zip(whole.keys, whole.splits(), strict=True))
    assert set(split) - set(made.keys) == {f"train/{name}"}
    assert made.splits() == [split[key] for key in made.keys]
    (reason,) = made.meta.funnel[-1].dropped
    assert reason.startswith("file of zero bytes" if is_empty else "missing file, source ")
    assert (made.folder / "missing_files.txt").read_text() == f"train/{name}\n"


def test_missing_files_are_dropped_by_source_and_listed(tmp_path, capsys):
    made = read(make(tmp_path / "c", missing=["c2.png", "n2.JPG", "c1-a.png"]))
    step = made.meta.funnel[-1]
    assert step.count == 9
    assert step.dropped == {
        "missing file, source cohen": 1,
        "missing file, source ricord": 1,
        "missing file, source stonybrook": 1,
    }
    listed = (made.folder / "missing_files.txt").read_text()
    assert listed == "train/c1-a.png\ntrain/c2.png\ntrain/n2.JPG\n"
    printed = capsys.readouterr().err
    assert "3 listed files are missing" in printed
    assert "1 Stony Brook files are missing, 0 with ABDOMEN in the name; 496 and 430" in printed
    for name in ("c2.png", "n2.JPG", "c1-a.png"):
        (tmp_path / "c" / "train" / name).write_bytes(b"picture")
    assert not (read(tmp_path / "c").folder / "missing_files.txt").exists()


def test_a_numbered_file_is_found_under_its_other_name(tree, capsys):
    (tree / "train" / "COVID(216).png").rename(tree / "train" / "COVID-216.png")
    made = read(tree)
    row = next(row for row in made.images.to_pylist() if row["subject_id"] == "COVID 216")
    assert row["key"] == "train/COVID(216).png"
    assert row["image_path"] == "train/COVID-216.png"
    assert "1 files have the form NAME-1.png" in capsys.readouterr().err


def test_the_other_name_is_not_looked_for_where_it_is_an_image_of_its_own(tmp_path):
    lines = "p1 a(1).png COVID-19 cohen\np2 a-1.png normal cohen\n"
    make(tmp_path / "c", train=TRAIN + lines, missing=("a(1).png",))
    made = read(tmp_path / "c")
    assert "train/a-1.png" in made.keys
    assert "train/a(1).png" not in made.keys
    paths = made.images["image_path"].to_pylist()
    assert len(set(paths)) == len(paths)


def test_no_file_at_all_is_an_error(tree):
    for path in [*(tree / "train").iterdir(), *(tree / "test").iterdir()]:
        path.unlink()
    assert "none of the 12 listed files is there" in refused(tree)


def test_the_order_of_lines_is_of_no_matter(tmp_path):
    one = read(make(tmp_path / "a"), out="one/m")
    turned = ["\n".join(text.splitlines()[::-1]) + "\n" for text in (TRAIN, TEST)]
    two = read(make(tmp_path / "b", *turned), out="two/m")
    assert one.meta.hash == two.meta.hash
    for name in ("images.parquet", "texts.parquet"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_line_ends_marks_and_blank_lines_are_of_no_matter(tmp_path):
    plain = read(make(tmp_path / "a"), out="a/m").meta.hash
    tree = make(tmp_path / "b")
    path = tree / "train_COVIDx9A.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n").encode() + b"\r\n")
    assert read(tree, out="b/m").meta.hash == plain


def test_identical_lines_are_merged_and_contradicting_ones_refused(tmp_path):
    twice = make(tmp_path / "a", TRAIN + "n2 n2.JPG normal cohen\n")
    made = read(twice)
    assert len(made.keys) == 12
    assert made.meta.funnel[1].dropped == {"identical line": 1}
    other = make(tmp_path / "b", TRAIN + "n2 n2.JPG pneumonia cohen\n")
    message = refused(other)
    assert "lines 3 and 10 name the same file and contradict each other" in message
    assert "train_COVIDx9A.txt" in message


def test_lines_that_cannot_be_read_are_named(tmp_path):
    message = refused(make(tmp_path / "a", TRAIN + "x x.png fracture rsna\n\nlost\n"))
    assert "2 lines are not `patient file class source`" in message
    assert "rows 10, 12" in message
    tree = make(tmp_path / "b")
    (tree / "test_COVIDx9A.txt").write_bytes(b"\xff\xfe\xfa")
    assert "no UTF-8 text" in refused(tree)


def test_a_patient_in_both_lists_is_refused_by_count(tmp_path):
    message = refused(make(tmp_path / "a", test=TEST + "n2 n2-b.png normal cohen\n"))
    assert "1 patients are in more than one split" in message
    assert "train_COVIDx9A.txt" in message
    assert "n2-b" not in message


def test_binary_lists_are_refused_for_three_classes(tmp_path):
    def binary(text):
        for name in covidx.CLASSES["three"][:2]:
            text = text.replace(f" {name}", " negative")
        return text.replace(" COVID-19", " positive")

    tree = make(tmp_path / "a", binary(TRAIN), binary(TEST), version="")
    message = refused(tree)
    assert "has the classes normal, pneumonia, COVID-19, the list has negative, positive" in message
    assert "--set task=two" in message
    made = read(tree, "task=two")
    assert set(made.images["label:class"].to_pylist()) == {"negative", "positive"}
    assert made.meta.policies["lists"].startswith("version plain of unknown length")
    assert "--set task=three" in refused(make(tmp_path / "b"), "task=two")


def test_lists_are_found_by_version(tmp_path):
    tree = make(tmp_path / "a", lists_in="labels")
    make(tree, version="_COVIDx5")
    make(tree, version="_COVIDx_CXR-3A")
    (tree / "train_COVIDx8A.txt").write_text(TRAIN)  # a train list alone
    message = refused(tree, kind=UsageError)
    assert "lists of 3 versions: 5, 9A, CXR-3A" in message
    assert "--set version=5" in message
    for spelled, version in (("5", "5"), ("9a", "9A"), ("3A", "CXR-3A"), ("cxr-3a", "CXR-3A")):
        assert (
            read(tree, f"version={spelled}")
            .meta.policies["lists"]
            .startswith(f"version {version}, 9 + 3 lines")
        )
    message = refused(tree, "version=9B", kind=UsageError)
    assert "no lists of version `9B`; did you mean `9A`" in message


def test_of_two_lists_of_one_name_the_folders_own_is_taken(tmp_path):
    tree = make(tmp_path / "a", lists_in="labels")
    make(tree, train=TRAIN + "n3 n3.png normal cohen\n")
    assert "train/n3.png" in read(tree).keys


def test_a_published_validation_list_is_kept(tmp_path):
    tree = make(tmp_path / "a", version="")
    (tree / "val.txt").write_text("v1 v1.png pneumonia rsna\n")
    (tree / "val").mkdir()
    (tree / "val" / "v1.png").write_bytes(b"picture")
    made = read(tree)
    validate = [k for k, s in zip(made.keys, made.splits(), strict=True) if s == "validate"]
    assert validate == ["val/v1.png"]
    assert made.meta.policies["split"] == "as published"
    assert any("66.7% of the test images" in one for one in made.meta.notes)  # v1 taught nothing
    assert covidx.NOTE_VALIDATE not in made.meta.notes


def test_the_split_of_mgca_knows_no_third_list_and_needs_lines(tmp_path):
    tree = make(tmp_path / "a", version="")
    (tree / "val.txt").write_text("v1 v1.png pneumonia rsna\n")
    (tree / "val").mkdir()
    (tree / "val" / "v1.png").write_bytes(b"picture")
    message = refused(tree, "split=mgca")
    assert "version plain has a third" in message
    assert "--set split=ours" in message
    short = make(tmp_path / "b", train="n1 n1.png normal rsna\n")
    assert "the train list is too short to be split" in refused(short, "split=mgca")


def test_a_folder_without_lists_says_what_is_wanted(tmp_path):
    message = refused(tmp_path)
    assert "no train list with a test list of the same version" in message
    assert "train_COVIDx9A.txt" in message


def classes_of(text: str) -> dict[str, int]:
    return dict(Counter(covidx.parse_line(line)[2] for line in text.splitlines()))


def pretend_published(monkeypatch) -> None:
    """Let the small lists of this file be the published ones."""
    monkeypatch.setitem(covidx.PUBLISHED, "9A", {"train": 9, "test": 3})
    monkeypatch.setitem(covidx.PUBLISHED_CLASSES, "9A", classes_of(TRAIN))


def test_a_complete_version_is_said_to_be_complete(tree, monkeypatch, capsys):
    pretend_published(monkeypatch)
    assert read(tree).meta.policies["lists"] == "version 9A, 9 + 3 lines as published"
    assert "of the published" not in capsys.readouterr().err
    monkeypatch.setitem(covidx.PUBLISHED_CLASSES, "9A", {"normal": 9})
    assert read(tree).meta.policies["lists"].endswith("but other numbers of each class")


def test_the_withdrawn_files_are_recognised_by_their_number(tree, monkeypatch, capsys):
    (tree / "train" / "c2.png").unlink()
    monkeypatch.setitem(covidx.WITHDRAWN, "9A", (1, 0))
    read(tree)
    assert "so it is these: CXR-3A is the list without them" in capsys.readouterr().err


def test_leaks_of_the_published_test_list_are_said(tree, synthetic, tmp_path):
    notes = read(tree).meta.notes
    assert covidx.NOTE_LEAK in notes
    assert covidx.NOTE_RSNA_TEST in notes
    drawn = covidx.read(synthetic, tmp_path / "m", options=covidx.Options())
    assert covidx.NOTE_LEAK not in drawn.meta.notes


def test_the_split_of_mgca_is_recomputed_and_its_sharing_counted(synthetic, tmp_path):
    made = covidx.read(synthetic, tmp_path / "m", options=covidx.Options(split="mgca"))
    lines = (synthetic / "train_COVIDx9A.txt").read_text().splitlines()
    train, validate = train_test_split(lines, train_size=0.8, random_state=0)
    want = {f"train/{covidx.parse_line(line)[1]}": "train" for line in train}
    want |= {f"train/{covidx.parse_line(line)[1]}": "validate" for line in validate}
    got = dict(zip(made.keys, made.splits(), strict=True))
    assert {key: split for key, split in got.items() if split != "test"} == {
        key: split for key, split in want.items() if key in got
    }
    known = {covidx.parse_line(line)[0] for line in train}
    shared = [line for line in validate if covidx.parse_line(line)[0] in known]
    patients = len({covidx.parse_line(line)[0] for line in shared})
    assert patients > 5
    assert (
        f"The split is MGCA's, by image: {patients} patients are in train and validation, with "
        f"{len(shared) / len(validate):.1%} of the validation images."
    ) in made.meta.notes
    assert made.images["subject_id"].to_pylist() == made.keys
    assert "not comparable with the published one" in made.meta.policies["split"]
    assert covidx.NOTE_VALIDATE not in made.meta.notes


def test_the_split_of_mgca_must_meet_its_hashes_where_the_lists_are_whole(tree, monkeypatch):
    pretend_published(monkeypatch)
    message = refused(tree, "split=mgca")
    assert "otherwise than published in train, validate, test" in message
    assert "--set split=ours" in message
    train, validate = train_test_split(TRAIN.splitlines(), train_size=0.8, random_state=0)
    for name, lines in (("train", train), ("validate", validate), ("test", TEST.splitlines())):
        files = "".join(f"{covidx.parse_line(line)[1]}\n" for line in lines)
        digest = hashlib.sha256(files.encode()).hexdigest()[:16]
        monkeypatch.setitem(published.HASHES, name, digest)
    assert (
        "equal to the published one by its hashes"
        in read(tree, "split=mgca").meta.policies["split"]
    )
