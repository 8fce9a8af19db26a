"""A text finds its place in an image."""

import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM

from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import build_adaptor
from featcache.loader.batch import Batch

GRID = (3, 4)
FINDINGS = 6


def marked(count, seed):
    """Noise in which one patch of each image carries a finding, that its text names."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(FINDINGS, IMAGE_DIM, generator=torch.Generator().manual_seed(7))
    words = torch.randn(FINDINGS, TEXT_DIM, generator=torch.Generator().manual_seed(8))
    images = torch.randn(count, 1 + 12, IMAGE_DIM, generator=generator)
    finding = torch.randint(FINDINGS, (count,), generator=generator)
    place = torch.randint(12, (count,), generator=generator)
    images[torch.arange(count), 1 + place] = 2 * looks[finding]
    texts = words[finding].unsqueeze(1)
    numbers = torch.arange(count)
    valid = torch.ones(count, 1, dtype=torch.bool)
    return Batch(images, texts, valid, numbers, numbers, finding), place


@pytest.mark.parametrize("pooling", ["cosine", "logsumexp"])
def test_the_largest_similarity_lies_where_the_finding_is(pooling):
    torch.manual_seed(0)
    config = AdaptorConfig(dim=DIM, layers=1, heads=2, feedforward=32, dropout=0.0, pooling=pooling)
    adaptor, objective = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
    optimizer = torch.optim.AdamW([*adaptor.parameters(), *objective.parameters()], lr=5e-3)
    for step in range(80):
        loss = objective(adaptor, marked(48, step)[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch, place = marked(200, 1000)
    with torch.no_grad():
        found = objective.eval().similarity_map(
            adaptor.eval(), batch.image_tokens, batch.text_tokens, batch.text_valid, GRID
        )
    row, column = place // 4, place % 4
    best = found.flatten(1).argmax(dim=1)
    hits = (found[torch.arange(200), row, column] == found.flatten(1).amax(dim=1)).float().mean()
    assert (best == place).float().mean() == hits
    assert hits > 0.7  # chance is 1 / 12
