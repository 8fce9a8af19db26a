"""What all objectives share: blocks for many logits, and a gradient cache that holds little."""

import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, gradients, random_batch

from featcache.adaptor import objective as objective_module
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import build_adaptor


def built(**changes):
    torch.manual_seed(0)
    config = AdaptorConfig(dim=DIM, heads=4, feedforward=24, dropout=0.0, **changes)
    return build_adaptor(config, IMAGE_DIM, TEXT_DIM)


@pytest.mark.parametrize("objective", ["dual", "paper"])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_from_some_number_of_logits_on_they_are_made_in_blocks(monkeypatch, objective, loss):
    adaptor, made = built(objective=objective, loss=loss)
    batch = random_batch(12)
    batch.text_rows = torch.arange(12) // 2
    plain = gradients(made, adaptor, batch)
    monkeypatch.setattr(objective_module, "LOGITS_AT_ONCE", 143)
    assert made(adaptor, batch).logits_per_image is None
    for name, gradient in gradients(made, adaptor, batch).items():
        assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-6), name
    monkeypatch.setattr(objective_module, "LOGITS_AT_ONCE", 144)
    assert made(adaptor, batch).logits_per_image.shape == (12, 12)


def kept_numbers(objective, adaptor, batch, **how) -> int:
    """How many numbers the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in adaptor.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = objective(adaptor, batch, **how)
    output.loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("objective", ["dual", "allpairs"])
def test_the_gradient_cache_keeps_no_activations(objective):
    adaptor, made = built(objective=objective)
    batch = random_batch(32, image_tokens=20, text_tokens=8)
    plain = kept_numbers(made, adaptor, batch)
    cached = kept_numbers(made, adaptor, batch, chunk=8)
    inputs = batch.image_tokens.numel() + batch.text_tokens.numel() + batch.text_valid.numel()
    adapted = batch.image_tokens.numel() * DIM // IMAGE_DIM if objective == "allpairs" else 0
    small = 32 * 32 + 6 * 32 * DIM  # logits, and a few vectors per pair
    assert cached <= inputs + adapted + 3 * small
    assert cached < plain / 6
