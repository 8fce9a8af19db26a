"""Texts that are compressed until they are wanted."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.manifest.packed import PackedTexts

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=12)


@given(pieces=st.lists(TEXTS, max_size=4), draw=st.randoms(use_true_random=False))
def test_any_rows_in_any_order_come_back_as_they_were(pieces, draw):
    packed = PackedTexts()
    for piece in pieces:
        packed.append(pa.array(piece, pa.large_string()))
    whole = [text for piece in pieces for text in piece]
    rows = [row for row in range(len(whole)) if draw.random() < 0.7]
    draw.shuffle(rows)
    taken = packed.take(np.array(rows, dtype=np.int64))
    taken.validate(full=True)
    assert taken.to_pylist() == [whole[row] for row in rows]


def test_a_part_of_a_longer_column_and_nulls_keep_their_places():
    packed = PackedTexts()
    packed.append(pa.array(["a", "b", None, "dd", "e"], pa.large_string())[1:4])
    packed.append(pa.nulls(2, pa.large_string()))
    packed.append(pa.array(["z"], pa.large_string()))
    assert packed.take(np.array([5, 2, 0])).to_pylist() == ["z", "dd", "b"]


def test_repeated_words_take_a_part_of_their_bytes():
    packed = PackedTexts()
    texts = pa.array(["The lungs are clear without effusion. " * 20] * 1000, pa.large_string())
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    packed.append(texts)
    kept = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert kept < texts.nbytes / 10


def test_a_row_that_is_not_there_is_an_error():
    packed = PackedTexts()
    packed.append(pa.array(["a"], pa.large_string()))
    with pytest.raises(IndexError):
        packed.take(np.array([1]))
