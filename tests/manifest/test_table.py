"""Writing and opening a manifest."""

import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featcache.config import read_json, write_json
from featcache.errors import ManifestError
from featcache.manifest.table import (
    FunnelStep,
    check_funnel,
    manifest_hash,
    open_manifest,
    text_id,
    write_manifest,
)


def images(num=6, **changed):
    numbers = range(num)
    columns = {
        "key": [f"k{n}" for n in numbers],
        "subject_id": [f"p{n // 2}" for n in numbers],
        "study_id": [f"s{n}" if n % 2 else None for n in numbers],
        "view_position": ["AP"] * num,
        "split": ["train", "train", "validate", "validate", "test", "test"][:num],
        "source": ["here"] * num,
        "image_path": [f"a/{n}.png" for n in numbers],
        "label:class": ["x", "y", None, "x", "y", "x"][:num],
        "label:Edema": pa.array([1, 0, -1, None, 1, 0][:num], pa.int8()),
    }
    return pa.table(columns | changed)


def texts(keys=("k0", "k1", "k1"), words=("clear", "clear", "opaque")):
    return pa.table({"key": keys, "text": words, "unit": ["report"] * len(keys)})


def write(folder, images_table, texts_table=None, **options):
    defaults = {"dataset": "toy", "image_root": folder / "pictures"}
    return write_manifest(folder, images_table, texts_table, **(defaults | options))


def refused(folder, images_table, texts_table=None, **options):
    with pytest.raises(ManifestError) as caught:
        write(folder, images_table, texts_table, **options)
    assert not (folder / "manifest.json").exists()
    return str(caught.value)


def test_what_is_written_is_what_is_opened(tmp_path):
    made = write(
        tmp_path / "m", images(), texts(), notes=["so"], policies={"a": "b"}, synthetic=True
    )
    opened = open_manifest(tmp_path / "m")
    assert opened.meta == made.meta
    assert opened.images.equals(made.images)
    assert opened.texts.equals(made.texts)
    assert opened.name == "m"
    assert opened.keys == ["k0", "k1", "k2", "k3", "k4", "k5"]
    assert opened.image_file(3) == tmp_path / "m" / "pictures" / "a" / "3.png"
    assert opened.splits() == ["train"] * 2 + ["validate"] * 2 + ["test"] * 2
    assert opened.label_names == ["Edema", "class"]
    assert opened.has_texts
    assert opened.meta.synthetic
    assert opened.meta.notes == ["so"]
    assert opened.meta.funnel == [FunnelStep(name="images", count=6)]


def test_an_absolute_path_ignores_the_root(tmp_path):
    made = write(tmp_path / "m", images(1, image_path=["/data/x.png"]))
    assert str(made.image_file(0)) == "/data/x.png"


def test_texts_may_be_absent(tmp_path):
    made = write(tmp_path / "m", images())
    assert not made.has_texts
    assert made.unique_texts() == ([], [])
    assert open_manifest(tmp_path / "m").texts.num_rows == 0


def test_a_text_is_unique_by_its_id_in_order_of_first_appearance(tmp_path):
    made = write(
        tmp_path / "m",
        images(),
        texts(["k2", "k0", "k1", "k1"], ["late", "shared", "shared", "own"]),
    )
    ids, unique = made.unique_texts()
    assert ids == [text_id(one) for one in unique]
    assert unique[0] == "shared"
    assert sorted(unique) == ["late", "own", "shared"]
    assert made.texts.num_rows == 4


def test_a_text_id_is_the_start_of_sha256():
    # printf 'clear' | sha256sum
    assert text_id("clear") == "913a4cb91be20332f3559f8070255d7a"
    assert text_id("\u00b5") == text_id("\N{MICRO SIGN}") != text_id("\N{GREEK SMALL LETTER MU}")


