"""Grids of tokens: places keep their order, what is written down is read back."""

import numpy as np
import pytest
import torch
from heads.kit_masks import masked_toy

from featcache.adaptor.saved import load_adaptor
from featcache.errors import CacheError, TrainingError
from featcache.heads.segment_tokens import CachedGrid, _hold, adapted_grid, why_no_places


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


def test_cached_grid_leaves_prefix_tokens_out_and_keeps_places(masked):
    rows = np.array([5, 0, 5, 80])
    grid = CachedGrid(masked.images, rows)
    numbers = np.array([3, 1, 1, 0])
    found = torch.cat([batch.clone() for batch in grid.batches(numbers, 3)])
    assert found.shape == (4, 4, 4, 12)
    shard = torch.cat(
        [
            batch.clone()
            for batch in CachedGrid(masked.images, np.arange(90)).batches(np.arange(90), 90)
        ]
    )
    assert torch.equal(found, shard[rows[numbers]])
    # the kit lifts channel 0 of a 2 x 2 block by 3
    assert shard[0, ..., 0].flatten().topk(4).values.min() > shard[6, ..., 0].median()


def test_adapted_grid_is_what_the_adaptor_makes_of_each_image(masked, make_run, tmp_path):
    trained = load_adaptor(make_run(tmp_path / "run", masked))
    rows = np.arange(40)
    grid = adapted_grid(masked.images, rows, trained, tmp_path, device="cpu", batch_size=7)
    assert not isinstance(grid, str)
    [found] = grid.batches(np.array([11, 3]), 2)
    from featcache.loader.gather import iterate_rows

    _, tokens, _ = next(iterate_rows(masked.images, np.array([11, 3]), 2))
    expected = trained.adaptor.encode_images(tokens.float())[:, 1:].view(2, 4, 4, 16)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert len(list(tmp_path.glob("adaptor-*.npy"))) == 1


def test_written_tokens_are_those_of_the_images_not_of_the_row_numbers(
    masked, make_run, write_set, tmp_path
):
    trained = load_adaptor(make_run(tmp_path / "run", masked))
    keys, tokens = masked.images.keys[:6], list(masked.images.read_tokens(np.arange(6)))
    turned = [
        write_set(tmp_path / name, masked.images.spec, order, tokens)
        for name, order in (("one", keys), ("other", keys[::-1]))
    ]
    for images in turned:
        adapted_grid(images, np.arange(6), trained, tmp_path / "held", device="cpu")
    assert len(list((tmp_path / "held").iterdir())) == 2


def test_written_tokens_are_found_again_without_asking_for_more(tmp_path):
    tokens = torch.randn(5, 4, 3)
    first = _hold(tmp_path / "a.npy", [tokens[:2], tokens[2:]], 5, (2, 2))
    again = _hold(tmp_path / "a.npy", iter(()), 5, (2, 2))
    for grid in (first, again):
        [found] = grid.batches(np.arange(5), 5)
        torch.testing.assert_close(found.view(5, 4, 3), tokens.half())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_token_beyond_float16_is_refused_not_stored_as_infinity(tmp_path):
    with pytest.raises(TrainingError, match="beyond 65504"):
        _hold(tmp_path / "a.npy", [torch.full((1, 4, 3), 7e4)], 1, (2, 2))
    assert not (tmp_path / "a.npy").exists()


def test_full_disk_is_said_in_words(tmp_path):
    (tmp_path / "a.partial").symlink_to("/dev/full")
    with pytest.raises(CacheError, match="the disk is full"):
        _hold(tmp_path / "a.npy", [torch.ones(1, 4, 3)], 1, (2, 2))
    assert not (tmp_path / "a.npy").exists()


def test_adaptor_of_a_budget_without_places_says_so(masked, make_run, tmp_path):
    trained = load_adaptor(make_run(tmp_path / "run", masked))
    assert why_no_places(trained) == ""
    image = trained.facts.image.model_copy(update={"tokens": "pooled"})
    facts = trained.facts.model_copy(update={"image": image})
    budget = type(trained)(trained.folder, trained.adaptor, trained.objective, facts)
    assert "budget `pooled`" in why_no_places(budget)
    assert "budget `pooled`" in adapted_grid(
        masked.images, np.arange(3), budget, tmp_path, device="cpu"
    )
