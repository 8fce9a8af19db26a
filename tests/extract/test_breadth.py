"""Stage one with several encoders at once, views, inner layers, pooled grids and int8."""

import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest_extract import shard_hashes
from distributed import Client
from encoders.conftest import stir
from pydantic import ValidationError
from reliability.kit import CONFIG, VIT, partials, times, write_rows
from timm.models import save_for_hf

from featcache.cache.reader import FeatureSet
from featcache.cli import main
from featcache.errors import CacheError
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.workspace import Workspace

ROWS = 16


def save_vit(folder, change=None, **options):
    network = stir(timm.create_model("vit_tiny_patch16_224", num_classes=0, **(VIT | options)))
    with torch.no_grad():
        if change is not None:
            change(network)
    save_for_hf(network, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Twice as wide as the tiny one: four rows a shard instead of eight."""
    return save_vit(tmp_path_factory.mktemp("wide") / "wide", embed_dim=384)


@pytest.fixture
def make(tiny):
    def make(root, images=(), texts=(), rows=range(ROWS), **settings):
        workspace = Workspace.open(root)
        if not workspace.manifests.exists():
            write_rows(workspace, tiny.pictures, rows, texts=1)
        config = CONFIG.model_copy(update={"scheduler": tiny.scheduler} | settings)
        result = extract(
            workspace,
            config,
            backbones=[str(one) for one in images] or ["none"],
            text_encoders=[str(one) for one in texts] or ["none"],
        )
        return workspace, result

    return make


@pytest.fixture
def opened(tiny):
    """Says which pictures the worker has opened since the last question."""

    def listen():
        sys.opened_pictures = []
        if not hasattr(sys, "hears_pictures"):
            sys.hears_pictures = True

            def hear(event, arguments):
                if event == "open" and str(arguments[0]).endswith(".jpg"):
                    sys.opened_pictures.append(str(arguments[0]))

            sys.addaudithook(hear)

    def ask():
        found, sys.opened_pictures = sys.opened_pictures, []
        return found

    with Client(tiny.scheduler) as client:
        client.run(listen)
        yield lambda: [path for paths in client.run(ask).values() for path in paths]


def test_several_encoders_at_once_make_the_bytes_of_single_runs(tiny, wide, make, opened, tmp_path):
    together, result = make(tmp_path / "all", [tiny.vit, wide], [tiny.bert])
    paths = opened()
    assert len(paths) == len(set(paths)) == ROWS, "a picture is decoded once for both"
    assert [(one.unit, one.rows) for one in result.passes] == [("images", ROWS), ("texts", ROWS)]
    assert [made.shards for made in result.sets] == [2, 4, 1]
    alone = {}
    for name, chosen in {"vit": [tiny.vit], "wide": [wide]}.items():
        alone |= shard_hashes(make(tmp_path / name, chosen)[0])
    alone |= shard_hashes(make(tmp_path / "bert", texts=[tiny.bert])[0])
    assert shard_hashes(together) == alone

    lost = together.folder("image") / "wide" / "shard-000001.h5"
    lost.unlink()
    before = times(together.folder("image") / "vit") | times(lost.parent)
    opened()
    result = make(tmp_path / "all", [tiny.vit, wide], [tiny.bert])[1]
    assert [made.missing_shards for made in result.sets] == [0, 1, 0]
    assert len(opened()) == 4
    after = times(together.folder("image") / "vit") | times(lost.parent)
    assert before.items() <= after.items() | {(lost.name, before.get(lost.name))}
    assert shard_hashes(together) == alone


def test_each_side_is_made_without_the_other_ones_weights(tiny, make, tmp_path):
    vit, bert = (shutil.copytree(one, tmp_path / one.name) for one in (tiny.vit, tiny.bert))
    make(tmp_path / "ws", [vit], [bert], rows=range(4))
    with Client(tiny.scheduler) as client:
        for weights, images, texts in ((bert, [vit], []), (vit, [], [bert])):
            hidden = (weights / "model.safetensors").rename(tmp_path / "hidden")
            for shard in (tmp_path / "ws").rglob("*.h5"):
                shard.unlink()
            result = make(tmp_path / "ws", images, texts)[1]
            hidden.rename(weights / "model.safetensors")
            assert [made.missing_shards for made in result.sets] == [1]
            (loaded,) = client.run(
                lambda: [key[0][0] for key in sys.modules["featcache.encoders.task"]._loaded]
            ).values()
            assert loaded == ["image" if images else "text"]


def test_three_views_are_three_sets_and_equal_single_runs(tiny, make, opened, tmp_path):
    workspace, result = make(tmp_path / "all", [tiny.vit], rows=range(8), views=3)
    names = [made.name for made in result.sets]
    assert names[:2] == ["image/vit", "image/vit@flip"]
    assert names[2].startswith("image/vit@crop-")
    assert len(opened()) == 8
    alone = {}
    for name in names:
        view = name.removeprefix("image/vit")
        alone |= shard_hashes(make(tmp_path / name, [f"{tiny.vit}{view}"], rows=range(8))[0])
    assert shard_hashes(workspace) == alone
    assert len(set(alone.values())) == 3
    assert workspace.feature_set("image", "vit@flip").name == "vit@flip"
    assert workspace.feature_set("image").name == "vit"


def test_layers_pooling_and_size_are_options_and_are_told(tiny, tmp_path, capsys):
    deep = save_vit(tmp_path / "deep", depth=3)
    write_rows(Workspace.open(tmp_path / "ws"), tiny.pictures, range(4), texts=0)
    root = ["--root", str(tmp_path / "ws")]
    options = ["--layers", "1,-1", "--pool-grid", "2", "--image-size", "32x64", "--device", "cpu"]
    arguments = ["--backbone", f"{deep}@flip", "--scheduler", tiny.scheduler, "--set=threads=1"]
    assert main(["extract", *arguments, *options, *root]) == 0
    assert main(["info", *root]) == 0
    text = capsys.readouterr().out
    assert "33 = 1 prefix + 4 x 8 grid, width 384" in text
    assert "32 x 64 pixels, view flip, layers 1, 3 side by side, grid averaged over 2 x 2" in text
    tokens = FeatureSet.open(tmp_path / "ws/features/image/deep@flip").read_tokens(np.arange(4))
    assert tokens.shape == (4, 33, 384)


def loud(network):
    network.norm.weight[5] *= 100


def test_int8_is_half_as_large_and_near_and_comes_back_the_same(tiny, make, tmp_path):
    vit = save_vit(tmp_path / "vit", loud)
    exact, _ = make(tmp_path / "exact", [vit])
    small, result = make(tmp_path / "small", [vit], dtype="int8")
    folders = [one.feature_set("image") for one in (exact, small)]
    bytes_of = [sum(path.stat().st_size for path in one.glob("*.h5")) for one in folders]
    assert bytes_of[1] <= 0.52 * bytes_of[0]  # with headers, which are large beside 1 MiB
    rows = np.arange(ROWS)
    want, got = (FeatureSet.open(one).read_tokens(rows).astype(np.float32) for one in folders)
    others = np.arange(want.shape[-1]) != 5
    for channels, limit in ((others, 0.02), (~others, 0.02)):
        error = np.linalg.norm((got - want)[..., channels]) / np.linalg.norm(want[..., channels])
        assert error < limit
    assert np.abs(want[..., 5]).mean() > 20 * np.abs(want[..., others]).mean()
    quality = json.loads((folders[1] / "quality.json").read_text())["int8"]
    assert 0 < quality["relative_error"] < 0.02
    assert quality["worst_row"] >= quality["relative_error"]
    assert "int8: relative error 0.0" in result.to_text()

    hashes = shard_hashes(small)
    (folders[1] / "shard-000000.h5").unlink()
    assert make(tmp_path / "small", [vit], dtype="int8")[1].sets[0].missing_shards == 1
    assert shard_hashes(small) == hashes


def deafening(network):
    network.norm.weight[3] *= 1e7


def test_a_value_beyond_float16_names_encoder_and_row_and_leaves_nothing(tiny, make, tmp_path):
    vit = save_vit(tmp_path / "huge", deafening)
    with pytest.raises(
        CacheError, match=r"encoder `huge` gave .* in channel 3 of row `study0"
    ) as c:
        make(tmp_path / "ws", [vit], rows=range(4))
    assert "float16 cannot hold" in c.value.what
    assert "--dtype float32" in c.value.fix
    workspace = Workspace.open(tmp_path / "ws")
    assert not list(workspace.root.rglob("*.h5"))
    assert not partials(workspace)
    with pytest.raises(CacheError, match="float16 cannot hold") as c:
        make(tmp_path / "float32", [vit], rows=range(4), dtype="float32")
    assert "normalized_mean" in c.value.fix, "the class token is the pooled vector, too"


def blind(network):
    network.patch_embed.proj.weight.zero_()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_encoder_that_answers_the_same_for_every_picture_is_told(
    tiny, make, tmp_path, capsys, dtype
):
    vit = save_vit(tmp_path / "blind", blind)
    make(tmp_path / "ws", [vit], dtype=dtype)
    assert "image/blind gives nearly the same tokens" in capsys.readouterr().err
    make(tmp_path / "seeing", [tiny.vit], dtype=dtype)
    assert "nearly the same" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "want"),
    [
        ({"image_size": "224x448"}, (224, 448)),
        ({"image_size": "224 X 448"}, (224, 448)),
        ({"image_size": "224"}, 224),
        ({"layers": "6,12"}, (6, 12)),
        ({"layers": "6, -1"}, (6, -1)),
        ({"layers": "-1"}, (-1,)),
        ({"layers": -1}, (-1,)),
    ],
)
def test_sizes_and_layers_are_read_as_typed(typed, want):
    (name,) = typed
    assert getattr(ExtractConfig(**typed), name) == want


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"image_size": "0x448"}, "a side is below 1 pixel"),
        ({"image_size": 0}, "a side is below 1 pixel"),
        ({"image_size": "wide"}, "valid integer"),
        ({"layers": "6,twelve"}, "valid integer"),
        ({"dtype": "int4"}, "'float16', 'float32' or 'int8'"),
        ({"pool_grid": 0}, "greater than or equal to 1"),
        ({"views": 8}, "less than or equal to 7"),
        ({"batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(typed, words):
    with pytest.raises(ValidationError, match=words):
        ExtractConfig(**typed)