def test_bytes_do_not_depend_on_order_pieces_or_string_type(tmp_path):
    write(tmp_path / "one" / "m", images(), texts(), image_root=tmp_path)
    rows = list(range(6))
    random.Random(0).shuffle(rows)
    table = images().take(rows)
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    names = random.Random(1).sample(pieces.column_names, len(pieces.column_names))
    pieces = pieces.select(names)
    at = names.index("source")
    pieces = pieces.set_column(at, "source", pieces["source"].combine_chunks().dictionary_encode())
    at = names.index("key")
    pieces = pieces.set_column(at, "key", pieces["key"].cast(pa.large_string()))
    write(tmp_path / "two" / "m", pieces, texts().take([2, 0, 1]), image_root=tmp_path)
    for name in ("images.parquet", "texts.parquet", "manifest.json"):
        one, two = (tmp_path / run / "m" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize(
    "changed",
    [
        {"split": ["train"] * 4 + ["test", "test"]},
        {"study_id": [None] * 6},
        {"label:class": ["x", "y", None, "x", "y", "y"]},
        {"label:Edema": pa.array([1, 0, -1, 0, 1, 0], pa.int8())},
        {"mask_path": ["m.png"] + [None] * 5},
        # The same bytes in a row, cut elsewhere.
        {"view_position": ["A", "PAP", "AP", "AP", "AP", "AP"]},
    ],
)
def test_the_hash_follows_every_row(tmp_path, changed):
    assert (
        write(tmp_path / "a", images()).meta.hash
        != write(tmp_path / "b", images(**changed)).meta.hash
    )


def test_the_hash_follows_texts_and_policies_and_nothing_else(tmp_path):
    base = write(tmp_path / "a", images(), texts(), policies={"p": "1"}).meta.hash
    assert write(tmp_path / "b", images(), texts(), policies={"p": "2"}).meta.hash != base
    other = texts(words=("clear", "clear", "cloudy"))
    assert write(tmp_path / "c", images(), other, policies={"p": "1"}).meta.hash != base
    moved = write(
        tmp_path / "d", images(), texts(), policies={"p": "1"}, notes=["n"], image_root=tmp_path
    )
    assert moved.meta.hash == base


def test_the_hash_does_not_follow_how_columns_are_cut():
    table = images().select(["key", "study_id", "label:Edema"])
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    nothing = table.slice(0, 0)
    assert manifest_hash(table, nothing, {}) == manifest_hash(cut, nothing, {})
    assert manifest_hash(table.slice(2), nothing, {}) == manifest_hash(cut.slice(2), nothing, {})


def test_identical_rows_are_merged_and_counted(tmp_path):
    twice = pa.concat_tables([images(), images().slice(3, 2)])
    made = write(tmp_path / "m", twice, texts(["k0", "k0"], ["same", "same"]))
    assert made.images.equals(write(tmp_path / "n", images()).images)
    assert made.texts.num_rows == 1
    assert made.meta.funnel[-1] == FunnelStep(
        name="distinct images", count=6, dropped={"identical row": 2}
    )
    assert check_funnel(made.meta.funnel, 6) == []


def test_contradicting_rows_are_refused_with_both_numbers(tmp_path):
    other = images(image_path=["other.png"] * 6).slice(0, 1)
    message = refused(tmp_path / "m", pa.concat_tables([images(), other]))
    assert "rows 1 and 7 have the same `key` and contradict each other" in message


def test_a_null_contradicts_a_value(tmp_path):
    other = images(study_id=["s0"] * 6).slice(0, 1)
    message = refused(tmp_path / "m", pa.concat_tables([images(), other]))
    assert "rows 1 and 7" in message


def test_the_readers_row_numbers_appear_and_are_not_stored(tmp_path):
    numbered = images().append_column("row", pa.array([12, 13, 14, 15, 16, 17]))
    assert "row" not in write(tmp_path / "m", numbered).images.column_names
    bad = numbered.set_column(0, "key", pa.array(["k0", "", "k2", "k3", "k4", "k5"]))
    assert "`key` is blank: row 13" in refused(tmp_path / "n", bad)


def test_all_problems_are_named_at_once_and_no_identifier(tmp_path):
    table = images(
        key=["secret0", None, "s" * 129, "a\tb", "k4", "k5"],
        subject_id=["secret1", "secret1", " ", "q", "q", "secret1"],
        split=["train", "val", "test", "test", "test", "test"],
        image_path=["", "x", "y", "z\n", "u", "v"],
        **{
            "label:class": [" ", "b", "c", "d", "e", "f"],
            "label:Edema": pa.array([1, 0, 2, None, -2, 0], pa.int8()),
        },
    )
    wrong = pa.table(
        {
            "key": ["k5", "nobody", "k4", "k4"],
            "text_id": [text_id("t"), text_id("t"), "0" * 32, None],
            "text": ["t", "t", "secret2", "\u00a0\n"],
            "unit": ["report", "report", "page", "report"],
        }
    )
    message = refused(tmp_path / "m", table, wrong, funnel=[FunnelStep(name="rows", count=9)])
    for sentence in (
        "`key` is blank: row 2",
        "`key` is longer than 128 bytes: row 3",
        "`key` holds a control character: row 4",
        "`subject_id` is blank: row 3",
        "`image_path` is blank: row 1",
        "`image_path` holds a control character: row 4",
        "`split` is none of train, validate, test: row 2",
        "`label:class` is blank where null is meant: row 1",
        "`label:Edema` is none of 1, 0, -1: rows 3, 5",
        "1 patients are in more than one split",
        "`key` is that of no image: row 2",
        "`text` is blank: row 4",
        "`text_id` is not the hash of the text: rows 3, 4",
        "`unit` is none of report, sentence: row 3",
        "no step of the funnel counts the 6 images handed over",
    ):
        assert sentence in message
    assert "secret" not in message


def test_a_key_of_128_bytes_passes_and_bytes_count(tmp_path):
    assert write(tmp_path / "m", images(1, key=["\u00e9" * 64])).keys == ["\u00e9" * 64]
    message = refused(tmp_path / "n", images(1, key=["\u00e9" * 65]))
    assert "longer than 128 bytes" in message


def test_an_image_may_be_in_no_split(tmp_path):
    made = write(tmp_path / "m", images(split=["train", None] + ["test"] * 4))
    assert made.splits()[1] is None


def test_missing_and_unknown_columns_are_named_with_the_nearest(tmp_path):
    table = images().rename_columns(
        ["key", "subject", "study_id", "view_position", "split", "source", "image_path", "a", "b"]
    )
    message = refused(tmp_path / "m", table)
    assert "`subject_id` is missing; did you mean `subject`" in message
    assert "unknown column `subject`; did you mean `subject_id`" in message
    assert "unknown column `a`" in message


def test_ids_that_are_numbers_are_refused(tmp_path):
    numbers = pa.array([1.0, 2, 3, 4, 5, 6])
    message = refused(tmp_path / "m", images(subject_id=numbers))
    assert "`subject_id` holds double, text is needed" in message


def test_findings_of_another_type_are_cast_or_refused(tmp_path):
    edema = pa.array([1.0, 0.0, -1.0, None, 1.0, 0.0])
    cast = write(tmp_path / "m", images(**{"label:Edema": edema}))
    assert cast.meta.hash == write(tmp_path / "n", images()).meta.hash
    half = pa.array([0.5] * 6)
    message = refused(tmp_path / "o", images(**{"label:Edema": half}))
    assert "`label:Edema` holds values that are no int8" in message


def test_no_image_is_no_manifest(tmp_path):
    assert "no image is left" in refused(tmp_path / "m", images().slice(0, 0))


def test_one_text_in_two_units_is_refused(tmp_path):
    table = pa.table({"key": ["k0", "k0"], "text": ["t", "t"], "unit": ["report", "sentence"]})
    assert "1 texts of an image stand there in two units" in refused(
        tmp_path / "m", images(), table
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("rows", 9, {}), ("images", 6, {"a": 1})], "does not close at `images`: 9 came in, 7"),
        ([("rows", 6, {"a": 1})], "does not close at `rows`: 6 came in, 7"),
        ([("rows", 9, {}), ("images", 6, {"a": 4, "b": -1})], "does not close at `images`"),
        ([("rows", 9, {}), ("images", 5, {"a": 4})], "no step of the funnel counts the 6 images"),
    ],
)
def test_a_funnel_that_does_not_close_is_refused(tmp_path, steps, message):
    funnel = [FunnelStep(name=name, count=count, dropped=lost) for name, count, lost in steps]
    assert message in refused(tmp_path / "m", images(), funnel=funnel)


