"""Exports: whole or not at all, never over anything else, and loadable as their card says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from adaptor.conftest import build, run_config, spec, write_set

from featcache.adaptor import export as module
from featcache.adaptor.export import WRITTEN, export
from featcache.adaptor.saved import load_adaptor
from featcache.adaptor.train import train_adaptor
from featcache.cli import main
from featcache.config import file_sha256
from featcache.errors import CacheError, StaleFeatureSetError, UsageError
from featcache.loader.gather import iterate_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study, and the folder of a run on it."""
    study = build(tmp_path_factory.mktemp("made"), notes=["The tokens are made up."])
    folder = study.workspace.runs / "tried"
    train_adaptor(study.images, study.texts, study.manifest, folder, run_config(epochs=1))
    return study, folder


@pytest.fixture
def write(made, tmp_path):
    """Export the run; arguments go to `export`."""

    def start(to="safetensors", out=None, **changes):
        out = tmp_path / "out" if out is None else out
        return export(made[0].workspace, out, to=to, run=str(made[1]), device="cpu", **changes)

    return start


def snippet(folder: Path) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def run_snippet(folder: Path, monkeypatch) -> dict:
    """What the card's lines define, run in the folder."""
    lines = snippet(folder)
    assert lines.count("\n") == 5
    names: dict = {}
    monkeypatch.chdir(folder)
    exec(lines, names)
    return names


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["safetensors", "parquet", "numpy"])
def test_the_lines_of_the_card_load_what_was_written(made, write, to, monkeypatch):
    result = write(to)
    assert set(result.files) == {*WRITTEN[to], "README.md", "config.json"}
    assert names_in(result.folder.parent) == ["out"]
    names = run_snippet(result.folder, monkeypatch)
    if to == "safetensors":
        assert names["vector"].shape == (1, 16)
    else:
        assert names["vectors"].shape == (58, 16)
        assert names["keys"] == made[0].images.keys


def test_the_exported_adaptor_is_that_of_the_run(made, write):
    folder = write().folder
    ours, theirs = load_adaptor(made[1]), load_adaptor(folder)
    assert theirs.facts == ours.facts
    weights = "adaptor.safetensors"
    assert (folder / weights).read_bytes() == (made[1] / "adaptor" / weights).read_bytes()


def test_the_card_says_what_it_is_and_on_what_it_was_trained(made, write):
    study, folder = made
    card = (write().folder / "README.md").read_text()
    for words in (
        "allpairs, pooling cosine, loss infonce",
        f"`made-image`, width 12, tokens all, fingerprint `{study.images.fingerprint}`",
        f"`made-text`, width 8, tokens all, fingerprint `{study.texts.fingerprint}`",
        "| data set | made (not a synthetic stand-in) |",
        "42 pairs of the split `train`",
        file_sha256(folder / "adaptor" / "adaptor.safetensors"),
        "- The tokens are made up.",
        "the last of 1 epochs",
    ):
        assert words in card, words
    assert "is synthetic" not in card
    assert str(study.workspace.root) not in card


def test_the_best_epoch_is_exported_by_its_folder(made, tmp_path):
    study, folder = made
    result = export(study.workspace, tmp_path / "out", run=str(folder / "best"))
    assert result.run == "tried"
    assert "epoch 1 of 1, the best by MRR" in (tmp_path / "out" / "README.md").read_text()


def expected(features, trained, rows):
    """Vectors row by row, each alone."""
    vectors = []
    for _, tokens, valid in iterate_rows(features, rows, 1):
        with torch.no_grad():
            if valid is None:
                vectors.append(trained.objective.image_vector(trained.adaptor, tokens.float()))
            else:
                given = (tokens.float(), valid)
                vectors.append(trained.objective.encode_texts(trained.adaptor, *given))
    return torch.cat(vectors).numpy()


@pytest.mark.parametrize("to", ["parquet", "numpy"])
def test_every_row_has_the_vector_that_the_adaptor_makes_of_it_alone(made, write, to, monkeypatch):
    monkeypatch.setattr("featcache.adaptor.vector_files.BATCH_SIZE", 7)
    monkeypatch.setattr("featcache.adaptor.vector_files.GROUP_BYTES", 20 * 16 * 4)
    study, run = made
    result = write(to)
    assert result.facts["vectors"] == {"images": 58, "texts": 57}
    trained = load_adaptor(run)
    for name, features in (("images", study.images), ("texts", study.texts)):
        if to == "numpy":
            vectors = np.load(result.folder / f"{name}.npy", mmap_mode="r")
            keys = np.load(result.folder / f"{name}_keys.npy", allow_pickle=False).tolist()
        else:
            file = pq.ParquetFile(result.folder / f"{name}.parquet")
            assert file.num_row_groups == 3  # of 21 rows at most
            table = file.read()
            vectors, keys = np.array(table["vector"].to_pylist(), np.float32), table["key"]
            keys = keys.to_pylist()
            about = json.loads(table.schema.metadata[b"featcache"])
            assert about["fingerprint"] == features.fingerprint
            assert about["weights_sha256"] == trained.facts.weights_sha256
        assert keys == features.keys
        whole = expected(features, trained, np.arange(len(keys)))
        assert vectors.dtype == np.float32
        assert np.allclose(vectors, whole, atol=1e-6)


