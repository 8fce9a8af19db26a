"""A workspace with twenty of the embedded radiographs, and stage one on it with real weights."""

import csv
import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from featcache.datasets.sample import compose_text, sample_folder
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.manifest.table import write_manifest
from featcache.workspace import Workspace

CONFIG = ExtractConfig(batch_size=4, threads=1, shard_mb=1, max_failures=0)


def sample_rows(count: int) -> list[dict[str, str]]:
    with (sample_folder() / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[:count]


def write_sample_manifest(
    root: Path, rows, *, image_root: Path, name="few", texts=True
) -> Workspace:
    names = ("key", "subject_id", "view_position", "split", "source", "image_path")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in names}
    columns["study_id"] = columns["key"]
    columns["label:class"] = pa.array([row["finding"] for row in rows], pa.string())
    table = None
    if texts:
        table = pa.table(
            {
                "key": columns["key"],
                "text": [compose_text(row["key"], row["finding"]) for row in rows],
                "unit": ["report"] * len(rows),
            }
        )
    workspace = Workspace.open(root)
    write_manifest(
        workspace.manifests / name,
        pa.table(columns),
        table,
        dataset="sample",
        image_root=image_root,
    )
    workspace.use(manifest=name)
    return workspace


def shard_hashes(workspace: Workspace) -> dict[str, str]:
    return {
        str(path.relative_to(workspace.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workspace.features.rglob("*.h5"))
    }


@pytest.fixture(scope="session")
def extracted(tmp_path_factory) -> Workspace:
    """Twenty pictures in three shards, their texts in one, made by one worker."""
    root = tmp_path_factory.mktemp("extracted")
    workspace = write_sample_manifest(root, sample_rows(20), image_root=sample_folder())
    extract(workspace, CONFIG, backbones=["lite0-demo"], text_encoders=["minilm-demo"])
    return workspace


@pytest.fixture
def copied(extracted, tmp_path) -> Workspace:
    """A copy of the finished workspace that a test may spoil."""
    shutil.copytree(extracted.root, tmp_path / "copy")
    return Workspace.open(tmp_path / "copy")
