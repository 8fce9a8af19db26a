import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from featcache.adaptor import pooling
from featcache.adaptor.pooling import pooled_cosine


def plain(images, queries, targets):
    """The same function as one would write it down, with everything it names in memory."""
    weights = torch.einsum("ild,jd->ijl", images, queries).softmax(dim=-1)
    pooled = torch.einsum("ijl,ild->ijd", weights, images)
    return (functional.normalize(pooled, dim=-1) * targets).sum(dim=-1)


def inputs(dtype=torch.float64, images=5, texts=4, tokens=7, dim=6):
    torch.manual_seed(0)
    shapes = [(images, tokens, dim), (texts, dim), (texts, dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("block", [1, 60, 2**20], ids=["image by image", "in blocks", "at once"])
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
