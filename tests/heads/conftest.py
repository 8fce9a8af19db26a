"""A tiny workspace of made-up tokens: classes that can be learnt, texts that belong to images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import FeaturesRead, build_adaptor, save_adaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import ShardWriter
from featcache.manifest.table import Manifest, text_id, write_manifest

CLASSES = ("effusion", "normal", "pneumonia")


def image_spec(**changes) -> FeatureSetSpec:
    values = {
        "modality": "image",
        "encoder": "toy",
        "source": "folder:toy",
        "library": "timm",
        "library_version": "1",
        "weights_sha256": "0" * 64,
        "num_prefix_tokens": 1,
        "grid": (2, 2),
        "num_tokens": 5,
        "dim": 12,
        "batch_size": 4,
    }
    return FeatureSetSpec(**(values | changes))


def text_spec(**changes) -> FeatureSetSpec:
    values = {
        "modality": "text",
        "encoder": "toy-text",
        "source": "folder:toy-text",
        "library": "transformers",
        "library_version": "1",
        "weights_sha256": "1" * 64,
        "tokenizer_sha256": "2" * 64,
        "max_tokens": 8,
        "dim": 8,
        "batch_size": 4,
    }
    return FeatureSetSpec(**(values | changes))


def build_set(
    folder: Path, spec: FeatureSetSpec, keys, tokens, *, bad=(), shard_bytes=2000
) -> FeatureSet:
    """Write rows of tokens (a list of arrays) as a feature set; rows in `bad` are quarantined."""
    plan = plan_shards(spec, keys, keys, shard_bytes=shard_bytes, ragged_rows=7)
    writer = FeatureSetWriter.create(folder, spec, plan, "toy")
    start = 0
    for shard in writer.shards:
        rows = range(start, start + shard.num_rows)
        lengths = None
        if spec.num_tokens is None:
            lengths = np.array([len(tokens[row]) for row in rows], dtype=np.int64)
        with ShardWriter(folder, spec, shard, lengths) as out:
            for place, row in enumerate(rows):
                if keys[row] in bad:
                    out.quarantine(place)
                    continue
                block = tokens[row] if spec.num_tokens is None else tokens[row][None]
                out.write(np.array([place]), block.astype(np.float32))
            out.finish()
        start += shard.num_rows
    return FeatureSet.open(folder)


@dataclass(frozen=True)
class Toy:
    """A manifest with both feature sets of it."""

    root: Path
    manifest: Manifest
    images: FeatureSet
    texts: FeatureSet


def build_toy(
    root: Path,
    *,
    patients: int = 60,
    sources=("clinic",),
    notes=("Made-up tokens.",),
    seed: int = 0,
    bad=(),
    edit: Callable[[dict], None] | None = None,
) -> Toy:
    """Two images per patient; the class shifts the patch tokens; two patients share each text."""
    generator = np.random.default_rng(seed)
    count = 2 * patients
    person = np.arange(count) // 2
    kind = person % 3
    splits = np.array(["train", "train", "train", "validate", "test", "test"])[(person // 3) % 6]
    columns = {
        "key": [f"img-{i:03d}" for i in range(count)],
        "subject_id": [f"pat-{p:03d}" for p in person],
        "study_id": [f"study-{i}" for i in range(count)],
        "view_position": ["PA"] * count,
        "split": splits.tolist(),
        "source": [sources[k % len(sources)] for k in kind],
        "image_path": [f"{i}.png" for i in range(count)],
        "label:class": [CLASSES[k] for k in kind],
    }
    if edit is not None:
        edit(columns)
    images = pa.table(columns)
    texts = [f"text of pair {p // 2}" for p in person]
    table = pa.table(
        {
            "key": columns["key"],
            "text_id": [text_id(text) for text in texts],
            "text": texts,
            "unit": ["report"] * count,
        }
    )
    manifest = write_manifest(
        root / "manifests" / "toy",
        images,
        table,
        dataset="spreadsheet",
        image_root=root,
        notes=list(notes),
        synthetic=True,
    )
    base = generator.normal(size=(count, 5, 12))
    base[:, 1:, :3] += 1.8 * np.eye(3)[kind][:, None]
    meaning = generator.normal(size=(patients, 4))
    base[:, 1:, 4:8] += 2.0 * meaning[person // 2][:, None]
    sets = root / "features"
    features = build_set(
        sets / "image" / "toy", image_spec(), columns["key"], list(base), bad=set(bad)
    )
    unique = sorted({(text_id(text), p // 2) for text, p in zip(texts, person, strict=True)})
    mixing = generator.normal(size=(4, 8))
    said = [
        meaning[number] @ mixing + 0.3 * generator.normal(size=(3 + number % 4, 8))
        for _, number in unique
    ]
    words = build_set(sets / "text" / "toy-text", text_spec(), [one for one, _ in unique], said)
    return Toy(root, manifest, features, words)


def build_run(folder: Path, toy: Toy, *, objective="allpairs", seed=0, **changed) -> Path:
    """An Adaptor with fresh weights, saved as a run's."""
    torch.manual_seed(seed)
    config = AdaptorConfig(dim=16, layers=1, heads=2, feedforward=32, objective=objective)
    adaptor, head = build_adaptor(config, toy.images.spec.dim, toy.texts.spec.dim)
    prints = {"image": toy.images.fingerprint, "text": toy.texts.fingerprint} | changed
    save_adaptor(
        folder / "adaptor",
        adaptor,
        head,
        config,
        image=FeaturesRead(encoder="toy", fingerprint=prints["image"], dim=12),
        text=FeaturesRead(encoder="toy-text", fingerprint=prints["text"], dim=8),
        notes=[],
    )
    return folder


@pytest.fixture(scope="session")
def write_set() -> Callable[..., FeatureSet]:
    return build_set


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    return build_toy


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return build_run


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    return build_toy(tmp_path_factory.mktemp("toy"))
