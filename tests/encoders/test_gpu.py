"""Encoders on a CUDA device: the tokens of the CPU, and nothing that holds up the device."""

import pytest
import torch

from featcache.encoders.decode import to_input
from featcache.encoders.interface import load_encoder, locate_encoder

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TEXTS = ["lungs are clear", "small left pleural effusion, mild edema in the right base."]


def both(folder, modality, **options):
    located = locate_encoder(str(folder), modality, **options)
    return load_encoder(located), load_encoder(located, device=DEVICE)


def pictures(encoder):
    torch.manual_seed(0)
    size = encoder.preprocessing.image_size
    return torch.randint(0, 256, (4, *size), dtype=torch.uint8)


def assert_near(found, wanted, tolerance):
    assert found.device.type == DEVICE
    assert (found.float().cpu() - wanted).abs().max() <= tolerance * wanted.abs().max()


IMAGES = {
    "vit": {},
    "registers": {"layers": (1, -1), "pool_grid": 2},
    "swin": {},
    "cnn": {"pool_grid": 2},
    "dinov2": {},
}


@pytest.mark.parametrize(("kind", "options"), IMAGES.items())
def test_tokens_of_pictures_are_those_of_the_cpu(folders, kind, options):
    cpu, device = both(folders[kind], "image", **options)
    greys = pictures(cpu)
    wanted = cpu(to_input(greys, cpu.preprocessing))
    found = device(to_input(greys.to(DEVICE), device.preprocessing))
    assert found.tokens.dtype == torch.float32
    assert_near(found.tokens, wanted.tokens, 2e-3)  # convolutions may use TF32
    assert_near(found.pooled, wanted.pooled, 2e-3)


@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_tokens_of_texts_are_those_of_the_cpu(folders, layers):
    cpu, device = both(folders["bert"], "text", layers=layers)
    ids, valid = cpu.pad_batch(cpu.tokenize(TEXTS).ids)
    wanted = cpu(ids, valid)
    found = device(ids.to(DEVICE), valid.to(DEVICE))
    assert_near(found.tokens[valid.to(DEVICE)], wanted.tokens[valid], 1e-4)
    assert_near(found.pooled, wanted.pooled, 1e-4)


@pytest.mark.parametrize("kind", ["vit", "cnn", "dinov2"])
def test_bfloat16_stays_near(folders, kind):
    cpu, device = both(folders[kind], "image")
    greys = pictures(cpu)
    wanted = cpu(to_input(greys, cpu.preprocessing))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = device(to_input(greys.to(DEVICE), device.preprocessing))
    assert all(p.dtype == torch.float32 for p in device._network.parameters())
    assert_near(found.tokens, wanted.tokens, 5e-2)


@pytest.mark.parametrize("kind", ["vit", "registers", "swin", "cnn", "dinov2"])
def test_a_forward_pass_never_waits_for_the_device(folders, kind):
    layers = None if kind in ("swin", "cnn", "dinov2") else (1, 2)
    located = locate_encoder(str(folders[kind]), "image", layers=layers, pool_grid=2)
    encoder = load_encoder(located, device=DEVICE)
    greys = pictures(encoder).to(DEVICE)
    encoder(to_input(greys, encoder.preprocessing))
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(to_input(greys, encoder.preprocessing))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_maps_keep_their_channels_last(folders):
    _, encoder = both(folders["cnn"], "image")
    kernels = [p for p in encoder._network.parameters() if p.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
