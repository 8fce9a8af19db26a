"""Dice in its several meanings, thresholds, presence AUROC."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.segmentation import dice_score

from featcache.heads.segment_scores import (
    METRICS,
    Counts,
    Levels,
    MaskJudge,
    Operating,
    answer,
    choose_operating,
    count_pixels,
    empty_counts,
    join_counts,
    weighted_figures,
)

LEVELS = Levels(low=0.0, high=1.0, count=11)
AT_HALF = Operating(mask=5, presence=5, own=5)


def truth(images=10, positive=3):
    masks = torch.zeros(images, 8, 8, dtype=torch.bool)
    masks[:positive, 2:4, 2:6] = True
    return masks


def figures(values, masks, operating=AT_HALF):
    given = answer(count_pixels(values, masks, LEVELS), operating)
    return dict(zip(METRICS, weighted_figures(given, np.ones((1, len(masks))))[0], strict=True))


@pytest.mark.parametrize(
    ("name", "every", "positive", "presence"),
    [("empty", 0.7, 0.0, 0.5), ("full", 0.3 * 16 / 72, 16 / 72, 0.5), ("perfect", 1.0, 1.0, 1.0)],
)
def test_ten_images_of_which_seven_are_empty(name, every, positive, presence):
    masks = truth()
    values = {"empty": torch.zeros(10, 8, 8), "full": torch.ones(10, 8, 8), "perfect": masks}
    found = figures(values[name].float(), masks)
    assert found["dice"] == pytest.approx(every)
    assert found["dice_positive"] == pytest.approx(positive)
    assert found["presence_auroc"] == pytest.approx(presence)


def test_dice_of_an_image_is_torchmetrics_where_that_has_one():
    torch.manual_seed(0)
    masks = torch.rand(6, 8, 8) > 0.6
    values = torch.rand(6, 8, 8)
    counts = count_pixels(values, masks, LEVELS)
    with pytest.warns(UserWarning, match="average"):
        expected = dice_score(
            (values >= 0.5).long()[:, None], masks.long()[:, None], num_classes=1, average="micro"
        )
    torch.testing.assert_close(torch.from_numpy(counts.dice[:, 5]).float(), expected.flatten())


def test_counts_are_those_of_comparing_with_each_level():
    torch.manual_seed(1)
    values, masks = torch.rand(5, 6, 7), torch.rand(5, 6, 7) > 0.5
    counts = join_counts(
        [count_pixels(values[:2], masks[:2], LEVELS), count_pixels(values[2:], masks[2:], LEVELS)]
    )
    for level in range(LEVELS.count):
        above = values >= LEVELS.value(level) - 1e-5
        assert counts.predicted[:, level].tolist() == above.sum((1, 2)).tolist()
        assert counts.overlap[:, level].tolist() == (above & masks).sum((1, 2)).tolist()
    assert counts.predicted[:, -1].tolist() == [0] * 5
    assert counts.target.tolist() == masks.sum((1, 2)).tolist()


def test_level_counts_at_the_edges():
    found = LEVELS.reached(torch.tensor([-9.0, 0.0, 0.1, 0.3, 1.0, 9.0, torch.nan, torch.inf]))
    assert found.tolist() == [0, 1, 2, 4, 11, 11, 0, 11]


def test_pixel_dice_pools_all_images():
    masks = truth(4, 2)
    values = torch.zeros(4, 8, 8)
    values[0, 2:4, 2:6] = 1.0  # 8 of 8 right
    values[3, 0, :4] = 1.0  # 4 false ones, on an empty image
    assert figures(values, masks)["pixel_dice"] == pytest.approx(2 * 8 / (8 + 4 + 16))
    assert figures(values, masks)["dice"] == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_presence_is_the_rank_of_the_highest_value():
    torch.manual_seed(2)
    masks, values = truth(20, 8), torch.rand(20, 8, 8) ** 8
    values[:8, 0, 0] += 0.1
    expected = roc_auc_score(masks.any(1).any(1).numpy(), values.flatten(1).max(1).values.numpy())
    for moved in (values, values + 5.0, values - 5.0):  # wherever the levels lie
        assert figures(moved, masks)["presence_auroc"] == pytest.approx(expected)


def brute_force(counts, select_by):
    """The best figure over all pairs of levels, by applying each."""
    column = METRICS.index(select_by)
    width = counts.predicted.shape[1]
    best = -1.0
    for mask in range(width):
        for presence in range(mask, width):
            given = answer(counts, Operating(mask, presence, 0))
            found = weighted_figures(given, np.ones((1, len(counts.target))))[0, column]
            best = max(best, round(float(np.nan_to_num(found, nan=-1.0)), 6))
    return best


@pytest.mark.parametrize("select_by", ["dice", "dice_positive", "pixel_dice"])
def test_chosen_levels_are_the_best_of_all_pairs(select_by):
    torch.manual_seed(3)
    masks, values = truth(12, 5), torch.rand(12, 8, 8)
    values[:4][masks[:4]] += 0.4
    counts = count_pixels(values, masks, LEVELS)
    operating, figure = choose_operating(counts, select_by)
    assert figure == pytest.approx(brute_force(counts, select_by), abs=1e-6)
    given = answer(counts, operating)
    own = weighted_figures(given, np.ones((1, 12)))[0, METRICS.index(select_by)]
    assert own == pytest.approx(figure)
    assert operating.presence >= operating.mask


def test_choice_by_dice_is_never_worse_than_the_empty_mask():
    torch.manual_seed(4)
    masks = truth(20, 4)
    counts = count_pixels(torch.rand(20, 8, 8), masks, LEVELS)
    operating, figure = choose_operating(counts, "dice")
    assert figure == pytest.approx(0.8)
    assert answer(counts, operating).predicted.tolist() == [0] * 20


def test_all_empty_answer_scores_the_share_of_empty_images():
    target = np.array([0, 0, 5, 7, 0], dtype=np.int64)
    last = LEVELS.count
    given = answer(empty_counts(target, 64, LEVELS), Operating(last, last, last))
    found = weighted_figures(given, np.ones((1, 5)))[0]
    assert found.tolist() == [0.6, 0.0, 0.0, 0.5, 0.0, 6 / 64]


def test_what_does_not_exist_is_not_a_number():
    counts = empty_counts(np.zeros(4, dtype=np.int64), 64, LEVELS)
    found = weighted_figures(answer(counts, AT_HALF), np.ones((1, 4)))[0]
    assert found[0] == 1.0
    assert np.isnan(found[1:]).all()
    assert np.isnan(choose_operating(counts, "dice_positive")[1])


def test_weights_count_images_as_often_as_they_say():
    torch.manual_seed(5)
    masks, values = truth(6, 3), torch.rand(6, 8, 8)
    doubled = [0, 0, 1, 2, 3, 3, 4, 5]
    weights = np.bincount(doubled).astype(float)[None]
    one = weighted_figures(answer(count_pixels(values, masks, LEVELS), AT_HALF), weights)
    many = answer(count_pixels(values[doubled], masks[doubled], LEVELS), AT_HALF)
    np.testing.assert_allclose(one, weighted_figures(many, np.ones((1, 8))))


def test_single_positive_patient_gets_no_interval():
    masks = truth(6, 2)
    given = answer(count_pixels(masks.float(), masks, LEVELS), AT_HALF)
    subjects = ["a", "a", "b", "c", "d", "e"]
    judge = MaskJudge(subjects, masks.any(1).any(1).numpy(), draws=100, seed=0)
    found = judge.judge([given, given]).figures
    assert found["dice"].interval is not None
    assert found["dice"].values == (1.0, 1.0)
    assert all(found[name].interval is None for name in METRICS[1:])


def test_difference_is_paired_over_runs_and_draws():
    masks = truth(10, 5)
    perfect = answer(count_pixels(masks.float(), masks, LEVELS), AT_HALF)
    nothing = answer(count_pixels(torch.zeros(10, 8, 8), masks, LEVELS), AT_HALF)
    judge = MaskJudge([str(i) for i in range(10)], masks.any(1).any(1).numpy(), draws=200, seed=0)
    first, second = judge.judge([perfect]), judge.judge([nothing])
    gap = judge.difference(first, second)
    assert gap.figures["dice"].mean == pytest.approx(0.5)
    np.testing.assert_allclose(gap.drawn[:, 0], first.drawn[:, 0] - second.drawn[:, 0])
    assert judge.difference(first, first).figures["dice"].interval.high == 0.0


def test_pointing_asks_where_the_highest_pixel_lies():
    masks = truth(4, 3)
    values = torch.zeros(4, 8, 8)
    values[0, 2, 2] = 1.0  # inside
    values[1, 0, 0] = 1.0  # outside
    values[2, 2, 2] = values[2, 0, 0] = 1.0  # equals: half
    assert figures(values, masks)["pointing"] == pytest.approx(0.5)
    assert figures(torch.zeros(4, 8, 8), masks)["pointing"] == pytest.approx(8 / 64)


def test_counts_do_not_mix_images():
    torch.manual_seed(6)
    values, masks = torch.rand(4, 5, 5), torch.rand(4, 5, 5) > 0.5
    together = count_pixels(values, masks, LEVELS)
    alone = join_counts(
        [count_pixels(values[i : i + 1], masks[i : i + 1], LEVELS) for i in range(4)]
    )
    for name in ("predicted", "overlap", "target", "hit", "highest"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))
    assert isinstance(together, Counts)
