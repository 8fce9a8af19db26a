"""What a decode found out, kept beside the manifest that it is about and no other."""

import numpy as np
import pyarrow as pa
import pytest
from manifest.test_audit import made

from featcache.manifest.decoded import (
    FILE_NAME,
    Decoded,
    read_decoded,
    read_stated_sizes,
    write_decoded,
    write_stated_sizes,
)


@pytest.fixture
def manifest(tmp_path):
    return made(tmp_path, [{}, {}, {}])


@pytest.fixture
def decoded() -> Decoded:
    signatures = np.array([[1, 2, 3, 2**64 - 1], [0] * 4, [1, 2, 3, 2**64 - 1]], np.uint64)
    shape = np.array([[3, 4], [-1, -1], [5, 6]], np.int32)
    return Decoded(["k0", "k1", "k2"], ["", "gone", ""], shape, signatures)


def test_it_comes_back_as_it_was(manifest, decoded):
    write_decoded(manifest, decoded)
    back = read_decoded(manifest.folder, manifest.meta.hash)
    assert (back.keys, back.reasons) == (decoded.keys, decoded.reasons)
    assert back.shape.tolist() == decoded.shape.tolist()
    assert back.signatures.tolist() == decoded.signatures.tolist()
    assert back.is_readable.tolist() == [True, False, True]


def test_equal_signatures_are_one_node_and_none_is_none(decoded):
    once, node = decoded.nodes()
    assert once.tolist() == [decoded.signatures[0].tolist()]
    assert node.tolist() == [0, -1, 0]


def test_of_another_manifest_or_damaged_it_counts_as_missing(manifest, decoded):
    assert read_decoded(manifest.folder, manifest.meta.hash) is None
    write_decoded(manifest, decoded)
    assert read_decoded(manifest.folder, "0" * 32) is None
    path = manifest.folder / FILE_NAME
    path.write_bytes(path.read_bytes()[:100])
    assert read_decoded(manifest.folder, manifest.meta.hash) is None


def test_stated_sizes_follow_the_rows(manifest):
    assert read_stated_sizes(manifest) is None
    sizes = pa.table({"key": ["k2", "other", "k0"], "height": [1, 2, 3], "width": [4, 5, 6]})
    write_stated_sizes(manifest, sizes)
    assert read_stated_sizes(manifest).tolist() == [[3, 6], [0, 0], [1, 4]]
