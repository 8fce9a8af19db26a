"""Stage one from the outside, on real radiographs with the real demo weights."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest_extract import CONFIG, sample_rows, shard_hashes, write_sample_manifest

from featcache import cluster
from featcache.cache.reader import FeatureSet
from featcache.datasets.sample import sample_folder
from featcache.encoders.decode import decode_image, to_input
from featcache.encoders.interface import load_encoder, locate_encoder
from featcache.errors import (
    CacheError,
    EncoderError,
    StaleFeatureSetError,
    UsageError,
    WeightsError,
)
from featcache.extract.command import extract
from featcache.manifest.table import open_manifest
from featcache.workspace import Workspace

pytestmark = pytest.mark.weights

BOTH = {"backbones": ["lite0-demo"], "text_encoders": ["minilm-demo"]}


@pytest.fixture(scope="module")
def running(tiny):
    """The settings, with a worker that runs already: for tests that ask nothing about its start."""
    return CONFIG.model_copy(update={"scheduler": tiny.scheduler})


def test_cached_image_tokens_are_those_of_the_encoder(extracted):
    images = FeatureSet.open(extracted.feature_set("image"))
    manifest = open_manifest(extracted.manifest())
    encoder = load_encoder(locate_encoder("lite0-demo", "image"))
    paths = [manifest.image_file(row) for row in range(4)]
    greys = torch.from_numpy(np.stack([decode_image(p, encoder.preprocessing) for p in paths]))
    with torch.inference_mode():
        online = encoder(to_input(greys, encoder.preprocessing)).tokens.numpy()
    assert images.keys[:4] == manifest.keys[:4]
    cached = images.read_tokens(np.arange(4), verify=True).astype(np.float32)
    np.testing.assert_allclose(cached, online, rtol=2e-3, atol=2e-3)
    assert np.abs(online).max() > 1


def test_cached_text_tokens_are_those_of_the_encoder(extracted):
    texts = FeatureSet.open(extracted.feature_set("text"))
    ids, words = open_manifest(extracted.manifest()).unique_texts()
    encoder = load_encoder(locate_encoder("minilm-demo", "text"))
    tokenized = encoder.tokenize(words[:3])
    for row, token_ids in enumerate(tokenized.ids):
        padded, valid = encoder.pad_batch([token_ids])
        with torch.inference_mode():
            online = encoder(padded, valid).tokens[0, : len(token_ids)].numpy()
        cached = texts.read_tokens(np.asarray([texts.row_of[ids[row]]])).astype(np.float32)
        np.testing.assert_allclose(cached, online, rtol=2e-3, atol=2e-3)


def test_a_second_run_changes_nothing(copied):
    before = {p: p.stat().st_mtime_ns for p in copied.features.rglob("*.h5")}
    result = extract(copied, CONFIG, **BOTH)
    assert [made.missing_shards for made in result.sets] == [0, 0]
    assert "nothing to do" in result.to_text()
    assert {p: p.stat().st_mtime_ns for p in copied.features.rglob("*.h5")} == before


def test_without_options_the_current_encoders_are_taken(copied):
    result = extract(copied, CONFIG)
    assert [made.name for made in result.sets] == ["image/lite0-demo", "text/minilm-demo"]


def test_two_workers_make_the_bytes_of_one(extracted, tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(20), image_root=sample_folder())
    extract(workspace, CONFIG.model_copy(update={"workers": 2}), **BOTH)
    assert shard_hashes(workspace) == shard_hashes(extracted)
    assert len(shard_hashes(workspace)) == 4


def test_only_missing_shards_are_made(copied, extracted, running):
    folder = copied.feature_set("image")
    (folder / "shard-000001.h5").unlink()
    kept = (folder / "shard-000000.h5").stat().st_mtime_ns
    result = extract(copied, running, **BOTH)
    assert result.sets[0].missing_shards == 1
    assert (folder / "shard-000000.h5").stat().st_mtime_ns == kept
    assert shard_hashes(copied) == shard_hashes(extracted)


def test_an_unreadable_picture_is_quarantined_and_shifts_no_row(extracted, running, tmp_path):
    images = tmp_path / "pictures"
    rows = sample_rows(20)
    (images / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy2(sample_folder() / row["image_path"], images / row["image_path"])
    victim = images / rows[5]["image_path"]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) * 6 // 10])
    workspace = write_sample_manifest(tmp_path / "ws", rows, image_root=images)
    with pytest.raises(EncoderError, match="1 unreadable row of 20") as caught:
        extract(workspace, running, backbones=["lite0-demo"], text_encoders=["none"])
    assert "failures.parquet" in str(caught.value)
    got = FeatureSet.open(workspace.feature_set("image"))
    clean = FeatureSet.open(extracted.feature_set("image"))
    bad = got.row_of[rows[5]["key"]]
    assert got.valid.tolist() == [row != bad for row in range(20)]
    others = np.flatnonzero(got.valid)
    np.testing.assert_array_equal(got.read_tokens(others), clean.read_tokens(others))
    assert not got.read_tokens(np.asarray([bad])).any()

    allowed = running.model_copy(update={"max_failures": 1.0})
    result = extract(workspace, allowed, text_encoders=["none"])
    assert "1 unreadable row" in result.to_text()
    victim.write_bytes(whole)
    result = extract(workspace, allowed, text_encoders=["none"])
    assert result.sets[0].missing_shards == 1
    mended = FeatureSet.open(workspace.feature_set("image"))
    assert mended.valid.all()
    np.testing.assert_array_equal(
        mended.read_tokens(np.arange(20)), clean.read_tokens(np.arange(20))
    )


def test_a_changed_picture_is_refused_by_its_key(running, tmp_path):
    rows = sample_rows(20)
    pictures = tmp_path / "pictures"
    (pictures / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy2(sample_folder() / row["image_path"], pictures / row["image_path"])
    workspace = write_sample_manifest(tmp_path / "ws", rows[:4], image_root=pictures)
    one = running.model_copy(update={"batch_size": 2})
    extract(workspace, one, backbones=["lite0-demo"], text_encoders=["none"])
    os.utime(pictures / rows[2]["image_path"], ns=(1, 1))
    with pytest.raises(CacheError, match=rows[2]["key"]):
        extract(workspace, one, backbones=["lite0-demo"], text_encoders=["none"])


def test_another_size_is_refused_with_both_values(copied):
    with pytest.raises(StaleFeatureSetError, match="image_size") as caught:
        extract(copied, CONFIG.model_copy(update={"image_size": 256}), **BOTH)
    assert "--root" in str(caught.value)


def test_an_encoder_without_weights_fails_before_any_work(copied):
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        extract(copied, CONFIG, backbones=["vit-b"])
    assert time.monotonic() - started < 20
    message = str(caught.value)
    for words in ("--weights vit-b=", "hub", "featcache[demo]", "lite0-demo"):
        assert words in message
    assert not (copied.features / "image" / "vit-b").exists()
    assert copied.current("image") == "lite0-demo"


def test_an_unknown_backbone_offers_the_nearest(copied):
    with pytest.raises(UsageError, match="did you mean `vit-b`"):
        extract(copied, CONFIG, backbones=["vitb"])


def test_none_leaves_a_side_out_and_both_none_is_refused(running, tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(4), image_root=sample_folder())
    result = extract(workspace, running, backbones=["none"], text_encoders=["minilm-demo"])
    assert [made.name for made in result.sets] == ["text/minilm-demo"]
    with pytest.raises(UsageError, match="both sides are none"):
        extract(workspace, CONFIG, backbones=["none"], text_encoders=["none"])


def test_a_manifest_without_texts_is_image_only(running, tmp_path):
    workspace = write_sample_manifest(
        tmp_path, sample_rows(4), image_root=sample_folder(), texts=False
    )
    result = extract(workspace, running, backbones=["lite0-demo"])
    assert [made.name for made in result.sets] == ["image/lite0-demo"]


def test_a_dry_run_plans_and_makes_nothing(tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(4), image_root=sample_folder())
    result = extract(workspace, CONFIG.model_copy(update={"dry_run": True}), **BOTH)
    assert result.sets[0].missing_shards == 1
    assert not list(workspace.features.rglob("*.h5"))
    assert "wrote" not in result.to_text()
    assert "4 rows in 1 shard, 501.8 kB of tokens, 0 complete already" in result.to_text()
    assert workspace.current("image") is None


def arguments(root) -> list[str]:
    settings = ["--set", "batch_size=4", "--set", "threads=1", "--set", "shard_mb=1"]
    sides = ["--backbone", "lite0-demo", "--text-encoder", "none"]
    return ["extract", *sides, *settings, "--root", str(root)]


def wait_for_shards(folder, count: int) -> None:
    """Complete ones, and those that are being written."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.h5*"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def check_that_it_goes_on(workspace, extracted, running) -> None:
    extract(workspace, running, backbones=["lite0-demo"], text_encoders=["none"])
    want = {k: v for k, v in shard_hashes(extracted).items() if "image" in k}
    assert shard_hashes(workspace) == want
    assert not list(workspace.features.rglob("*.partial-*"))


