import dataclasses
import json

import pytest
import torch
from adaptor.spaces import lines, weights

from featcache.adaptor.run import load_run_config
from featcache.adaptor.saved import load_adaptor
from featcache.adaptor.train import train
from featcache.cache.folder import FeatureSetWriter
from featcache.errors import CacheError, TrainingError, UsageError


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def stamps(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def test_epochs_asked_are_epochs_trained(run):
    result = run(epochs=4)
    steps = lines(result.folder, "step")
    assert [line["step"] for line in steps] == list(range(1, 21))  # 42 pairs: 5 full batches of 8
    assert [line["epoch"] for line in steps] == [e for e in range(4) for _ in range(5)]
    assert [line["epoch"] for line in lines(result.folder, "validate")] == [0, 1, 2, 3]
    assert (result.facts["epochs"], result.facts["steps"]) == (4, 20)


def test_a_run_leaves_exactly_these_files(run):
    result = run()
    names = {"config.yaml", "run.json", "metrics.jsonl", "csv/metrics.csv"}
    adaptor = {"adaptor.json", "adaptor.safetensors"}
    names |= {f"{folder}/{name}" for folder in ("adaptor", "best") for name in adaptor}
    assert files(result.folder) == names


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
