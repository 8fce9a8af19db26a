"""Positives that a batch does not show by itself: pairs of the training set."""

from collections import Counter

import numpy as np
import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, gradients, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.adaptor import blocks
from featcache.adaptor import objective as objective_module
from featcache.adaptor import stage as stage_module
from featcache.adaptor.known import KnownPairs
from featcache.adaptor.losses import (
    Ids,
    batch_positives,
    image_counts,
    infonce,
    positives,
    text_counts,
)
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import build_adaptor
from featcache.datasets.registry import make_manifest
from featcache.loader.order import Order
from featcache.manifest.table import text_id
from featcache.synth.registry import synthesize
from featcache.workspace import Workspace


def known_of(pairs):
    images, texts = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return KnownPairs.of(np.ascontiguousarray(images), np.ascontiguousarray(texts))


def ids_of(pairs, known=None):
    images, texts = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return Ids(images.contiguous(), texts.contiguous(), known)


def dense(pairs, rows, columns):
    """What belongs together, pair by pair."""
    known = {tuple(pair) for pair in pairs}
    return torch.tensor(
        [
            [(i, j) in known for j in columns.texts.tolist()]
            for i in rows.images.tolist()
        ]
    )  # fmt: skip


# Text 1 stands with images 0 and 1, the others with one image each.
PAIRS = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)]


def test_a_small_case_equals_a_hand_computation():
    known = known_of(PAIRS)
    assert known.num_texts == 4
    assert known.codes.tolist() == [1, 5]  # image 0 with text 1, image 1 with text 1
    # In this batch image 0 stands with text 0, but the text of image 1 is right for it too.
    ids = ids_of([(0, 0), (1, 1), (2, 3)], known)
    expected = [[True, True, False], [False, True, False], [False, False, True]]
    assert positives(ids, ids).tolist() == expected
    assert text_counts(ids, ids).tolist() == [2, 1, 1]
    assert image_counts(ids, ids).tolist() == [1, 2, 1]
    assert positives(ids_of(PAIRS)[:1], ids).tolist() == [[True, False, False]]  # knows nothing


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0), (1, 0), (2, 1), (3, 2)],  # reports, of which images 0 and 1 share one
        [(0, 0), (0, 1), (1, 2), (1, 3)],  # sentences that no other image has
        [(0, 0), (0, 0), (1, 0)],  # a pair that is listed twice
    ],
)
def test_where_equal_rows_show_every_pair_there_is_nothing_to_look_up(pairs):
    assert known_of(pairs) is None
    ids = ids_of(pairs)
    assert torch.equal(positives(ids, ids), dense(pairs, ids, ids))


pair_lists = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(pairs=pair_lists, draw=st.data())
def test_positives_are_those_of_the_matrix_of_all_pairs(pairs, draw):
    known = known_of(pairs)
    some = st.lists(st.sampled_from(pairs), min_size=1, max_size=24)
    rows, columns = ids_of(draw.draw(some), known), ids_of(draw.draw(some))
    expected = dense(pairs, rows, columns)
    assert torch.equal(positives(rows, columns), expected)
    assert torch.equal(text_counts(rows, columns), expected.sum(dim=1))
    assert torch.equal(image_counts(rows, columns), expected.sum(dim=0))


@settings(max_examples=100, deadline=None)
@given(pairs=pair_lists, others=pair_lists, more=pair_lists)
def test_a_pair_that_is_not_in_the_set_still_belongs_to_itself(pairs, others, more):
    rows, columns = ids_of(others, known_of(pairs)), ids_of(more)
    found = positives(rows, columns)
    equal = positives(ids_of(others), columns)
    assert (found | equal).equal(found)
    assert not (found & ~equal & ~dense(pairs, rows, columns)).any()
    assert torch.equal(text_counts(rows, columns), found.sum(dim=1))
    assert torch.equal(image_counts(rows, columns), found.sum(dim=0))


def test_rows_of_large_sets_do_not_overflow():
    far = 400_000_000
    pairs = [(far, far), (far, 7), (far - 1, far), (far - 1, 9)]
    codes = torch.tensor(sorted(i * (far + 1) + t for i, t in pairs))
    known = KnownPairs(codes, far + 1)
    assert known.belong(torch.tensor([far, 3]), torch.tensor([7, far, 9])).tolist() == [
        [True, True, False],
        [False, False, False],
    ]


