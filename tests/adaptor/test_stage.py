import json

import pytest
import torch
from adaptor.spaces import lines, weights

from featcache.adaptor import stage as module
from featcache.adaptor.objectives import AllPairs
from featcache.adaptor.saved import load_adaptor
from featcache.cache.reader import open_cache
from featcache.errors import TrainingError
from featcache.loader.order import Order


def test_dropout_acts_in_training_and_not_in_validation(run, monkeypatch):
    modes = []
    whole = module.Candidates.metrics

    def metrics(self, objective, adaptor, device):
        modes.append(("validate", adaptor.training, objective.training))
        return whole(self, objective, adaptor, device)

    def noted(objective, adaptor, batch, **options):
        modes.append(("step", adaptor.training, objective.training))
        return forward(objective, adaptor, batch, **options)

    forward = AllPairs.forward
    monkeypatch.setattr(module.Candidates, "metrics", metrics)
    monkeypatch.setattr(AllPairs, "forward", noted)
    run(epochs=2)
    steps = [("step", True, True)] * 5
    assert modes == [*steps, ("validate", False, False)] * 2


def test_the_gradient_is_clipped_after_it_was_logged(run):
    clipped, free = run("a", gradient_clip=0.5), run("b", gradient_clip=None)
    norms = [lines(result.folder, "step")[0]["grad_norm"] for result in (clipped, free)]
    assert norms[0] == norms[1] > 0.5
    assert weights(clipped.folder) != weights(free.folder)


def test_each_step_is_logged_with_what_it_did(run):
    steps = lines(run(warmup=0.2, epochs=2).folder, "step")
    keys = {"kind", "step", "epoch", "loss", "logit_scale", "grad_norm", "lr", "elapsed_s"}
    assert all(set(line) == keys for line in steps)
    assert [line["lr"] for line in steps[:3]] == [0.0015, 0.003, 0.003]
    assert steps[-1]["lr"] < steps[2]["lr"]
    assert all(line["grad_norm"] > 0 for line in steps)
    elapsed = [line["elapsed_s"] for line in steps]
    assert elapsed == sorted(elapsed)


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


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_do(
    run, break_gradient, study, capsys, tmp_path
):
    break_gradient(first=8)
    with pytest.raises(
        TrainingError, match=r"the norm of the gradient is (inf|nan) at step 8"
    ) as caught:
        run(checkpoint_every=3)
    assert "the last good checkpoint is step-000000006" in caught.value.what
    recorded = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert (recorded["step"], recorded["epoch"]) == (8, 1)
    pairs = open_cache(study.images, study.texts, study.manifest, split="train")
    batch = Order(pairs.num_pairs, 8, 0).batch(7)
    keys = [study.images.keys[pairs.image_rows[pair]] for pair in batch]
    assert [one["key"] for one in recorded["pairs"]] == keys
    assert all(one["image_is_finite"] and one["text_is_finite"] for one in recorded["pairs"])
    said = str(caught.value) + "".join(capsys.readouterr())
    assert not any(key in said for key in keys)


def test_the_row_that_is_not_finite_is_recorded(run, monkeypatch, tmp_path):
    whole = module.Stage.transfer_batch_to_device

    def poisoned(self, batch, *place):
        batch = whole(self, batch, *place)
        batch.image_tokens[3] = torch.inf
        return batch

    monkeypatch.setattr(module.Stage, "transfer_batch_to_device", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 .*nothing is saved"):
        run()
    recorded = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["pairs"]
    assert [at for at, one in enumerate(recorded) if not one["image_is_finite"]] == [3]


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


def undefined_at(monkeypatch, *epochs):
    """Let the metric of some epochs be no number."""
    whole, calls = module.Candidates.metrics, iter(range(100))

    def metrics(self, *arguments):
        found = whole(self, *arguments)
        return found | {"mrr": torch.nan} if next(calls) in epochs else found

    monkeypatch.setattr(module.Candidates, "metrics", metrics)


def test_an_undefined_metric_does_not_disable_the_best_epoch(run, monkeypatch, capsys):
    undefined_at(monkeypatch, 0, 2)
    result = run(epochs=3)
    assert result.facts["best_epoch"] == 1
    assert [line["mrr"] is None for line in lines(result.folder, "validate")] == [True, False, True]
    assert load_adaptor(result.folder / "best").config == load_adaptor(result.folder).config
    said = capsys.readouterr().err
    assert "validation of epoch 1 is undefined: it cannot be the best" in said
    assert "best epoch 2" in said


def test_without_any_defined_metric_this_is_said_and_the_last_epoch_kept(run, monkeypatch, capsys):
    undefined_at(monkeypatch, 0, 1, 2)
    result = run(epochs=3)
    assert result.facts["best_epoch"] is None
    assert not (result.folder / "best").exists()
    assert "undefined in every epoch, so none is the best" in capsys.readouterr().err
    load_adaptor(result.folder)


def test_the_best_epochs_weights_are_kept(run, monkeypatch):
    whole, calls = module.Candidates.metrics, iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(
        module.Candidates, "metrics", lambda *given: whole(*given) | {"mrr": next(calls)}
    )
    result = run(epochs=3)
    assert result.facts["best_epoch"] == 1
    best, last = (
        load_adaptor(result.folder / name).adaptor.logit_scale.item()
        for name in ("best", "adaptor")
    )
    logged = [line["logit_scale"] for line in lines(result.folder, "step")]
    assert abs(best - logged[9]) < abs(best - logged[14])
    assert abs(last - logged[14]) < abs(last - logged[9])


def test_three_epochs_see_every_pair_nearly_three_times(run, monkeypatch):
    seen = []
    whole = module.Stage.training_step

    def noting(self, batch, number):
        seen.extend(batch.pairs.tolist())
        return whole(self, batch, number)

    monkeypatch.setattr(module.Stage, "training_step", noting)
    run(epochs=3)
    assert len(seen) == 3 * 5 * 8
    assert sorted(seen[:42]) == sorted(seen[42:84]) == list(range(42))  # the rest opens the next
    assert len(set(seen[84:])) == 36


def test_a_checkpoint_is_taken_at_an_epochs_end_after_a_minute(run, monkeypatch, tmp_path):
    taken = []
    whole = module.Stage._save
    monkeypatch.setattr(
        module.Stage, "_save", lambda self: (taken.append(self.global_step), whole(self))
    )
    run("quick")
    assert taken == []
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    run("slow")
    assert taken == [5, 10]  # not 15: there the Adaptor itself is saved
    assert not (tmp_path / "slow" / "checkpoints").exists()


def test_the_largest_batch_is_told_after_the_first_step(run, capsys):
    run(epochs=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "largest batch" in line]
    assert len(said) == 1
    assert said[0].startswith("train-adaptor run  largest batch for this memory: about ")
