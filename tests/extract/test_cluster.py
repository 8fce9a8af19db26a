"""Workers: what each one sees."""

import os

import pytest

from featcache.cluster import connect, local_workers, resolve_device
from featcache.errors import UsageError


def test_each_worker_sees_its_own_gpu_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = local_workers("cuda", None, 3)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["2", "5"]
    assert {p["OMP_NUM_THREADS"] for p in places} == {"3"}


def test_the_environment_reaches_the_worker_process():
    places = [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "9"}]
    with connect(None, places) as client:
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    assert sorted(seen.values()) == ["7", "9"]


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match="no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="unknown device `tpu`"):
        resolve_device("tpu")
