"""Trainings that are shared by several real processes."""

import json
import signal

import pytest
from adaptor.spaces import wait_for_ever
from safetensors.torch import load_file

QUIET = {"adaptor.dropout": 0, "precision": "32-true"}


@pytest.fixture(scope="module")
def space(make_space):
    return make_space()


@pytest.fixture(scope="module")
def alone(space):
    assert space.train("alone", **QUIET) == 0
    return space.metrics("alone")


def differences(one, other):
    """Largest relative difference of the numbers of two logs, which must have the same lines."""
    assert len(one) == len(other)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert [a["kind"], a["epoch"]] == [b["kind"], b["epoch"]]
        for name in {"loss", "grad_norm", "logit_scale", "mrr"} & a.keys():
            worst = max(worst, abs(a[name] - b[name]) / max(abs(a[name]), 1e-3))
    return worst


def test_two_ranks_are_one_with_their_batch_stopped_and_resumed_by_one(space, alone):
    hurt = ("during", 7, signal.SIGTERM)
    assert space.train("shared", hurt, devices=2, **QUIET) == 143
    said = space.said()
    assert "checkpoint step-000000007 is saved" in said
    assert said.count("pairs, 15 steps in 3 epochs") == 1  # one process speaks for all
    assert differences(space.metrics("shared"), alone[:8]) < 1e-5
    assert space.train("shared", devices=1, **QUIET) == 0
    assert "trained by 2 processes before, now by 1" in space.said()
    assert differences(space.metrics("shared"), alone) < 1e-4
    one, two = (
        load_file(space.root / "runs" / name / "adaptor" / "adaptor.safetensors")
        for name in ("alone", "shared")
    )
    for name, tensor in one.items():
        if name.endswith("key_value.bias"):  # no gradient but rounding, which AdamW blows up
            continue
        assert (tensor - two[name]).abs().max() < 1e-4, name


def test_a_batch_that_ranks_cannot_share_is_refused(space):
    assert space.train("odd", devices=3) == 2
    assert "8 pairs cannot be shared equally by 3 ranks" in space.said()
    assert not (space.root / "runs" / "odd").exists()


@pytest.mark.slow
def test_ranks_draw_other_dropout_and_go_on_bit_for_bit(space):
    assert space.train("whole", devices=2, **{"adaptor.dropout": 0.3}) == 0
    hurt = ("after", 6, signal.SIGKILL)
    settings = {"adaptor.dropout": 0.3, "devices": 2, "checkpoint_every": 2}
    assert space.train("killed", hurt, **settings) == -signal.SIGKILL
    assert space.train("killed", **settings) == 0
    assert space.result("killed") == space.result("whole")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks_and_records_the_whole_batch(space):
    assert space.train("hot", devices=2, lr=1e25, gradient_clip="null") == 1
    assert "is nan at step" in space.said()
    assert space.said().count("error: ") == 1
    recorded = json.loads((space.root / "runs" / "hot" / "nonfinite.json").read_text())
    assert len({one["key"] for one in recorded["pairs"]}) == 8


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_training_in_words(space):
    assert space.train("dead", ("kill a worker after", 3, signal.SIGKILL), devices=2) == 1
    assert "error: process 1 of the training ended with code -9" in space.said()
    assert "Traceback" not in space.said()


@pytest.mark.slow
def test_rank_0_does_not_wait_for_ever_for_one_that_is_gone(processes, tmp_path):
    process = processes.Process(target=wait_for_ever, args=(tmp_path, tmp_path / "errors.txt"))
    process.start()
    process.join(300)
    assert process.exitcode == 1
    assert "error: this folder is no feature set" in (tmp_path / "errors.txt").read_text()
