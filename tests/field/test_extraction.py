"""What went wrong with long extractions elsewhere: padding, shifts, stale folders, dead workers."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reliability.kit import CONFIG, children, content, key_of, times, wait_until, write_rows

from featcache.cache.check import verify_feature_set
from featcache.cache.format import plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.encoders.forward import Pace
from featcache.encoders.interface import load_encoder, locate_encoder
from featcache.encoders.request import EncoderRequest
from featcache.encoders.shard import Lane, encode_images
from featcache.encoders.task import Part, ShardTask
from featcache.errors import CacheError, EncoderError, StaleFeatureSetError
from featcache.extract.command import extract
from featcache.extract.prepare import Admission, prepare
from featcache.manifest.table import open_manifest
from featcache.workspace import Workspace

SPY = str(Path(__file__).with_name("load_spy.py"))


@pytest.fixture(scope="module")
def forty_one(tiny, tmp_path_factory):
    """Forty-one rows on one worker: a number that no other number of workers divides."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("forty_one"), range(41), texts=0)
    tiny.extract(workspace)
    return content(workspace)


@pytest.mark.parametrize("workers", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_no_row_is_made_twice_to_feed_all_workers(tiny, forty_one, launcher, tmp_path, workers):
    """A padded sampler writes some rows twice; the same rows are the same bytes here."""
    workspace = tiny.workspace(tmp_path, range(41), texts=0)
    code, said = launcher.run(tiny.arguments(workspace, "--workers", str(workers)))
    assert code == 0, said
    assert content(workspace) == forty_one
    made = FeatureSet.open(workspace.features / "image/vit")
    assert made.keys == [key_of(row) for row in range(41)]


def test_a_worker_that_wakes_late_leaves_no_gap(tiny, forty_one, launcher, tmp_path):
    """What is done is decided once, not by each worker when it looks."""
    workspace = tiny.workspace(tmp_path, range(41), texts=0)
    tiny.extract(workspace)
    folder = workspace.features / "image/vit"
    for number in (1, 3, 5):
        (folder / f"shard-{number:06d}.h5").unlink()
    before = times(folder)
    command = launcher.start(tiny.arguments(workspace, "--workers", "2"))
    late = wait_until(lambda: children(command.pid))[0]
    wait_until(lambda: list(folder.glob("*.partial-*")) or len(times(folder)) > 3)
    os.kill(late, signal.SIGSTOP)
    time.sleep(1)
    os.kill(late, signal.SIGCONT)
    code, said = command.wait()
    assert code == 0, said
    assert content(workspace) == forty_one
    after = times(folder)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("batch_size", [8, 4])
def test_a_failed_picture_shifts_no_neighbour(tiny, tmp_path, batch_size):
    """Failures left out of the rows but not of the names would move all later identities."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in range(8):
        Image.new("L", (64, 64), 20 * row).save(pictures / f"{key_of(row)}.jpg", quality=95)
    sets = []
    for name in ("clean", "broken"):
        if name == "broken":
            (pictures / f"{key_of(3)}.jpg").write_bytes(b"\xff\xd8 no more")
        workspace = write_rows(Workspace.open(tmp_path / name), pictures, range(8), texts=0)
        tiny.extract(workspace, batch_size=batch_size, max_failures=1.0)
        sets.append(FeatureSet.open(workspace.feature_set("image")))
    clean, broken = sets
    others = [key_of(row) for row in range(8) if row != 3]
    tokens = [
        made.read_tokens(np.asarray([made.row_of[key] for key in others]), verify=True)
        for made in sets
    ]
    np.testing.assert_array_equal(*tokens)
    assert len(np.unique(tokens[0].reshape(7, -1), axis=0)) == 7  # seven grey levels
    assert [key for key, valid in zip(broken.keys, broken.valid, strict=True) if not valid] == [
        key_of(3)
    ]
    assert FeatureSetWriter.open(broken.folder).read_failures().keys() == {key_of(3)}
    assert clean.valid.all()


class Hungry:
    """An encoder that fits a few rows of a batch at once."""

    def __init__(self, encoder, fits):
        for name in dir(encoder):
            if not name.startswith("_"):
                setattr(self, name, getattr(encoder, name))
        self._encoder, self._fits = encoder, fits
        self.passes = []

    def __call__(self, images):
        if len(images) > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        self.passes.append(len(images))
        return self._encoder(images)


def encode(tiny, folder, fits=None):
    """Ten pictures in batches of 8, through a real shard.

    Returns:
        The set, what the encoder saw, and the part's figures.
    """
    encoder = load_encoder(locate_encoder(str(tiny.vit), "image"))
    keys = [key_of(row) for row in range(10)]
    spec = encoder.spec(dtype="float32", batch_size=8)
    plan = plan_shards(spec, keys, keys)
    writer = FeatureSetWriter.create(folder, spec, plan, "few")
    hungry = Hungry(encoder, fits or 8)
    with ShardWriter(folder, spec, plan[0]) as shard:
        lane = Lane(
            encoder=hungry,
            preprocessing=encoder.preprocessing,
            first=0,
            count=10,
            batch_size=8,
            open=lambda: shard,
            close=lambda sink, _: sink.finish(),
        )
        paths = [tiny.pictures / f"{key}.jpg" for key in keys]
        encode_images([lane], paths, Pace(1, "cpu"), lambda rows: None)
    assert writer.missing() == []
    return FeatureSet.open(folder), hungry, lane.stats


def test_a_batch_that_does_not_fit_is_halved_and_the_figures_say_so(tiny, tmp_path):
    whole, _, calm = encode(tiny, tmp_path / "whole")
    halved, hungry, stats = encode(tiny, tmp_path / "halved", fits=4)
    assert set(hungry.passes[-2:]) == {4}
    assert hungry.passes.count(8) == 0
    assert (calm.pass_rows, calm.difference) == (None, None)
    assert stats.pass_rows == 4
    assert 0 <= stats.difference < 1e-5
    rows = np.arange(10)
    np.testing.assert_allclose(
        halved.read_tokens(rows, verify=True), whole.read_tokens(rows), rtol=1e-4, atol=1e-4
    )


def test_a_row_that_does_not_fit_alone_is_an_error_with_the_free_memory(tiny, tmp_path):
    with pytest.raises(EncoderError, match=r"a single row of `vit` does not fit") as caught:
        encode(tiny, tmp_path / "set", fits=0.5)
    assert "it asked for 2.00 GiB more" in caught.value.what
    assert "are free" in caught.value.what
    assert not list((tmp_path / "set").glob("*.h5*"))


@pytest.fixture
def made(tiny, tmp_path):
    """A finished workspace whose encoders lie beside it and may be changed."""
    shutil.copytree(tiny.vit, tmp_path / "vit")
    shutil.copytree(tiny.bert, tmp_path / "bert")
    workspace = tiny.workspace(tmp_path / "ws", range(8), texts=1)
    again(tiny, workspace)
    return workspace


def again(tiny, workspace, *, images=True, texts=True, **settings):
    config = CONFIG.model_copy(update={"scheduler": tiny.scheduler} | settings)
    beside = workspace.root.parent
    return extract(
        workspace,
        config,
        backbones=[str(beside / "vit")] if images else ["none"],
        text_encoders=[str(beside / "bert")] if texts else ["none"],
    )


def other_weight(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "vit/model.safetensors"
    tensors = load_file(path)
    tensors["norm.bias"][0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def other_mean(folder):
    path = folder / "vit/config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["mean"] = [0.4, 0.4, 0.4]
    path.write_text(json.dumps(config))


def other_tokenizer(folder):
    path = folder / "bert/vocab.txt"
    words = path.read_text().split("\n")
    words[-2], words[-3] = words[-3], words[-2]
    path.write_text("\n".join(words))


@pytest.mark.parametrize(
    ("change", "settings", "side", "field"),
    [
        (None, {"image_size": 32}, "image", "image_size"),
        (None, {"dtype": "float32"}, "image", "dtype"),
        (None, {"max_tokens": 16}, "text", "max_tokens"),
        (other_weight, {}, "image", "weights_sha256"),
        (other_mean, {}, "image", "mean"),
        (other_tokenizer, {}, "text", "tokenizer_sha256"),
    ],
)
def test_whatever_changes_is_refused_by_its_name(tiny, made, change, settings, side, field):
    """A folder of another version of anything would pass as the cache of this one."""
    kept = content(made)
    if change is not None:
        change(made.root.parent)
    with pytest.raises(StaleFeatureSetError, match=f"`[a-z.]*{field}`") as caught:
        again(tiny, made, images=side == "image", texts=side == "text", **settings)
    assert "--root" in str(caught.value)
    assert content(made) == kept
    other = again(tiny, made, images=side == "text", texts=side == "image")
    assert [one.missing_shards for one in other.sets] == [0]  # the other side stays valid


def test_unchanged_nothing_is_done(tiny, made):
    before = {path: path.stat().st_mtime_ns for path in made.features.rglob("*.h5")}
    assert [one.missing_shards for one in again(tiny, made).sets] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in made.features.rglob("*.h5")} == before


def test_another_text_leaves_the_image_set_valid(tiny, made):
    kept = content(made)
    write_rows(made, tiny.pictures, range(8), texts=2)
    assert again(tiny, made, texts=False).sets[0].missing_shards == 0
    with pytest.raises(CacheError, match="other rows than the set"):
        again(tiny, made, images=False)
    assert content(made) == kept


def test_a_task_is_small_and_holds_no_weights(tiny, tmp_path):
    workspace = tiny.workspace(tmp_path, range(41), texts=0)
    tables = open_manifest(workspace.manifest())
    located = locate_encoder(str(tiny.vit), "image")
    request = EncoderRequest(modality="image", name=str(tiny.vit), batch_size=4, shard_mb=1)
    one = prepare(workspace.features / "image/vit", tables, request, located, "cpu", Admission())
    part = Part(located, one.writer.folder, 0)
    task = ShardTask((part,), tables.folder, tables.meta.hash, Pace(1, "cpu", None))
    assert (tiny.vit / "model.safetensors").stat().st_size > 1_000_000
    assert len(pickle.dumps(task)) < 10_000


def test_each_worker_loads_the_network_once(tiny, forty_one, launcher, tmp_path):
    workspace = tiny.workspace(tmp_path / "ws", range(41), texts=0)
    log = tmp_path / "loads.txt"
    code, said = launcher.run(
        tiny.arguments(workspace, "--workers", "2"),
        DASK_DISTRIBUTED__WORKER__PRELOAD=SPY,
        LOAD_LOG=str(log),
        PYTHONWARNINGS="always",
    )
    assert code == 0, said
    loads = log.read_text().split()
    assert 1 <= len(loads) <= 2
    assert len(set(loads)) == len(loads)
    assert "arning" not in said
    assert content(workspace) == forty_one


CONNECT = """
from featcache.cluster import connect, local_workers
with connect(None, local_workers("cpu", 1, 1)) as client:
    print(client.submit(sum, [1, 2]).result())
"""
EXTRACT = """
from pathlib import Path
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.workspace import Workspace
config = ExtractConfig(batch_size=4, threads=1, shard_mb=1, device="cpu")
print(extract(Workspace.open(Path("{root}")), config, backbones=["{vit}"]).sets[0].rows)
"""


def group_lives(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def run_script(text, path, how):
    """Run a script as a file or through standard input; nothing may be left of it.

    Returns:
        Its output and errors.
    """
    path.write_text(text)
    piped = how == "standard input"
    process = subprocess.Popen(
        [sys.executable, "-" if piped else str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    output, error = process.communicate(text if piped else None, timeout=300)
    assert process.returncode == 0, error
    wait_until(lambda: not group_lives(process.pid), limit_s=5)
    assert "Traceback" not in error
    return output, error


@pytest.mark.parametrize("how", ["standard input", pytest.param("file", marks=pytest.mark.slow)])
def test_workers_start_without_a_main_guard(tmp_path, how):
    output, error = run_script(CONNECT, tmp_path / "script.py", how)
    assert (output, error) == ("3\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["standard input", "file"])
def test_a_script_without_a_main_guard_may_extract(tiny, tmp_path, how):
    workspace = tiny.workspace(tmp_path / "ws", range(16), texts=0)
    text = EXTRACT.format(root=workspace.root, vit=tiny.vit)
    output, error = run_script(text, tmp_path / "script.py", how)
    assert output == "16\n"
    assert error.count("manifest few") == 1  # the program did not run again in a worker
    assert verify_feature_set(workspace.feature_set("image")).ok
