"""Classes told apart by sentences: prompts, their text side, and the table."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from encoders.conftest import save_bert

from featcache.adaptor.run import RunConfig
from featcache.adaptor.saved import load_adaptor
from featcache.adaptor.train import train_adaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import ShardWriter
from featcache.config import ConfigError, list_configs, validate
from featcache.encoders.interface import load_encoder
from featcache.encoders.request import EncoderRequest, locate_all, save_request
from featcache.errors import StaleFeatureSetError, TrainingError, UsageError
from featcache.heads.prompts import Prompts, encode_prompts, find_prompts, text_spec
from featcache.heads.zeroshot import (
    ZeroShotConfig,
    probabilities_of,
    zeroshot,
    zeroshot_workspace,
)
from featcache.manifest.table import open_manifest, text_id, write_manifest
from featcache.workspace import Workspace

SAID = {
    "effusion": ["left pleural effusion", "small pleural effusion", "right effusion"],
    "normal": ["lungs are clear", "heart size is normal", "no acute abnormality"],
    "pneumonia": ["opacity in left base", "mild edema and opacity", "opacity in the base"],
}
PROMPTS = Prompts(classes={name: tuple(some) for name, some in SAID.items()})
QUICK = ZeroShotConfig(prompts=PROMPTS, draws=200, untrained=2)


@dataclasses.dataclass(frozen=True)
class Study:
    root: object
    images: FeatureSet
    texts: FeatureSet
    manifest: object
    run: object
    request: EncoderRequest


def write_texts(folder, encoder, unique):
    """Ids and texts, encoded one by one, as a feature set."""
    spec, ids = encoder.spec(dtype="float16", batch_size=4), [one for one, _ in unique]
    said, pooled = [], []
    for _, text in unique:
        padded, valid = encoder.pad_batch(encoder.tokenize([text]).ids * 4)
        encoded = encoder(padded, valid)
        said.append(encoded.tokens[0][valid[0]].numpy())
        pooled.append(encoded.pooled[0].numpy())
    writer = FeatureSetWriter.create(folder, spec, plan_shards(spec, ids, ids), "toy")
    [shard] = writer.shards
    with ShardWriter(folder, spec, shard, np.array([len(one) for one in said])) as out:
        out.write(np.arange(len(ids)), np.concatenate(said), np.stack(pooled))
        out.finish()
    return FeatureSet.open(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory, make_toy):
    """Texts that name the class, encoded by a small BERT, and an Adaptor trained on them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("zeroshot")
    toy = make_toy(root)
    request = EncoderRequest(
        modality="text", name=str(save_bert(root / "bert")), batch_size=4, max_tokens=16
    )
    (located,) = locate_all([request])
    encoder = load_encoder(located)
    kinds = toy.manifest.images.column("label:class").to_pylist()
    texts = [SAID[kind][number % 3] for number, kind in enumerate(kinds)]
    effusion = pa.array([int(kind == "effusion") for kind in kinds], pa.int8())
    manifest = write_manifest(
        root / "manifests" / "toy",
        toy.manifest.images.append_column("label:Effusion", effusion),
        pa.table(
            {
                "key": toy.manifest.keys,
                "text_id": [text_id(text) for text in texts],
                "text": texts,
                "unit": ["report"] * len(texts),
            }
        ),
        dataset="spreadsheet",
        image_root=root,
        synthetic=True,
    )
    unique = sorted({(text_id(text), text) for text in texts})
    folder = root / "features" / "text" / "bert"
    words = write_texts(folder, encoder, unique)
    save_request(folder, request)
    config = RunConfig(
        images="toy",
        texts="bert",
        epochs=12,
        batch_size=24,
        lr=5e-3,
        threads=1,
        adaptor={"dim": 16, "layers": 1, "heads": 2, "feedforward": 24},
    )
    run = root / "runs" / "first"
    train_adaptor(toy.images, words, manifest, run, config, device="cpu")
    return Study(root, toy.images, words, manifest, run, request)


def ask(study, out, config=QUICK, **options):
    return zeroshot(study.images, study.manifest, study.run, study.request, out, config, **options)


@pytest.fixture(scope="module")
def results(study):
    return ask(study, study.root / "out", device="cpu")


def line_of(results, method, **setting):
    [line] = [
        line
        for line in results.values["rows"]
        if line["method"] == method and setting.items() <= line["setting"].items()
    ]
    return line


def test_trained_adaptor_tells_classes_by_their_sentences(results):
    auroc = line_of(results, "Adaptor")["figures"]["auroc"]
    assert auroc["mean"] > 0.8
    assert auroc["low"] is not None
    gap = line_of(results, "Adaptor minus untrained Adaptor")["figures"]["auroc"]
    assert gap["low"] > 0
    assert line_of(results, "majority class")["figures"]["auroc"]["mean"] == 0.5


def test_table_has_the_trivial_rows_and_says_that_nothing_was_trained(results):
    assert [line["method"] for line in results.values["rows"]] == [
        "majority class",
        "untrained Adaptor",
        "Adaptor, first prompt alone",
        "Adaptor",
        "Adaptor minus untrained Adaptor",
    ]
    text = results.table.to_markdown()
    assert "No label was trained on and nothing was chosen. 9 sentences" in text
    assert "Configurations tried and compared on validation: 0." in text
    assert results.values["config"]["prompts"]["classes"]["normal"] == SAID["normal"]


