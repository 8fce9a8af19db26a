"""ONNX graphs give torch's vectors, whatever stands in padding, for any number of rows."""

import copy

import pytest
import torch
from adaptor.test_saved import IMAGE, TEXT

from featcache.adaptor import graph as module
from featcache.adaptor.graph import write_graphs
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import build_adaptor, load_adaptor, save_adaptor
from featcache.errors import TrainingError

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]


@pytest.fixture
def trained(tmp_path):
    def make(**changes):
        torch.manual_seed(0)
        config = AdaptorConfig(dim=16, layers=1, heads=2, feedforward=24, **changes)
        adaptor, objective = build_adaptor(config, 12, 8)
        folder = tmp_path / "adaptor"
        save_adaptor(folder, adaptor, objective, config, image=IMAGE, text=TEXT, notes=[])
        return load_adaptor(folder)

    return make


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooling": "logsumexp"}, {"objective": "dual"}, {"objective": "paper"}],
    ids=str,
)
def test_a_graph_gives_torchs_vectors(trained, tmp_path, changes):
    one = trained(**changes)
    errors = write_graphs(tmp_path, one, {"weights_sha256": one.facts.weights_sha256})
    assert max(errors.values()) < 1e-5
    assert sorted(path.name for path in tmp_path.glob("*.onnx*")) == ["image.onnx", "text.onnx"]
    image, text = (
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        for name in ("image.onnx", "text.onnx")
    )
    tokens, words = torch.randn(9, 11, 12), torch.randn(9, 11, 8)
    valid = torch.arange(11) < torch.arange(9).unsqueeze(1)  # the first text has no token
    words[~valid] = torch.nan
    want = one.objective.image_vector(one.adaptor, tokens)
    (found,) = image.run(None, {"tokens": tokens.numpy()})
    assert torch.allclose(torch.from_numpy(found), want, atol=1e-5)
    want = one.objective.encode_texts(one.adaptor, words, valid)
    (found,) = text.run(None, {"tokens": words.numpy(), "valid": valid.numpy()})
    assert torch.allclose(torch.from_numpy(found), want, atol=1e-5)
    stored = {one.key: one.value for one in onnx.load(tmp_path / "text.onnx").metadata_props}
    assert stored["weights_sha256"] == one.facts.weights_sha256


def test_a_graph_that_differs_from_torch_is_refused(trained, tmp_path, monkeypatch):
    whole = module.torch.onnx.export

    def wrong(side, **given):
        other = copy.deepcopy(side)
        torch.nn.init.ones_(other.adaptor.image_projection.weight)
        return whole(other, **given)

    monkeypatch.setattr(module.torch.onnx, "export", wrong)
    with pytest.raises(TrainingError, match=r"image\.onnx differs from torch by"):
        write_graphs(tmp_path, trained(), {})


def test_without_the_runtime_a_graph_is_written_unchecked(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RUNTIME", "no_such_package")
    assert write_graphs(tmp_path, trained(), {}) is None
    assert (tmp_path / "text.onnx").is_file()
