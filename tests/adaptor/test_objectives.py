import math
from dataclasses import replace

import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, ObjectiveContract, random_batch
from torch.nn import functional

from featcache.adaptor.model import Adaptor, AdaptorConfig, count_parameters
from featcache.adaptor.objectives import (
    OBJECTIVES,
    Dual,
    batch_positives,
    build_objective,
    chance_recall,
    infonce,
    retrieval_metrics,
    retrieval_ranks,
    unpaired_scores,
)
from featcache.errors import ConfigError, TrainingError


def small(**changes) -> AdaptorConfig:
    return AdaptorConfig(dim=DIM, heads=4, feedforward=24, **changes)


class TestAllPairs(ObjectiveContract):
    config = small(objective="allpairs")

    def test_a_score_is_the_cosine_of_what_the_text_pools_from_the_image(self, objective, adaptor):
        batch = random_batch()
        images, texts = self.encode(objective, adaptor, batch)
        torch.nn.init.normal_(objective.query.weight)
        scores = objective.score(images, texts, adaptor.scale)
        for i, image in enumerate(images):
            for j, text in enumerate(texts):
                weights = (image @ objective.query(text) / math.sqrt(DIM)).softmax(dim=0)
                cosine = functional.cosine_similarity(weights @ image, text, dim=0)
                assert scores[i, j].item() == pytest.approx(
                    (adaptor.scale * cosine).item(), abs=1e-4
                )

    def test_all_weights_are_trained(self, objective, adaptor):
        objective(adaptor, random_batch()).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in (*adaptor.parameters(), *objective.parameters()))

    def test_it_adds_one_matrix(self, objective):
        assert count_parameters(objective) == DIM * DIM


class TestDual(ObjectiveContract):
    config = small(objective="dual")

    def test_it_adds_no_weights(self, objective):
        assert count_parameters(objective) == 0


class TestPaperWithoutFusion(ObjectiveContract):
    config = small(objective="paper", text_to_image_weight=0.75)

    def test_query_and_key_weights_get_no_gradient(self, objective, adaptor):
        objective(adaptor, random_batch()).loss.backward()
        for block in adaptor.blocks:
            assert block.query.weight.grad.abs().max() == 0
            keys, values = block.key_value.weight.grad.chunk(2)
            assert keys.abs().max() == 0
            assert values.abs().max() > 0

    def test_the_paper_model_leaves_a_fifth_of_its_weights_untrained(self):
        adaptor = Adaptor(768, 768)
        untrained = sum(2 * (768 * 768 + 768) for _ in adaptor.blocks)
        assert untrained == 2_362_368
        assert round(100 * untrained / count_parameters(adaptor), 1) == 19.4

    def test_a_shared_text_counts_as_a_negative(self, objective, adaptor):
        batch = random_batch()
        shared = replace(batch, text_rows=torch.zeros(6, dtype=torch.int64))
        assert objective(adaptor, shared).loss == objective(adaptor, batch).loss

    def test_it_says_what_it_is(self, objective):
        assert "never meet before the loss" in objective.notice


class TestPaperWithFirstToken(ObjectiveContract):
    config = small(objective="paper", paper_vector="first")

    def test_other_tokens_have_no_influence(self, objective, adaptor):
        tokens = random_batch().image_tokens
        changed = torch.cat([tokens[:, :1], tokens[:, 1:] + 1], dim=1)
        one, other = (objective.image_vector(adaptor, x) for x in (tokens, changed))
        assert torch.equal(one, other)


class TestPaperOwnPair(ObjectiveContract):
    config = small(objective="paper", fusion="own-pair")
    leaks = True

    def test_it_says_that_it_leaks(self, objective):
        assert "LEAKS" in objective.notice

    def test_another_text_changes_what_is_made_of_the_image(self, objective, adaptor):
        batch = random_batch()
        before = objective(adaptor, batch).logits_per_image
        texts = batch.text_tokens.clone()
        texts[0] += 1
        after = objective(adaptor, replace(batch, text_tokens=texts)).logits_per_image
        assert (after - before)[0, 1:].abs().max() > 1e-4


