"""Rows that repeat, against the plain way of finding them."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.manifest.checks import (
    conflict_sentence,
    distinct_rows,
    is_blank,
    patients_in_two_splits,
    rows_text,
    take_rows,
    text_id,
    text_ids,
)

CELLS = st.sampled_from(["a", "b", "\u00e9", "", None])
ROWS = st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=12)


def table(rows, pieces=1):
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    whole = pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip("xyz", columns, strict=True)}
    )
    cuts = np.linspace(0, len(rows), pieces + 1, dtype=int)
    parts = [whole.slice(a, b - a) for a, b in pairwise(cuts)]
    return pa.concat_tables(parts)


@given(ROWS, st.integers(1, 3))
def test_distinct_rows_equal_those_of_a_dictionary(rows, pieces):
    kept, conflicts = distinct_rows(table(rows, pieces), ["x", "y"], same=["z"])
    groups: dict[tuple, list[int]] = {}
    for position, (x, y, _) in enumerate(rows):
        identity = (x, y) if None not in (x, y) else (x, y, position)
        groups.setdefault(identity, []).append(position)
    assert sorted(kept.tolist()) == sorted(group[0] for group in groups.values())
    clashes = {
        group[0] for group in groups.values() if len({rows[position][2] for position in group}) > 1
    }
    found = {next(g[0] for g in groups.values() if one in g) for one in conflicts[:, 0].tolist()}
    assert found == clashes
    for one, other in conflicts.tolist():
        assert rows[one][:2] == rows[other][:2]
        assert rows[one][2] != rows[other][2]


@given(ROWS)
def test_kept_rows_are_sorted_by_the_bytes_of_their_identity(rows):
    kept, _ = distinct_rows(table(rows), ["x", "y"], same=[])
    identities = [rows[position][:2] for position in kept.tolist()]
    full = [tuple(cell.encode() for cell in one) for one in identities if None not in one]
    assert full == sorted(full)


def test_rows_in_their_order_are_not_copied():
    whole = table([("a", "b", "c"), ("d", "e", "f")])
    assert take_rows(whole, np.array([0, 1])) is whole
    for rows in ([1, 0], [1], [0, 0], []):
        taken = take_rows(whole, np.array(rows, dtype=np.int64))
        assert taken.to_pylist() == [whole.to_pylist()[row] for row in rows]


@pytest.mark.parametrize("blank", [None, "", " ", "\t\n", "\u00a0", "\u3000\u2028", "\x00\x1f"])
def test_white_space_of_every_kind_is_blank(blank):
    assert is_blank(pa.chunked_array([pa.array([blank], pa.string())])).to_pylist() == [True]


@pytest.mark.parametrize("said", ["a", " a", ".", "\u00b5", "0"])
def test_a_visible_character_is_not_blank(said):
    assert is_blank(pa.chunked_array([[said]])).to_pylist() == [False]


def test_text_ids_of_a_column_are_those_of_its_values(monkeypatch):
    monkeypatch.setattr("featcache.manifest.checks._PIECE_ROWS", 2)
    column = pa.chunked_array([["a", None, "b"], ["c", "a"]])
    expected = [text_id("a"), None, text_id("b"), text_id("c"), text_id("a")]
    assert text_ids(column).to_pylist() == expected
    assert text_ids(column.slice(0, 0)).to_pylist() == []


def test_row_numbers_in_words():
    assert rows_text([4]) == "row 4"
    assert rows_text([1, 2]) == "rows 1, 2"
    assert rows_text(np.arange(1_007)) == "rows 0, 1, 2, 3, 4 and 1,002 more"


def test_conflicts_in_words():
    numbers = np.arange(10, 30)
    pairs = np.array([[0, 3], [1, 2], [4, 5], [6, 7], [8, 9]])
    sentence = conflict_sentence("the same `key`", pairs, numbers)
    assert sentence == (
        "rows 10 and 13, 11 and 12, 14 and 15 and 2 more pairs have the same `key` "
        "and contradict each other"
    )


def test_patients_in_two_splits_are_counted_once_each():
    splits = pa.table(
        {
            "subject_id": ["p", "p", "p", "q", "q", "r", "r"],
            "split": ["train", "test", "validate", "train", None, "test", "test"],
        }
    )
    assert patients_in_two_splits(splits) == 1
