"""Similarity maps of phrases, and the map that sees no pixel."""

import numpy as np
import pytest
import torch
from heads.kit_masks import masked_toy

from featcache.adaptor.saved import load_adaptor
from featcache.heads.phrase_maps import centre_map, map_images, phrase_maps


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return masked_toy(tmp_path_factory.mktemp("masked"))


@pytest.mark.parametrize("objective", ["allpairs", "dual"])
def test_map_of_one_phrase_is_the_objectives_similarity_map(masked, make_run, tmp_path, objective):
    trained = load_adaptor(make_run(tmp_path / "run", masked, objective=objective))
    torch.manual_seed(0)
    images, words = torch.randn(3, 17, 12), torch.randn(1, 4, 8)
    valid = torch.ones(1, 4, dtype=torch.bool)
    text = trained.objective.encode_texts(trained.adaptor, words, valid)
    expected = trained.objective.similarity_map(
        trained.adaptor, images, words.expand(3, -1, -1), valid.expand(3, -1), (4, 4)
    )
    torch.testing.assert_close(phrase_maps(trained, images, text, (4, 4)), expected)
    twice = phrase_maps(trained, images, torch.cat([text, text]), (4, 4))
    torch.testing.assert_close(twice, expected)


def test_maps_of_all_images_do_not_depend_on_the_batch(masked, make_run, tmp_path):
    adaptors = [load_adaptor(make_run(tmp_path / str(n), masked, seed=n)) for n in (0, 1)]
    texts = [torch.randn(2, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    rows = np.array([5, 3, 80, 7, 8])
    whole, small = (
        map_images(adaptors, texts, masked.images, rows, device="cpu", batch_size=size)
        for size in (5, 2)
    )
    assert [one.shape for one in whole] == [(5, 4, 4)] * 2
    for one, other in zip(whole, small, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 0.01


@pytest.mark.parametrize("grid", [(7, 7), (4, 6), (1, 1)])
def test_centre_is_highest_in_the_middle_and_even_all_round(grid):
    found = centre_map(grid)
    assert found.shape == grid
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-6)
    assert found[grid[0] // 2, grid[1] // 2] == found.max()
    assert 0 <= found.min() <= found[0, 0] == found.min()
