"""Attention heads trained at once, on tokens that are streamed."""

import numpy as np
import pytest
import torch

from featcache.errors import TrainingError, UsageError
from featcache.heads.attention import TokenRows, train_attention
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.mlp import Schedule
from featcache.heads.probe import train_probes
from featcache.heads.segment_tokens import HeldGrid

PLACES = 16
SMALL = Schedule(epochs=20, batch_size=32, fewest_steps=60)
CONFIG = ProbeConfig(
    head="attention",
    fractions=(100,),
    seeds=1,
    draws=200,
    epochs=10,
    learning_rates=(1e-2,),
    mlp_weight_decays=(0.1,),
)


def needles(rows: int = 240, seed: int = 0):
    """The class stands in one marked token; in all others the same channel is noise."""
    generator = np.random.default_rng(seed)
    tokens = generator.normal(size=(rows, PLACES, 6))
    targets = generator.integers(0, 2, rows)
    place = generator.integers(0, PLACES, rows)
    tokens[np.arange(rows), place, 0] = 4.0  # the mark
    tokens[np.arange(rows), place, 1] = 2.0 * (2 * targets - 1)
    tokens = tokens.astype(np.float16)
    return TokenRows(HeldGrid(tokens, (4, 4)), np.arange(rows)), targets, tokens


def train(rows, targets, subsets, *, classes=2, settings=((0.03, 0.01),), seeds=(0,), **plan):
    schedule = Schedule(**(vars(SMALL) | plan))
    options = {"num_classes": classes, "settings": settings, "seeds": seeds}
    return train_attention(rows, targets, subsets, **options, schedule=schedule)


def test_query_finds_what_the_mean_dilutes():
    rows, targets, tokens = needles(400)
    mine, test = np.arange(300), np.arange(300, 400)
    heads = train(rows, targets, [mine], epochs=60)
    found = heads.probabilities(rows[test])[0].argmax(axis=1) == targets[test]
    mean = tokens.astype(np.float32).mean(axis=1)
    probes = train_probes(mean, targets, [mine], num_classes=2, decays=(0.1,), seeds=(0,))
    plain = probes.probabilities(mean[test])[0].argmax(axis=1) == targets[test]
    assert found.mean() > plain.mean() + 0.1
    assert found.mean() > 0.9


def test_query_of_zero_is_the_mean_of_the_patches():
    rows, targets, tokens = needles()
    heads = train(rows, targets, [np.arange(100)])
    weight, bias, query = heads.parameters
    query.zero_()
    mean = torch.from_numpy(tokens.astype(np.float32).mean(axis=1))
    logits = ((mean - heads.mean[0]) / heads.sd[0]) @ weight[0] + bias[0]
    expected = logits.double().softmax(dim=-1).numpy()
    np.testing.assert_allclose(heads.probabilities(rows)[0], expected, atol=1e-5)


def test_all_heads_at_once_equal_each_alone():
    rows, targets, _ = needles(80)
    subsets, settings, seeds = [np.arange(40), np.arange(33)], ((0.03, 0.1), (0.01, 0.01)), (0, 1)
    together = train(rows, targets, subsets, settings=settings, seeds=seeds)
    found = together.probabilities(rows)
    assert len(found) == 8
    for number in range(8):
        alone = train(
            rows,
            targets,
            [subsets[together.subset[number]]],
            settings=((together.rate[number], together.decay[number]),),
            seeds=(int(together.seed[number]),),
        )
        np.testing.assert_allclose(alone.probabilities(rows)[0], found[number], atol=2e-4)
    np.testing.assert_allclose(together.probabilities(rows, [3, 1]), found[[3, 1]], atol=1e-6)


def test_answer_does_not_depend_on_the_other_images():
    rows, targets, _ = needles()
    heads = train(rows, targets, [np.arange(100)])
    whole = heads.probabilities(rows)[0]
    alone = heads.probabilities(rows[np.array([77])])[0]
    np.testing.assert_allclose(alone, whole[77:78], atol=1e-6)


@pytest.mark.parametrize("count", [1, 33])
def test_every_image_has_a_say(count):
    rows, targets, _ = needles()
    plain = train(rows, targets, [np.arange(count)]).probabilities(rows)
    turned = targets.copy()
    turned[count - 1] = 1 - turned[count - 1]
    other = train(rows, turned, [np.arange(count)]).probabilities(rows)
    assert np.isfinite(plain).all()
    assert np.abs(other - plain).max() > 1e-3


def test_unknown_findings_have_no_say():
    rows, first, _ = needles()
    targets = np.stack([first, np.full_like(first, -1)], axis=1)
    found = train(rows, targets, [np.arange(200)], epochs=60).probabilities(rows)[0]
    assert ((found[200:, 0] > 0.5) == (first[200:] == 1)).mean() > 0.8
    np.testing.assert_allclose(found[:, 1], 0.5, atol=0.1)


def test_tokens_that_are_not_finite_are_refused():
    rows, targets, tokens = needles(40)
    tokens[3, 2, 1] = np.inf
    with pytest.raises(TrainingError, match="a token is not finite"):
        train(rows, targets, [np.arange(20)])


@pytest.fixture(scope="module")
def results(toy, make_run):
    run = make_run(toy.root / "runs" / "attentive", toy)
    return finetune(toy.images, toy.manifest, run, toy.root / "out-attention", CONFIG, device="cpu")


def test_attention_heads_are_named_as_such_beside_the_trivial_rows(results):
    text = results.table.to_markdown()
    assert text.startswith("# Attention heads: toy")
    assert "pooled by a trained query" in text
    assert "Published probes are linear" in text
    lines = {line["method"]: line for line in results.values["rows"]}
    assert list(lines) == [
        "majority class",
        "random encoder",
        "raw backbone",
        "Adaptor",
        "Adaptor minus raw backbone",
    ]
    assert lines["raw backbone"]["poolings"] == ["attention"]
    assert lines["raw backbone"]["learning_rates"] == [1e-2]
    assert lines["raw backbone"]["figures"]["accuracy"]["mean"] > 0.6
    assert CONFIG.asked == "class-attention"


def test_tokens_are_removed_once_the_result_is_written(results):
    assert not (results.folder / "tokens").exists()


def test_adaptor_without_places_keeps_its_row_with_the_reason(toy, make_run, tmp_path):
    run = make_run(tmp_path / "run", toy, objective="paper")
    found = finetune(toy.images, toy.manifest, run, tmp_path / "out", CONFIG, device="cpu")
    [line] = [line for line in found.values["rows"] if line["method"] == "Adaptor"]
    assert line["remark"] == "no places: the objective `paper` knows one vector per image"
    assert line["figures"] == {}


def test_set_without_a_grid_is_refused_before_it_is_read(toy, write_set, tmp_path):
    keys = list(toy.images.keys)
    spec = toy.images.spec.model_copy(update={"grid": None, "num_prefix_tokens": 5})
    flat = write_set(tmp_path / "flat", spec, keys, [np.zeros((5, 12))] * len(keys))
    with pytest.raises(UsageError, match="attention heads read patch tokens"):
        finetune(flat, toy.manifest, None, tmp_path / "out", CONFIG, device="cpu")
