"""What methods answer before anybody looks at the test labels."""

import dataclasses

import numpy as np
import pytest

from featcache.errors import TrainingError
from featcache.heads import answers
from featcache.heads.answers import ProbeGrid, majority_answers, probe_answers, source_answers
from featcache.heads.labels import LabelledImages
from featcache.heads.mlp import Schedule


def labelled(seed: int = 0, per_split=(60, 30, 30)):
    generator = np.random.default_rng(seed)
    count = sum(per_split)
    targets = np.arange(count) % 3
    vectors = generator.normal(size=(count, 8)).astype(np.float32)
    vectors[:, :3] += np.eye(3)[targets]
    splits = np.repeat(["train", "validate", "test"], per_split)
    images = LabelledImages(
        keys=tuple(f"k{i:03d}" for i in range(count)),
        rows=np.arange(count),
        subject_ids=tuple(f"p{i}" for i in range(count)),
        splits=tuple(splits.tolist()),
        sources=tuple(("north", "south")[i % 2] for i in range(count)),
        targets=targets.astype(np.int64),
        classes=("a", "b", "c"),
        left_out={},
    )
    return images, vectors


def ask(images, vectors, members, **changed):
    options = {
        "decays": (0.001, 0.1, 10.0),
        "seeds": (0, 1),
        "select_by": "auroc",
        "tolerance": 1e-5,
        "max_steps": 500,
    }
    given = vectors if isinstance(vectors, dict) else {"mean": vectors}
    return probe_answers(images, members, given, ProbeGrid(**(options | changed)))


def test_majority_is_that_of_the_subset_and_the_first_of_equals():
    images, _ = labelled()
    members = [np.array([1, 4, 7, 0]), np.array([2, 5, 0, 3])]
    found = majority_answers(images, members).probabilities
    assert found.shape == (2, 30, 3)
    assert found[0].argmax(axis=1).tolist() == [1] * 30
    assert found[1].argmax(axis=1).tolist() == [0] * 30


def test_source_answers_are_the_frequencies_of_the_subset():
    images, _ = labelled()
    members = [np.array([0, 2, 4, 6, 1])]  # north: a c b a, south: b
    [found] = source_answers(images, members).probabilities
    north = np.array(images.sources)[images.of("test")] == "north"
    np.testing.assert_allclose(found[north], np.tile([0.5, 0.25, 0.25], (15, 1)))
    np.testing.assert_allclose(found[~north], np.tile([0, 1, 0], (15, 1)))


def test_source_that_a_subset_lacks_gets_its_overall_frequencies():
    images, _ = labelled()
    [found] = source_answers(images, [np.array([0, 2])]).probabilities
    south = np.array(images.sources)[images.of("test")] == "south"
    np.testing.assert_allclose(found[south], np.tile([0.5, 0, 0.5], (15, 1)))


def test_source_that_knows_nothing_of_a_finding_gets_its_overall_frequency():
    images, _ = labelled()
    targets = np.zeros((120, 2), dtype=np.int64)
    targets[::8] = 1  # a quarter of those from the north
    targets[1::2, 1] = -1  # the south is not asked about the second
    images = dataclasses.replace(images, targets=targets, classes=("a", "b"))
    [found] = source_answers(images, [np.arange(60)]).probabilities
    north = np.array(images.sources)[images.of("test")] == "north"
    np.testing.assert_allclose(found[north], np.tile([8 / 30, 8 / 30], (15, 1)))
    np.testing.assert_allclose(found[~north], np.tile([0.0, 8 / 30], (15, 1)))


def test_runs_are_ordered_by_subset_then_seed():
    images, vectors = labelled()
    members = [np.arange(30), np.arange(30, 60)]
    both = ask(images, vectors, members)
    assert both.probabilities.shape == (4, 30, 3)
    second = ask(images, vectors, members[1:])
    np.testing.assert_allclose(both.probabilities[2:], second.probabilities, atol=2e-3)
    assert both.details["configurations_tried"] == 12
    first, other = both.details["weight_decays"][:2]
    assert first == other


def test_test_labels_have_no_say_in_training_or_choice():
    images, vectors = labelled()
    members = [np.arange(60)]
    turned = images.targets.copy()
    turned[images.of("test")] = 0
    plain = ask(images, vectors, members)
    changed = ask(dataclasses.replace(images, targets=turned), vectors, members)
    np.testing.assert_array_equal(plain.probabilities, changed.probabilities)
    assert plain.details == changed.details


def test_equals_go_to_the_smaller_decay():
    images, vectors = labelled()
    found = ask(images, np.zeros_like(vectors), [np.arange(60)])
    assert found.details["weight_decays"] == [0.001, 0.001]


def test_validation_alone_chooses_the_decay():
    images, vectors = labelled()
    members = [np.r_[np.arange(0, 60, 3), np.arange(1, 16, 3), np.arange(2, 17, 3)]]
    options = {"decays": (0.01, 1000.0), "select_by": "accuracy"}
    found = ask(images, vectors, members, **options)
    assert found.details["weight_decays"] == [0.01, 0.01]
    targets = images.targets.copy()
    targets[images.of("validate")] = 0  # now the probe that only knows the common class wins
    found = ask(dataclasses.replace(images, targets=targets), vectors, members, **options)
    assert found.details["weight_decays"] == [1000.0, 1000.0]
    assert found.details["validation"] == [1.0, 1.0]


def test_probe_that_did_not_converge_is_said_in_the_table():
    images, vectors = labelled()
    found = ask(images, vectors, [np.arange(60)], max_steps=1)
    assert found.remark == "2 of 2 probes not converged"
    assert found.details["converged"] == [False, False]


def test_validation_chooses_the_pooling_that_holds_the_classes():
    images, vectors = labelled()
    noise = np.random.default_rng(5).normal(size=vectors.shape).astype(np.float32)
    members = [np.arange(60), np.arange(30)]
    found = ask(images, {"mean": noise, "prefix": vectors}, members)
    assert found.details["poolings"] == ["prefix"] * 4
    assert found.details["configurations_tried"] == 2 * (2 * 3 * 2)
    alone = ask(images, {"prefix": vectors}, members)
    np.testing.assert_array_equal(found.probabilities, alone.probabilities)
    assert found.details["weight_decays"] == alone.details["weight_decays"]


def mlp(**changed):
    schedule = Schedule(hidden=8, epochs=5, batch_size=16, fewest_steps=40)
    return {"decays": (0.01,), "rates": (0.01, 1e30), "schedule": schedule, **changed}


def test_diverged_head_is_not_chosen_and_is_said():
    images, vectors = labelled()
    found = ask(images, vectors, [images.of("train")], **mlp())
    assert found.details["learning_rates"] == [0.01, 0.01]
    assert np.isfinite(found.probabilities).all()
    assert found.remark == "2 of 4 heads diverged, none of them chosen (learning rate 1e+30)"


def test_heads_that_all_diverge_are_an_error_with_the_learning_rates():
    images, vectors = labelled()
    with pytest.raises(TrainingError, match=r"learning rates 1e\+25, 1e\+30") as caught:
        ask(images, vectors, [images.of("train")], **mlp(rates=(1e25, 1e30)))
    assert caught.value.fix == "--set learning_rates=[1e+24]"


def test_many_heads_are_judged_as_each_alone(monkeypatch):
    images, vectors = labelled()
    members = [images.of("train")[:20], images.of("train")]
    together = ask(images, vectors, members)
    monkeypatch.setattr(answers, "BLOCK_VALUES", 1)
    alone = ask(images, vectors, members)
    np.testing.assert_array_equal(together.probabilities, alone.probabilities)
    assert together.details == alone.details
