"""`docs/format.md` is normative, so what it shows must run and what it names must be so."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featcache.cache import folder, header
from featcache.cache.format import FeatureSetSpec

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_example_reads_a_row(build, tmp_path, monkeypatch, modality):
    spec = build.make_spec(modality)
    content = build.make_content(spec, 3)
    content.keys = ["key-2", "key-1", "key-0"]
    build.write_set(tmp_path / "set", spec, content)
    monkeypatch.chdir(tmp_path / "set")
    names = {}
    exec(EXAMPLE, names)
    assert names["tokens"].tobytes() == build.expected_tokens(spec, content, [2]).tobytes()


def test_the_example_refuses_a_quarantined_row(build, tmp_path, monkeypatch):
    spec = build.make_spec()
    build.write_set(tmp_path / "set", spec, build.make_content(spec, 3, failed={0}))
    monkeypatch.chdir(tmp_path / "set")
    with pytest.raises(ValueError, match="could not be extracted"):
        exec(EXAMPLE, {})


def test_the_example_is_short():
    lines = [line for line in EXAMPLE.splitlines() if line.strip()]
    assert len(lines) <= 12  # ten, and the import and the flag


def test_every_name_of_the_format_is_on_the_page():
    names = {*header.ARRAY_ORDER, *FeatureSetSpec.model_fields, *header.NUMPY_TYPES}
    names |= {folder.QUALITY_FILE, folder.SCALE_FILE, folder.FAILURES_FOLDER}
    assert not [name for name in names if f"`{name}" not in PAGE]
    for number in (header.USER_BLOCK, header.ALIGNMENT, header.ATTRIBUTE_BYTES):
        assert f"{number:,}" in PAGE


def test_the_page_is_enough_to_find_a_row(build, tmp_path):
    """A reader written from the page alone, with nothing but the standard library."""
    spec = build.make_spec()
    content = build.make_content(spec, 3)
    path = build.write_set(tmp_path / "set", spec, content).folder / "shard-000000.h5"
    block = path.read_bytes()
    magic, version, length = struct.unpack_from("<8sII", block)
    assert (magic, version) == (b"FEATCACH", 1)
    arrays = json.loads(block[16 : 16 + length])["arrays"]
    width = int(arrays["keys"]["dtype"][1:])
    start = arrays["keys"]["offset"]
    keys = [block[start + i * width : start + (i + 1) * width].rstrip(b"\0") for i in range(3)]
    row = keys.index(b"key-1")
    _, L, D = arrays["tokens"]["shape"]
    first = arrays["tokens"]["offset"] + row * L * D * 2
    values = struct.unpack(f"<{L * D}e", block[first : first + L * D * 2])
    assert list(values) == content.tokens[1].astype(np.float16).reshape(-1).tolist()


def test_failed_rows_are_one_parquet_table(build, tmp_path):
    spec = build.make_spec()
    made = build.write_set(tmp_path / "set", spec, build.make_content(spec, 8, failed={1, 6}))
    made.write_failures(0, {"key-1": "cut short"})
    made.write_failures(1, {"key-6": "cut short"})
    table = pq.read_table(tmp_path / "set" / "failures.parquet").to_pydict()
    assert table == {"shard": [0, 1], "key": ["key-1", "key-6"], "reason": ["cut short"] * 2}
