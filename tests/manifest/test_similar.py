"""Pictures that look alike: the signature, and pairs by bands against the plain comparison."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.manifest import similar
from featcache.manifest.similar import MAX_DISTANCE, NUM_BITS, alike_elsewhere, near_pairs
from featcache.synth.draw import draw_frontal, generator, make_anatomy


def thumbnail(patient: int, exposure: int = 0) -> np.ndarray:
    rng = generator(0, "similar", patient, exposure)
    grey, _ = draw_frontal(make_anatomy(generator(0, "p", patient)), [], rng, height=96, width=96)
    return np.asarray(grey).reshape(32, 3, 32, 3).mean((1, 3)).round().astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.bitwise_count(similar.signature(one) ^ similar.signature(other)).sum())


@pytest.mark.parametrize("patient", [1, 2, 3])
def test_brightness_and_contrast_hardly_change_a_signature(patient):
    picture = thumbnail(patient)
    for other in (picture // 2, 40 + picture // 2, 255 * (picture / 255) ** 0.8):
        assert distance(picture, other.astype(np.uint8)) <= MAX_DISTANCE


def test_another_patient_a_mirror_image_and_a_turn_have_another_signature():
    picture = thumbnail(1)
    assert distance(picture, thumbnail(2)) > 2 * MAX_DISTANCE
    assert distance(picture, picture[:, ::-1].copy()) > 2 * MAX_DISTANCE
    assert distance(picture, picture.T.copy()) > 2 * MAX_DISTANCE


def test_one_grey_level_has_no_signature():
    assert not similar.signature(np.full((32, 32), 90, np.uint8)).any()


def test_the_mean_is_no_part_of_the_signature():
    rows, columns = similar._frequencies()
    assert (rows + columns > 0).all()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == NUM_BITS


def flip(signature: np.ndarray, bits) -> np.ndarray:
    words = signature.copy()
    for bit in bits:
        words[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return words


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.lists(st.integers(0, MAX_DISTANCE + 3), max_size=12))
def test_bands_find_what_the_plain_comparison_finds(seed, distances):
    rng = np.random.default_rng(seed)
    rows = [*rng.integers(0, 2**64, (5, 4), dtype=np.uint64)]
    for number in distances:
        base = rows[rng.integers(len(rows))]
        rows.append(flip(base, rng.choice(NUM_BITS, number, replace=False).tolist()))
    signatures = np.stack(rows)
    differ = np.bitwise_count(signatures[:, None] ^ signatures[None]).sum(axis=2)
    expected = np.argwhere(np.triu(differ <= MAX_DISTANCE, 1))
    assert near_pairs(signatures).tolist() == expected.tolist()


@pytest.mark.parametrize("band", range(12))
def test_no_band_is_left_out(band):
    # One bit too many in each other band, and one in this: only this band can find the pair.
    others = [bit for other in range(12) if other != band for bit in (other, other + 12)]
    base = np.random.default_rng(0).integers(0, 2**64, 4, dtype=np.uint64)
    pair = np.stack([base, flip(base, [*others, band + 12])])
    assert np.bitwise_count(pair[0] ^ pair[1]).sum() == MAX_DISTANCE
    assert near_pairs(pair).tolist() == [[0, 1]]


def test_pieces_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**64, 4, dtype=np.uint64)
    chosen = [rng.choice(NUM_BITS, 8, replace=False).tolist() for _ in range(40)]
    rows = np.stack([flip(base, bits) for bits in chosen])
    whole = near_pairs(rows)
    assert len(whole) > 700
    monkeypatch.setattr(similar, "_PIECE", 7)
    assert near_pairs(rows).tolist() == whole.tolist()


def test_a_pair_of_a_cluster_is_held_once_whatever_bands_find_it(monkeypatch):
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2**64, 4, dtype=np.uint64)
    chosen = [rng.choice(NUM_BITS, 4, replace=False).tolist() for _ in range(500)]
    rows = np.unique(np.stack([flip(base, bits) for bits in chosen]), axis=0)
    monkeypatch.setattr(similar, "_PIECE", 1_000)
    tracemalloc.start()
    try:
        pairs = near_pairs(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pairs) == len(rows) * (len(rows) - 1) // 2
    assert peak < 120 * len(pairs)  # 12 bands with two numbers each are 192 bytes before sorting


def test_a_table_of_values_finds_what_a_search_finds(monkeypatch):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 2**64, (30, 4), dtype=np.uint64)
    rows = np.concatenate([rows, [flip(row, [3, 9, 200]) for row in rows[:20]]])
    searched = near_pairs(rows)
    assert len(searched) == 20
    monkeypatch.setattr(similar, "_FEW", 0)
    assert near_pairs(rows).tolist() == searched.tolist()


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_signatures_make_no_pair(number):
    assert near_pairs(np.zeros((number, 4), np.uint64)).shape == (0, 2)


def test_pictures_that_look_like_one_of_another_group():
    node = np.array([0, 0, 1, 2, 3, -1, 4, 4])
    pairs = np.array([[1, 2], [2, 3]])
    group = np.array([0, 0, 5, 5, 6, 7, -1, 8])
    alike = alike_elsewhere(node, pairs, group)
    assert alike.tolist() == [False, False, False, True, True, False, False, False]
    assert alike_elsewhere(node, pairs[:0], np.arange(8)).tolist() == (
        [True, True, False, False, False, False, True, True]
    )
    assert not alike_elsewhere(np.array([-1]), pairs[:0], np.array([0])).any()
