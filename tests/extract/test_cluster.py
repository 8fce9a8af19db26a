"""Workers: what each one sees."""

import os

from featcache.cluster import connect, local_workers


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
