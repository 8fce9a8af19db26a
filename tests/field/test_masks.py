"""What people report about masks and their figures, from end to end."""

import numpy as np
import pytest
import torch
from heads.conftest import build_set, image_spec
from heads.kit_masks import masked_toy

from featcache.errors import ManifestError
from featcache.heads.segment import SegmentConfig, segment
from featcache.heads.segment_masks import masked_images
from featcache.heads.segment_scores import (
    METRICS,
    Levels,
    MaskJudge,
    Operating,
    answer,
    count_pixels,
)
from featcache.heads.segment_tokens import CachedGrid

QUICK = SegmentConfig(
    fractions=(100,),
    seeds=1,
    learning_rates=(0.05,),
    steps=5,
    epochs=1,
    batch_size=8,
    loss_scale=2,
    size=32,
    draws=200,
    random_encoder=False,
)


def keep_masks(columns, split: str, wanted: int) -> None:
    """Leave masks to the first so many images of a split."""
    seen = 0
    for row, name in enumerate(columns["split"]):
        if name == split and columns["mask"][row]:
            seen += 1
            columns["mask"][row] = columns["mask"][row] if seen <= wanted else ""


def row_of(results, method):
    [line] = [line for line in results.values["rows"] if line["method"] == method]
    return line


# Dice when nothing is there


def test_seven_of_ten_empty_images_make_the_empty_masks_row_70(tmp_path):
    toy = masked_toy(tmp_path, patients=30, edit=lambda columns: keep_masks(columns, "test", 3))
    found = segment(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")
    shown = row_of(found, "all empty")["figures"]
    assert shown["dice"]["mean"] == 0.7
    assert shown["dice_positive"]["mean"] == 0.0
    assert shown["presence_auroc"]["mean"] == 0.5
    table = found.table.to_markdown()
    titles = ("Dice, all %", "Dice, positive %", "presence AUROC %")
    assert all(f"| {title} |" in table for title in titles)
    assert "| all empty | 70.0 [" in table
    assert "empty on empty = 1" in table


# One patient in all three splits


def test_patient_in_two_splits_is_refused_with_the_number_and_no_id(tmp_path):
    def edit(columns):
        columns["subject_id"][columns["split"].index("test")] = columns["subject_id"][0]

    with pytest.raises(ManifestError, match="1 patients are in more than one split") as caught:
        masked_toy(tmp_path, patients=30, edit=edit)
    assert "pat-" not in str(caught.value)


# Bootstrap draws without positives


def judged(positives: int):
    masks = torch.zeros(60, 4, 4, dtype=torch.bool)
    masks[:positives, :2] = True
    values = masks.float() + torch.rand(60, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = Levels(0.0, 1.5, 16)
    given = answer(count_pixels(values, masks, levels), Operating(10, 10, 10))
    patients = [f"p{i}" for i in range(60)]
    return MaskJudge(patients, masks.any(1).any(1).numpy(), draws=1000, seed=0).judge([given])


@pytest.mark.parametrize("name", ["dice_positive", "pixel_dice", "presence_auroc"])
def test_draws_without_a_mask_are_left_out_and_counted(name):
    figure = judged(3).figures[name]
    # (1 - 3/60)^60 = 4.6 % of the draws; pixel Dice is undefined there as nothing is predicted.
    assert figure.interval.undefined == pytest.approx(46, abs=20)
    assert figure.interval.draws == 1000
    assert figure.interval.low <= figure.mean <= figure.interval.high
    assert judged(3).figures["dice"].interval.undefined == 0


@pytest.mark.parametrize("positives", [0, 1])
def test_no_mask_or_one_gives_no_interval_but_to_dice_over_all(positives):
    figures = judged(positives).figures
    assert figures["dice"].interval is not None
    assert all(figures[name].interval is None for name in METRICS[1:])
    assert np.isnan(figures["dice_positive"].mean) == (positives == 0)


def test_single_patient_with_a_mask_is_said_in_words(tmp_path):
    toy = masked_toy(tmp_path, patients=30, edit=lambda columns: keep_masks(columns, "test", 1))
    found = segment(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")
    words = "positive, own t, pointing game: too few test patients of one kind."
    assert "No interval for Dice, positive, pixel Dice, presence AUROC, " + words in (
        found.table.to_markdown()
    )


def test_split_without_any_mask_is_refused_in_words(tmp_path):
    toy = masked_toy(tmp_path, patients=30, edit=lambda columns: keep_masks(columns, "test", 0))
    with pytest.raises(ManifestError, match="no image of split `test` has a mask"):
        segment(toy.images, toy.manifest, None, tmp_path / "out", QUICK, device="cpu")


# A stratified subset with a class of one


def test_only_training_mask_is_in_every_subset(tmp_path):
    toy = masked_toy(tmp_path, edit=lambda columns: keep_masks(columns, "train", 1))
    quick = QUICK.model_copy(update={"fractions": (10.0, 100.0), "subsets": 3})
    found = segment(toy.images, toy.manifest, None, tmp_path / "out", quick, device="cpu")
    masked = masked_images(toy.images, toy.manifest)
    [only] = np.flatnonzero(masked.positive & (np.asarray(masked.labelled.splits) == "train"))
    for one in found.values["subsets"]:
        keys = (found.folder / "subsets" / one["file"]).read_text().split()
        assert masked.labelled.keys[only] in keys
        assert one["missing_classes"] == []


# Register tokens taken for patches


def test_grid_of_a_set_with_five_prefix_tokens_is_its_last_256(tmp_path):
    tokens = np.zeros((3, 261, 8), dtype=np.float32)
    tokens[:, :5] = -1.0
    tokens[:, 5:, 0] = np.arange(256)
    spec = image_spec(num_prefix_tokens=5, grid=(16, 16), num_tokens=261, dim=8)
    images = build_set(tmp_path / "set", spec, ["a", "b", "c"], list(tokens))
    [found] = CachedGrid(images, np.arange(3)).batches(np.array([2]), 1)
    assert found.shape == (1, 16, 16, 8)
    assert torch.equal(found[0, :, :, 0].long(), torch.arange(256).view(16, 16))
