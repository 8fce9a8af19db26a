import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache.adaptor.model import MAX_LOGIT_SCALE, AdaptorConfig
from featcache.adaptor.saved import (
    FACTS,
    WEIGHTS,
    FeaturesRead,
    build_adaptor,
    load_adaptor,
    save_adaptor,
)
from featcache.config import file_sha256
from featcache.errors import TrainingError

CONFIG = AdaptorConfig(dim=16, layers=1, heads=2, feedforward=24)
IMAGE = FeaturesRead(encoder="vit-b", fingerprint="a" * 32, dim=12)
TEXT = FeaturesRead(encoder="bert", fingerprint="b" * 32, dim=8)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    adaptor, objective = build_adaptor(CONFIG, 12, 8)
    torch.nn.init.normal_(objective.query.weight)
    folder = tmp_path / "run" / "adaptor"
    save_adaptor(
        folder, adaptor, objective, CONFIG, image=IMAGE, text=TEXT, notes=["Made-up tokens."]
    )
    return folder, adaptor, objective


def rewrite(folder, change):
    """Change the weights as a stranger would who also mends the checksum."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    facts = json.loads((folder / FACTS).read_text())
    facts["weights_sha256"] = file_sha256(folder / WEIGHTS)
    (folder / FACTS).write_text(json.dumps(facts))


def test_what_is_saved_loads_equal_with_its_fingerprints(saved):
    folder, adaptor, objective = saved
    loaded = load_adaptor(folder)
    for ours, theirs in ((adaptor, loaded.adaptor), (objective, loaded.objective)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    assert (loaded.image_fingerprint, loaded.text_fingerprint) == ("a" * 32, "b" * 32)
    assert loaded.config == CONFIG
    assert loaded.notes == ["Made-up tokens."]
    assert loaded.facts.parameters == {"adaptor": 2281, "objective": 256}


def test_a_loaded_adaptor_is_in_eval_mode_without_gradients(saved):
    loaded = load_adaptor(saved[0])
    assert not loaded.adaptor.training
    assert not any(p.requires_grad for p in loaded.adaptor.parameters())
    assert not any(p.requires_grad for p in loaded.objective.parameters())


def test_a_runs_folder_stands_for_the_adaptor_in_it(saved):
    assert load_adaptor(saved[0].parent).folder == saved[0]


def test_saving_twice_gives_equal_bytes(saved, tmp_path):
    folder, adaptor, objective = saved
    other = tmp_path / "other"
    save_adaptor(
        other, adaptor, objective, CONFIG, image=IMAGE, text=TEXT, notes=["Made-up tokens."]
    )
    for name in (WEIGHTS, FACTS):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_weights_of_another_shape_are_refused_by_name(saved):
    def change(tensors):
        tensors["adaptor.image_projection.weight"] = torch.zeros(16, 99)
        del tensors["objective.query.weight"]
        tensors["adaptor.extra"] = torch.zeros(1)

    rewrite(saved[0], change)
    with pytest.raises(TrainingError) as caught:
        load_adaptor(saved[0])
    message = str(caught.value)
    assert (
        "`adaptor.image_projection.weight` has shape (16, 99), the config makes (16, 12)" in message
    )
    assert "`objective.query.weight` is missing" in message
    assert "`adaptor.extra` is unknown" in message


def test_weights_that_are_not_finite_are_refused(saved):
    rewrite(saved[0], lambda tensors: tensors["adaptor.logit_scale"].fill_(torch.nan))
    with pytest.raises(TrainingError, match=r"`adaptor\.logit_scale` holds values that are not f"):
        load_adaptor(saved[0])


def test_a_logit_scale_that_ran_away_is_brought_back(saved):
    rewrite(saved[0], lambda tensors: tensors["adaptor.logit_scale"].fill_(12.0))
    loaded = load_adaptor(saved[0])
    assert loaded.adaptor.logit_scale <= MAX_LOGIT_SCALE
    assert loaded.adaptor.scale <= 100.0


def test_damaged_weights_are_refused(saved):
    path = saved[0] / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="the weights are damaged: their SHA-256 is"):
        load_adaptor(saved[0])


def test_a_pickle_in_place_of_the_weights_runs_no_code(saved, tmp_path):
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return canary.touch, ()

    (saved[0] / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    facts = json.loads((saved[0] / FACTS).read_text())
    facts["weights_sha256"] = file_sha256(saved[0] / WEIGHTS)
    (saved[0] / FACTS).write_text(json.dumps(facts))
    with pytest.raises(TrainingError, match="no safetensors file"):
        load_adaptor(saved[0])
    assert not canary.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}'])
def test_facts_that_make_no_sense_are_refused(saved, content):
    (saved[0] / FACTS).write_text(content)
    with pytest.raises(TrainingError, match=r"adaptor\.json"):
        load_adaptor(saved[0])


def test_a_folder_without_an_adaptor_says_what_to_do(tmp_path, saved):
    with pytest.raises(TrainingError, match="featcache train-adaptor trains one"):
        load_adaptor(tmp_path)
    (saved[0] / WEIGHTS).unlink()
    with pytest.raises(TrainingError, match="the Adaptor's weights are missing"):
        load_adaptor(saved[0])


def test_an_adaptor_saved_before_an_option_existed_still_loads(saved):
    folder, adaptor, _ = saved
    facts = json.loads((folder / FACTS).read_text())
    for name in ("pooling", "matching"):
        del facts["config"][name]
    (folder / FACTS).write_text(json.dumps(facts))
    loaded = load_adaptor(folder)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.adaptor.logit_scale, adaptor.logit_scale)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sigmoid"},
        {"pooling": "logsumexp"},
        {"pooling": "heads"},
        {"objective": "dual", "matching": 0.5},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_weights_of_each_kind_come_back(tmp_path, changes):
    config = CONFIG.model_copy(update=changes)
    adaptor, objective = build_adaptor(config, 12, 8)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter)
    save_adaptor(tmp_path, adaptor, objective, config, image=IMAGE, text=TEXT, notes=[])
    loaded = load_adaptor(tmp_path)
    assert objective.state_dict()
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, loaded.objective.state_dict()[name])
