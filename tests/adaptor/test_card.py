"""The card names what a program drew."""

import torch
from adaptor.test_saved import CONFIG, IMAGE, TEXT

from featcache.adaptor.card import SNIPPETS, data_title, model_card
from featcache.adaptor.saved import build_adaptor, load_adaptor, save_adaptor


def test_a_synthetic_data_set_is_never_called_by_its_name_alone(tmp_path):
    torch.manual_seed(0)
    adaptor, objective = build_adaptor(CONFIG, 12, 8)
    save_adaptor(tmp_path, adaptor, objective, CONFIG, image=IMAGE, text=TEXT, notes=["Said."])
    trained = load_adaptor(tmp_path)
    run = {"manifest": {"name": "mimic", "synthetic": True}}
    assert data_title(run) == "mimic (synthetic stand-in: drawn by a program)"
    card = model_card("run", trained, run, "safetensors", [])
    assert "| data set | mimic (synthetic stand-in" in card
    assert "no figure here says anything about patients" in card
    assert "- Said." in card
    real = model_card("run", trained, {"manifest": {"name": "m", "synthetic": False}}, "onnx", [])
    assert "| data set | m (not a synthetic stand-in) |" in real
    assert "no figure here" not in real


def test_every_kind_has_five_lines_that_load_it():
    assert all(lines.count("\n") == 5 for lines in SNIPPETS.values())
