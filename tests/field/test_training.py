"""What people report about training; what the tests of single modules hold is not repeated here."""

import hashlib
import io
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
from safetensors.torch import save

from featcache.adaptor import stage as module
from featcache.adaptor.checkpoint import read_checkpoint, write_checkpoint
from featcache.adaptor.export import export
from featcache.adaptor.losses import batch_positives, infonce
from featcache.adaptor.retrieval import retrieval_metrics, retrieval_ranks
from featcache.adaptor.saved import load_adaptor
from featcache.adaptor.train import train_adaptor
from featcache.cache.reader import FeatureSet, open_cache
from featcache.cli import main
from featcache.errors import TerminatedError, TrainingError
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.retrieve import RetrieveConfig, retrieve
from featcache.loader.batch import Batch
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
    long = {"batch_size": 4, "epochs": 2}  # 10 batches an epoch
    start(study, tmp_path / "undisturbed", **long)
    undisturbed = list(seen)
    assert len(undisturbed) == 20
    seen.clear()
    stop_at(monkeypatch, 17)
    with pytest.raises(TerminatedError, match="stopped after step 17 of 20"):
        start(study, tmp_path / "stopped", **long)
    assert len(seen) == 17
    capsys.readouterr()
    start(study, tmp_path / "stopped", **long, **means)  # a framework's warning would be an error
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


@pytest.mark.parametrize(
    ("pairs", "setting", "code", "words"),
    [
        (1, "batch_size=32", 1, "has 1 image-text pairs with valid features; at least 2 are"),
        (33, "batch_size=1", 2, "1 pairs in a batch leave nothing to contrast a pair with"),
        (3, "devices=4", 1, "3 training pairs cannot be shared by 4 processes"),
    ],
)
def test_what_leaves_nothing_to_contrast_is_refused_in_words(
    tmp_path, capsys, pairs, setting, code, words
):
    few = build(tmp_path / "few", train=pairs).workspace
    few.use(manifest="made", image="made-image", text="made-text")
    assert main(["train-adaptor", "--root", str(few.root), "--set", setting]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not few.runs.exists()


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


def foreign(canary: pathlib.Path) -> dict[str, bytes]:
    """What torch, pickle and safetensors write, none of it ours."""
    files = {}
    for name, content in (("path", pathlib.Path("/")), ("bomb", _Bomb(canary))):
        files[f"pickled {name}"] = pickle.dumps({"state_dict": {}, "folder": content})
        buffer = io.BytesIO()
        torch.save({"state_dict": {}, "folder": content}, buffer)
        files[f"torch {name}"] = buffer.getvalue()
    files["other tensors"] = save({"weight": torch.zeros(2)})
    return files


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: pathlib.Path):
        self.canary = canary

    def __reduce__(self):
        return (pathlib.Path.touch, (self.canary,))


@pytest.mark.parametrize("command", ["retrieve", "export"])
def test_an_adaptor_with_an_object_in_it_is_refused_and_nothing_of_it_runs(
    tmp_path, capsys, command
):
    whole = build(tmp_path / "study", train=8)
    start(whole, whole.workspace.runs / "run", epochs=1)
    folder = whole.workspace.runs / "run" / "adaptor"
    facts = json.loads((folder / "adaptor.json").read_text())
    asked = [command, "--root", str(whole.workspace.root)]
    asked += ["--manifest", "made", "--run", str(folder)]
    if command == "export":
        asked = [*asked[:3], str(folder), "--out", str(tmp_path / "out")]
    canary = tmp_path / "canary"
    capsys.readouterr()
    for kind, content in foreign(canary).items():
        for mended in (True, False):  # whether the stranger mends the checksum too
            (folder / "adaptor.safetensors").write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            own = facts | ({"weights_sha256": digest} if mended else {})
            (folder / "adaptor.json").write_text(json.dumps(own))
            assert main(asked) == 1, kind
            said = capsys.readouterr().err
            assert "weights" in said.partition("\n")[0]
            assert "Traceback" not in said
            assert "weights_only" not in said
            (folder / "adaptor.json").write_bytes(content)
            assert main(asked) == 1, kind
            assert "no JSON" in capsys.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_a_config_that_lies_about_its_size_costs_no_memory(tmp_path, study):
    start(study, tmp_path / "run", epochs=1)
    path = tmp_path / "run" / "adaptor" / "adaptor.json"
    facts = json.loads(path.read_text())
    for size, words in ((2**20, "has shape"), (2**40, r"`config\.dim`: input should be less")):
        facts["config"] |= {"dim": size, "feedforward": size}
        path.write_text(json.dumps(facts))
        with pytest.raises(TrainingError, match=words):
            load_adaptor(tmp_path / "run")


