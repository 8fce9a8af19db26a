"""Finding weights: packages, folders, the hub's cache, and a hub that is not there."""

import hashlib
import pickle
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from featcache.encoders.interface import load_encoder, locate_encoder
from featcache.encoders.weights import (
    check_pin,
    hub_answers,
    hub_file,
    package_path,
    read_state_dict,
)
from featcache.errors import EncoderError, WeightsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download needs; `files` by their path."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        self.asked.append(f"{self.command} {self.path}")
        repo, _, name = self.path.lstrip("/").partition("/resolve/main/")
        content = self.files.get(f"{repo}/{name}")
        if content is None:
            self.send_response(404)
            missing = any(path.startswith(f"{repo}/") for path in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if missing else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine and an empty cache."""
    handler = type("FilledHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("no_proxy", "*")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def put(hub, repo, folder):
    for path in folder.iterdir():
        hub.files[f"{repo}/{path.name}"] = path.read_bytes()


def test_without_a_hub_every_preset_fails_within_seconds_and_says_how(unreachable_hub):
    started = time.monotonic()
    for name, modality in [("vit-b", "image"), ("rad-dino", "image"), ("cxr-bert", "text")]:
        with pytest.raises(WeightsError, match="not on this machine, and no hub answers") as caught:
            locate_encoder(name, modality)
        assert f"--weights {name}=PATH" in caught.value.fix
        assert 'pip install "featcache[demo]"' in caught.value.fix
        assert str(unreachable_hub) in caught.value.where
    assert time.monotonic() - started < 20  # of which most is the import of two libraries


def test_a_hub_that_accepts_but_never_answers_is_given_up(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert not hub_answers(0.2)
        assert time.monotonic() - started < 5


def test_a_name_server_that_never_answers_is_given_up(monkeypatch):
    release = threading.Event()

    def resolve(*_args, **_options):
        release.wait(10)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    started = time.monotonic()
    assert not hub_answers(0.2)
    assert time.monotonic() - started < 5
    release.set()


def test_a_proxy_is_asked_instead_of_the_hub(hub, monkeypatch):
    proxy = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", proxy)
    assert hub_answers(2.0)
    assert hub.asked == ["HEAD http://hub.invalid"]


def test_a_proxy_that_lets_nothing_through_is_no_answer(hub, monkeypatch):
    proxy = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", proxy)
    assert not hub_answers(2.0)


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        hub_file("org/model", ["config.json"], encoder="mine")
    assert not hub.asked


def test_a_download_is_cached_and_then_works_offline(hub, folders, monkeypatch):
    put(hub, "org/tiny", folders["bert"])
    first = locate_encoder("hf:org/tiny", "text")
    assert first.name == "hf:org--tiny"
    assert first.weights.is_relative_to(constants.HF_HUB_CACHE)
    assert first.config.source == "hf:org/tiny"

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = locate_encoder("hf:org--tiny", "text")
    assert again == first
    assert not hub.asked
    load_encoder(again)


def test_timm_names_load_from_the_hubs_files(hub, folders, monkeypatch):
    import timm

    network = timm.create_model("test_vit.r160_in1k", pretrained=False)
    save_file(network.state_dict(), folders["vit"].parent / "test_vit.safetensors")
    content = (folders["vit"].parent / "test_vit.safetensors").read_bytes()
    hub.files["timm/test_vit.r160_in1k/model.safetensors"] = content
    encoder = load_encoder(locate_encoder("timm:test_vit.r160_in1k", "image"))
    images = torch.randn(2, 3, *encoder.preprocessing.image_size)
    with torch.inference_mode():
        assert torch.equal(network.eval().forward_features(images), encoder(images).tokens)
    assert encoder.name == "timm:test_vit.r160_in1k"


def test_the_second_name_of_a_file_is_tried(hub, folders):
    torch.save({"x": torch.ones(1)}, folders["bert"].parent / "w.bin")
    hub.files["org/old/pytorch_model.bin"] = (folders["bert"].parent / "w.bin").read_bytes()
    path = hub_file("org/old", ["model.safetensors", "pytorch_model.bin"], encoder="old")
    assert path.name == "pytorch_model.bin"
    with pytest.raises(WeightsError, match=r"has none of: vocab\.txt"):
        hub_file("org/old", ["vocab.txt"], encoder="old")


def test_an_unknown_repository_is_named(hub):
    with pytest.raises(WeightsError, match="no `org/nothing` for you"):
        locate_encoder("hf:org/nothing", "text")


def test_an_impossible_id_is_named(unreachable_hub):
    with pytest.raises(WeightsError, match="no possible hub id"):
        locate_encoder("hf:a b", "text")


def test_weights_by_hand_replace_the_hubs(unreachable_hub, folders, tmp_path):
    located = locate_encoder("cxr-bert", "text", weights=folders["bert"], max_tokens=64)
    assert located.weights == folders["bert"] / "model.safetensors"
    assert located.config.lowercase is True
    with pytest.raises(EncoderError, match="dim = 32, its preset says 768"):
        load_encoder(located)
    with pytest.raises(WeightsError, match="no such file of weights"):
        locate_encoder("vit-b", "image", weights=tmp_path / "nothing.safetensors")


def test_a_single_file_of_a_transformers_model_needs_its_config(unreachable_hub, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"config.json of `microsoft/") as caught:
        locate_encoder("cxr-bert", "text", weights=tmp_path / "model.safetensors")
    assert "a folder with config.json" in caught.value.fix


def test_a_folder_that_lacks_a_file_is_named(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["bert"] / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"has none of: model.safetensors"):
        locate_encoder(str(tmp_path), "text")


def test_a_missing_package_names_the_extra():
    with pytest.raises(WeightsError, match="a package that is not installed") as caught:
        package_path("no_such_package/model", extra="demo", encoder="minilm-demo")
    assert 'pip install "featcache[demo]"' in caught.value.fix


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_package").mkdir()
    (tmp_path / "trap_package" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "trap_package" / "w.pth").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    path = package_path("trap_package/w.pth", extra=None, encoder="trap")
    assert path == tmp_path / "trap_package" / "w.pth"
    with pytest.raises(WeightsError, match="holds no other"):
        package_path("trap_package/other", extra=None, encoder="trap")


def test_a_pinned_file_must_be_that_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"right")
    check_pin(path, hashlib.sha256(b"right").hexdigest(), encoder="demo")
    with pytest.raises(WeightsError, match="is not what it claims to be"):
        check_pin(path, hashlib.sha256(b"wrong").hexdigest(), encoder="demo")


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "sung")


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"weight": torch.ones(1), "x": Canary(canary)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="more than tensors") as caught:
        read_state_dict(tmp_path / "model.pth")
    assert not canary.exists()
    assert "weights_only" not in str(caught.value)

    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / "plain.bin")
    assert not canary.exists()


NOISE = [random.Random(seed).randbytes(300) for seed in range(40)]


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", *NOISE])
def test_damaged_weights_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged|more than tensors"):
        read_state_dict(tmp_path / name)


def test_other_kinds_of_files_are_not_read(tmp_path):
    with pytest.raises(WeightsError, match=r"not read from `\.npz` files"):
        read_state_dict(tmp_path / "a.npz")


@pytest.mark.parametrize("wrap", [dict, lambda d: {"state_dict": d}, lambda d: {"model": d}])
def test_state_dicts_are_unwrapped(tmp_path, wrap):
    torch.save(wrap({"module.weight": torch.ones(2)}), tmp_path / "a.pt")
    assert list(read_state_dict(tmp_path / "a.pt")) == ["weight"]
    torch.save(wrap({"epoch": 3}), tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        read_state_dict(tmp_path / "b.pt")
