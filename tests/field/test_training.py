"""What people report about training; what the tests of single modules hold is not repeated here."""

import json
import os
import pathlib
import pickle
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch
from adaptor.conftest import build, run_config, spec, write_set

from featcache.adaptor import stage as module
from featcache.adaptor.losses import batch_positives, infonce
from featcache.adaptor.retrieval import retrieval_metrics, retrieval_ranks
from featcache.adaptor.train import train_adaptor
from featcache.cache.reader import FeatureSet, open_cache
from featcache.errors import TerminatedError, TrainingError
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.retrieve import RetrieveConfig, retrieve
from featcache.loader.gather import TokenLoader
from featcache.manifest.table import write_manifest


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return build(tmp_path_factory.mktemp("study"))


def start(on, folder, **changes):
    """Train on a study in a folder."""
    return train_adaptor(on.images, on.texts, on.manifest, folder, run_config(**changes))


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """The pairs of each batch that is trained on; a signal comes in the step that is asked for."""
    batches, whole = [], module.Stage.training_step

    def noting(stage, batch, number):
        batches.append(tuple(batch.pairs.tolist()))
        return whole(stage, batch, number)

    monkeypatch.setattr(module.Stage, "training_step", noting)
    return batches


def stop_at(monkeypatch, step):
    """SIGTERM while a step is being computed, once."""
    whole = module.Stage.training_step

    def hurting(stage, batch, number):
        if stage.global_step == step - 1:
            monkeypatch.setattr(module.Stage, "training_step", whole)
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(stage, batch, number)

    monkeypatch.setattr(module.Stage, "training_step", hurting)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


def weights(folder):
    return (folder / "adaptor" / "adaptor.safetensors").read_bytes()


@pytest.mark.parametrize("means", [{"threads": 3, "io": "pread"}, {"resident": True}], ids=str)
def test_a_training_that_was_stopped_goes_on_in_the_same_order_by_other_means(
    study, seen, tmp_path, monkeypatch, capsys, means
):
    start(study, tmp_path / "undisturbed")
    undisturbed = list(seen)
    assert len(undisturbed) == 15
    seen.clear()
    stop_at(monkeypatch, 7)
    with pytest.raises(TerminatedError, match="stopped after step 7 of 15"):
        start(study, tmp_path / "stopped")
    assert len(seen) == 7
    capsys.readouterr()
    start(study, tmp_path / "stopped", **means)  # a warning of the framework would be an error
    assert seen == undisturbed
    assert "resum" not in capsys.readouterr().err.lower()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "undisturbed")


def test_a_row_left_over_opens_the_next_epoch_and_none_is_lost(seen, tmp_path):
    odd = build(tmp_path / "odd", train=33)
    result = start(odd, tmp_path / "run", batch_size=32, epochs=4)
    assert result.facts["steps"] == 4
    assert {len(batch) for batch in seen} == {32}
    rows = np.concatenate(seen)  # 128
    for at in (0, 33, 66):
        assert set(rows[at : at + 33]) == set(range(33))


def test_a_probe_fits_any_number_of_rows_and_a_subset_of_a_row_for_each_class(tmp_path):
    odd = build(tmp_path / "odd", train=33, validate=6, test=6)
    columns = odd.manifest.images.drop_columns(
        [name for name in odd.manifest.images.column_names if name.startswith("label:")]
    )
    kinds = [("clear", "edema")[number % 2] for number in range(columns.num_rows)]
    labelled = write_manifest(
        tmp_path / "labelled",
        columns.append_column("label:class", pa.array(kinds)),
        dataset="spreadsheet",
        image_root=tmp_path,
    )
    config = ProbeConfig(draws=100, random_encoder=False)
    result = finetune(odd.images, labelled, None, tmp_path / "out", config)
    rows = [row for row in result.table.rows if row.method == "raw backbone"]
    assert [row.setting["images"] for row in rows] == ["2", "4", "33"]


@pytest.mark.parametrize("place", ["tensors.safetensors", "state.json"])
def test_a_checkpoint_with_an_object_in_it_is_refused_and_nothing_of_it_runs(
    study, tmp_path, monkeypatch, place
):
    stop_at(monkeypatch, 7)
    with pytest.raises(TerminatedError):
        start(study, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (canary,))

    (checkpoint / place).write_bytes(pickle.dumps({"folder": pathlib.Path("/"), "bomb": Bomb()}))
    with pytest.raises(TrainingError) as caught:
        start(study, tmp_path / "run")
    assert caught.value.what.count("\n") == 0
    assert "weights_only" not in str(caught.value)
    assert checkpoint.name in caught.value.where
    assert not canary.exists()