def test_order_of_classes_and_sentences_changes_nothing(study, results, tmp_path):
    turned = {name: tuple(SAID[name][::-1]) for name in reversed(SAID)}
    config = QUICK.model_copy(update={"prompts": Prompts(classes=turned)})
    found = ask(study, tmp_path, config, device="cpu")
    for method in ("Adaptor", "untrained Adaptor"):
        for part in ("figures", "confusion", "class_auroc"):
            assert line_of(found, method)[part] == line_of(results, method)[part]
    assert list(line_of(found, "Adaptor")["confusion"]) == ["effusion", "normal", "pneumonia"]


def test_prompt_is_read_exactly_like_the_cached_text(study):
    trained = load_adaptor(study.run)
    (located,) = locate_all([study.request])
    encoder = load_encoder(located)
    spec = study.texts.spec
    sentences = ["left pleural effusion", "lungs are clear", "no acute abnormality"] * 2
    found = encode_prompts(trained, encoder, spec, sentences)
    for vector, sentence in zip(found, sentences, strict=True):
        row = study.texts.row_of[text_id(sentence)]
        tokens = torch.from_numpy(study.texts.read_tokens(np.array([row]))).float()[None]
        real = torch.ones(tokens.shape[:2], dtype=torch.bool)
        with torch.inference_mode():
            expected = trained.objective.encode_texts(trained.adaptor, tokens, real)[0]
        torch.testing.assert_close(vector, expected, atol=2e-3, rtol=2e-3)


def test_score_of_a_class_is_the_mean_of_its_sentences():
    logits = np.array([[2.0, 0.0, 1.0, 3.0]], dtype=np.float32)
    found = probabilities_of(logits, [[0, 1], [2], [3]], of_findings=False)
    expected = np.exp([1.0, 1.0, 3.0])
    np.testing.assert_allclose(found[0], expected / expected.sum())
    pairs = probabilities_of(logits, [[0], [1], [2], [3]], of_findings=True)
    np.testing.assert_allclose(pairs[0], 1 / (1 + np.exp([-2.0, 2.0])))


def test_finding_is_scored_by_presence_against_absence(study, tmp_path):
    absent = SAID["normal"] + SAID["pneumonia"]
    prompts = Prompts(findings={"Effusion": {"present": SAID["effusion"], "absent": absent}})
    config = QUICK.model_copy(update={"prompts": prompts})
    found = ask(study, tmp_path, config, device="cpu")
    line = line_of(found, "Adaptor", finding="Effusion")
    assert line["figures"]["auroc"]["mean"] > 0.7
    assert [column["name"] for column in found.values["columns"]] == ["auroc"]


def test_class_without_prompts_is_refused(study, tmp_path):
    prompts = Prompts(classes={"effusions": ("a",), "normal": ("b",), "pneumonia": ("c",)})
    config = QUICK.model_copy(update={"prompts": prompts})
    with pytest.raises(UsageError, match="`effusion` has no prompts; did you mean `effusions`"):
        ask(study, tmp_path, config, device="cpu")
    assert not (tmp_path / "test_reads.json").exists()


def test_second_read_of_test_is_refused(study, results):
    config = QUICK.model_copy(update={"seed": 1})
    with pytest.raises(TrainingError, match="by 1 other request"):
        ask(study, results.folder, config, device="cpu")
    assert not ask(study, results.folder, device="cpu").is_new


def test_text_encoder_of_other_weights_is_refused(study, tmp_path):
    torch.manual_seed(5)
    other = study.request.model_copy(update={"max_tokens": 12})
    (located,) = locate_all([other])
    with pytest.raises(StaleFeatureSetError, match="is not the one the Adaptor was trained on"):
        text_spec(load_encoder(located), other, load_adaptor(study.run))


def test_workspace_finds_the_text_encoder_of_the_run(study, results, tmp_path):
    workspace = Workspace(study.root)
    workspace.use(manifest="toy", image="toy", run="first")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"kind": "prompts", "classes": SAID}))
    plain = QUICK.model_copy(update={"prompts": None})
    found = zeroshot_workspace(workspace, plain, prompts=str(file), device="cpu")
    assert found.folder == study.run / "zeroshot" / "toy-class-toy"
    assert found.values["rows"] == results.values["rows"]
    other = tmp_path / "other.yaml"  # whatever the name: sentences must not be chosen on test
    other.write_text(yaml.safe_dump({"kind": "prompts", "classes": {**SAID, "normal": ["clear"]}}))
    with pytest.raises(TrainingError, match="by 1 other request"):
        zeroshot_workspace(workspace, plain, prompts=str(other), device="cpu")
    with pytest.raises(UsageError, match="no prompts are known for data set `spreadsheet`"):
        zeroshot_workspace(workspace, plain, device="cpu")


@pytest.mark.parametrize("name", list_configs("prompts"))
def test_shipped_prompts_fit(name, study):
    found, prompts = find_prompts(name, open_manifest(study.root / "manifests" / "toy"))
    assert found == name
    assert prompts.classes or prompts.findings


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"classes": {"a": ["x"]}},
        {"classes": {"a": ["x"], "b": []}},
        {"classes": {"a": ["x"], "b": ["y"]}, "findings": {"c": {"present": ["x"], "absent": []}}},
    ],
)
def test_prompts_that_cannot_tell_anything_are_refused(values):
    with pytest.raises(ConfigError):
        validate(Prompts, values)
