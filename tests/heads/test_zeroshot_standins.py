"""Zero-shot on stand-ins of published data sets, by the prompts that are shipped for them.

The tokens are noise: what is held to is which classes and findings are asked about, not how well.
"""

import numpy as np
import pytest
import torch
from heads.conftest import build_set, image_spec
from heads.kit_sentences import open_bert, plain_run, write_texts

from featcache.datasets.registry import make_manifest
from featcache.heads.zeroshot import ZeroShotConfig, zeroshot_workspace
from featcache.manifest.table import Manifest
from featcache.synth.registry import synthesize
from featcache.workspace import Workspace

QUICK = ZeroShotConfig(draws=100, untrained=1)


def noise_workspace(root, manifest: Manifest, workspace: Workspace):
    """Features of noise for a manifest's images, and an Adaptor with fresh weights."""
    generator = np.random.default_rng(0)
    tokens = list(generator.normal(size=(len(manifest.keys), 5, 12)))
    images = build_set(
        root / "features" / "image" / "toy", image_spec(), manifest.keys, tokens, shard_bytes=10**6
    )
    encoder, request = open_bert(root / "bert")
    texts = write_texts(root / "features" / "text" / "bert", encoder, request, ["lungs are clear"])
    run = plain_run(root / "runs" / "first", images, texts)
    (run / "config.yaml").write_text("images: toy\ntexts: bert\n")
    workspace.use(image="toy", run="first")


@pytest.fixture(scope="module", params=["covidx", "chexpert"])
def asked(request, tmp_path_factory):
    torch.manual_seed(0)
    dataset, root = request.param, tmp_path_factory.mktemp(request.param)
    folder = root / "stand-in"
    synthesize(dataset, folder)
    workspace = Workspace.open(root)
    manifest = make_manifest(workspace, dataset, folder)
    noise_workspace(root, manifest, workspace)
    return dataset, manifest, zeroshot_workspace(workspace, QUICK, device="cpu")


def test_every_class_or_finding_is_asked_about_by_name(asked):
    dataset, manifest, found = asked
    rows = found.values["rows"]
    assert "Adaptor minus untrained Adaptor" in [row["method"] for row in rows]
    if dataset == "covidx":
        assert found.values["classes"] == ["COVID-19", "normal", "pneumonia"]
        [line] = [row for row in rows if row["method"] == "Adaptor"]
        assert set(line["figures"]) == {"accuracy", "balanced_accuracy", "auroc"}
        assert set(line["class_auroc"]) == {*found.values["classes"]}
        methods = [row["method"] for row in rows]
        assert methods[:2] == ["majority class", "source only"]
        return
    assert found.values["classes"] == sorted(manifest.label_names)
    assert len(found.values["classes"]) == 14
    ours = {row["setting"]["finding"]: row for row in rows if row["method"] == "Adaptor"}
    assert {*ours} == {*manifest.label_names, *(name for name in ours if "mean of" in name)}
    known = [row for name, row in ours.items() if "mean of" not in name]
    exists = [row for row in known if row["figures"]["auroc"]["mean"] is not None]
    assert f"mean of {len(exists)}" in ours
    for row in known:
        assert (row["figures"]["auroc"]["mean"] is None) == ("undefined" in row["remark"])


def test_nothing_is_learnt_from_noise(asked):
    _, _, found = asked
    [line] = [
        row
        for row in found.values["rows"]
        if row["method"] == "Adaptor" and "mean of" in row["setting"].get("finding", "mean of")
    ]
    assert 0.3 < line["figures"]["auroc"]["mean"] < 0.7
