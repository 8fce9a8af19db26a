import numpy as np
import pyarrow as pa
import pytest

from featcache.cache.reader import FeatureSet, open_cache
from featcache.errors import CacheError, ManifestError, WorkspaceError
from featcache.manifest.table import Manifest, ManifestMeta, write_manifest


def make_manifest(tmp_path, pairs, splits):
    """`pairs`: key and text_id; `splits`: of each image key."""
    meta = ManifestMeta(name="m", dataset="test", hash="0" * 32, image_root=str(tmp_path))
    images = pa.table({"key": list(splits), "split": list(splits.values())})
    keys, ids = zip(*pairs, strict=True)
    return Manifest(tmp_path, meta, images, pa.table({"key": keys, "text_id": ids}))


@pytest.fixture
def folders(build, tmp_path):
    images, texts = build.make_spec(), build.make_spec("text")
    build.write_set(
        tmp_path / "image", images, build.make_content(images, 6, failed={4}), rows_per_shard=2
    )
    build.write_set(
        tmp_path / "text",
        texts,
        build.make_content(texts, 5, prefix="text", failed={3}),
        rows_per_shard=2,
    )
    return tmp_path / "image", tmp_path / "text"


PAIRS = [
    ("key-5", "text-0"),
    ("key-0", "text-2"),
    ("key-0", "text-0"),  # two texts of one image, and text 0 a second time
    ("key-4", "text-1"),  # image quarantined
    ("key-1", "text-3"),  # text quarantined
    ("key-2", "text-9"),  # text not extracted
    ("key-9", "text-1"),  # image not extracted
    ("key-3", "text-4"),
]
SPLITS = {f"key-{row}": "test" if row in (3, 9) else "train" for row in range(10)}


def test_pairs_are_joined_by_key_and_text_id(folders, tmp_path):
    cache = open_cache(*folders, make_manifest(tmp_path, PAIRS, SPLITS))
    assert cache.image_rows.tolist() == [5, 0, 0, 3]
    assert cache.text_rows.tolist() == [0, 2, 0, 4]
    assert cache.num_pairs == 4
    assert cache.dropped == {
        "image has no features": 1,
        "image could not be read": 1,
        "text has no features": 1,
        "text could not be read": 1,
    }


def write_workspace(build, root):
    """A manifest of two pairs, and both sets, under names."""
    columns = ("subject_id", "study_id", "view_position", "split", "source", "image_path")
    images = pa.table({"key": ["key-0", "key-1"], **{name: ["train", "train"] for name in columns}})
    words = {"text": ["effusion", "clear lungs"], "unit": ["report"] * 2}
    texts = pa.table({"key": ["key-1", "key-0"], **words})
    manifest = write_manifest(
        root / "manifests" / "few", images, texts, dataset="test", image_root=root
    )
    ids = manifest.texts["text_id"].to_pylist()
    specs = build.make_spec(), build.make_spec("text")
    contents = [build.make_content(spec, 2) for spec in specs]
    contents[1].keys = ids
    for spec, content in zip(specs, contents, strict=True):
        build.write_set(root / "features" / spec.modality / "tiny", spec, content)


def test_the_manifest_may_be_a_folder_and_all_three_names_of_a_workspace(build, tmp_path):
    write_workspace(build, tmp_path)
    folders = [tmp_path / "features" / kind / "tiny" for kind in ("image", "text")]
    by_folder = open_cache(*folders, str(tmp_path / "manifests" / "few"))
    by_name = open_cache("tiny", "tiny", "few", root=tmp_path)
    mixed = open_cache(FeatureSet.open(folders[0]), folders[1], "few", root=str(tmp_path))
    assert by_folder.num_pairs == 2
    assert by_folder.fingerprint == by_name.fingerprint == mixed.fingerprint


def test_a_name_that_is_not_there_is_refused_with_the_names_that_are(build, tmp_path):
    write_workspace(build, tmp_path)
    with pytest.raises(WorkspaceError, match="no image feature set `tin`; did you mean `tiny`"):
        open_cache("tin", "tiny", "few", root=tmp_path)
    with pytest.raises(ManifestError, match="there is no manifest in this folder"):
        open_cache(*[tmp_path / "features" / k / "tiny" for k in ("image", "text")], tmp_path)


def test_pairs_follow_the_manifest_and_not_the_sets(folders, tmp_path):
    turned = open_cache(*folders, make_manifest(tmp_path, PAIRS[::-1], SPLITS))
    assert turned.image_rows.tolist() == [3, 0, 0, 5]


def test_split_keeps_its_own_pairs(folders, tmp_path):
    manifest = make_manifest(tmp_path, PAIRS, SPLITS)
    cache = open_cache(*folders, manifest, split="test")
    assert cache.image_rows.tolist() == [3]
    assert cache.dropped == {"in another split": 6, "image has no features": 1}
    train = open_cache(*folders, manifest, split="train")
    assert train.num_pairs + cache.num_pairs == open_cache(*folders, manifest).num_pairs
    with pytest.raises(CacheError, match="no split `tset`; did you mean `test`"):
        open_cache(*folders, manifest, split="tset")


def test_image_without_a_split_is_in_none(folders, tmp_path):
    manifest = make_manifest(tmp_path, PAIRS, {**SPLITS, "key-0": None})
    assert open_cache(*folders, manifest, split="train").image_rows.tolist() == [5]


def test_fingerprint_tells_pairs_and_recipes_apart(build, folders, tmp_path):
    manifest = make_manifest(tmp_path, PAIRS, SPLITS)
    first = open_cache(*folders, manifest).fingerprint
    assert first == open_cache(*map(FeatureSet.open, folders), manifest).fingerprint
    assert len(first) == 32
    ours, theirs = ([("key-0", "text-0"), ("key-5", other)] for other in ("text-1", "text-2"))
    one, two = (open_cache(*folders, make_manifest(tmp_path, p, SPLITS)) for p in (ours, theirs))
    assert np.array_equal(one.image_rows, two.image_rows)
    assert one.fingerprint != two.fingerprint  # only the texts differ
    third = open_cache(*folders, make_manifest(tmp_path, [ours[0], ("key-2", "text-1")], SPLITS))
    assert np.array_equal(one.text_rows, third.text_rows)
    assert one.fingerprint != third.fingerprint  # only the images differ
    other = build.make_spec(batch_size=7)
    build.write_set(tmp_path / "other", other, build.make_content(other, 6, failed={4}))
    remade = open_cache(tmp_path / "other", folders[1], manifest)
    assert np.array_equal(remade.image_rows, open_cache(*folders, manifest).image_rows)
    assert first != remade.fingerprint


def test_no_pair_at_all_is_an_error_with_counts(folders, tmp_path):
    manifest = make_manifest(tmp_path, [("other", "text-0"), ("key-4", "text-0")], SPLITS)
    with pytest.raises(CacheError, match="no pair is left of the 2 in manifest `m`: 1 image"):
        open_cache(*folders, manifest)


def test_sets_cannot_be_swapped(folders, tmp_path):
    with pytest.raises(CacheError, match="image features is needed, this one is text/tiny"):
        open_cache(folders[1], folders[0], make_manifest(tmp_path, PAIRS, SPLITS))
