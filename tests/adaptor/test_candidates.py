import dataclasses

import numpy as np
import torch

from featcache.adaptor.candidates import Candidates
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.retrieval import retrieval_ranks
from featcache.adaptor.saved import build_adaptor
from featcache.cache.reader import open_cache


def test_each_image_and_text_stands_once_and_keeps_all_its_positives(study):
    cache = open_cache(study.images, study.texts, study.manifest, split="train")
    candidates = Candidates.of(cache)
    # Images 0 and 1 share a text.
    assert (len(candidates.image_rows), len(candidates.text_rows)) == (42, 41)
    assert candidates.positives.sum(dim=1).tolist() == [1] * 42
    assert sorted(candidates.positives.sum(dim=0).tolist()) == [1] * 40 + [2]


def test_a_pair_that_is_listed_twice_is_one_candidate(study):
    cache = open_cache(study.images, study.texts, study.manifest, split="validate")
    twice = dataclasses.replace(
        cache,
        image_rows=np.concatenate([cache.image_rows, cache.image_rows]),
        text_rows=np.concatenate([cache.text_rows, cache.text_rows]),
    )
    assert torch.equal(Candidates.of(twice).positives, Candidates.of(cache).positives)


def test_metrics_stand_beside_their_chance(study):
    torch.manual_seed(0)
    config = AdaptorConfig(dim=16, layers=1, heads=2, feedforward=24)
    adaptor, objective = build_adaptor(config, 12, 8)
    cache = open_cache(study.images, study.texts, study.manifest, split="validate")
    found = Candidates.of(cache).metrics(objective.eval(), adaptor.eval(), "cpu")
    assert (found["images"], found["texts"]) == (12, 12)
    assert abs(found["image_to_text_chance_recall_at_1"] - 1 / 12) < 1e-9
    assert found["mrr"] == (found["image_to_text_mrr"] + found["text_to_image_mrr"]) / 2
    assert 0 <= found["text_to_image_recall_at_1"] <= found["text_to_image_recall_at_10"] <= 1


def test_every_pair_of_sentences_is_a_hit(sentence_study):
    cache = open_cache(
        sentence_study.images, sentence_study.texts, sentence_study.manifest, split="validate"
    )
    candidates = Candidates.of(cache)
    pairs = {(row["key"], row["text_id"]) for row in sentence_study.manifest.texts.to_pylist()}
    images = [cache.images.keys[row] for row in candidates.image_rows]
    texts = [cache.texts.keys[row] for row in candidates.text_rows]
    expected = torch.tensor([[(one, other) in pairs for other in texts] for one in images])
    assert torch.equal(candidates.positives, expected)
    assert expected.sum(dim=1).tolist() == [3] * 12
    assert sorted(expected.sum(dim=0).tolist()) == [1] * 12 + [3] * 4 + [4] * 3
    for one in expected.nonzero().tolist():  # whichever of them scores highest
        scores = torch.zeros(expected.shape)
        scores[tuple(one)] = 1
        assert retrieval_ranks(scores, candidates.positives)[one[0]] == 1
        assert retrieval_ranks(scores.T, candidates.positives.T)[one[1]] == 1
