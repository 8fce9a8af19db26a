"""Splits and fractions by patient."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UsageError
from featcache.manifest.splits import (
    label_fraction,
    label_shots,
    list_hash,
    main_class,
    split_by_subject,
)

SUBJECTS = st.lists(st.text("abcdefgh0123", min_size=1, max_size=4), min_size=1, max_size=60)


def test_list_hash_is_that_of_the_sorted_lines():
    # printf 'a\nb\n' | sha256sum
    assert list_hash(["b", "a"]) == list_hash(["a", "b"]) == "911169ddaaf146af"
    assert list_hash(["a", "b"]) != list_hash(["ab"])
    assert list_hash(["a", "a"]) != list_hash(["a"])
    assert len(list_hash([])) == 16


@given(SUBJECTS, st.integers(0, 5), st.randoms())
def test_a_patient_has_one_split_in_any_order(subjects, seed, random):
    splits = split_by_subject(subjects, seed=seed)
    of_subject = dict(zip(subjects, splits, strict=True))
    assert splits == [of_subject[subject] for subject in subjects]
    shuffled = random.sample(subjects, len(subjects))
    again = split_by_subject(shuffled, seed=seed)
    assert again == [of_subject[subject] for subject in shuffled]


def test_shares_are_met_on_average():
    subjects = [f"p{number}" for number in range(20_000)]
    counts = Counter(split_by_subject(subjects, fractions=(0.7, 0.1, 0.2), seed=0))
    assert counts["train"] == pytest.approx(14_000, abs=200)
    assert counts["validate"] == pytest.approx(2_000, abs=130)
    assert counts["test"] == pytest.approx(4_000, abs=170)


def test_patients_stay_where_they_are_when_others_are_added():
    few = [f"p{number}" for number in range(300)]
    before = split_by_subject(few, seed=3)
    after = split_by_subject([*few, *(f"q{number}" for number in range(300))], seed=3)
    assert after[:300] == before


def test_another_seed_gives_another_split():
    subjects = [f"p{number}" for number in range(300)]
    assert split_by_subject(subjects, seed=0) != split_by_subject(subjects, seed=1)


@pytest.mark.parametrize("seed", range(30))
def test_no_wanted_split_stays_empty_while_patients_last(seed):
    assert set(split_by_subject(["a", "b", "c"], seed=seed)) == {"train", "validate", "test"}
    assert len(set(split_by_subject(["a", "b"], seed=seed))) == 2


def test_a_share_of_zero_stays_empty():
    subjects = [f"p{number}" for number in range(2_000)]
    assert set(split_by_subject(subjects, fractions=(0.8, 0.2, 0.0), seed=0)) == {
        "train",
        "validate",
    }
    assert set(split_by_subject(subjects, fractions=(0.0, 0.0, 1.0), seed=0)) == {"test"}


def test_no_patients_give_no_splits():
    assert split_by_subject([], seed=0) == []


@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_shares_that_are_none_are_refused(fractions):
    with pytest.raises(UsageError, match="must not be negative and sum to 1, got"):
        split_by_subject(["a"], fractions=fractions, seed=0)


@st.composite
def labelled(draw):
    subjects = draw(SUBJECTS)
    labels = [draw(st.sampled_from(["normal", "pneumonia", "rare"])) for _ in subjects]
    return [f"k{number}" for number in range(len(subjects))], subjects, labels


@given(labelled(), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 3))
def test_a_fraction_takes_whole_patients_every_class_and_is_nested(rows, one, other, seed):
    keys, subjects, labels = rows
    small, large = (
        set(label_fraction(keys, subjects, labels, fraction=fraction, seed=seed))
        for fraction in sorted((one, other))
    )
    assert small <= large
    of_key = dict(zip(keys, zip(subjects, labels, strict=True), strict=True))
    patients = {of_key[key][0] for key in small}
    assert small == {key for key in keys if of_key[key][0] in patients}
    assert {of_key[key][1] for key in small} == set(labels)


@given(labelled(), st.randoms())
def test_a_fraction_does_not_depend_on_the_order_of_rows(rows, random):
    order = random.sample(range(len(rows[0])), len(rows[0]))
    shuffled = [[column[i] for i in order] for column in rows]
    one = label_fraction(*rows, fraction=0.3, seed=0)
    assert one == sorted(one) == label_fraction(*shuffled, fraction=0.3, seed=0)


def test_a_fraction_meets_its_share_in_each_class():
    random = np.random.default_rng(0)
    subjects = [f"p{number}" for number in random.integers(0, 4_000, 10_000)]
    labels = random.choice(["a", "b", "c"], 10_000, p=[0.7, 0.2, 0.1]).tolist()
    keys = [f"k{number}" for number in range(10_000)]
    chosen = label_fraction(keys, subjects, labels, fraction=0.1, seed=0)
    of_key = dict(zip(keys, labels, strict=True))
    counts = Counter(of_key[key] for key in chosen)
    assert len(chosen) == pytest.approx(1_000, abs=15)
    for name, count in Counter(labels).items():
        assert counts[name] == pytest.approx(count / 10, rel=0.25)


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_a_class_of_one_is_in_the_smallest_subset(fraction):
    labels = ["a"] * 250 + ["b"] * 49 + ["c"]
    keys = [f"k{number}" for number in range(300)]
    chosen = label_fraction(keys, keys, labels, fraction=fraction, seed=0)
    counts = Counter(labels[keys.index(key)] for key in chosen)
    assert counts["c"] == 1
    assert len(chosen) == pytest.approx(300 * fraction, abs=3)


def test_a_patient_with_many_images_does_not_blow_up_a_subset():
    subjects = ["big"] * 236 + [f"p{number}" for number in range(400)]
    keys = [f"k{number}" for number in range(636)]
    sizes = [
        len(label_fraction(keys, subjects, ["a"] * 636, fraction=0.1, seed=seed))
        for seed in range(20)
    ]
    assert np.median(sizes) == pytest.approx(64, abs=2)


def test_the_whole_is_the_whole():
    assert label_fraction(["b", "a"], ["p", "q"], ["x", "y"], fraction=1, seed=0) == ["a", "b"]


def test_subsets_and_splits_are_independent():
    """Else a patient's place in the order of subsets would tell their split."""
    subjects = [f"p{number}" for number in range(4_000)]
    split = dict(zip(subjects, split_by_subject(subjects, seed=0), strict=True))
    chosen = label_fraction(subjects, subjects, ["a"] * 4_000, fraction=0.2, seed=0)
    assert sum(split[key] == "train" for key in chosen) / len(chosen) == pytest.approx(
        0.7, abs=0.05
    )


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, 10])
def test_fractions_are_no_percentages(fraction):
    with pytest.raises(UsageError, match=r"lies in \(0, 1\], got"):
        label_fraction(["k"], ["p"], ["a"], fraction=fraction, seed=0)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(UsageError, match="2 keys, 1 patients and 1 labels do not match"):
        label_fraction(["k", "l"], ["p"], ["a"], fraction=0.5, seed=0)