def test_the_card_of_vectors_says_that_they_count_as_their_data(write):
    card = (write("numpy").folder / "README.md").read_text()
    assert "count as the data they came from" in card
    assert "images: 58 vectors of width 16." in card


def test_an_export_is_never_overwritten_unasked(made, write):
    first = write()
    before = content(first.folder)
    with pytest.raises(UsageError, match="holds an export; nothing is overwritten") as caught:
        write("numpy")
    assert "--overwrite" in caught.value.fix
    assert content(first.folder) == before
    again = write("numpy", overwrite=True)
    assert (first.replaced, again.replaced) == (False, True)
    assert again.to_text().startswith("replaced ")
    assert not (again.folder / "adaptor.safetensors").exists()
    assert names_in(again.folder.parent) == ["out"]


def test_nothing_that_no_export_wrote_is_ever_replaced(made, write, tmp_path):
    for out, words in (
        (made[1], "no export wrote, e.g. `adaptor`"),
        (tmp_path / "f", "this is no"),
    ):
        (tmp_path / "f").touch()
        with pytest.raises(UsageError, match=words):
            write(out=out, overwrite=True)
    (tmp_path / "link").symlink_to(made[1])
    with pytest.raises(UsageError, match="this is none"):
        write(out=tmp_path / "link", overwrite=True)
    load_adaptor(made[1])


def test_a_failure_leaves_the_export_before_and_nothing_else(write, monkeypatch):
    folder = write().folder
    before = content(folder)

    def full(*_):
        raise CacheError("the disk is full")

    def refused(path, target):
        if "partial" in path.name and ".old." not in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    rename = Path.rename
    for owner, name, failing in ((module, "write_json", full), (Path, "rename", refused)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(CacheError, match=r"the disk is full|Permission denied"):
                write("numpy", overwrite=True)
        assert content(folder) == before
        assert names_in(folder.parent) == ["out"]


def test_features_of_another_encoder_are_refused(made, write):
    study = made[0]
    folder = study.workspace.features / "image" / "other"
    write_set(folder, spec("image", weights_sha256="9" * 64), ["a"], list(np.zeros((1, 5, 12))))
    try:
        with pytest.raises(StaleFeatureSetError, match="was trained on image features"):
            write("parquet", backbone="other")
        assert write("numpy").facts["vectors"]["images"] == 58  # found by its fingerprint
    finally:
        shutil.rmtree(folder)


def test_an_adaptor_alone_is_exported_without_its_runs_facts(made, tmp_path):
    shutil.copytree(made[1] / "adaptor", tmp_path / "alone")
    result = export(made[0].workspace, tmp_path / "out", run=str(tmp_path / "alone"))
    assert result.run == "alone"
    assert "| data set | not recorded here |" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(
    write, monkeypatch, tmp_path
):
    monkeypatch.setattr("featcache.adaptor.graph.NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(UsageError, match="no_such_package") as caught:
        write("onnx")
    assert "featcache[export]" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_graphs_lie_beside_the_card_whose_lines_run_them(write, monkeypatch, unchecked):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    result = write("onnx")
    assert max(result.facts["errors"].values()) < 1e-5
    assert "Checked with onnxruntime against torch" in (result.folder / "README.md").read_text()
    assert run_snippet(result.folder, monkeypatch)["vector"].shape == (1, 16)


def test_the_command_prints_one_object_and_refuses_an_unknown_kind(made, tmp_path, capsys):
    study, folder = made
    root = ["--root", str(study.workspace.root)]
    asked = ["export", str(folder), "--out", str(tmp_path / "out"), *root]
    assert main([*asked, "--to", "pickle"]) == 2
    assert "unknown kind of export `pickle`" in capsys.readouterr().err
    assert main([*asked, "--to", "numpy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["vectors"] == {"images": 58, "texts": 57}
    assert found["files"]["images.npy"] == (tmp_path / "out" / "images.npy").stat().st_size
