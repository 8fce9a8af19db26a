"""SIIM from tables made by hand and from a synthetic tree whose truth is known."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from contracts.dataset_contract import DatasetContract
from sklearn.model_selection import train_test_split

from featcache.config import load_config, read_json
from featcache.datasets import siim
from featcache.datasets.challenge import gaps
from featcache.encoders.decode import decode_image
from featcache.encoders.preprocessing import Preprocessing
from featcache.errors import ConfigError, ImageError, ManifestError
from featcache.manifest.masks import decode_mask
from featcache.manifest.splits import list_hash
from featcache.synth.secondary_capture import Header, encode_dicom
from featcache.synth.siim import TABLE, encode_gaps

SHAPE = (5, 7)


def uid(number):
    return f"1.2.276.0.7230010.3.1.4.9999999.{number}.1.1"


def make(folder, rows, *, blank="", shape=SHAPE, header="ImageId,{blank}EncodedPixels", skip=()):
    """A tree of rows `(number, cell)`, each image in a study and a series of its own."""
    lines = [header.format(blank=blank), *(f"{uid(n)},{blank}{cell}" for n, cell in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    for number in sorted({n for n, _ in rows} - set(skip)):
        place = folder / "dicom-images-train" / f"study{number}" / f"series{number}"
        place.mkdir(parents=True)
        header = Header("someone", "1.2.1", "1.2.2", uid(number), "AP", "F", "62", 0.1)
        grey = np.full(shape, number, np.uint8)
        (place / f"{uid(number)}.dcm").write_bytes(encode_dicom(grey, header))
    return folder


NEGATIVES = [(n, "-1") for n in range(10, 18)]
ROWS = [*NEGATIVES, (1, "6 2 1 3"), (2, "0 1"), (3, "11 2"), (1, "9 2")]


def read(folder, *settings, out="m"):
    options = load_config(siim.Options, overrides=settings)
    return siim.read(folder, folder.parent / out / "made", options=options)


def refused(folder, *settings):
    with pytest.raises(ManifestError) as caught:
        read(folder, *settings)
    assert "9999999" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tree(tmp_path):
    return make(tmp_path / "siim", ROWS)


@pytest.fixture(scope="module")
def synthetic(siim_tree):
    return siim_tree


@pytest.fixture(scope="module")
def truth(synthetic):
    return read_json(synthetic.with_name("tree.truth.json"))["images"]


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory):
    return siim.read(synthetic, tmp_path_factory.mktemp("out") / "m", options=siim.Options())


class TestContract(DatasetContract):
    @pytest.fixture
    def module(self):
        return siim

    @pytest.fixture
    def source(self, synthetic):
        return synthetic

    @pytest.fixture
    def options(self):
        return siim.Options()


def odd_cases(truth):
    odd = defaultdict(list)
    for key, one in truth.items():
        for name in one["odd"]:
            odd[name].append(key)
    return odd


def test_the_synthetic_tree_is_read_as_its_truth_says(made, truth):
    expected = {
        key: one
        for key, one in truth.items()
        if one["folder"] == "train"
        and not {"row without a file", "file without a row", "zero bytes"} & set(one["odd"])
    }
    assert made.keys == sorted(expected)
    for row in made.images.to_pylist():
        one = expected[row["key"]]
        assert row["mask"] == one["mask"]
        assert row["label:pneumothorax"] == int(one["pneumothorax"]) == int(bool(one["mask"]))
        assert row["image_path"] == one["path"]
        assert (row["view_position"] is None) == ("no view" in one["odd"])
    assert made.meta.synthetic
    assert made.meta.notes[1] == siim.NOTE_UNKNOWN


def test_every_odd_case_is_dropped_for_its_reason_or_kept(made, truth, synthetic, tmp_path, capsys):
    odd = odd_cases(truth)
    listed = [one for one in truth.values() if one["folder"] == "train"]
    listed = [one for one in listed if "file without a row" not in one["odd"]]
    rows = sum(one["rows"] for one in listed)
    assert {one["rows"] for one in listed} >= {1, 2, 3, 4, 10}
    steps = {step.name: step for step in made.meta.funnel}
    assert made.meta.funnel[0].count == rows
    assert steps["images"].dropped == {"further row of an image": rows - len(listed)}
    missing = len(odd["row without a file"])
    assert steps["images with a file"].dropped == {"missing file": missing} != {"file missing": 0}
    empty = len(odd["zero bytes"])
    assert steps["images with a DICOM header"].dropped == {"file of zero bytes": empty}
    for key in odd["truncated"]:
        with pytest.raises(ImageError, match="truncated"):
            decode_image(
                synthetic / truth[key]["path"],
                Preprocessing(image_size=(64, 64), mean=(0.0,), std=(1.0,)),
            )
    siim.read(synthetic, tmp_path / "m", options=siim.Options())
    printed = capsys.readouterr().err
    strangers = len(odd["file without a row"])
    strangers += sum(one["folder"] == "test" for one in truth.values())
    assert f"{strangers} DICOM files have no row in the table and are not read" in printed
    assert "neither complete stage 1 nor the complete later release" in printed
    for split in ("train", "validate", "test"):
        assert f"siim: {split} has a pneumothorax in " in printed
    assert not any(key in printed for key in truth)


@pytest.mark.parametrize(("in_name", "in_cells"), [("", " "), (" ", ""), (" ", " "), ("", "")])
def test_blanks_in_names_and_cells_are_of_no_matter(tmp_path, tree, in_name, in_cells):
    header = f"ImageId,{in_name}EncodedPixels"
    other = make(tmp_path / "other", ROWS, blank=in_cells, header=header)
    assert read(other).meta.hash == read(tree).meta.hash


def test_runs_are_gaps_column_by_column_and_rows_are_united(tree):
    made = read(tree)
    masks = dict(zip(made.keys, made.images["mask"].to_pylist(), strict=True))
    # Image 1 of 5 x 7: 6, 7 and 9, 10, 11 of the first row, 9, 10 of the second; column by column.
    flat = np.zeros(35, bool)
    flat[[6, 7, 9, 10, 11]] = True
    assert np.array_equal(decode_mask(masks[uid(1)], tree), flat.reshape(7, 5).T)
    flat = np.zeros(35, bool)
    flat[[11, 12]] = True
    assert np.array_equal(decode_mask(masks[uid(3)], tree), flat.reshape(7, 5).T)
    assert masks[uid(2)] == "runs:5x7:0,1"
    assert masks[uid(10)] == ""
    assert Counter(made.images["label:pneumothorax"].to_pylist()) == {1: 3, 0: 8}


def test_the_generator_and_the_reader_agree_on_any_mask():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 8), (8, 3), (20, 20)):
        mask = rng.random(shape) < 0.5
        mask[0, 0] = True
        pairs = gaps.read_pairs(encode_gaps(mask))
        assert np.array_equal(gaps.unite([pairs], *shape), mask)


def test_the_synthetic_masks_lie_where_the_picture_is_dark(made, synthetic):
    preprocessing = Preprocessing(image_size=(128, 128), mean=(0.0,), std=(1.0,))
    darker = []
    for row in made.images.to_pylist():
        if row["mask"]:
            try:
                grey = decode_image(synthetic / row["image_path"], preprocessing).astype(float)
            except ImageError:
                continue  # the truncated one
            mask = decode_mask(row["mask"], synthetic)
            darker.append(grey[mask].mean() < min(grey[mask.T].mean(), grey[:, ::-1][mask].mean()))
    assert len(darker) > 50
    assert np.mean(darker) > 0.9


def test_our_split_is_by_image_and_class(made):
    splits = Counter(zip(made.splits(), made.images["label:pneumothorax"].to_pylist(), strict=True))
    for name in ("validate", "test"):
        for label in (0, 1):
            total = sum(count for (_, one), count in splits.items() if one == label)
            assert splits[name, label] == pytest.approx(0.15 * total, abs=1.5)
    assert "by image, for patients are unknown" in made.meta.policies["split"]


def test_the_published_split_cuts_rows_and_its_leak_is_counted_and_mended(synthetic, tmp_path):
    made = siim.read(synthetic, tmp_path / "m", options=siim.Options(split="mgca"))
    lines = [line.split(",") for line in (synthetic / TABLE).read_text().splitlines()[1:]]
    train, rest = train_test_split(lines, test_size=0.15 * 2, random_state=0)
    test, validate = train_test_split(rest, test_size=0.5, random_state=0)
    of_image = defaultdict(set)
    for name, rows in (("train", train), ("test", test), ("validate", validate)):
        for key, _ in rows:
            of_image[key].add(name)
    for key, name in zip(made.keys, made.splits(), strict=True):
        first = next(one for one in ("test", "validate", "train") if one in of_image[key])
        assert name == first
    positive = {key for key, cell in lines if cell.strip() != "-1"}
    tests = {key for key in positive if "test" in of_image[key]}
    leaked = sum("train" in of_image[key] for key in tests)
    moved = sum("train" in one and len(one) > 1 for one in of_image.values())
    assert leaked > 0
    note = next(one for one in made.meta.notes if one.startswith("The split mgca cuts rows"))
    assert f"{leaked} of {len(tests)} positive test images ({leaked / len(tests):.1%})" in note
    assert f"Here {moved} images were taken out of train" in note


def test_only_listed_images_are_read(tree, tmp_path):
    path = tmp_path / "ids.txt"
    kept = [uid(n) for n in (1, 2, 10, 11, 12, 13)]
    path.write_text("\n".join([*kept, "another"]))
    made = read(tree, f"only={path}")
    assert made.keys == sorted(kept)
    assert made.meta.funnel[1].dropped == {"image not in the list": 5}
    assert made.meta.policies["images"] == f"6, of a list ({list_hash(kept)})"
    path.write_text("another")
    assert "none of the table's images is in the list" in refused(tree, f"only={path}")
    assert "cannot be read" in refused(tree, f"only={tmp_path / 'nowhere.txt'}")


def test_stage_1_and_complete_tables_are_recognised(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(siim, "STAGE_1_IDS", list_hash([uid(1), uid(10)]))
    monkeypatch.setitem(siim.PUBLISHED, "stage 1", (12, 11, 3))
    path = tmp_path / "ids.txt"
    path.write_text(f"{uid(10)}\n{uid(1)}\n")
    assert "2, those of stage 1 (" in read(tree, f"only={path}").meta.policies["images"]
    capsys.readouterr()
    made = read(tree)
    assert made.meta.policies["table"] == "12 rows, 11 images, 3 positive, as in stage 1"
    assert "neither complete" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, (2, "1 2 3")], "neither -1 nor pairs of gap and length: row 14"),
        ([*ROWS, (2, "1 0")], "neither -1 nor pairs of gap and length: row 14"),
        ([*ROWS, (2, "-3 2")], "neither -1 nor pairs of gap and length: row 14"),
        ([*ROWS, (2, "1.0 2")], "neither -1 nor pairs of gap and length: row 14"),
        ([*ROWS, (2, "")], "neither -1 nor pairs of gap and length: row 14"),
        ([*ROWS, (2, "-1")], "an image has a mask and also none: row 11"),
        ([*ROWS, (4, "30 4 1 1")], "1 images have a mask that leaves the image: row 14"),
        (NEGATIVES, "the table has no image with a mask"),
        (ROWS[8:], "the table has no image without a mask"),
    ],
)
def test_tables_that_cannot_be_are_refused_by_row(tmp_path, rows, message):
    assert message in refused(make(tmp_path / "siim", rows))


def test_a_run_may_end_at_the_last_pixel(tmp_path):
    made = read(make(tmp_path / "siim", [*ROWS, (4, "30 4 0 1")]))
    masks = dict(zip(made.keys, made.images["mask"].to_pylist(), strict=True))
    assert decode_mask(masks[uid(4)], tmp_path)[-1, -1]


def test_a_table_of_absolute_starts_is_refused_and_a_single_such_row_is_told(tmp_path, capsys):
    starts = " ".join(f"{start} 1" for start in range(1, 28, 3))
    message = refused(make(tmp_path / "a", [*ROWS, (4, starts)], shape=(50, 50)))
    assert "holds absolute starts where gaps are meant: row 14" in message
    equal = " ".join(["1 1"] * 9)
    others = [(n, equal) for n in (5, 6)]
    capsys.readouterr()
    read(make(tmp_path / "b", [*ROWS, (4, starts), *others], shape=(50, 50)))
    assert "row 14 may hold absolute starts" in capsys.readouterr().err


def test_an_unknown_header_is_named_with_the_columns_found(tmp_path):
    tree = make(tmp_path / "siim", ROWS, header="ImageId,{blank}EncodedPixel")
    assert "no column `EncodedPixels`; did you mean `EncodedPixel`" in refused(tree)


def test_tables_are_found_or_chosen_by_name(tree, tmp_path):
    (tree / "stage_2_train.csv").write_text((tree / TABLE).read_text())
    message = refused(tree)
    assert "there are 2 tables: train-rle.csv, stage_2_train.csv" in message
    assert "--set table=train-rle.csv" in message
    assert len(read(tree, "table=stage_2_train.csv").keys) == 11
    assert "there is no mine.csv" in refused(tree, "table=mine.csv")
    assert "there is no train-rle.csv and no stage_2_train.csv" in refused(tmp_path)


def test_images_may_lie_anywhere_below_the_folder(tree, tmp_path):
    before = read(tree)
    flat = tree / "flat"
    flat.mkdir()
    for path in sorted((tree / "dicom-images-train").rglob("*.dcm")):
        path.rename(flat / path.name)
    for path in sorted((tree / "dicom-images-train").rglob("*"), reverse=True):
        path.rmdir()
    (tree / "dicom-images-train").rmdir()
    after = read(tree)
    assert after.images["image_path"][0].as_py().startswith("flat/")
    assert after.images.drop(["image_path"]).equals(before.images.drop(["image_path"]))
    (flat / "again").mkdir()
    (flat / "again" / f"{uid(1)}.dcm").write_bytes((flat / f"{uid(1)}.dcm").read_bytes())
    assert "1 images have more than one file" in refused(tree)


def test_no_file_at_all_says_where_they_belong(tmp_path):
    tree = make(tmp_path / "siim", ROWS, skip=range(20))
    message = refused(tree)
    assert "none of the 11 images of the table is there" in message
    assert "<ImageId>.dcm" in message


def test_shares_that_leave_no_training_images_are_refused():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        load_config(siim.Options, overrides=["validate_fraction=0.5", "test_fraction=0.5"])