def test_a_killed_run_goes_on_to_the_same_bytes(extracted, running, launcher, tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(20), image_root=sample_folder())
    command = launcher.start(arguments(tmp_path))
    wait_for_shards(workspace.features / "image/lite0-demo", 1)
    command.kill()
    code, error = command.wait()
    assert code == -signal.SIGKILL, error
    assert "Traceback" not in error
    check_that_it_goes_on(workspace, extracted, running)


def test_ctrl_c_says_how_to_go_on_to_the_same_bytes(extracted, running, tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(20), image_root=sample_folder())
    process = subprocess.Popen(
        [sys.executable, "-m", "featcache.cli", *arguments(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_shards(workspace.features / "image/lite0-demo", 1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "the same command goes on" in error
    check_that_it_goes_on(workspace, extracted, running)


def test_a_running_scheduler_serves_as_well(extracted, running, tmp_path):
    workspace = write_sample_manifest(tmp_path, sample_rows(20), image_root=sample_folder())
    extract(workspace, running, **BOTH)
    assert shard_hashes(workspace) == shard_hashes(extracted)


def test_no_scheduler_at_the_address_is_said(copied, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 1)
    (copied.feature_set("image") / "shard-000001.h5").unlink()
    config = CONFIG.model_copy(update={"scheduler": "tcp://127.0.0.1:9"})
    with pytest.raises(UsageError, match="no Dask scheduler answers"):
        extract(copied, config, **BOTH)


def test_the_cache_of_another_manifest_is_not_filled_up(copied, tmp_path):
    write_sample_manifest(copied.root, sample_rows(6), image_root=sample_folder(), name="other")
    with pytest.raises(CacheError, match="few") as caught:
        extract(Workspace.open(copied.root), CONFIG, manifest="other", **BOTH)
    assert "--root" in str(caught.value)
