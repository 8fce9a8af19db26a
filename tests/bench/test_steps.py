"""The step that benches time is a step of training, and operations are counted whole."""

import numpy as np
import torch

from featcache.adaptor.model import AdaptorConfig
from featcache.bench.groups.gather import Memcpy
from featcache.bench.groups.online import GRID, PATCHES, _budget, _flops
from featcache.bench.sets import make_cache
from featcache.bench.steps import Training, copy_batch, random_batch
from featcache.loader.gather import TokenLoader

TINY = AdaptorConfig(dim=8, heads=2, layers=1, feedforward=8)


def test_a_step_moves_every_weight_it_has_a_gradient_for():
    training = Training(TINY, 6, 4, "cpu")
    before = [p.detach().clone() for p in training.adaptor.parameters()]
    assert training.run([random_batch(4, (3, 6), (2, 4))]) > 0
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, training.adaptor.parameters(), strict=True)
    ]
    assert all(moved)
    assert all(p.grad is None for p in training.adaptor.parameters())


def test_the_gradient_cache_is_used_when_a_chunk_is_given():
    seen = []
    training = Training(TINY, 6, 4, "cpu", chunk=2)
    encode = training.objective.encode_images
    training.objective.encode_images = lambda adaptor, tokens: (
        seen.append(len(tokens)) or encode(adaptor, tokens)
    )
    training.step(random_batch(6, (3, 6), (2, 4)))
    assert set(seen) == {2}


def test_a_copied_batch_stays_when_the_loader_goes_on(tmp_path):
    batches = iter(TokenLoader(make_cache(tmp_path, 16, shape=(3, 4)), 4, prefetch=0))
    first = next(batches)
    copied, tokens = copy_batch(first), first.image_tokens.clone()
    for _ in batches:
        pass
    assert torch.equal(copied.image_tokens, tokens)
    assert not torch.equal(first.image_tokens, tokens)


def test_every_byte_is_copied_also_where_the_last_buffer_is_not_full():
    copying = Memcpy(total=2500, buffer_bytes=1000, buffers=4, threads=2)
    for target in copying._targets:
        target[:] = 0
    copying.run(1)
    assert [int(target.sum()) for target in copying._targets] == [1000, 1000, 500, 0]


def test_operations_of_products_and_of_attention_are_counted():
    a, b = torch.randn(2, 3), torch.randn(3, 5)
    assert _flops(lambda: a @ b) == 2 * 2 * 3 * 5
    tokens = torch.randn(1, 2, 7, 4)
    attended = _flops(lambda: torch.nn.functional.scaled_dot_product_attention(*[tokens] * 3))
    assert attended == 2 * (2 * 2 * 7 * 7 * 4)


def test_the_token_budget_is_the_class_token_and_distinct_patches():
    columns = _budget(np.random.default_rng(0))
    assert columns[0] == 0
    assert len(set(columns.tolist())) == 1 + PATCHES == 50
    assert columns.max() <= GRID[0] * GRID[1]
