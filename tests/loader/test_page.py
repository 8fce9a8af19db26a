"""The loader's page: its code runs as written, and it has every option."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from featcache.loader.ring import Reading
from featcache.manifest.table import write_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "loader.md").read_text()


@pytest.fixture
def workspace(build, tmp_path):
    """70 pairs under the names of the page."""
    root = tmp_path / "featcache-data"
    keys = [f"key-{number}" for number in range(70)]
    images = {"key": keys, "split": ["train"] * 66 + ["test"] * 4}
    for name in ("subject_id", "study_id", "view_position", "source", "image_path"):
        images[name] = keys
    texts = {"key": keys, "text": [f"report {key}" for key in keys], "unit": ["report"] * 70}
    manifest = write_manifest(
        root / "manifests" / "demo",
        pa.table(images),
        pa.table(texts),
        dataset="test",
        image_root=root,
    )
    ids = manifest.texts["text_id"].to_pylist()
    for modality, name, rows in (("image", "lite0-demo", keys), ("text", "minilm-demo", ids)):
        spec = build.make_spec(modality)
        content = build.make_content(spec, 70)
        content.keys = rows
        build.write_set(root / "features" / modality / name, spec, content, rows_per_shard=50)
    return tmp_path


def test_the_five_lines_run_as_they_are_written(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    seen = []

    def step(*tensors):
        seen.append([(one.dtype, tuple(one.shape[:2])) for one in tensors])

    exec(code, {"step": step})
    ((images, texts, valid),) = seen  # one batch of 64 of the 66 pairs of the split
    assert images == (torch.float32, (64, 3))
    assert texts[0] == torch.float32
    assert valid == (torch.bool, texts[1])


def test_every_option_stands_on_the_page():
    table = PAGE.split("## Options")[1].split("##")[0]
    named = re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", table, re.MULTILINE)
    assert dict(named) == {name: str(one.default) for name, one in Reading.model_fields.items()}
