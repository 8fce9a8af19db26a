import math
from dataclasses import replace

import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch
from torch.nn import functional

from featcache.adaptor.contrast import LogitTile
from featcache.adaptor.losses import (
    Ids,
    batch_positives,
    image_counts,
    infonce,
    positives,
    sigmoid,
    text_counts,
)
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import build_adaptor


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


def test_the_sigmoid_loss_equals_a_hand_computation():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    own = torch.tensor([[True, False], [True, True]])
    signs, bias = own.double() * 2 - 1, torch.tensor(-0.5)
    expected = sum(
        math.log1p(math.exp(-signs[i, j] * (logits[i, j] - 0.5))) for i in (0, 1) for j in (0, 1)
    )
    assert sigmoid(logits, own, bias).item() == pytest.approx(expected / 2)


def test_the_sigmoid_loss_is_least_when_all_positives_are_high_and_all_negatives_low():
    report = torch.arange(16) // 4
    own = report.unsqueeze(1) == report
    best = own * 200.0 - 100
    assert sigmoid(best, own, torch.zeros(())).item() == pytest.approx(0, abs=1e-6)
    worse = best.clone()
    worse[0, 1] = -100  # a text that the image shares, called wrong
    assert sigmoid(worse, own, torch.zeros(())) > 1


def test_the_sigmoid_loss_starts_as_in_its_paper():
    adaptor, objective = build_adaptor(AdaptorConfig(loss="sigmoid", dim=16, heads=4), 12, 8)
    assert adaptor.scale.item() == pytest.approx(10)
    assert objective.contrast.bias.item() == -10
    assert objective.contrast.bias.requires_grad


def test_counts_of_positives_are_the_sums_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: Ids(*(torch.randint(9, (n,), generator=generator) for _ in range(2)))  # noqa: E731
    rows, columns = draw(40), draw(31)
    assert torch.equal(text_counts(rows, columns), positives(rows, columns).sum(dim=1))
    assert torch.equal(image_counts(rows, columns), positives(rows, columns).sum(dim=0))
    assert text_counts(rows, columns).max() > 5


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_that_runs_away_stays_finite(dtype, separable, loss):
    torch.manual_seed(0)
    config = AdaptorConfig(
        dim=DIM, layers=1, heads=4, feedforward=24, dropout=0.0, objective="dual", loss=loss
    )
    adaptor, objective = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
    with torch.no_grad():
        adaptor.logit_scale.fill_(12.0)
    optimizer = torch.optim.SGD([adaptor.logit_scale, *objective.parameters()], lr=1.0)
    images, texts = functional.normalize(torch.randn(2, 64, DIM), dim=-1)
    if separable:
        texts = images
    ids = Ids(torch.arange(64), torch.arange(64))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for _ in range(50):
            logits = objective.score(images, texts, adaptor.scale)
            value = objective.contrast(LogitTile(ids, ids, logits))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            adaptor.clamp_logit_scale()
            assert value.isfinite()
            assert adaptor.scale <= 100.0
    assert separable or adaptor.scale < 99.0  # random pairs want a cooler one: it came back
