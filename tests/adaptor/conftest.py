"""A small workspace of made-up tokens in which each text repeats a linear view of its image."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow as pa
import pytest
import torch
from adaptor.spaces import Space

from featcache.adaptor import stage
from featcache.adaptor.run import RunConfig
from featcache.adaptor.train import train_adaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import ShardWriter
from featcache.manifest.table import Manifest, text_id, write_manifest
from featcache.workspace import Workspace

IMAGE_DIM, TEXT_DIM = 12, 8


@dataclass(frozen=True)
class Study:
    """Everything that a training reads."""

    workspace: Workspace
    manifest: Manifest
    images: FeatureSet
    texts: FeatureSet


def spec(modality: str, **changes) -> FeatureSetSpec:
    layout = {"num_tokens": 5, "num_prefix_tokens": 1, "grid": (2, 2), "dim": IMAGE_DIM}
    if modality == "text":
        layout = {"max_tokens": 6, "dim": TEXT_DIM, "tokenizer_sha256": "2" * 64}
    values = {
        "modality": modality,
        "encoder": f"made-{modality}",
        "source": f"folder:made-{modality}",
        "library": "timm",
        "library_version": "1",
        "weights_sha256": "0" * 64,
        "batch_size": 4,
        **layout,
    }
    return FeatureSetSpec(**(values | changes))


def write_set(folder: Path, made: FeatureSetSpec, keys: list[str], tokens: list) -> FeatureSet:
    plan = plan_shards(made, keys, keys, shard_bytes=2000, ragged_rows=16)
    writer = FeatureSetWriter.create(folder, made, plan, "made")
    start = 0
    for shard in writer.shards:
        part = tokens[start : start + shard.num_rows]
        lengths = None if made.num_tokens else np.array([len(one) for one in part])
        with ShardWriter(folder, made, shard, lengths) as out:
            for row, one in enumerate(part):
                block = one[None] if made.num_tokens else one
                out.write(np.array([row]), block.astype(np.float32))
            out.finish()
        start += shard.num_rows
    return FeatureSet.open(folder)


def build(
    root: Path, *, train: int = 42, validate: int = 12, test: int = 4, notes=(), nan_image=False
) -> Study:
    """One image per patient; images 0 and 1 share their text."""
    count = train + validate + test
    rng = np.random.default_rng(0)
    keys = [f"img-{number:03d}" for number in range(count)]
    texts = [f"report {max(number, 1)}" for number in range(count)]
    images = pa.table(
        {
            "key": keys,
            "subject_id": [f"pat-{number}" for number in range(count)],
            "study_id": keys,
            "view_position": ["PA"] * count,
            "split": ["train"] * train + ["validate"] * validate + ["test"] * test,
            "source": ["made"] * count,
            "image_path": [f"{key}.png" for key in keys],
        }
    )
    table = pa.table({"key": keys, "text": texts, "unit": ["report"] * count})
    workspace = Workspace(root)
    manifest = write_manifest(
        workspace.manifests / "made",
        images,
        table,
        dataset="spreadsheet",
        image_root=root,
        notes=list(notes),
    )
    tokens = rng.normal(size=(count, 5, IMAGE_DIM))
    if nan_image:
        tokens[:] = 0
    view = rng.normal(size=(IMAGE_DIM, TEXT_DIM))
    said = {}
    for number, text in enumerate(texts):
        noise = rng.normal(size=(2 + number % 4, TEXT_DIM))
        said[text_id(text)] = 0.3 * noise + tokens[number].mean(axis=0) @ view
    return Study(
        workspace,
        manifest,
        write_set(workspace.features / "image" / "made-image", spec("image"), keys, list(tokens)),
        write_set(
            workspace.features / "text" / "made-text", spec("text"), list(said), list(said.values())
        ),
    )


def run_config(**changes) -> RunConfig:
    adaptor = {"dim": 16, "layers": 1, "heads": 2, "feedforward": 24}
    values = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "threads": 1, "adaptor": adaptor}
    adaptor |= changes.pop("adaptor", {})
    return RunConfig.model_validate(values | changes)


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Study]:
    return build


@pytest.fixture(scope="session")
def make_config() -> Callable[..., RunConfig]:
    return run_config


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Study:
    """Not to be changed by a test: runs go to folders of their own."""
    return build(tmp_path_factory.mktemp("study"), notes=["The tokens are made up."])


@pytest.fixture(scope="session")
def sentence_study(study, tmp_path_factory) -> Study:
    """The same pictures; a report has three sentences, of which others have two as well."""
    root, keys = tmp_path_factory.mktemp("sentences"), study.manifest.keys
    said = [f"Size {n % 3}. Shape {n % 4}. Picture {n}." for n in range(len(keys))]
    manifest = write_manifest(
        root / "manifest",
        study.manifest.images,
        pa.table({"key": keys, "text": said, "unit": ["report"] * len(keys)}),
        dataset="spreadsheet",
        image_root=root,
        text_unit="sentence",
    )
    ids = manifest.unique_texts()[0]
    tokens = list(np.random.default_rng(0).normal(size=(len(ids), 4, TEXT_DIM)))
    texts = write_set(root / "text", spec("text"), ids, tokens)
    return replace(study, manifest=manifest, texts=texts)


@pytest.fixture
def run(study, tmp_path):
    """Train in a folder of its own; arguments change the config, or say where."""

    def start(name="run", *, on=study, **changes):
        config = run_config(**changes)
        return train_adaptor(
            on.images, on.texts, on.manifest, tmp_path / name, config, device="cpu"
        )

    return start


@pytest.fixture
def break_gradient(monkeypatch):
    """Let the gradient of one weight be infinite from a step on."""
    whole = stage.build_adaptor

    def arm(first):
        def broken(*arguments):
            adaptor, objective = whole(*arguments)
            calls = iter(range(1, 1000))
            adaptor.logit_scale.register_hook(
                lambda gradient: gradient * torch.inf if next(calls) >= first else gradient
            )
            return adaptor, objective

        monkeypatch.setattr(stage, "build_adaptor", broken)

    return arm


@pytest.fixture
def unchecked():
    """No shape checks, which break the graph of `torch.compile` and slow that of ONNX."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def processes():
    """Processes that start with everything imported, from a parent that never computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["featcache.adaptor.train"])
    return context


@pytest.fixture(scope="session")
def make_space(processes, tmp_path_factory) -> Callable[[], Space]:
    """Workspaces in which the command line is typed by processes of their own."""

    def make() -> Space:
        root = tmp_path_factory.mktemp("space")
        build(root).workspace.use(manifest="made", image="made-image", text="made-text")
        return Space(root, processes)

    return make
