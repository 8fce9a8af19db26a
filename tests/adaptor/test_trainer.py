import re
import shutil
import threading

import numpy as np
import pytest
import torch
from adaptor.spaces import lines
from safetensors.torch import load_file

from featcache.adaptor import stage as module
from featcache.adaptor.checkpoint import write_checkpoint
from featcache.adaptor.run import start_folder
from featcache.adaptor.saved import load_adaptor
from featcache.errors import TrainingError, UsageError
from featcache.heads.vectors import image_vectors


def test_lightning_keeps_quiet(run, capsys, caplog):
    run()
    out, err = capsys.readouterr()
    assert out == ""
    foreign = [line for line in err.splitlines() if re.search("lightning|gpu|warn", line, re.I)]
    assert foreign == []
    # A cluster of another test may say something in threads of its own.
    mine = [record for record in caplog.records if record.thread == threading.get_ident()]
    assert not [record for record in mine if not record.name.startswith("featcache")]


def test_the_logger_can_be_switched_off(run):
    assert not (run(logger="none").folder / "csv").exists()


def test_lightnings_own_csv_is_written(run):
    folder = run().folder
    rows = (folder / "csv" / "metrics.csv").read_text().splitlines()
    assert {"loss", "grad_norm", "logit_scale", "lr", "step"} == set(rows[0].split(","))
    assert len(rows) == 1 + 15


def test_bfloat16_trains(run):
    result = run(precision="bf16-mixed", epochs=2)
    tensors = load_file(result.folder / "adaptor" / "adaptor.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.fixture
def unfinished(run, break_gradient, monkeypatch):
    """The checkpoint of a training that stopped after step 7."""
    break_gradient(first=8)
    with pytest.raises(TrainingError):
        run(checkpoint_every=7)
    monkeypatch.undo()

    def go_on(name="run", **changes):
        return run(name, checkpoint_every=7, **changes)

    return go_on


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_starts_anew(
    unfinished, tmp_path, capsys
):
    folder = tmp_path / "run" / "checkpoints" / "step-000000007"
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"step": 7', '"step": 6'))
    with pytest.raises(TrainingError, match="damaged or changed") as caught:
        unfinished()
    assert caught.value.where == str(state)
    shutil.rmtree(folder)
    capsys.readouterr()
    assert unfinished().facts["steps"] == 15
    assert "goes on" not in capsys.readouterr().err


def test_the_checkpoint_of_another_run_is_refused(unfinished, run, make_config, tmp_path):
    start_folder(tmp_path / "b", make_config(lr=0.5), {})
    (tmp_path / "b" / "run.json").unlink()
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "b" / "checkpoints")
    with pytest.raises(TrainingError, match=r"belongs to another run:\n  `config.lr`"):
        run("b", lr=0.5)


def test_a_checkpoint_of_something_else_is_refused(unfinished, tmp_path):
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000009", {"state_dict": {}})
    with pytest.raises(TrainingError, match="no checkpoint of a training: it has no `loops`"):
        unfinished()


def test_a_pickle_beside_the_checkpoints_is_never_read(unfinished, tmp_path):
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"no pickle at all")
    assert unfinished().status == "trained"


@pytest.mark.parametrize(
    ("tokens", "count"), [("prefix", 1), ("grid", 4), ("random:2", 3), ("all", 5)]
)
def test_a_token_budget_holds_in_training_validation_and_for_heads(run, monkeypatch, tokens, count):
    seen = {True: set(), False: set()}
    whole = module.build_adaptor

    def watched(*arguments):
        adaptor, objective = whole(*arguments)
        adaptor.image_projection.register_forward_pre_hook(
            lambda layer, given: seen[layer.training].add(given[0].shape[1])
        )
        return adaptor, objective

    monkeypatch.setattr(module, "build_adaptor", watched)
    loaded = load_adaptor(run(tokens=tokens, text_tokens=3, epochs=1).folder)
    measured = 5 if tokens == "random:2" else count
    assert seen == {True: {count}, False: {measured}}
    assert loaded.facts.image.tokens == tokens
    expected = "all" if tokens == "random:2" else tokens
    assert loaded.reading == {"tokens": expected, "text_tokens": 3}


def test_heads_read_the_tokens_that_the_adaptor_was_trained_on(run, study):
    trained = load_adaptor(run(tokens="grid", epochs=1).folder)
    rows = np.arange(6)
    vectors = image_vectors(study.images, rows, trained, batch_size=4)
    tokens = torch.from_numpy(study.images.read_tokens(rows)).float()  # 1 prefix, 4 of the grid
    expected = trained.objective.image_vector(trained.adaptor, tokens[:, 1:])
    assert np.allclose(vectors.adaptor, expected.numpy(), atol=1e-5)


def test_a_budget_that_the_set_cannot_give_is_refused_in_words(run):
    with pytest.raises(UsageError, match="has no pooled vectors"):
        run(tokens="pooled")


def test_tokens_held_in_memory_change_nothing(run):
    plain, resident = (
        lines(run(name, resident=one, epochs=1).folder, "step")
        for name, one in (("a", False), ("b", True))
    )
    assert [line["loss"] for line in resident] == [line["loss"] for line in plain]


def test_a_gradient_cache_gives_the_same_steps(run):
    adaptor = {"dropout": 0.0}
    plain, cached = (
        lines(run(name, adaptor=adaptor, gradient_cache=chunk, epochs=1).folder, "step")
        for name, chunk in (("a", None), ("b", 3))
    )
    for one, two in zip(plain, cached, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_queue_of_earlier_pairs_raises_the_loss_and_is_not_saved(run):
    adaptor = {"objective": "dual", "dropout": 0.0}
    plain, queued = (
        run(name, adaptor=adaptor, queue=size, epochs=1) for name, size in (("a", 0), ("b", 16))
    )
    one, two = (lines(result.folder, "step") for result in (plain, queued))
    assert one[0]["loss"] == two[0]["loss"]
    assert two[1]["loss"] > one[1]["loss"]
    names = [set(load_file(r.adaptor_folder / "adaptor.safetensors")) for r in (plain, queued)]
    assert names[0] == names[1]


def test_what_the_machine_cannot_do_is_refused_in_words(run, monkeypatch):
    with pytest.raises(UsageError, match="precision 16-mixed needs CUDA"):
        run(precision="16-mixed")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="compile=true needs a C\\+\\+ compiler"):
        run(compile=True)


def test_what_does_not_fit_into_memory_is_told_with_a_number(run, monkeypatch):
    def full(self, batch, number):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module.Stage, "training_step", full)
    with pytest.raises(TrainingError, match="a batch of 8 pairs does not fit") as caught:
        run()
    assert caught.value.fix.startswith("--set gradient_cache=2 ")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the first captures the same graphs, and leaves out the C++ compiler
def test_compiled_blocks_give_the_same_steps(run, unchecked, monkeypatch, backend):
    torch.compiler.reset()
    whole, compiled_blocks = torch.nn.Module.compile, []

    def counted(block):
        compiled_blocks.append(block)
        whole(block, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    adaptor = {"dropout": 0.0}
    plain, compiled = (
        lines(run(name, adaptor=adaptor, compile=one, epochs=1).folder, "step")
        for name, one in (("a", False), ("b", True))
    )
    assert len(compiled_blocks) == 1
    for one, two in zip(plain, compiled, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
