"""Losses of vectors in blocks equal those of the logits, and never hold them all."""

import pytest
import torch
from adaptor.largest_tensor import LargestTensor
from torch.nn import functional

from featcache.adaptor import blocks, objective
from featcache.adaptor.contrast import Contrast, VectorTile
from featcache.adaptor.losses import Ids, infonce, positives, sigmoid


def given(images=30, texts=30, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    vectors = [functional.normalize(torch.randn(n, dim, dtype=dtype)) for n in (images, texts)]
    return [x.requires_grad_() for x in vectors], Ids(torch.arange(30) % 25, torch.arange(30) // 2)


def gradients(value, tensors):
    return torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("block", [1, 100, 2**22], ids=["row by row", "in blocks", "at once"])
@pytest.mark.parametrize("weight", [0.5, 0.75])
def test_infonce_of_vectors_is_that_of_their_logits(monkeypatch, block, weight):
    monkeypatch.setattr(blocks, "CPU_BLOCK_NUMBERS", block)
    (images, texts), ids = given()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    plain = infonce(scale * images @ texts.T, positives(ids, ids), weight)
    ours = Contrast("infonce", weight)(VectorTile(ids, ids, images=scale * images, texts=texts))
    assert torch.allclose(ours, plain)
    for one, other in zip(
        gradients(ours, (images, texts, scale)), gradients(plain, (images, texts, scale)),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("block", [1, 100, 2**22], ids=["row by row", "in blocks", "at once"])
def test_the_sigmoid_loss_of_vectors_is_that_of_their_logits(monkeypatch, block):
    monkeypatch.setattr(blocks, "CPU_BLOCK_NUMBERS", block)
    (images, texts), ids = given()
    contrast = Contrast("sigmoid").double()
    inputs = (images, texts, contrast.bias)
    plain = sigmoid(5 * images @ texts.T, positives(ids, ids), contrast.bias)
    ours = contrast(VectorTile(ids, ids, images=5 * images, texts=texts))
    assert torch.allclose(ours, plain)
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_gradients_pass_gradcheck(monkeypatch, loss):
    monkeypatch.setattr(blocks, "CPU_BLOCK_NUMBERS", 10)
    (images, texts), ids = given(6, 6, 3)
    contrast = Contrast(loss, 0.5).double()
    assert torch.autograd.gradcheck(
        lambda x, t: contrast(VectorTile(ids[:6], ids[:6], images=x, texts=t)), (images, texts)
    )


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_no_tensor_of_all_pairs_is_made(monkeypatch, loss):
    monkeypatch.setattr(blocks, "CPU_BLOCK_NUMBERS", 64 * 30)
    (images, texts), _ = given(300, 300, 8, torch.float32)
    ids = Ids(torch.arange(300) % 200, torch.arange(300))
    with LargestTensor() as seen:
        Contrast(loss)(VectorTile(ids, ids, images=images, texts=texts)).backward()
    assert seen.largest < 300 * 300 / 20


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_under_autocast_products_are_bfloat16_and_sums_float32(loss):
    (images, texts), ids = given(dtype=torch.float32)
    exact = Contrast(loss)(VectorTile(ids, ids, images=images, texts=texts))
    with torch.autocast("cpu", torch.bfloat16):
        ours = Contrast(loss)(VectorTile(ids, ids, images=images, texts=texts))
    ours.backward()
    assert ours.dtype == images.grad.dtype == torch.float32
    assert torch.allclose(ours, exact, rtol=0.02)
    assert not torch.equal(ours, exact)


def test_a_large_scale_stays_finite():
    (images, _), ids = given(dtype=torch.float32)
    value = Contrast()(VectorTile(ids, ids, images=100 * images, texts=-images.detach()))
    value.backward()
    assert value.isfinite()
    assert images.grad.isfinite().all()
    assert len(images) ** 2 < objective.LOGITS_AT_ONCE  # small batches take the plain way
