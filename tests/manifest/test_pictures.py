"""Checks of decoded pictures: what cannot be read, sizes, and what looks alike where."""

import io

import numpy as np
import pyarrow as pa
import pytest
from manifest.test_audit import found, made
from manifest.test_similar import thumbnail
from PIL import Image

from featcache.encoders.look import look_at_pictures
from featcache.manifest.audit import audit
from featcache.manifest.decoded import write_stated_sizes


def picture(patient: int, *, size=(64, 48), gain=1.0, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    levels = (thumbnail(patient) * gain).clip(0, 255).astype(np.uint8)
    Image.fromarray(levels).resize(size).save(file, kind, **options)
    return file.getvalue()


def looked(tmp_path, rows, **files):
    manifest = made(tmp_path, rows, **files)
    return audit(manifest, decoded=look_at_pictures(manifest, workers=2))


def test_without_a_decode_two_findings_say_so(tmp_path):
    findings = audit(made(tmp_path, [{}, {}]))
    for check in (6, 8):
        assert found(findings, check, "--decode").level == "info"


def test_files_that_cannot_be_decoded_are_counted_by_reason(tmp_path):
    whole = picture(1, size=(64, 64), kind="JPEG")
    findings = looked(
        tmp_path, [{} for _ in range(5)],
        k0=whole, k1=whole[: len(whole) // 2], k2=b"<html>", k3=None, k4=whole[:-40],
    )  # fmt: skip
    one = found(findings, 6, "cannot be decoded")
    assert (one.count, one.level, one.examples) == (4, "warning", ["k1", "k2", "k3", "k4"])
    assert one.text == (
        "4 of 5 pictures cannot be decoded: the file is an HTML page, no picture 1, "
        "the file is missing 1, the file is truncated, it cannot be decoded 2"
    )


def test_twins_are_found_whatever_their_size_brightness_and_format(tmp_path):
    rows = [{"subject_id": name} for name in "ppqrst"]
    rows[2]["split"], rows[5]["split"] = "test", None
    findings = looked(
        tmp_path, rows,
        k0=picture(1), k1=picture(1, gain=0.7), k2=picture(1, size=(90, 90), kind="JPEG"),
        k3=picture(2), k4=picture(3), k5=picture(3, gain=0.9),
    )  # fmt: skip
    assert found(findings, 8, "another one").count == 5
    people = found(findings, 8, "of another patient")
    assert (people.count, people.level) == (5, "warning")
    assert people.examples == ["k0 and k2", "k1 and k2", "k4 and k5"]
    crossing = found(findings, 8, "in another split")
    assert (crossing.count, crossing.examples) == (3, ["k0 and k2", "k1 and k2"])


def test_pictures_of_one_level_look_like_none(tmp_path):
    flat = io.BytesIO()
    Image.new("L", (8, 8), 70).save(flat, "PNG")
    findings = looked(tmp_path, [{}, {}, {}], k0=flat.getvalue(), k1=flat.getvalue(), k2=picture(1))
    assert found(findings, 8, "one grey level").count == 2
    assert found(findings, 8, "another one").count == 0
    assert found(findings, 8, "byte for byte").count == 1


@pytest.mark.parametrize("decode", [False, True])
def test_sizes_are_held_against_the_table_and_the_mask(tmp_path, decode):
    masks = ["boxes:48x64:1,1,2,2", "boxes:64x48:1,1,2,2", "", None, "file:m.png"]
    rows = [{"mask": mask} for mask in masks]
    files = {f"k{number}": picture(number) for number in range(5)}
    manifest = made(tmp_path, rows, **files)
    stated = {"key": ["k0", "k1", "k2"], "height": [48, 64, 0], "width": [64, 48, 64]}
    write_stated_sizes(manifest, pa.table(stated))
    findings = audit(manifest, decoded=look_at_pictures(manifest) if decode else None)
    for words in ("of their table", "their masks"):
        one = found(findings, 6, words)
        assert one.text.startswith("1 of 2 pictures have another size than ")
        assert one.examples == ["k1"]


def test_pictures_of_another_data_set_are_found_without_their_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mine = made(tmp_path / "a", [{"key": f"a{n}"} for n in range(3)],
                a0=picture(1), a1=picture(2), a2=picture(1))  # fmt: skip
    other = made(tmp_path / "b", [{"key": f"b{n}"} for n in range(2)],
                 b0=picture(1, gain=0.8), b1=picture(3))  # fmt: skip
    decoded = look_at_pictures(mine)
    findings = audit(mine, {"other": other.folder}, decoded)
    assert found(findings, 9, "not decoded").count == 0
    look_at_pictures(other)
    shared = found(audit(mine, {"other": other.folder}, decoded), 9, "look like one of")
    assert (shared.count, shared.level) == (2, "warning")
    assert shared.examples == ["a0 and b0", "a2 and b0"]
    assert found(findings, 9, "have the name").count == 0