def test_a_funnel_may_go_on_to_texts(tmp_path):
    funnel = [
        FunnelStep(name="rows", count=8),
        FunnelStep(name="images", count=6, dropped={"blank": 2}),
        FunnelStep(name="images with a report", count=2, dropped={"no report": 4}),
    ]
    assert write(tmp_path / "m", images(), texts(), funnel=funnel).meta.funnel == funnel
    twice = pa.concat_tables([images(), images().slice(5)])
    funnel[1] = FunnelStep(name="images", count=7, dropped={"blank": 1})
    funnel[2] = FunnelStep(name="images with a report", count=2, dropped={"no report": 5})
    message = refused(tmp_path / "n", twice, texts(), funnel=funnel)
    assert "1 identical image rows, while the funnel ends with `images with a report`" in message


def test_an_older_manifest_is_replaced(tmp_path):
    write(tmp_path / "m", images())
    made = write(tmp_path / "m", images(4), texts())
    assert open_manifest(tmp_path / "m").meta == made.meta
    assert sorted(os.listdir(tmp_path / "m")) == [  # noqa: PTH208 - hidden files count
        "images.parquet",
        "manifest.json",
        "texts.parquet",
    ]


def test_a_refused_manifest_leaves_the_older_one(tmp_path):
    before = write(tmp_path / "m", images()).meta
    with pytest.raises(ManifestError):
        write(tmp_path / "m", images(split=["no"] * 6))
    assert open_manifest(tmp_path / "m").meta == before


