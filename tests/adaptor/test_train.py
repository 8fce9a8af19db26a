import dataclasses
import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from featcache.adaptor import train as module
from featcache.adaptor.objectives import AllPairs
from featcache.adaptor.run import load_run_config
from featcache.adaptor.saved import load_adaptor
from featcache.adaptor.train import train, train_adaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.errors import CacheError, InterruptedByUserError, TrainingError, UsageError


@pytest.fixture
def run(study, make_config, tmp_path):
    """Train in a folder of its own; arguments change the config, or say where."""

    def start(name="run", *, on=study, **changes):
        folder = tmp_path / name
        config = make_config(**changes)
        return train_adaptor(on.images, on.texts, on.manifest, folder, config, device="cpu")

    return start


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def stamps(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def weights(folder):
    return (folder / "adaptor" / "adaptor.safetensors").read_bytes()


def test_epochs_asked_are_epochs_trained(run):
    result = run(epochs=4)
    steps = lines(result.folder, "step")
    assert [line["step"] for line in steps] == list(range(1, 21))  # 42 pairs: 5 full batches of 8
    assert [line["epoch"] for line in steps] == [e for e in range(4) for _ in range(5)]
    assert [line["epoch"] for line in lines(result.folder, "validate")] == [0, 1, 2, 3]
    assert (result.facts["epochs"], result.facts["steps"]) == (4, 20)


def test_dropout_acts_in_training_and_not_in_validation(run, monkeypatch):
    modes = []
    whole = module.Candidates.metrics

    def metrics(self, objective, adaptor, device):
        modes.append(("validate", adaptor.training, objective.training))
        return whole(self, objective, adaptor, device)

    def noted(adaptor, objective, batch):
        modes.append(("step", adaptor.training, objective.training))
        return forward(objective, adaptor, batch)

    forward = AllPairs.forward
    monkeypatch.setattr(module.Candidates, "metrics", metrics)
    monkeypatch.setattr(AllPairs, "forward", lambda self, a, b: noted(a, self, b), raising=False)
    run(epochs=2)
    steps = [("step", True, True)] * 5
    assert modes == [*steps, ("validate", False, False)] * 2


def test_the_gradient_is_clipped_after_it_was_logged(run):
    clipped, free = run("a", gradient_clip=0.5), run("b", gradient_clip=None)
    norms = [lines(result.folder, "step")[0]["grad_norm"] for result in (clipped, free)]
    assert norms[0] == norms[1] > 0.5
    assert weights(clipped.folder) != weights(free.folder)


def test_a_run_leaves_exactly_these_files(run):
    result = run()
    names = {"config.yaml", "run.json", "metrics.jsonl", "csv/metrics.csv"}
    assert files(result.folder) == names | {"adaptor/adaptor.json", "adaptor/adaptor.safetensors"}


def test_each_step_is_logged_with_what_it_did(run):
    steps = lines(run(warmup=0.2, epochs=2).folder, "step")
    keys = {"kind", "step", "epoch", "loss", "logit_scale", "grad_norm", "lr", "elapsed_s"}
    assert all(set(line) == keys for line in steps)
    assert [line["lr"] for line in steps[:3]] == [0.0015, 0.003, 0.003]
    assert steps[-1]["lr"] < steps[2]["lr"]
    assert all(line["grad_norm"] > 0 for line in steps)
    elapsed = [line["elapsed_s"] for line in steps]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("objective", ["allpairs", "dual", "paper"])
def test_training_learns_what_texts_say_about_images(run, objective):
    adaptor = {"objective": objective, "dropout": 0.0}
    result = run(epochs=20, adaptor=adaptor, batch_size=20, lr=1e-2)
    steps, found = lines(result.folder, "step"), result.facts["validation"]
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert found["image_to_text_recall_at_5"] > found["image_to_text_chance_recall_at_5"]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(run):
    first, again, other = run("a"), run("b"), run("c", seed=1)
    assert weights(first.folder) == weights(again.folder)
    assert weights(first.folder) != weights(other.folder)


def test_neither_the_callers_generators_nor_its_files_have_a_part(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = run("a")
    assert torch.equal(torch.rand(3), expected)
    assert weights(run("b").folder) == weights(first.folder)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_finished_run_is_returned_untouched(run):
    first = run()
    before = stamps(first.folder)
    again = run(threads=2)  # not part of what is computed
    assert (first.status, again.status) == ("trained", "unchanged")
    assert again.facts == first.facts
    assert again.facts == json.loads((first.folder / "run.json").read_text())
    assert stamps(first.folder) == before


def test_another_config_in_the_same_folder_is_an_error(run):
    run()
    with pytest.raises(TrainingError, match=r"`config.lr`: the folder has 0.003, this run"):
        run(lr=0.5)


def test_other_pairs_in_the_same_folder_are_an_error(run, study, make_study, tmp_path):
    run()
    fewer = make_study(tmp_path / "fewer", train=41)
    with pytest.raises(TrainingError, match=r"`inputs.manifest`: the folder has"):
        run(on=dataclasses.replace(fewer, images=study.images, texts=study.texts))


def test_what_is_saved_is_the_last_epoch_and_names_what_it_read(run, study):
    result = run()
    loaded = load_adaptor(result.folder)
    last = lines(result.folder, "step")[-1]
    assert loaded.adaptor.logit_scale.item() == pytest.approx(last["logit_scale"], abs=1e-3)
    assert loaded.image_fingerprint == study.images.fingerprint
    assert loaded.text_fingerprint == study.texts.fingerprint
    assert loaded.notes == ["The tokens are made up."] == result.facts["notes"]


def test_the_best_epoch_is_recorded_by_validation(run):
    result = run(epochs=5)
    mrr = [line["mrr"] for line in lines(result.folder, "validate")]
    assert result.facts["best_epoch"] == mrr.index(max(mrr))
    assert result.facts["validation"]["mrr"] == mrr[-1]


def test_without_a_validation_split_nothing_is_measured_and_this_is_said(
    run, make_study, tmp_path, capsys
):
    result = run(on=make_study(tmp_path / "s", validate=0))
    assert (
        "nothing is measured while training: the manifest has no split" in capsys.readouterr().err
    )
    assert result.facts["best_epoch"] is None
    assert lines(result.folder, "validate") == []


def test_a_batch_larger_than_all_pairs_is_reduced_and_this_is_said(run, capsys):
    result = run(batch_size=1000)
    assert "batch size 1000 is more than the 42 training pairs: using 42" in capsys.readouterr().err
    assert (result.facts["batch_size"], result.facts["steps"]) == (42, 3)


def test_a_single_pair_is_refused_in_words(run, make_study, tmp_path):
    with pytest.raises(TrainingError, match="has 1 image-text pairs with valid features"):
        run(on=make_study(tmp_path / "s", train=1))


def test_no_pair_at_all_is_refused_with_the_splits_there_are(run, make_study, tmp_path):
    with pytest.raises(CacheError, match="no split `train`; known: test, validate"):
        run(on=make_study(tmp_path / "s", train=0))


def test_a_row_left_over_by_the_batches_does_not_stop_training(run, make_study, tmp_path):
    result = run(on=make_study(tmp_path / "s", train=33), batch_size=32, epochs=2)
    assert result.facts["steps"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    whole = module.build_adaptor

    def broken(*arguments):
        adaptor, objective = whole(*arguments)
        torch.nn.init.constant_(adaptor.text_projection.weight, torch.nan)
        return adaptor, objective

    monkeypatch.setattr(module, "build_adaptor", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 \(epoch 0, lr up to 0.003"):
        run()
    monkeypatch.undo()
    assert run().status == "trained"  # the unfinished folder starts anew


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_do(run, monkeypatch):
    whole = module.build_adaptor

    def broken(*arguments):
        adaptor, objective = whole(*arguments)
        adaptor.logit_scale.register_hook(lambda gradient: gradient * torch.inf)
        return adaptor, objective

    monkeypatch.setattr(module, "build_adaptor", broken)
    with pytest.raises(TrainingError, match=r"the norm of the gradient is (inf|nan) at step 1"):
        run()


def test_a_logit_scale_that_starts_too_high_is_brought_back_and_trained(run, monkeypatch):
    whole = module.build_adaptor

    def hot(*arguments):
        adaptor, objective = whole(*arguments)
        torch.nn.init.constant_(adaptor.logit_scale, 12.0)
        return adaptor, objective

    monkeypatch.setattr(module, "build_adaptor", hot)
    logged = [line["logit_scale"] for line in lines(run().folder, "step")]
    assert logged[0] == 12.0
    assert logged[1] < 4.6052
    assert logged[-1] < logged[1]


def test_ctrl_c_says_how_to_go_on_and_leaves_the_signal_as_it_was(run, monkeypatch, tmp_path):
    whole = module.task

    @contextmanager
    def interrupted(*arguments, **options):
        with whole(*arguments, **options) as progress:

            class Interrupting:
                def update(self, done, *, note=""):
                    if done == 7:
                        os.kill(os.getpid(), signal.SIGINT)
                    progress.update(done, note=note)

            yield Interrupting()

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, "task", interrupted)
    with pytest.raises(InterruptedByUserError, match=r"stopped after step \d of 15") as caught:
        run()
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "adaptor").exists()
    assert len(lines(tmp_path / "run", "step")) >= 7
    left = json.loads((tmp_path / "run" / "run.json").read_text())
    assert left["status"] == "started"
    assert left["images"]["folder"].endswith("made-image")
    monkeypatch.undo()
    assert run().status == "trained"


def test_lightning_keeps_quiet(run, capsys, caplog):
    run()
    out, err = capsys.readouterr()
    assert out == ""
    assert all("train-adaptor" in line or "made up" in line for line in err.splitlines())
    assert caplog.records == []


def test_the_logger_can_be_switched_off(run):
    assert not (run(logger="none").folder / "csv").exists()


def test_lightnings_own_csv_is_written(run):
    folder = run().folder
    rows = (folder / "csv" / "metrics.csv").read_text().splitlines()
    assert {"loss", "grad_norm", "logit_scale", "lr", "step"} == set(rows[0].split(","))
    assert len(rows) == 1 + 15


def test_a_run_on_the_paper_says_what_it_is(run, capsys):
    result = run(adaptor={"objective": "paper", "fusion": "own-pair"})
    assert "with own-pair fusion LEAKS" in capsys.readouterr().err
    assert any("LEAKS" in sentence for sentence in load_adaptor(result.folder).notes)


def test_the_trainable_share_is_told_where_the_encoders_are_known(
    run, make_study, tmp_path, capsys
):
    study = make_study(tmp_path / "s")
    for features, count in ((study.images, 80_000), (study.texts, 20_000)):
        FeatureSetWriter.open(features.folder).write_quality({"parameters": count})
    result = run(on=study)
    trainable = result.facts["parameters"]["trainable"]
    assert trainable == 2281 + 256
    assert result.facts["parameters"]["trainable_share"] == trainable / (trainable + 100_000)
    assert "2,537 trainable parameters, 2.5 % of all" in capsys.readouterr().err


def test_bfloat16_trains(run):
    result = run(precision="bf16-mixed", epochs=2)
    tensors = load_file(result.folder / "adaptor" / "adaptor.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_workspace_trains_on_what_is_current_and_makes_the_run_current(
    make_study, make_config, tmp_path
):
    space = make_study(tmp_path).workspace
    space.use(manifest="made", image="made-image", text="made-text")
    first = train(space, make_config())
    assert first.folder == tmp_path / "runs" / "made-image-made-text-allpairs"
    assert space.current("run") == first.folder.name
    other = train(space, make_config(lr=1e-3))
    assert other.folder.name.startswith("made-image-made-text-allpairs-")
    assert train(space, make_config(), device="cpu").status == "unchanged"
    assert space.current("run") == first.folder.name
    named = train(space, make_config(), backbone="made-image", manifest="made", name="mine")
    assert named.folder == tmp_path / "runs" / "mine"
    again = load_run_config(named.folder / "config.yaml")
    assert (again.images, again.texts, again.manifest) == ("made-image", "made-text", "made")
    assert train(space, again, name="mine").status == "unchanged"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", ""])
def test_a_run_name_is_a_plain_folder_name(study, make_config, name):
    with pytest.raises(UsageError, match="is no plain folder name"):
        train(study.workspace, make_config(), name=name)
