"""Six small networks with fixed random weights, one per token layout, saved as local folders."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTImageProcessor

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
REPORT = """no acute cardio ##pulmonary ab ##normal ##ity lungs are clear heart size is normal
effusion small left right pleural pneumothorax there the of and mild edema opacity in base
. , - patient stable line tip over"""
WORDS = [*SPECIALS, *REPORT.split()]
SWIN = {"window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4},
    ),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}),
    "cnn": ("resnet10t", {}),
}
CNN_SIZE = 64


def stir(network):
    """Move every parameter off its initial value, so that none is zero or one by convention."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


def save_timm(kind: str, folder: Path) -> Path:
    name, options = TIMM[kind]
    network = stir(timm.create_model(name, num_classes=0, **options))
    save_for_hf(network, folder, safe_serialization=True)
    if kind == "cnn":
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, CNN_SIZE, CNN_SIZE]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    stir(Dinov2Model(config)).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.4] * 3, image_std=[0.2] * 3, resample=3
    ).save_pretrained(folder)
    return folder


def save_bert(folder: Path, *, vocabulary=WORDS, **changes) -> Path:
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 60,
        "max_position_embeddings": 64,
    }
    stir(BertModel(BertConfig(**(options | changes)))).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each small encoder, by its kind."""
    root = tmp_path_factory.mktemp("encoders")
    saved = {kind: save_timm(kind, root / kind) for kind in TIMM}
    saved["dinov2"] = save_dinov2(root / "dinov2")
    saved["bert"] = save_bert(root / "bert")
    return saved


@pytest.fixture
def unreachable_hub(tmp_path, monkeypatch):
    """An empty hub cache, and a hub whose port is closed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub"
