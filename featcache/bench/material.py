"""What benches work on: enlarged radiographs, long manifests, networks with random weights."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from featcache.datasets.sample import sample_folder
from featcache.manifest.table import write_manifest
from featcache.workspace import Workspace

LARGE = (2544, 3056)
"""Width, height of a common radiograph of MIMIC-CXR-JPG."""
QUALITY = 95


def sample_rows() -> list[dict[str, str]]:
    """The rows of the embedded sample's table."""
    with (sample_folder() / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_jpegs(folder: Path, count: int, size: tuple[int, int] = LARGE) -> list[Path]:
    """Embedded radiographs brought to one size, as grey JPEGs of quality 95.

    Enlarged pictures are smoother than real ones of that size, so their files are smaller.

    Args:
        folder: Where they go; made when absent.
        count: How many, each of another radiograph.
        size: Width, height in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for row in sample_rows()[:count]:
        path = folder / f"{row['key']}.jpg"
        with Image.open(sample_folder() / row["image_path"]) as picture:
            grey = picture.convert("L").resize(size, Image.Resampling.BICUBIC)
        grey.save(path, quality=QUALITY)
        made.append(path)
    return made


def write_repeated(workspace: Workspace, name: str, files: Sequence[Path], count: int) -> None:
    """A manifest whose rows go round a few files.

    Args:
        workspace: Where it goes.
        name: The manifest's.
        files: Pictures of one folder.
        count: Rows.
    """
    keys = [f"row-{number:07d}" for number in range(count)]
    columns: dict[str, Sequence[str | None]] = {
        "key": keys,
        "subject_id": keys,
        "study_id": keys,
        "view_position": [None] * count,
        "split": [None] * count,
        "image_path": [files[number % len(files)].name for number in range(count)],
        "source": ["bench"] * count,
    }
    write_manifest(
        workspace.manifests / name,
        pa.table({key: pa.array(values, pa.string()) for key, values in columns.items()}),
        dataset="bench",
        image_root=files[0].parent,
    )


def write_sample(workspace: Workspace, name: str, rows: Sequence[dict[str, str]]) -> None:
    """A manifest of some rows of the embedded sample, with labels and splits, without texts."""
    names = ("key", "subject_id", "view_position", "split", "source", "image_path")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in names}
    columns["study_id"] = columns["key"]
    columns["label:class"] = pa.array([row["finding"] for row in rows], pa.string())
    write_manifest(
        workspace.manifests / name,
        pa.table(columns),
        dataset="sample",
        image_root=sample_folder(),
    )


def save_random_vit(folder: Path, network: str, *, seed: int = 0, **options: Any) -> Path:
    """A vision transformer with random weights, for timing only, as a folder of timm's.

    Args:
        folder: Where it goes; its name becomes the encoder's.
        network: A name of timm's.
        seed: Of the weights.
        options: For `timm.create_model`.
    """
    torch.manual_seed(seed)
    made = timm.create_model(network, num_classes=0, **options)
    save_for_hf(made, str(folder), safe_serialization=True)
    return folder
