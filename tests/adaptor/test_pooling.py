import pytest
import torch
from adaptor.largest_tensor import LargestTensor
from torch.nn import functional

from featcache.adaptor import pooling
from featcache.adaptor.pooling import pooled_cosine, pooled_logsumexp


def plain(images, queries, targets):
    """The same function as one would write it down, with everything it names in memory."""
    weights = torch.einsum("ild,jd->ijl", images, queries).softmax(dim=-1)
    pooled = torch.einsum("ijl,ild->ijd", weights, images)
    return (functional.normalize(pooled, dim=-1) * targets).sum(dim=-1)


def inputs(dtype=torch.float64, images=5, texts=4, tokens=7, dim=6):
    torch.manual_seed(0)
    shapes = [(images, tokens, dim), (texts, dim), (texts, dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("block", [1, 110, 2**20], ids=["image by image", "in blocks", "at once"])
def test_scores_and_gradients_are_those_of_the_plain_function(monkeypatch, block):
    monkeypatch.setattr(pooling, "CPU_BLOCK_NUMBERS", block)
    ours, theirs = inputs(), inputs()
    outer = torch.randn(5, 4, dtype=torch.float64)
    scores, expected = pooled_cosine(*ours), plain(*theirs)
    assert torch.allclose(scores, expected)
    (scores * outer).sum().backward()
    (expected * outer).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad)


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(pooled_cosine, inputs(images=3, texts=2, tokens=4))


def test_no_tensor_over_all_pairs_and_tokens_is_made(monkeypatch):
    monkeypatch.setattr(pooling, "CPU_BLOCK_NUMBERS", 2 * 24 * 10)
    given = inputs(torch.float32, images=32, texts=24, tokens=10, dim=8)
    with LargestTensor() as seen:
        pooled_cosine(*given).sum().backward()
    assert seen.largest < 32 * 24 * 10 / 2


def test_under_autocast_products_are_bfloat16_and_scores_float32():
    given = [x.detach().requires_grad_() for x in inputs(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        scores = pooled_cosine(*given)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, plain(*given), atol=0.1)
    assert not torch.equal(scores, pooled_cosine(*given))
    scores.sum().backward()
    assert given[0].grad.dtype == torch.float32


def test_a_text_without_content_scores_zero_with_finite_gradients():
    images, queries, targets = inputs()
    scores = pooled_cosine(images, queries * 0, targets * 0)
    assert torch.equal(scores, torch.zeros_like(scores))
    blank = torch.zeros_like(images).requires_grad_()
    pooled_cosine(blank, queries, targets).sum().backward()
    assert blank.grad.isfinite().all()


def plain_logsumexp(images, queries):
    return torch.einsum("ild,jd->ijl", images, queries).logsumexp(dim=2)


@pytest.mark.parametrize("block", [1, 110, 2**20], ids=["image by image", "in blocks", "at once"])
def test_log_sum_exps_and_gradients_are_those_of_the_plain_function(monkeypatch, block):
    monkeypatch.setattr(pooling, "CPU_BLOCK_NUMBERS", block)
    ours, theirs = inputs()[:2], inputs()[:2]
    outer = torch.randn(5, 4, dtype=torch.float64)
    scores, expected = pooled_logsumexp(*ours), plain_logsumexp(*theirs)
    assert torch.allclose(scores, expected)
    (scores * outer).sum().backward()
    (expected * outer).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad)


def test_no_tensor_over_all_pairs_and_tokens_is_made_for_log_sum_exps(monkeypatch):
    monkeypatch.setattr(pooling, "CPU_BLOCK_NUMBERS", 2 * 24 * 10)
    given = inputs(torch.float32, images=32, texts=24, tokens=10, dim=8)
    with LargestTensor() as seen:
        pooled_logsumexp(*given[:2]).sum().backward()
    assert seen.largest < 32 * 24 * 10 / 2


def test_under_autocast_log_sum_exps_are_float32():
    given = [x.detach().requires_grad_() for x in inputs(torch.float32)[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        scores = pooled_logsumexp(*given)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, plain_logsumexp(*given), atol=0.1)
    assert not torch.equal(scores, pooled_logsumexp(*given))
    scores.sum().backward()
    assert given[0].grad.dtype == torch.float32