def test_a_run_holds_no_pickle(study, tmp_path, monkeypatch):
    stop_at(monkeypatch, 7)
    with pytest.raises(TerminatedError):
        start(study, tmp_path / "run")
    start(study, tmp_path / "run")
    export(study.workspace, tmp_path / "run" / "out", run=str(tmp_path / "run"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".safetensors", ".md")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


@pytest.fixture
def hot(monkeypatch):
    """Every Adaptor starts with a temperature beyond what float16 can hold."""
    whole = module.build_adaptor

    def build_hot(*arguments):
        adaptor, objective = whole(*arguments)
        torch.nn.init.constant_(adaptor.logit_scale, 12.0)
        return adaptor, objective

    monkeypatch.setattr(module, "build_adaptor", build_hot)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_temperature_that_starts_too_high_trains_at_any_rate(hot, tmp_path, precision):
    pairs = build(tmp_path / "study", train=64, validate=0)
    run = start(
        pairs, tmp_path / "run", batch_size=64, epochs=50, lr=1.0, warmup=0.0, precision=precision
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 50
    assert np.isfinite([line["loss"] for line in steps]).all()
    logged = [line["logit_scale"] for line in steps]
    assert logged[0] == 12.0  # as it was found; what multiplies the cosines is clamped
    assert max(logged[1:]) <= np.log(100)
    assert load_adaptor(run.folder).adaptor.scale <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_in_half_precision_stays_finite(dtype):
    torch.manual_seed(0)
    config = run_config(adaptor={"objective": "dual", "dropout": 0.0}).adaptor
    adaptor, objective = module.build_adaptor(config, 64, 64)
    torch.nn.init.constant_(adaptor.logit_scale, 12.0)
    tokens, number = 5 * torch.eye(64).unsqueeze(1), torch.arange(64)  # no two pairs are alike
    batch = Batch(tokens, tokens, torch.ones(64, 1, dtype=torch.bool), number, number, number)
    rest = [p for name, p in adaptor.named_parameters() if name != "logit_scale"]
    groups = [{"params": rest, "lr": 3e-3}, {"params": [adaptor.logit_scale], "lr": 1.0}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(50):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective(adaptor, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adaptor.clamp_logit_scale()
        assert loss.isfinite()
        assert adaptor.scale <= 100
    assert loss < np.log(64)  # better than guessing: it learns


def test_a_checkpoint_with_a_temperature_too_high_goes_on_with_a_clamped_one(
    study, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 7)
    with pytest.raises(TerminatedError):
        start(study, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = read_checkpoint(folder)
    state["state_dict"]["adaptor.logit_scale"].fill_(12.0)
    write_checkpoint(folder, state)
    run = start(study, tmp_path / "run")
    assert np.isfinite([loss for _, loss in losses(run.folder)]).all()
    assert load_adaptor(run.folder).adaptor.scale <= 100


def undefined_in(monkeypatch, *epochs):
    """Let nothing be measured in some epochs."""
    whole, calls = module.Candidates.metrics, iter(range(100))

    def metrics(self, *arguments):
        found = whole(self, *arguments)
        return found | {"mrr": float("nan")} if next(calls) in epochs else found

    monkeypatch.setattr(module.Candidates, "metrics", metrics)


@pytest.mark.parametrize(("undefined", "best"), [((0,), (1, 2)), ((0, 1, 2), (None,))], ids=str)
def test_an_undefined_epoch_is_reported_and_never_the_best(
    study, tmp_path, monkeypatch, capsys, undefined, best
):
    undefined_in(monkeypatch, *undefined)
    run = start(study, tmp_path / "run")
    said = capsys.readouterr().err
    assert run.facts["best_epoch"] in best
    for epoch in undefined:
        assert f"validation of epoch {epoch + 1} is undefined: it cannot be the best" in said
    assert ("undefined in every epoch, so none is the best" in said) == (best == (None,))
    assert (run.folder / "best").exists() == (best != (None,))
    load_adaptor(run.folder)  # the last one


def test_a_validation_split_of_one_report_measures_nothing_and_this_is_said(tmp_path, capsys):
    pairs = build(tmp_path / "study", train=8, validate=1)
    run = start(pairs, tmp_path / "run", epochs=2)
    assert "no epoch is called the best" in capsys.readouterr().err
    assert run.facts["validation"] is None
    assert run.facts["best_epoch"] is None
    assert not (run.folder / "best").exists()
    load_adaptor(run.folder)


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
