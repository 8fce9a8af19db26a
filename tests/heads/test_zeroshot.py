"""Classes told apart by sentences: prompts, their text side, and the table."""

import dataclasses

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import yaml
from heads.conftest import image_spec
from heads.kit_sentences import SAID, open_bert, said_manifest, write_texts

from featcache.adaptor.run import RunConfig
from featcache.adaptor.train import train_adaptor
from featcache.cache.reader import FeatureSet
from featcache.errors import StaleFeatureSetError, TrainingError, UsageError
from featcache.heads.prompts import Prompts
from featcache.heads.zeroshot import ZeroShotConfig, zeroshot, zeroshot_workspace
from featcache.manifest.table import write_manifest
from featcache.workspace import Workspace

PROMPTS = Prompts(classes={name: tuple(some) for name, some in SAID.items()})
QUICK = ZeroShotConfig(prompts=PROMPTS, draws=200, untrained=2)


@dataclasses.dataclass(frozen=True)
class Study:
    root: object
    images: FeatureSet
    texts: FeatureSet
    manifest: object
    run: object


@pytest.fixture(scope="module")
def study(tmp_path_factory, make_toy):
    """Texts that name the class, encoded by a small BERT, and an Adaptor trained on them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("zeroshot")
    toy = make_toy(root)
    kinds = toy.manifest.images.column("label:class").to_pylist()
    manifest = said_manifest(
        root,
        toy,
        Effusion=[int(kind == "effusion") for kind in kinds],
        Normal=[int(kind == "normal") for kind in kinds],
        Hernia=[0] * len(kinds),
    )
    encoder, request = open_bert(root / "bert")
    texts = sorted(one for some in SAID.values() for one in some)
    words = write_texts(root / "features" / "text" / "bert", encoder, request, texts)
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
    return Study(root, toy.images, words, manifest, run)


def ask(study, out, config=QUICK, **options):
    return zeroshot(
        study.images, study.manifest, study.run, study.texts.folder, out, config, **options
    )


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
        "Adaptor minus first prompt alone",
        "Adaptor minus majority class",
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


def test_differences_of_all_rows_are_paired_and_written_down(results):
    named = {(one["first"], one["second"]): one["figures"] for one in results.values["differences"]}
    assert len(named) == 6  # of four rows
    for second in ("majority class", "untrained Adaptor", "Adaptor, first prompt alone"):
        for figure, gap in named["Adaptor", second].items():
            means = [
                line_of(results, one)["figures"][figure]["mean"] for one in ("Adaptor", second)
            ]
            assert gap["mean"] == pytest.approx(means[0] - means[1], abs=2e-6)
            assert gap["low"] <= gap["mean"] <= gap["high"]
    shown = line_of(results, "Adaptor minus majority class")["figures"]
    assert shown == named["Adaptor", "majority class"]
    assert len(named["Adaptor", "untrained Adaptor"]["auroc"]["values"]) == 2


def about_findings(**more):
    absent = SAID["normal"] + SAID["pneumonia"]
    found = {"Effusion": {"present": SAID["effusion"], "absent": absent}, **more}
    return QUICK.model_copy(update={"prompts": Prompts(findings=found)})


def test_finding_is_scored_by_presence_against_absence(study, tmp_path):
    found = ask(study, tmp_path, about_findings(), device="cpu")
    line = line_of(found, "Adaptor", finding="Effusion")
    assert line["figures"]["auroc"]["mean"] > 0.7
    assert [column["name"] for column in found.values["columns"]] == ["auroc"]
    methods = [line["method"] for line in found.values["rows"]]
    assert "Adaptor minus majority class" not in methods  # AUROC minus 50 % says nothing


def test_finding_that_no_test_image_has_is_undefined_and_in_no_mean(study, tmp_path):
    asked = about_findings(
        Normal={"present": SAID["normal"], "absent": SAID["effusion"]},
        Hernia={"present": ["small effusion"], "absent": ["lungs are clear"]},
    )
    found = ask(study, tmp_path, asked, device="cpu")
    mean = line_of(found, "Adaptor", finding="mean of 2")["figures"]["auroc"]["mean"]
    single = [
        line_of(found, "Adaptor", finding=one)["figures"]["auroc"]["mean"]
        for one in ("Effusion", "Normal")
    ]
    assert mean == pytest.approx(np.mean(single), abs=2e-6)
    hernia = line_of(found, "Adaptor", finding="Hernia")
    assert hernia["remark"] == "undefined (0 of 36 images)"
    assert hernia["figures"]["auroc"]["mean"] is None
    assert "| undefined |" in found.table.to_markdown()


def test_misspelt_finding_is_refused_before_the_test_split_is_read(study, tmp_path):
    asked = about_findings(Norml={"present": ["a"], "absent": ["b"]})
    with pytest.raises(UsageError, match="have `Norml`, the manifest does not; did you mean `Nor"):
        ask(study, tmp_path, asked, device="cpu")
    assert not (tmp_path / "test_reads.json").exists()


def only_test(study, folder):
    """The manifest's test images alone, as people have them who evaluate on another's data."""
    rows = study.manifest.images
    kept = rows.filter(pc.equal(rows["split"], "test"))
    return write_manifest(folder, kept, dataset="spreadsheet", image_root=folder, synthetic=True)


@pytest.mark.parametrize("config", [QUICK, about_findings()], ids=["classes", "findings"])
def test_manifest_of_test_images_alone_will_do(study, tmp_path, config):
    manifest = only_test(study, tmp_path / "manifests" / "outside")
    found, whole = (
        zeroshot(
            study.images,
            one,
            study.run,
            study.texts.folder,
            tmp_path / one.name,
            config,
            device="cpu",
        )
        for one in (manifest, study.manifest)
    )
    assert line_of(found, "Adaptor")["figures"] == line_of(whole, "Adaptor")["figures"]
    majority = line_of(found, "majority class")
    assert majority["figures"] == {}
    assert majority["remark"].startswith("not computable: no training image here has a label")
    assert "Adaptor minus majority class" not in [one["method"] for one in found.values["rows"]]
    text = found.table.to_markdown()
    assert "Training labels are known to" not in text
    assert "whether it has seen patients of this test split is not known" in text


def test_names_stand_for_themselves_whatever_their_order(study, results, tmp_path):
    """As text `10` comes before `2`, and `Normal` is another class than `normal` was."""
    names = {"effusion": "2", "normal": "10", "pneumonia": "Normal"}
    rows = study.manifest.images
    place = rows.column_names.index("label:class")
    renamed = [names[kind] for kind in rows.column(place).to_pylist()]
    manifest = write_manifest(
        tmp_path / "manifests" / "renamed",
        rows.set_column(place, "label:class", [renamed]).take(np.arange(rows.num_rows)[::-1]),
        dataset="spreadsheet",
        image_root=tmp_path,
        synthetic=True,
    )
    turned = {names[kind]: tuple(SAID[kind]) for kind in ("pneumonia", "effusion", "normal")}
    found = zeroshot(
        study.images,
        manifest,
        study.run,
        study.texts.folder,
        tmp_path / "out",
        QUICK.model_copy(update={"prompts": Prompts(classes=turned)}),
        device="cpu",
    )
    assert found.values["classes"] == ["10", "2", "Normal"]
    ours, theirs = (line_of(one, "Adaptor") for one in (found, results))
    assert ours["figures"]["accuracy"] == theirs["figures"]["accuracy"]
    for kind, row in theirs["confusion"].items():
        renamed_row = {names[other]: count for other, count in row.items()}
        assert ours["confusion"][names[kind]] == renamed_row
        assert ours["class_auroc"][names[kind]] == theirs["class_auroc"][kind]


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


def test_adaptor_of_another_encoder_is_refused(study, tmp_path, write_set):
    other = write_set(
        tmp_path / "other",
        image_spec(weights_sha256="f" * 64),
        list(study.images.keys),
        list(study.images.read_tokens(np.arange(study.images.num_rows))),
    )
    with pytest.raises(
        StaleFeatureSetError, match="was trained on image features with fingerprint"
    ):
        zeroshot(
            other,
            study.manifest,
            study.run,
            study.texts.folder,
            tmp_path / "out",
            QUICK,
            device="cpu",
        )
    assert not (tmp_path / "out").exists()
