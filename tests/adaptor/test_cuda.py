"""Training on a GPU: half precision, and a resume with the generators of the device."""

import pytest
import torch
from adaptor.spaces import lines

from featcache.adaptor import stage
from featcache.adaptor.train import train_adaptor
from featcache.errors import TrainingError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def run(study, make_config, tmp_path):
    def start(name, **changes):
        config = make_config(**changes)
        return train_adaptor(
            study.images, study.texts, study.manifest, tmp_path / name, config, device="cuda"
        )

    return start


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_precision_trains(run, precision):
    steps = lines(run("run", precision=precision, epochs=6, lr=1e-2).folder, "step")
    assert all(line["loss"] < 100 for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_equals_an_undisturbed_one(run, precision, monkeypatch):
    settings = {"precision": precision, "checkpoint_every": 2, "adaptor": {"dropout": 0.3}}
    whole = run("whole", **settings)

    def failing(self, batch, number):
        if self.global_step == 7:
            raise TrainingError("stopped on purpose")
        return step(self, batch, number)

    step = stage.Stage.training_step
    monkeypatch.setattr(stage.Stage, "training_step", failing)
    with pytest.raises(TrainingError, match="on purpose"):
        run("part", **settings)
    monkeypatch.undo()
    part = run("part", **settings)
    one, two = (
        (result.adaptor_folder / "adaptor.safetensors").read_bytes() for result in (whole, part)
    )
    assert one == two


def test_known_pairs_are_found_on_the_device(sentence_study, make_config, tmp_path):
    on, losses = sentence_study, {}
    config = make_config(precision="32-true", epochs=1, queue=16, adaptor={"dropout": 0.0})
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        run = train_adaptor(on.images, on.texts, on.manifest, folder, config, device=device)
        losses[device] = [line["loss"] for line in lines(run.folder, "step")]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
