import pytest
import torch

from featcache.device import resolve_device
from featcache.errors import UsageError


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "cuda:99", "cuda:", "cuda:x"):
        with pytest.raises(UsageError, match=f"there is no device `{name}` here"):
            resolve_device(name)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match="0 CUDA devices"):
        resolve_device("cuda")