def shared_sentences(count=24):
    """A batch of sentences, and all pairs that it was drawn from."""
    generator = np.random.default_rng(0)
    pairs = sorted({(int(i), int(j)) for i, j in generator.integers(0, 14, (90, 2))})
    drawn = [pairs[number] for number in generator.permutation(len(pairs))[:count]]
    batch = random_batch(count)
    batch.image_rows, batch.text_rows = torch.tensor(drawn).T.contiguous()
    return batch, known_of(pairs), pairs


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_the_loss_in_blocks_has_the_same_positives(monkeypatch, loss):
    config = AdaptorConfig(
        dim=DIM, heads=4, feedforward=24, dropout=0.0, objective="dual", loss=loss
    )
    torch.manual_seed(0)
    adaptor, objective = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
    batch, known, _ = shared_sentences()
    plain = gradients(objective, adaptor, batch, known=known)
    assert plain["loss"] != gradients(objective, adaptor, batch)["loss"]
    monkeypatch.setattr(objective_module, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(blocks, "CPU_BLOCK_NUMBERS", 24 * 5)
    for name, gradient in gradients(objective, adaptor, batch, known=known).items():
        assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("objective", ["allpairs", "dual", "paper"])
def test_the_loss_is_that_of_the_matrix_of_all_pairs(objective):
    config = AdaptorConfig(dim=DIM, heads=4, feedforward=24, dropout=0.0, objective=objective)
    adaptor, made = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
    batch, known, pairs = shared_sentences()
    found = made(adaptor, batch, known=known)
    own = dense(pairs, Ids.of(batch), Ids.of(batch))
    assert own.sum() > batch_positives(batch).sum() + 20
    if objective == "paper":  # there, a pair belongs to nothing but itself
        own = torch.eye(len(batch), dtype=torch.bool)
    assert torch.equal(found.loss, infonce(found.logits_per_image, own))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Image and text rows of all training pairs of written reports that were cut into sentences."""
    folder = tmp_path_factory.mktemp("sentences")
    tree = synthesize("mimic-cxr-jpg", folder / "tree").path
    workspace = Workspace(folder / "data")
    manifest = make_manifest(workspace, "mimic-cxr-jpg", tree, text_unit="sentence")
    splits = dict(zip(manifest.keys, manifest.images["split"].to_pylist(), strict=True))
    texts = [row for row in manifest.texts.to_pylist() if splits[row["key"]] == "train"]
    rows = [{}, {}]
    for row in texts:
        for numbers, name in zip(rows, (row["key"], row["text_id"]), strict=True):
            numbers.setdefault(name, len(numbers))
    pairs = [(rows[0][row["key"]], rows[1][row["text_id"]]) for row in texts]
    return np.array(pairs, dtype=np.int64)


def test_no_positive_of_a_batch_of_sentences_is_missed(sentences):
    known = KnownPairs.of(*sentences.T.copy())
    order, shown = Order(len(sentences), 64, seed=0), 0
    for step in range(3 * order.steps_per_epoch):
        batch = sentences[order.batch(step)]
        ids = ids_of(batch, known)
        expected = dense(sentences, ids, ids)
        assert torch.equal(positives(ids, ids), expected)
        shown += int((expected & ~positives(ids_of(batch), ids_of(batch))).sum())
    assert shown > 100  # without the known pairs these were negatives


def test_reports_that_are_not_cut_have_nothing_to_look_up(study):
    number = {text: row for row, text in enumerate(study.texts.keys)}
    images = np.arange(len(study.images.keys))
    texts = np.array([number[text_id(f"report {max(1, i)}")] for i in images])
    assert Counter(texts.tolist()).most_common(1)[0][1] == 2
    assert KnownPairs.of(images, texts) is None


def test_a_training_knows_its_pairs(run, sentence_study, monkeypatch):
    whole, checked = stage_module.Stage.training_step, []

    def checking(stage, batch, number):
        loss = whole(stage, batch, number)
        cache = stage.cache
        pairs = np.stack([cache.image_rows, cache.text_rows], axis=1)
        own = dense(pairs.tolist(), Ids.of(batch), Ids.of(batch))
        logits = stage.objective(stage.adaptor, batch).logits_per_image
        assert torch.equal(loss, infonce(logits, own))
        assert not any("known" in name for name in stage.state_dict())  # nor in a checkpoint
        checked.append(int((own & ~batch_positives(batch)).sum()))
        return loss

    monkeypatch.setattr(stage_module.Stage, "training_step", checking)
    run(on=sentence_study, batch_size=8, epochs=2, adaptor={"dropout": 0.0})
    assert sum(checked) > 10