def test_the_main_class_is_the_commonest_then_the_first():
    assert main_class({"b": 2, "a": 1}) == "b"
    assert main_class({"b": 2, "a": 2}) == "a"


def test_splits_need_no_arrow_and_no_torch():
    code = (
        "import featcache.manifest.splits, sys;"
        "sys.exit(bool({'torch', 'pyarrow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_places_are_the_same_on_every_machine():
    """Published subsets stand on this: a change of the hash would change every number."""
    subjects = [f"p{number}" for number in range(12)]
    letters = "".join(split[1] for split in split_by_subject(subjects, seed=0))
    assert letters == "errrerreraea"  # tRain, vAlidate, tEst
    chosen = label_fraction(subjects, subjects, list("ab" * 6), fraction=0.5, seed=0)
    assert list_hash(chosen) == "50ade49d7d76b6e5"


def shot_rows():
    """30 patients with 2 images of one class each; a class of three images of one patient."""
    keys = [f"k{i:02d}" for i in range(63)]
    subjects = [f"p{i // 2}" for i in range(60)] + ["last"] * 3
    labels = [("a", "b")[i // 2 % 2] for i in range(60)] + ["rare"] * 3
    return keys, subjects, labels


@pytest.mark.parametrize("shots", [1, 4, 15])
def test_shots_take_as_many_of_each_class_from_different_patients(shots):
    keys, subjects, labels = shot_rows()
    chosen = label_shots(keys, subjects, labels, shots=shots, seed=0)
    assert chosen == sorted(chosen)
    numbers = [keys.index(key) for key in chosen]
    for name in ("a", "b"):
        own = [subjects[i] for i in numbers if labels[i] == name]
        assert len(own) == len(set(own)) == shots
    assert sum(labels[i] == "rare" for i in numbers) == min(shots, 3)


def test_more_shots_than_patients_take_their_second_images():
    keys, subjects, labels = shot_rows()
    chosen = label_shots(keys, subjects, labels, shots=20, seed=0)
    own = [subjects[keys.index(key)] for key in chosen if labels[keys.index(key)] == "a"]
    assert (len(own), len(set(own))) == (20, 15)


def test_fewer_shots_lie_inside_more_and_rows_have_no_say():
    keys, subjects, labels = shot_rows()
    few = label_shots(keys, subjects, labels, shots=2, seed=3)
    assert set(few) < set(label_shots(keys, subjects, labels, shots=5, seed=3))
    assert few == label_shots(keys[::-1], subjects[::-1], labels[::-1], shots=2, seed=3)
    assert few != label_shots(keys, subjects, labels, shots=2, seed=4)


def test_no_shot_is_refused():
    with pytest.raises(UsageError, match="at least one image of each class"):
        label_shots(["k"], ["p"], ["a"], shots=0, seed=0)
