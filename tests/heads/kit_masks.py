"""A tiny workspace whose tokens show where something lies."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from heads.conftest import Toy, build_set, image_spec, text_spec

from featcache.manifest.masks import encode_boxes
from featcache.manifest.table import text_id, write_manifest

GRID, SIDE = (4, 4), 32  # a token stands for 8 x 8 pixels


def masked_toy(
    root: Path,
    *,
    patients: int = 90,
    spec=None,
    signal: float = 3.0,
    positive_every: int = 2,
    edit=None,
    dataset: str = "spreadsheet",
    synthetic: bool = True,
) -> Toy:
    """An image per patient; every second one has a box of 2 x 2 tokens, shown by channel 0."""
    generator = np.random.default_rng(1)
    splits = np.array(["train", "train", "train", "validate", "test", "test"])
    spec = spec or image_spec(grid=GRID, num_tokens=17, dim=12)
    tokens, masks = [], []
    for number in range(patients):
        one = generator.normal(size=(17, 12))
        boxes = []
        if (number // 6) % positive_every == 0:
            row, column = generator.integers(0, 3, size=2)
            one[1:].reshape(4, 4, 12)[row : row + 2, column : column + 2, 0] += signal
            boxes = [(8.0 * column, 8.0 * row, 16.0, 16.0)]
        tokens.append(one)
        masks.append(encode_boxes(SIDE, SIDE, boxes))
    keys = [f"img-{i:03d}" for i in range(patients)]
    columns = {
        "key": keys,
        "subject_id": [f"pat-{i:03d}" for i in range(patients)],
        "study_id": keys,
        "view_position": ["PA"] * patients,
        "split": splits[np.arange(patients) % 6].tolist(),
        "source": ["clinic"] * patients,
        "image_path": [f"{i}.png" for i in range(patients)],
        "mask": masks,
    }
    if edit is not None:
        edit(columns)
    texts = ["opacity" if mask else "clear" for mask in masks]
    table = pa.table(
        {
            "key": keys,
            "text_id": [text_id(text) for text in texts],
            "text": texts,
            "unit": ["report"] * patients,
        }
    )
    manifest = write_manifest(
        root / "manifests" / "toy",
        pa.table(columns),
        table,
        dataset=dataset,
        image_root=root,
        notes=["Made-up tokens."],
        synthetic=synthetic,
    )
    images = build_set(root / "features" / "image" / "toy", spec, keys, tokens, shard_bytes=6000)
    ids = sorted({text_id(text) for text in texts})
    words = [generator.normal(size=(3, 8)) for _ in ids]
    said = build_set(root / "features" / "text" / "toy-text", text_spec(), ids, words)
    return Toy(root, manifest, images, said)
