"""What benches work on is what their pages say."""

from PIL import Image

from featcache.bench.material import make_jpegs, save_random_vit, write_repeated
from featcache.bench.stage_one import Bare, cores, spent_s
from featcache.encoders.forward import Times
from featcache.extract.result import PassResult
from featcache.manifest.table import open_manifest
from featcache.workspace import Workspace

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}


def test_pictures_are_grey_jpegs_of_the_size_asked_for(tmp_path):
    paths = make_jpegs(tmp_path / "new", 2, (96, 64))
    assert len({path.read_bytes() for path in paths}) == 2
    for path in paths:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "L", (96, 64))


def test_a_long_manifest_goes_round_a_few_files(tmp_path):
    files = make_jpegs(tmp_path / "images", 2, (16, 16))
    write_repeated(Workspace(tmp_path), "long", files, 5)
    manifest = open_manifest(tmp_path / "manifests" / "long")
    assert [manifest.image_file(row) for row in range(5)] == [files[row % 2] for row in range(5)]
    assert len(set(manifest.keys)) == 5


def test_bare_work_is_timed_with_batches_larger_than_the_files(tmp_path):
    files = make_jpegs(tmp_path / "images", 2, (64, 64))
    folder = save_random_vit(tmp_path / "tiny", "vit_tiny_patch16_224", **TINY)
    bare = Bare(folder, files, 3, "cpu")
    assert bare._batch.shape == (3, 3, 32, 32)
    assert bare.forward_s(7) > 0
    assert bare.decode_s(7) > 0
    assert cores() >= 1


def test_what_a_pass_spent_leaves_out_the_start():
    times = Times(decode_wait_s=1.0, encode_s=2.0, write_wait_s=0.5, elapsed_s=3.5)
    assert spent_s(PassResult(["image/a"], 1, "images", elapsed_s=20.0, times=times)) == 3.5
