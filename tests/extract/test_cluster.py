"""Workers: what each one sees."""

import os

from featcache.cluster import connect, local_workers


def test_each_worker_sees_its_own_gpu_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = local_workers("cuda", None, 3)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["2", "5"]
    assert {p["OMP_NUM_THREADS"] for p in places} == {"3"}


def test_more_workers_than_gpus_share_them_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = local_workers("cuda", 3, None)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["2", "5", "2"]


def test_workers_on_a_cpu_share_the_cores_and_see_the_gpus_that_this_process_sees(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    places = local_workers("cpu", 2, None)
    assert places == [{"OMP_NUM_THREADS": "4"}] * 2


def test_two_gpus_make_two_worker_processes_that_each_see_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    with connect(None, local_workers("cuda", None, 1)) as client:
        seen = client.run(
            lambda: (
                os.environ["CUDA_VISIBLE_DEVICES"],
                os.environ["OMP_NUM_THREADS"],
                os.environ["OMP_WAIT_POLICY"],
                os.getpid(),
            )
        )
    assert sorted(one[:3] for one in seen.values()) == [
        ("7", "1", "passive"),
        ("9", "1", "passive"),
    ]
    assert len({one[3] for one in seen.values()} | {os.getpid()}) == 3
