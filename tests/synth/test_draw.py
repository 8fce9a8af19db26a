"""Drawn radiographs: every finding changes the pixels where its box says, nothing else does."""

import numpy as np
import pytest

from featcache.synth.draw import (
    GEOMETRY,
    LESIONS,
    Lesion,
    draw_frontal,
    draw_lateral,
    equalise,
    generator,
    make_anatomy,
)

PATIENT = make_anatomy(generator(0, "patient"))


def draw(lesions, name="one", *, height=160, width=140):
    return draw_frontal(PATIENT, lesions, generator(0, name), height=height, width=width)


@pytest.mark.parametrize("kind", sorted(LESIONS))
@pytest.mark.parametrize("side", [-1, 1])
def test_lesion_changes_its_box(kind, side):
    with_lesion, [(name, box)] = draw([Lesion(kind, side, 0.4, 0.9)])
    assert name == kind
    assert with_lesion.dtype == np.uint8
    assert with_lesion.shape == (160, 140)
    left, top, right, bottom = (
        round(edge * length) for edge, length in zip(box, (140, 160, 140, 160), strict=True)
    )
    # The lesion's own random numbers come before the noise: compare the means of many draws.
    change = np.zeros((160, 140))
    for number in range(12):
        drawn, _ = draw([Lesion(kind, side, 0.4, 0.9)], name=number)
        plain, _ = draw([Lesion(kind, side, 0.0, 0.9)], name=number)
        change += drawn.astype(float) - plain
    _, [(_, box)] = draw([Lesion(kind, side, 0.4, 0.9)])
    half = change[:, :70] if side < 0 else change[:, 70:]
    other = change[:, 70:] if side < 0 else change[:, :70]
    assert np.abs(half).sum() > 0
    if kind != "Edema":  # edema is on both sides
        assert np.abs(half).sum() > 2 * np.abs(other).sum()
    assert 0 <= left < right <= 140
    assert 0 <= top < bottom <= 160


def test_box_holds_the_change():
    lesion = Lesion("Lung Lesion", 1, 0.4, 1.0)
    drawn, [(_, box)] = draw([lesion])
    plain, _ = draw([Lesion("Lung Lesion", 1, 0.0, 1.0)])
    change = np.abs(drawn.astype(float) - plain) > 8
    rows, columns = np.nonzero(change)
    assert box[0] * 140 - 4 <= columns.min() <= columns.max() <= box[2] * 140 + 4
    assert box[1] * 160 - 4 <= rows.min() <= rows.max() <= box[3] * 160 + 4


@pytest.mark.parametrize("kind", GEOMETRY)
def test_geometry_widens_the_middle(kind):
    wide, boxes = draw([Lesion(kind, 0, 0.0, 1.0)])
    plain, _ = draw([])
    assert boxes == []
    middle = slice(45, 105)
    assert wide[:, middle].mean() > plain[:, middle].mean() + 2


def test_pictures_of_one_patient_are_alike_and_those_of_others_less():
    def small(patient, name):
        grey, _ = draw_frontal(patient, [], generator(0, name), height=64, width=64)
        return (grey - grey.mean()) / grey.std()

    people = [make_anatomy(generator(1, n)) for n in range(12)]
    pairs = [(small(p, ("a", n)), small(p, ("b", n))) for n, p in enumerate(people)]
    same = np.mean([(a * b).mean() for a, b in pairs])
    other = np.mean([(pairs[n][0] * pairs[n - 1][1]).mean() for n in range(12)])
    assert 0.5 < other < same < 0.995


def test_large_pictures_are_enlarged_and_small_ones_possible():
    grey, _ = draw([], height=700, width=600)
    assert grey.shape == (700, 600)
    assert draw([], height=1, width=9)[0].shape == (1, 9)


def test_lateral_picture():
    grey = draw_lateral(PATIENT, generator(0), height=100, width=90)
    assert grey.shape == (100, 90)
    assert grey.std() > 10


def test_equalise_gives_a_flat_histogram_and_survives_a_constant():
    rng = np.random.default_rng(0)
    flat = equalise((rng.random((64, 64)) ** 3 * 90 + 20).astype(np.uint8))
    assert np.all(np.abs(np.quantile(flat, (0.25, 0.5, 0.75)) - (64, 128, 191)) < 20)
    assert equalise(np.full((4, 4), 7, np.uint8)).shape == (4, 4)


def test_generator_depends_on_its_names_alone():
    assert generator(0, "a", 1).integers(1 << 30) == generator(0, "a", 1).integers(1 << 30)
    assert generator(0, "a", 1).integers(1 << 30) != generator(0, "a", 2).integers(1 << 30)
    assert generator(1, "a", 1).integers(1 << 30) != generator(0, "a", 1).integers(1 << 30)