def test_more_rows_than_a_row_group_come_back(tmp_path, monkeypatch):
    whole = write(tmp_path / "m", images(), texts())
    monkeypatch.setattr("featcache.manifest.table.GROUP_ROWS", 4)
    write(tmp_path / "n", images(), texts())
    assert pq.ParquetFile(tmp_path / "n" / "images.parquet").num_row_groups == 2
    assert open_manifest(tmp_path / "n").meta.hash == whole.meta.hash


def not_opened(folder, message):
    with pytest.raises(ManifestError, match=message) as caught:
        open_manifest(folder)
    assert caught.value.fix or caught.value.where
    return caught.value


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path):
    error = not_opened(tmp_path, "there is no manifest in this folder")
    assert "featcache manifest" in error.fix


def test_another_version_is_refused_with_both_numbers(tmp_path):
    write(tmp_path / "m", images())
    path = tmp_path / "m" / "manifest.json"
    write_json(path, read_json(path) | {"version": 2, "novelty": 1})
    not_opened(tmp_path / "m", "the manifest has version 2, this featcache reads 1")


def test_a_damaged_manifest_is_refused(tmp_path):
    write(tmp_path / "m", images())
    path = tmp_path / "m" / "manifest.json"
    good = read_json(path)
    write_json(path, good | {"novelty": 1})
    not_opened(tmp_path / "m", "`novelty`: unknown key")
    write_json(path, [1])
    not_opened(tmp_path / "m", "has version None")
    path.write_text("{")
    not_opened(tmp_path / "m", "is damaged: it is no JSON")


def test_a_damaged_or_missing_table_is_refused(tmp_path):
    write(tmp_path / "m", images())
    path = tmp_path / "m" / "texts.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    not_opened(tmp_path / "m", "a table of the manifest is damaged")
    path.unlink()
    not_opened(tmp_path / "m", "a table of the manifest is missing")


def test_a_table_changed_by_hand_is_refused(tmp_path):
    write(tmp_path / "m", images())
    changed = images(split=["test"] * 2 + ["validate"] * 2 + ["test"] * 2)
    path = tmp_path / "m" / "images.parquet"
    pq.write_table(changed, path)
    not_opened(tmp_path / "m", "the tables are not those that were checked")


def test_a_manifest_needs_no_torch():
    code = "import featcache.manifest.table, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
