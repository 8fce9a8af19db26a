"""Every picture of a manifest decoded once."""

import numpy as np
from manifest.test_audit import made
from manifest.test_pictures import picture
from PIL import Image

from featcache.encoders.look import look_at_pictures
from featcache.manifest.decoded import read_decoded


def test_rows_come_back_in_their_order_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.encoders.look._BLOCK", 1)
    rows = [{"key": f"k{n}", "image_path": f"{9 - n}.png"} for n in range(5)]
    rows += [{"key": "same", "image_path": "9.png", "subject_id": "p0"}]
    files = {f"k{n}": picture(n, size=(10 + n, 20)) for n in range(4)} | {"k4": b"no picture"}
    manifest = made(tmp_path, rows, **files, same=files["k0"])
    looked = look_at_pictures(manifest, workers=2)
    assert looked.keys == ["k0", "k1", "k2", "k3", "k4", "same"]
    assert looked.shape.tolist() == [[20, 10], [20, 11], [20, 12], [20, 13], [-1, -1], [20, 10]]
    assert looked.is_readable.tolist() == [True, True, True, True, False, True]
    assert (looked.signatures[0] == looked.signatures[5]).all()
    assert not looked.signatures[4].any()
    kept = read_decoded(manifest.folder, manifest.meta.hash)
    assert kept is not None
    assert np.array_equal(kept.signatures, looked.signatures)


def test_a_turned_jpeg_has_the_size_that_is_stored_and_looks_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    plain = picture(1, kind="JPEG")
    turned = Image.open(tmp_path_file(tmp_path, plain)).rotate(180)
    turned.save(tmp_path / "t.jpg", exif=exif, quality=95)
    manifest = made(tmp_path, [{}, {}], k0=plain, k1=(tmp_path / "t.jpg").read_bytes())
    looked = look_at_pictures(manifest)
    assert looked.shape.tolist() == [[48, 64], [48, 64]]
    assert np.bitwise_count(looked.signatures[0] ^ looked.signatures[1]).sum() < 20


def tmp_path_file(tmp_path, content: bytes):
    path = tmp_path / "plain.jpg"
    path.write_bytes(content)
    return path