def test_a_run_holds_no_pickle(study, tmp_path, monkeypatch):
    stop_at(monkeypatch, 7)
    with pytest.raises(TerminatedError):
        start(study, tmp_path / "run")
    start(study, tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".safetensors")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


@pytest.fixture(scope="module")
def shared_reports(tmp_path_factory):
    """Sixteen images in each split, four of each report; random tokens."""
    root = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)
    splits = [split for split in ("train", "validate", "test") for _ in range(16)]
    keys = [f"img-{number:02d}" for number in range(len(splits))]
    nothing = pa.nulls(len(keys), pa.string())
    table = {"key": keys, "subject_id": keys, "study_id": nothing, "view_position": nothing}
    table |= {"split": splits, "source": ["made"] * len(keys), "image_path": keys}
    reports = [f"report {number // 4}" for number in range(len(keys))]
    texts = {"key": keys, "text": reports, "unit": ["report"] * len(keys)}
    manifest = write_manifest(
        root / "manifest", pa.table(table), pa.table(texts), dataset="made", image_root=root
    )
    ids = manifest.unique_texts()[0]
    made = spec("image"), spec("text")
    images = write_set(root / "image", made[0], keys, list(rng.normal(size=(len(keys), 5, 12))))
    said = write_set(root / "text", made[1], ids, list(rng.normal(size=(len(ids), 4, 8))))
    return manifest, images, said


def test_images_of_one_report_are_positives_of_each_other(shared_reports):
    manifest, images, texts = shared_reports
    cache = open_cache(images, texts, manifest, split="train")
    (batch,) = TokenLoader(cache, 16, seed=0)
    report = batch.text_rows
    assert len(set(report.tolist())) == 4
    positives = batch_positives(batch)
    assert torch.equal(positives, report.unsqueeze(1) == report)
    assert positives.sum(dim=1).tolist() == [4] * 16
    floor = infonce(positives * 100.0, positives)
    assert floor.item() == pytest.approx(np.log(4), abs=1e-5)


def test_any_image_of_a_report_is_a_hit_and_the_table_says_so(shared_reports, tmp_path):
    manifest, images, texts = shared_reports
    run = train_adaptor(images, texts, manifest, tmp_path / "run", run_config(batch_size=16))
    assert run.facts["validation"]["texts"] == 4
    assert run.facts["validation"]["text_to_image_chance_recall_at_1"] == pytest.approx(4 / 16)
    config = RetrieveConfig(draws=100, linear_map=False)
    result = retrieve(images, texts, manifest, run.folder, tmp_path / "out", config)
    assert "4 texts belong to several images" in " ".join(result.table.notes)
    scores = torch.eye(4).repeat_interleave(4, dim=0)  # each image finds its own report
    positives = scores.bool()
    lowered = scores.clone()
    lowered[1::4] = -1  # of each report one image scores high, another lower than all
    for one in (scores.T, lowered.T):
        assert retrieval_metrics(retrieval_ranks(one, positives.T))["recall_at_1"] == 1


def test_a_sentence_is_a_positive_of_every_image_that_stands_with_it(tmp_path):
    whole = build(tmp_path / "study", train=12, validate=4, test=4)
    keys = whole.manifest.keys
    reports = [f"Image {number} is clear. No effusion." for number in range(len(keys))]
    table = pa.table({"key": keys, "text": reports, "unit": ["report"] * len(keys)})
    manifest = write_manifest(
        tmp_path / "sentences",
        whole.manifest.images,
        table,
        dataset="spreadsheet",
        image_root=tmp_path,
        text_unit="sentence",
    )
    ids = manifest.unique_texts()[0]
    rng = np.random.default_rng(0)
    texts: FeatureSet = write_set(
        tmp_path / "text", spec("text"), ids, list(rng.normal(size=(len(ids), 4, 8)))
    )
    cache = open_cache(whole.images, texts, manifest, split="train")
    assert cache.num_pairs == 24
    (batch,) = TokenLoader(cache, 24, seed=0)
    positives = batch_positives(batch)
    is_shared = batch.text_rows == int(np.bincount(batch.text_rows).argmax())
    assert is_shared.sum() == 12
    assert positives[is_shared][:, is_shared].all()
    same_image = batch.image_rows.unsqueeze(1) == batch.image_rows
    assert positives[same_image].all()  # both sentences of its report
    result = train_adaptor(whole.images, texts, manifest, tmp_path / "run", run_config(epochs=1))
    assert result.facts["pairs"]["train"] == 24
    assert result.facts["validation"]["texts"] == 5
