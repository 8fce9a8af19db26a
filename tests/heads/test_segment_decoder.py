"""Decoders and their loss."""

import math

import pytest
import torch
from torch.nn import functional

from featcache.heads.segment_decoder import (
    ConvDecoder,
    LinearDecoder,
    build_decoder,
    mask_loss,
    upsample,
)

SIZE = (16, 16)


def test_focal_loss_by_hand():
    logits = torch.tensor([[[2.0, -1.0]]])
    masks = torch.tensor([[[1.0, 0.0]]])
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    focal = ((1 - p) ** 2 * -math.log(p) + q**2 * -math.log(1 - q)) / 2
    dice = (2 * p + 1) / (p + q + 1 + 1)
    found = float(mask_loss(logits, masks, focal_weight=10, smooth=1))
    assert found == pytest.approx(10 * focal + 1 - dice, rel=1e-5)
    assert float(mask_loss(logits, masks, focal_weight=0)) == pytest.approx(1 - dice, rel=1e-5)


def test_perfect_masks_cost_nothing_and_wrong_ones_all():
    masks = torch.zeros(2, 8, 8)
    masks[0, 2:5, 2:5] = 1.0
    right = (masks * 2 - 1) * 40
    assert float(mask_loss(right, masks)) == pytest.approx(0.0, abs=1e-5)
    assert float(mask_loss(-right, masks, focal_weight=0)) > 0.99
    nothing = torch.full_like(masks, -40)
    assert float(mask_loss(nothing, torch.zeros_like(masks))) == pytest.approx(0.0, abs=1e-5)


def test_empty_answer_is_not_what_the_loss_likes_best():
    """A loss on logits instead of probabilities once trained nothing but empty masks."""
    masks = torch.zeros(4, 8, 8)
    masks[0, 2:5, 2:5] = 1.0
    empty = mask_loss(torch.full_like(masks, -6.0), masks, focal_weight=0)
    half = mask_loss((masks * 2 - 1) * 0.5, masks, focal_weight=0)
    right = mask_loss((masks * 2 - 1) * 6.0, masks, focal_weight=0)
    assert right < half < empty


@pytest.mark.parametrize("level", [0.0, -200.0, 200.0])
def test_gradients_are_finite_on_a_batch_without_masks(level):
    logits = torch.full((3, 4, 4), level, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(3, 4, 4))
    [gradient] = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient >= 0).all()


def test_linear_decoder_is_one_weight_per_channel_then_bilinear():
    torch.manual_seed(0)
    decoder, tokens = LinearDecoder(5), torch.randn(2, 4, 4, 5)
    decoder.mean.copy_(torch.randn(5))
    decoder.sd.fill_(2.0)
    plain = ((tokens - decoder.mean) / 2) @ decoder.head.weight[0] + decoder.head.bias
    expected = functional.interpolate(plain[:, None], SIZE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(tokens, SIZE), expected[:, 0])


def test_upsampling_keeps_places():
    spot = torch.zeros(1, 4, 4)
    spot[0, 1, 2] = 1.0
    found = upsample(spot, SIZE)[0]
    row, column = divmod(int(found.argmax()), 16)
    assert row // 4 == 1
    assert column // 4 == 2
    assert upsample(spot, (4, 4)) is spot


@pytest.mark.parametrize("kind", [LinearDecoder, ConvDecoder])
def test_no_image_sees_another(kind):
    torch.manual_seed(1)
    decoder, tokens = kind(6), torch.randn(5, 4, 4, 6)
    together = decoder(tokens, SIZE)
    alone = torch.cat([decoder(one[None], SIZE) for one in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_conv_decoder_is_light_and_finer_than_the_grid():
    decoder = ConvDecoder(768)
    assert sum(one.numel() for one in decoder.parameters()) < 120_000
    assert decoder.places(torch.zeros(1, 7, 7, 768)).shape == (1, 28, 28)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_untrained_decoder_answers_with_the_share_it_was_told(name):
    decoder = build_decoder(name, 6, seed=3)
    decoder.set_prior(0.1)
    torch.manual_seed(2)
    found = decoder(torch.randn(8, 4, 4, 6), SIZE).sigmoid().detach()
    assert float(found.mean()) == pytest.approx(0.1, abs=0.02)


def test_seed_decides_the_weights_and_nothing_else_moves():
    state = torch.random.get_rng_state()
    first, again, other = (build_decoder("linear", 6, seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
