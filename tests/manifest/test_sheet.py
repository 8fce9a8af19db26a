"""Table files as text."""

import csv
import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import ManifestError, UsageError
from featcache.manifest.sheet import column_names, read_sheet

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)


def cells(path, **options):
    names = column_names(path, encoding=options.get("encoding", "utf-8"))
    sheet = read_sheet(path, names, **options)
    return {name: sheet.columns[name].to_pylist() for name in names}


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_every_cell_comes_back_as_it_was_written(tmp_path_factory, rows, end):
    path = tmp_path_factory.mktemp("sheet") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        # Python's writer leaves a lone carriage return without the quotes that it needs.
        quoting = csv.QUOTE_ALL if any("\r" in cell for row in rows for cell in row) else 0
        writer = csv.writer(file, lineterminator=end, quoting=quoting)
        writer.writerows([("x", "y", "z"), *rows])
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    expected = list(zip(*kept, strict=True)) or [(), (), ()]
    found = cells(path)
    assert list(found) == ["x", "y", "z"]
    assert [tuple(column) for column in found.values()] == expected


def test_ids_are_never_numbers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,study\n007,59999901\n1e5,\n+3,59999902\n12345678901234567890,0x1f\n")
    assert cells(path) == {
        "id": ["007", "1e5", "+3", "12345678901234567890"],
        "study": ["59999901", "", "59999902", "0x1f"],
    }


def test_a_batch_border_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.manifest.sheet.BATCH_ROWS", 3)
    path = tmp_path / "t.csv"
    for count in (2, 3, 4, 6, 7):
        path.write_text("a,b\n" + "".join(f"{n},x\n" for n in range(count)))
        assert cells(path)["a"] == [str(n) for n in range(count)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfkey,b\n1,\xc3\xa9\n",
        "\ufeffkey,b\n1,\u00e9\n".encode("utf-16-le"),
        "\ufeffkey,b\r\n1,\u00e9\r\n".encode("utf-16-be"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert cells(path) == {"key": ["1"], "b": ["\u00e9"]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path, delimiter):
    path = tmp_path / "t.txt"
    path.write_text(f'a{delimiter}"b, c"\n1{delimiter}2\n')
    assert cells(path) == {"a": ["1"], "b, c": ["2"]}


def test_one_column_is_a_table_too(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("path\nx.png\n\ny.png\n")
    assert cells(path) == {"path": ["x.png", "y.png"]}


def test_a_gzipped_table_reads_the_same(tmp_path):
    content = b'key,b\n1,"x\ny"\n'
    (tmp_path / "t.csv").write_bytes(content)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content))
    assert cells(tmp_path / "t.csv") == cells(tmp_path / "t.csv.gz")


def test_a_cut_gzip_file_is_refused(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"key,b\n" + b"1,x\n" * 9_999)[:-20])
    with pytest.raises(ManifestError, match="gzip file is damaged or cut short"):
        cells(path)


def test_row_numbers_are_those_of_a_spreadsheet_program(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,"two\nlines"\n\n,\n2,x\n\n')
    sheet = read_sheet(path, ["b"])
    assert sheet.columns["b"].to_pylist() == ["two\nlines", "x"]
    assert sheet.numbers.tolist() == [2, 5]


def test_delimiters_that_trail_a_line_are_harmless(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2,,\n")
    assert cells(path) == {"a": ["1"], "b": ["2"]}


def test_rows_of_another_length_are_refused_by_number_without_content(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\nsecret,2,3\n1\n1,2\n")
    with pytest.raises(ManifestError, match=r"2 rows .* than the header's 2: rows 3, 4") as caught:
        cells(path)
    assert "secret" not in str(caught.value)


def test_a_quote_that_is_never_closed_swallows_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,x\n2,"secret\n3,y\n4,z\n')
    with pytest.raises(ManifestError, match="opened and never closed") as caught:
        cells(path)
    assert "row 3 (the header is row 1)" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_quote_that_closes_in_a_later_row_swallows_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,"secret\n2,"y"\n3,z\n')
    with pytest.raises(ManifestError, match="text follows a closing double quote") as caught:
        cells(path)
    assert "row 2 " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_cell_longer_than_pythons_limit_is_read(tmp_path):
    csv.field_size_limit(before := 131_072)
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1," + "x" * 200_000 + "\n")
    assert len(cells(path)["b"][0]) == 200_000
    assert csv.field_size_limit() == before


def test_another_encoding_is_refused_until_it_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\n1,\u00b5\n".encode("cp1252"))
    with pytest.raises(ManifestError, match="the table is not utf-8") as caught:
        cells(path)
    assert "--set encoding=cp1252" in caught.value.fix
    assert cells(path, encoding="cp1252") == {"a": ["1"], "b": ["\u00b5"]}
    with pytest.raises(UsageError, match="unknown encoding `klingon`"):
        cells(path, encoding="klingon")


def test_files_that_are_no_tables_are_refused(tmp_path):
    for name in ("t.xlsx", "t", "t.gz"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UsageError, match=r"cannot be read; known endings: \.csv") as caught:
            column_names(tmp_path / name)
        assert "save the table as CSV" in caught.value.fix
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(ManifestError, match="no header row"):
        column_names(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match="no readable Parquet table"):
        column_names(tmp_path / "t.parquet")
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        column_names(tmp_path / "absent.csv")


def test_a_name_that_stands_twice_is_refused_unless_it_is_blank(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,a,,\n")
    with pytest.raises(ManifestError, match="two columns have the same name: `a`\n"):
        column_names(path)


def test_parquet_text_whole_numbers_and_booleans_are_text(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table(
            {
                "text": ["a", None, ""],
                "category": pa.array(["x", "y", "x"]).dictionary_encode(),
                "whole": pa.array([1, None, -3]),
                "flag": [True, False, None],
                "nothing": pa.nulls(3),
                "label": [1.0, float("nan"), -1.0],
            }
        ),
        path,
    )
    assert cells(path, whole_numbers=["label"]) == {
        "text": ["a", None, ""],
        "category": ["x", "y", "x"],
        "whole": ["1", None, "-3"],
        "flag": ["1", "0", None],
        "nothing": [None] * 3,
        "label": ["1", None, "-1"],
    }
    assert read_sheet(path, ["text"]).numbers.tolist() == [1, 2, 3]


@pytest.mark.parametrize("values", [[1.0, None], [0.5, 1.0], [[1], [2]]])
def test_parquet_columns_that_are_no_ids_are_refused(tmp_path, values):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"study_id": values}), path)
    with pytest.raises(ManifestError, match=r"`study_id` holds .*, text is needed") as caught:
        cells(path)
    assert "lost their leading zeros" in caught.value.fix


def test_a_label_that_is_no_whole_number_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"label:x": [0.5, 1.0]}), path)
    with pytest.raises(ManifestError, match="`label:x` holds double"):
        cells(path, whole_numbers=["label:x"])
