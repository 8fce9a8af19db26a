"""MLP heads trained at once."""

import dataclasses

import numpy as np
import pytest

from featcache.errors import TrainingError
from featcache.heads.mlp import Schedule, batch_sizes, train_mlps

SMALL = Schedule(hidden=16, epochs=30, batch_size=32, fewest_steps=60)


def circles(rows: int = 160, seed: int = 0):
    """Two classes that no line parts: inside and outside of a circle."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(rows, 2)).astype(np.float32)
    return vectors, (np.square(vectors).sum(axis=1) > 1.4).astype(np.int64)


def train(vectors, targets, subsets, *, classes=2, settings=((0.01, 0.01),), seeds=(0,), **plan):
    schedule = Schedule(**(vars(SMALL) | plan))
    return train_mlps(
        vectors,
        targets,
        subsets,
        num_classes=classes,
        settings=settings,
        seeds=seeds,
        schedule=schedule,
    )


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 64, 65, 97])
def test_batches_lose_no_row_and_none_is_tiny(rows):
    sizes = batch_sizes(rows, 32)
    assert sum(sizes) == rows
    assert max(sizes) <= 32
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rows", [1, 33])
def test_a_last_batch_of_one_row_trains_like_any_other(rows):
    vectors, targets = circles()
    heads = train(vectors, targets, [np.arange(rows)])
    assert np.isfinite(heads.probabilities(vectors)).all()


def test_every_row_of_33_at_batch_32_has_a_say():
    vectors, targets = circles()
    plain = train(vectors, targets, [np.arange(33)]).probabilities(vectors)
    for row in (0, 16, 32):
        turned = targets.copy()
        turned[row] = 1 - turned[row]
        other = train(vectors, turned, [np.arange(33)]).probabilities(vectors)
        assert np.abs(other - plain).max() > 1e-3


def test_all_heads_at_once_equal_each_alone():
    vectors, targets = circles()
    subsets, settings, seeds = [np.arange(40), np.arange(33)], ((0.01, 0.1), (0.003, 0.01)), (0, 1)
    together = train(vectors, targets, subsets, settings=settings, seeds=seeds)
    found = together.probabilities(vectors)
    assert len(found) == 8
    for number in range(8):
        alone = train(
            vectors,
            targets,
            [subsets[together.subset[number]]],
            settings=((together.rate[number], together.decay[number]),),
            seeds=(int(together.seed[number]),),
        )
        np.testing.assert_allclose(alone.probabilities(vectors)[0], found[number], atol=2e-4)


def test_head_learns_what_no_linear_probe_can():
    vectors, targets = circles(300)
    heads = train(vectors, targets, [np.arange(200)])
    right = heads.probabilities(vectors[200:])[0].argmax(axis=1) == targets[200:]
    assert right.mean() > 0.9


def test_answer_does_not_depend_on_the_other_images():
    vectors, targets = circles()
    heads = train(vectors, targets, [np.arange(100)])
    whole = heads.probabilities(vectors)[0]
    np.testing.assert_allclose(heads.probabilities(vectors[7:8])[0], whole[7:8], atol=1e-6)


def test_unknown_findings_have_no_say():
    vectors, first = circles()
    targets = np.stack([first, 1 - first], axis=1)
    targets[:80, 1] = -1
    heads = train(vectors, targets, [np.arange(160)])
    found = heads.probabilities(vectors)[0]
    assert found.shape == (160, 2)
    assert ((found[80:, 1] > 0.5) == (targets[80:, 1] == 1)).mean() > 0.9
    nothing = train(vectors, np.full_like(targets, -1), [np.arange(160)])
    np.testing.assert_allclose(nothing.probabilities(vectors)[0], 0.5, atol=0.05)


def test_same_seed_gives_the_same_bits_and_another_does_not():
    vectors, targets = circles()
    one, same = (train(vectors, targets, [np.arange(50)]).probabilities(vectors) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    other = train(vectors, targets, [np.arange(50)], seeds=(1,)).probabilities(vectors)
    assert np.abs(one - other).max() > 1e-4


def test_empty_subset_is_refused():
    vectors, targets = circles()
    with pytest.raises(TrainingError, match="holds no image"):
        train(vectors, targets, [np.zeros(0, dtype=np.int64)])


@pytest.mark.parametrize("of_findings", [False, True])
def test_sure_answers_keep_their_order(of_findings):
    vectors, targets = np.linspace(-1, 1, 64, dtype=np.float32)[:, None], np.repeat([0, 1], 32)
    asked = np.stack([1 - targets, targets], axis=1) if of_findings else targets
    heads = train(vectors, asked, [np.arange(64)])
    bias = heads.parameters[3].clone()
    bias[..., 1] += 20.0  # as a head is after many epochs
    heads = dataclasses.replace(heads, parameters=(*heads.parameters[:3], bias))
    plain = heads.probabilities(np.linspace(-1, 1, 9, dtype=np.float32)[:, None])[0, :, 1]
    assert len(np.unique(plain.astype(np.float32))) < 9  # it has few numbers just below 1
    assert len(np.unique(plain)) == 9
