import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featcache.adaptor.checkpoint import (
    FolderCheckpointIO,
    check_fit,
    checkpoint_folder,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from featcache.errors import CacheError, FeatcacheError, TrainingError
from featcache.partial import partial_path

STATE = {
    "weights": {"a.b": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": [{"state": {0: {"step": torch.tensor(7.0)}, 1: {}}, "betas": (0.9, 0.999)}],
    "rate": 1e-5 / 3,
    "nothing": None,
    "text": "é",
    "flag": True,
    "large": 2**70,
    "odd": [float("inf"), float("-inf")],
}


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path):
    path = checkpoint_folder(tmp_path, 7)
    write_checkpoint(path, STATE)
    return path


def test_what_is_written_comes_back_bit_for_bit(folder):
    found = read_checkpoint(folder)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE["weights"].items():
        assert torch.equal(found["weights"][name], tensor)
        assert found["weights"][name].dtype == tensor.dtype
    (optimizer,) = found["optimizer"]
    assert optimizer["betas"] == (0.9, 0.999)
    assert list(optimizer["state"]) == [0, 1]
    assert optimizer["state"][0]["step"] == 7
    for name in ("rate", "nothing", "text", "flag", "large", "odd"):
        assert found[name] == STATE[name]


def test_a_value_that_is_not_a_number_comes_back(tmp_path):
    write_checkpoint(tmp_path / "one", {"value": float("nan")})
    assert math.isnan(read_checkpoint(tmp_path / "one")["value"])


def test_a_checkpoint_is_two_files_and_no_pickle(folder):
    assert {path.name for path in folder.iterdir()} == {"state.json", "tensors.safetensors"}
    json.loads((folder / "state.json").read_text())
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError)):
            pickle.loads(path.read_bytes())


def test_an_object_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(TrainingError, match=r"`a\.b\.0` of the checkpoint is a PosixPath"):
        write_checkpoint(tmp_path / "one", {"a": {"b": [tmp_path]}})
    assert not list(tmp_path.iterdir())


def test_a_writer_that_died_leaves_nothing_that_counts(tmp_path, folder):
    dead = folder.with_name("step-000000009.partial-" + partial_path(folder).name.split("-", 2)[-1])
    dead = dead.with_name(dead.name.rsplit("-", 2)[0] + "-999999999-1")
    dead.mkdir()
    (dead / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path) == folder
    write_checkpoint(checkpoint_folder(tmp_path, 8), STATE)
    assert not dead.exists()


def test_only_finished_folders_of_ours_are_checkpoints(tmp_path, folder):
    (folder.parent / "step-12").mkdir()
    (folder.parent / "last.ckpt").write_bytes(b"x")
    assert checkpoints(tmp_path) == [folder]
    for step in (1_000_000_000, 8):
        write_checkpoint(checkpoint_folder(tmp_path, step), {})
    assert latest_checkpoint(tmp_path).name == "step-1000000000"
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000008", "step-1000000000"]
    prune_checkpoints(tmp_path, keep=0)
    assert not folder.parent.exists()
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_there_is_replaced(folder):
    write_checkpoint(folder, {"step": 1})
    assert read_checkpoint(folder) == {"step": 1}


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edited(path):
    path.write_text(path.read_text().replace("0.999", "0.998"))


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("state.json", cut, "no JSON"),
        ("state.json", Path.unlink, "has no state.json"),
        ("state.json", edited, "damaged or changed: its content is not what `state_sha256` says"),
        ("state.json", lambda p: p.write_text("[]"), "has `version` None, this featcache reads 1"),
        ("state.json", lambda p: p.write_text('{"version": 2}'), "has `version` 2"),
        ("state.json", lambda p: p.write_text('{"version": 1}'), "lacks `state`"),
        ("state.json", lambda p: p.write_text("[" * 100_000), "no JSON"),
        ("tensors.safetensors", cut, "damaged or changed: SHA-256"),
        ("tensors.safetensors", flip, "damaged or changed: SHA-256"),
        ("tensors.safetensors", Path.unlink, "no readable tensors.safetensors"),
    ],
)
def test_damage_is_named_with_file_and_remedy(folder, name, harm, words):
    harm(folder / name)
    with pytest.raises(TrainingError, match=words) as caught:
        read_checkpoint(folder)
    assert caught.value.where == str(folder / name)
    assert "delete this folder: the same command goes on" in caught.value.fix


@pytest.mark.parametrize("place", ["file", "state.json", "tensors.safetensors"])
def test_code_of_a_stranger_never_runs(tmp_path, folder, place):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    path = tmp_path / "stranger.ckpt" if place == "file" else folder / place
    path.write_bytes(bomb)
    with pytest.raises(TrainingError) as caught:
        FolderCheckpointIO().load_checkpoint(path if place == "file" else folder)
    assert "weights_only" not in str(caught.value)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()


@pytest.mark.parametrize(
    "doctored",
    [
        {"$tensor": "not there"},
        {"$tensor": ["weights"]},
        {"$float": "__import__"},
        {"$tuple": 3},
        {"$items": [[1, 2, 3]]},
        {"$items": [[[], 1]]},
        {"$object": "os.system"},
        {"$tensor": "weights.a.b", "more": 1},
    ],
)
def test_what_is_no_plain_value_is_refused(tmp_path, monkeypatch, doctored):
    from featcache.adaptor import checkpoint

    monkeypatch.setattr(checkpoint, "_flatten", lambda *_: {"deep": [doctored]})
    write_checkpoint(tmp_path / "one", {})
    with pytest.raises(TrainingError, match=r"`deep\.0` holds what no checkpoint of ours can hold"):
        read_checkpoint(tmp_path / "one")


def test_the_trainer_writes_and_removes_through_the_plugin(tmp_path):
    io = FolderCheckpointIO()
    io.save_checkpoint({"step": 3}, tmp_path / "one")
    assert io.load_checkpoint(tmp_path / "one", weights_only=True) == {"step": 3}
    io.remove_checkpoint(tmp_path / "one")
    with pytest.raises(TrainingError, match="there is no checkpoint here"):
        io.load_checkpoint(tmp_path / "one")


def test_a_full_disk_leaves_the_checkpoint_before(folder, monkeypatch):
    from featcache.adaptor import checkpoint

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(CacheError, match="the disk is full"):
        write_checkpoint(checkpoint_folder(folder.parents[1], 8), STATE)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    read_checkpoint(folder)


def test_weights_of_another_shape_are_named(tmp_path):
    mine = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    check_fit(mine, dict(mine), tmp_path, "weights")
    with pytest.raises(TrainingError, match=r"`b` is missing, and 2 more like this"):
        check_fit(mine, {"a": torch.zeros(3, 2), "c": torch.zeros(1)}, tmp_path, "weights")
    with pytest.raises(FeatcacheError, match=r"`a` has shape \(3, 2\), not \(2, 3\)\n"):
        check_fit(mine, {"a": torch.zeros(3, 2), "b": torch.zeros(2)}, tmp_path, "weights")


def test_a_safetensors_file_alone_is_no_checkpoint(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "tensors.safetensors")
    with pytest.raises(TrainingError, match=r"has no state\.json"):
        read_checkpoint(tmp_path)
