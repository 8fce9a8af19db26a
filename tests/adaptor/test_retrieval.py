import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch

from featcache.adaptor.model import Adaptor, AdaptorConfig
from featcache.adaptor.objectives import build_objective
from featcache.adaptor.retrieval import (
    chance_recall,
    retrieval_metrics,
    retrieval_ranks,
    unpaired_scores,
)
from featcache.errors import TrainingError


def test_ranks_count_from_one_and_take_the_best_positive():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    positives = torch.tensor([[True, False, True], [False, False, True]])
    assert retrieval_ranks(scores, positives).tolist() == [2, 3]


def test_ties_and_nan_count_against_us():
    own = torch.eye(4, dtype=torch.bool)
    assert retrieval_ranks(torch.zeros(4, 4), own).tolist() == [4, 4, 4, 4]
    assert retrieval_ranks(torch.full((4, 4), torch.nan), own).tolist() == [4, 4, 4, 4]
    one_bad = torch.eye(4)
    one_bad[0, 0] = torch.nan
    one_bad[1, 2] = torch.nan
    assert retrieval_ranks(one_bad, own).tolist() == [4, 2, 1, 1]
    infinite = torch.zeros(4, 4).fill_diagonal_(-torch.inf)
    assert retrieval_ranks(infinite, own).tolist() == [4, 4, 4, 4]


def test_a_query_without_a_positive_is_refused():
    positives = torch.tensor([[True, False], [False, False]])
    with pytest.raises(TrainingError, match="1 of 2 queries have no positive"):
        retrieval_ranks(torch.zeros(2, 2), positives)


def test_metrics_of_ranks():
    metrics = retrieval_metrics(torch.tensor([1, 2, 6, 20]))
    assert metrics["recall_at_1"] == 0.25
    assert metrics["recall_at_5"] == 0.5
    assert metrics["recall_at_10"] == 0.75
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 20) / 4)
    assert metrics["median_rank"] == 4.0


def test_chance_is_what_random_orders_reach():
    torch.manual_seed(0)
    positives = torch.zeros(3, 12, dtype=torch.bool)
    for row, count in enumerate((1, 3, 9)):
        positives[row, :count] = True
    ranks = torch.stack([retrieval_ranks(torch.rand(3, 12), positives) for _ in range(3000)])
    for k in (1, 5, 10):
        found = (ranks <= k).double().mean().item()
        assert chance_recall(positives, k) == pytest.approx(found, abs=0.015)
    assert chance_recall(torch.eye(4, dtype=torch.bool), 10) == 1.0


def test_unpaired_scores_do_not_depend_on_how_they_are_cut(monkeypatch):
    monkeypatch.setattr("featcache.adaptor.retrieval.TEXTS_AT_ONCE", 4)
    torch.manual_seed(0)
    adaptor = Adaptor(IMAGE_DIM, TEXT_DIM, dim=DIM, layers=1, heads=4, feedforward=24).eval()
    objective, batch = (
        build_objective(AdaptorConfig(dim=DIM, heads=4, feedforward=24)),
        random_batch(7),
    )
    texts = [(batch.text_tokens, batch.text_valid)]
    cut = [
        (batch.text_tokens[:2], batch.text_valid[:2]),
        (batch.text_tokens[2:], batch.text_valid[2:]),
    ]
    whole = unpaired_scores(objective, adaptor, [batch.image_tokens], texts)
    parts = unpaired_scores(objective, adaptor, batch.image_tokens.split(3), cut)
    assert whole.shape == (7, 7)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.allclose(whole, objective(adaptor, batch).logits_per_image, atol=1e-5)