def test_every_objective_has_a_contract():
    tested = {cls.config.objective for cls in ObjectiveContract.__subclasses__()}
    assert tested == set(OBJECTIVES)


def test_an_unknown_objective_offers_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown objective `duall`; did you mean `dual`"):
        build_objective(small(objective="duall"))


def test_equal_images_and_equal_texts_are_positives():
    batch = replace(
        random_batch(4),
        image_rows=torch.tensor([7, 8, 7, 9]),
        text_rows=torch.tensor([1, 2, 3, 2]),
    )
    expected = torch.eye(4, dtype=torch.bool)
    expected[[0, 2], [2, 0]] = True  # the image of rows 0 and 2
    expected[[1, 3], [3, 1]] = True  # the text of rows 1 and 3
    assert torch.equal(batch_positives(batch), expected)


def test_with_one_positive_each_the_loss_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    logits, own = torch.randn(5, 5), torch.arange(5)
    to_texts = functional.cross_entropy(logits, own)
    to_images = functional.cross_entropy(logits.T, own)
    diagonal = torch.eye(5, dtype=torch.bool)
    assert infonce(logits, diagonal).item() == pytest.approx(((to_texts + to_images) / 2).item())
    assert infonce(logits, diagonal, 1.0).item() == pytest.approx(to_images.item())
    assert infonce(logits, diagonal, 0.75).item() == pytest.approx(
        (0.25 * to_texts + 0.75 * to_images).item()
    )


def test_loss_with_several_positives_equals_a_hand_computation():
    # Image 0 owns texts 0 and 1, which score 2 and 0; text 2 scores 1.
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    positives = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    e = math.exp
    rows = [
        math.log(e(2) + 1 + e(1)) - (2 + 0) / 2,
        math.log(1 + e(3) + 1) - (0 + 3) / 2,
        math.log(1 + 1 + e(4)) - 4,
    ]
    columns = [
        math.log(e(2) + 1 + 1) - (2 + 0) / 2,
        math.log(1 + e(3) + 1) - (0 + 3) / 2,
        math.log(e(1) + 1 + e(4)) - 4,
    ]
    assert infonce(logits, positives, 0.0).item() == pytest.approx(sum(rows) / 3)
    assert infonce(logits, positives, 1.0).item() == pytest.approx(sum(columns) / 3)


def test_four_images_of_one_report_reach_the_floor_of_log_four_when_they_score_equally():
    report = torch.arange(16) // 4
    positives = report.unsqueeze(1) == report
    equal = positives.float() * 100
    assert infonce(equal, positives).item() == pytest.approx(math.log(4), abs=1e-5)
    uneven = equal + torch.diag(torch.full((16,), 3.0))
    assert infonce(uneven, positives) > infonce(equal, positives)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_that_runs_away_stays_finite(dtype):
    torch.manual_seed(0)
    adaptor = Adaptor(IMAGE_DIM, TEXT_DIM, dim=DIM, layers=1, heads=4, feedforward=24, dropout=0.0)
    with torch.no_grad():
        adaptor.logit_scale.fill_(12.0)
    objective, batch = Dual(), random_batch(64)
    optimizer = torch.optim.SGD([adaptor.logit_scale], lr=1.0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        images = objective.encode_images(adaptor, batch.image_tokens).detach()
        texts = objective.encode_texts(adaptor, batch.text_tokens, batch.text_valid).detach()
    for _ in range(50):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = objective.score(images, texts, adaptor.scale)
        loss = infonce(logits, batch_positives(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adaptor.clamp_logit_scale()
        assert loss.isfinite()
        assert adaptor.scale <= 100.0
    assert adaptor.scale < 99.0  # random pairs want a cooler one, so it must have come back


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
    monkeypatch.setattr("featcache.adaptor.objectives.TEXTS_AT_ONCE", 4)
    torch.manual_seed(0)
    adaptor = Adaptor(IMAGE_DIM, TEXT_DIM, dim=DIM, layers=1, heads=4, feedforward=24).eval()
    objective, batch = build_objective(small()), random_batch(7)
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
