"""Image encoders: six layouts of tokens, and what a preset promises about them."""

import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types

import pytest
import timm
import torch
from contracts.encoder_contract import ImageEncoderContract
from encoders.conftest import stir
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from featcache.encoders.decode import Preprocessing, to_input
from featcache.encoders.interface import load_encoder, locate_encoder, random_encoder
from featcache.errors import EncoderError, UsageError, WeightsError

LAYOUTS = {  # prefix tokens, grid, width
    "vit": (1, (2, 2), 192),
    "registers": (5, (2, 2), 48),
    "swin": (0, (2, 2), 192),
    "cnn": (0, (2, 2), 512),
    "dinov2": (1, (2, 2), 32),
}


def load(folder, **options):
    return load_encoder(locate_encoder(str(folder), "image", **options))


def pictures(encoder, count=3):
    torch.manual_seed(1)
    size = encoder.preprocessing.image_size
    return torch.randn(count, encoder.preprocessing.channels, *size)


@pytest.mark.parametrize("kind", LAYOUTS)
class TestSmallEncoders(ImageEncoderContract):
    @pytest.fixture
    def encoder(self, folders, kind):
        return load(folders[kind])

    @pytest.fixture
    def images(self, encoder):
        return pictures(encoder)

    def test_its_layout_is_recorded(self, encoder, kind):
        assert (encoder.num_prefix_tokens, encoder.grid, encoder.dim) == LAYOUTS[kind]

    def test_random_weights_have_another_name_and_hash(self, encoder, images):
        with torch.random.fork_rng():
            before = torch.random.get_rng_state()
            first, again = (random_encoder(encoder.located, seed=3) for _ in range(2))
            assert torch.equal(before, torch.random.get_rng_state())
        other = random_encoder(encoder.located, seed=4)
        assert first.name == f"{encoder.name}-random3"
        assert first.spec(batch_size=4).weights_sha256 == "random-3"
        assert torch.equal(first(images).tokens, again(images).tokens)
        assert not torch.equal(first(images).tokens, other(images).tokens)
        assert not torch.equal(first(images).tokens, encoder(images).tokens)


def test_timm_tokens_are_what_timm_gives(folders):
    encoder = load(folders["registers"])
    network = timm.create_model(f"local-dir:{folders['registers']}", pretrained=True).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        assert torch.equal(network.forward_features(images), encoder(images).tokens)
        assert torch.equal(network(images), encoder(images).pooled)


def test_a_cnn_map_becomes_rows_of_tokens(folders):
    encoder = load(folders["cnn"])
    network = timm.create_model(f"local-dir:{folders['cnn']}", pretrained=True).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        features = network.forward_features(images)
    tokens = encoder(images).tokens.reshape(3, 2, 2, 512).permute(0, 3, 1, 2)
    assert torch.allclose(tokens, features, atol=1e-4)
    assert torch.allclose(encoder(images).pooled, features.mean((2, 3)), atol=1e-4)


def test_a_swin_map_is_read_with_its_channels_last(folders):
    encoder = load(folders["swin"])
    network = timm.create_model(f"local-dir:{folders['swin']}", pretrained=True).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        features = network.forward_features(images)  # B H W C
    assert torch.equal(encoder(images).tokens, features.flatten(1, 2))


def test_transformers_tokens_are_what_transformers_gives(folders):
    encoder = load(folders["dinov2"])
    network = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        output = network(images)
    assert torch.equal(output.last_hidden_state, encoder(images).tokens)
    assert torch.equal(output.pooler_output, encoder(images).pooled)


def test_a_folder_says_its_own_preprocessing(folders):
    preprocessing = load(folders["dinov2"]).preprocessing
    assert preprocessing == Preprocessing(
        image_size=(28, 28), mean=(0.4,) * 3, std=(0.2,) * 3, interpolation="bicubic"
    )
    assert load(folders["registers"]).preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (4, 4)), ((32, 64), (2, 4))])
def test_positions_are_resampled_by_timms_own_filter(folders, size, grid):
    encoder = load(folders["vit"], image_size=size)
    assert encoder.grid == grid
    assert encoder.spec(batch_size=4).preprocessing["image_size"] == list(size)
    network = timm.create_model(
        f"local-dir:{folders['vit']}", pretrained=True, img_size=size
    ).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        assert torch.equal(network.forward_features(images), encoder(images).tokens)
    ImageEncoderContract().test_grid_token_r_c_sees_the_patch_r_c(encoder)


def test_transformers_positions_are_resampled_too(folders):
    encoder = load(folders["dinov2"], image_size=(28, 56))
    assert (encoder.grid, encoder.num_prefix_tokens) == ((2, 4), 1)


@pytest.mark.parametrize(("kind", "size"), [("vit", 40), ("swin", 72), ("dinov2", 30)])
def test_a_size_of_no_whole_patches_is_refused_with_sizes_that_are(folders, kind, size):
    with pytest.raises(UsageError, match="no whole number of the") as caught:
        load(folders[kind], image_size=size)
    assert "--image-size" in caught.value.fix


def test_an_image_size_below_one_is_refused(folders):
    with pytest.raises(UsageError, match="0 pixels"):
        load(folders["vit"], image_size=0)


@pytest.mark.parametrize("kind", ["vit", "registers"])
def test_inner_layers_of_timm_pass_its_last_norm(folders, kind):
    encoder = load(folders[kind], layers=(1, 2))
    network = timm.create_model(f"local-dir:{folders[kind]}", pretrained=True).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
        inner = network.norm(network.blocks[0](x))
    tokens, pooled = encoder(images)
    plain = load(folders[kind])
    assert torch.equal(tokens, torch.cat([inner, plain(images).tokens], -1))
    assert torch.equal(pooled, plain(images).pooled)
    assert encoder.dim == 2 * plain.dim == tokens.shape[2]
    assert encoder.spec(batch_size=4).preprocessing["layers"] == [1, 2]
    swapped = load(folders[kind], layers=(-1, -2))
    assert torch.equal(swapped(images).tokens, torch.cat(tokens.chunk(2, -1)[::-1], -1))
    assert swapped.spec(batch_size=4).preprocessing["layers"] == [2, 1]
    assert torch.equal(load(folders[kind], layers=(1,))(images).tokens, inner)


def save_vision(folder, model, config):
    stir(model(config(**SMALL, num_hidden_layers=3))).save_pretrained(folder)
    return folder


SMALL = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FAMILIES = [
    (Dinov2Model, Dinov2Config),
    (ViTModel, ViTConfig),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
]


@pytest.mark.parametrize(("model", "config"), FAMILIES)
def test_inner_layers_of_transformers_pass_its_last_norm(tmp_path, model, config):
    folder = save_vision(tmp_path, model, config)
    encoder, plain = load(folder, layers=(2, 3)), load(folder)
    network = model.from_pretrained(folder).eval()
    images = pictures(encoder)
    with torch.inference_mode():
        states = network(images, output_hidden_states=True).hidden_states
        inner = network.layernorm(states[2])
    tokens, pooled = encoder(images)
    assert torch.equal(tokens, torch.cat([inner, plain(images).tokens], -1))
    assert torch.equal(pooled, plain(images).pooled)
    with pytest.raises(UsageError, match="has 3 layers, 4 were asked for"):
        load(folder, layers=(4,))


@pytest.mark.parametrize("kind", ["swin", "cnn"])
def test_a_network_of_stages_has_its_last_layer_alone(folders, kind):
    with pytest.raises(UsageError, match="no row of equal blocks") as caught:
        load(folders[kind], layers=(1,))
    assert caught.value.fix.startswith("--layers -1")
    assert load(folders[kind], layers=(-1,)).spec(batch_size=1).preprocessing["layers"] == [-1]


def test_inner_tokens_that_do_not_end_as_the_encoders_are_refused(folders, monkeypatch):
    """A network whose last block is not what it gives: its inner blocks mean something else."""
    forward = timm.models.VisionTransformer.forward_intermediates

    def other(self, *arguments, **options):
        return forward(self, *arguments, **(options | {"norm": False}))

    other.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_intermediates", other)
    with pytest.raises(UsageError, match="no row of equal blocks"):
        load(folders["vit"], layers=(1, 2))


def test_layers_and_a_coarser_grid_go_together(folders):
    encoder = load(folders["registers"], layers=(1, 2), pool_grid=2)
    tokens, _ = encoder(pictures(encoder))
    assert tokens.shape == (3, 5 + 1, 2 * 48)
    spec = encoder.spec(batch_size=4)
    assert (spec.grid, spec.num_tokens, spec.dim) == ((1, 1), 6, 96)


def test_equal_layers_have_one_fingerprint_however_they_are_counted(folders):
    spec = [load(folders["vit"], layers=layers).spec(batch_size=4) for layers in ((1, 2), (-2, -1))]
    assert spec[0].fingerprint == spec[1].fingerprint


def test_a_preset_may_say_layers_and_pooling(folders):
    folder = folders["vit"]
    path = write_preset(folder, folder.parent / "deep.yaml", layers=[1, 2], pool_grid=2, dim=192)
    encoder = load(path)
    assert (encoder.dim, encoder.grid) == (384, (1, 1))
    assert load(path, layers=(2,), pool_grid=1).grid == (2, 2)


def test_a_stored_grid_that_is_no_square_is_no_square_for_transformers_either(tmp_path):
    wide = SMALL | {"image_size": (28, 56)}
    stir(ViTModel(ViTConfig(**wide, num_hidden_layers=1))).save_pretrained(tmp_path / "vit")
    encoder = load(tmp_path / "vit")
    assert encoder.grid == (2, 4)
    ImageEncoderContract().test_grid_token_r_c_sees_the_patch_r_c(encoder)
    with pytest.raises(UsageError, match="as if 28 x 56 pixels were a square") as caught:
        load(tmp_path / "vit", image_size=56)
    assert caught.value.fix == "--image-size 28x56"
    stir(Dinov2Model(Dinov2Config(**wide, num_hidden_layers=1))).save_pretrained(tmp_path / "dino")
    with pytest.raises(UsageError, match="were a square"):  # 2 x 4 here; 2 x 8 would pass unseen
        load(tmp_path / "dino")


@pytest.mark.parametrize("stored", [(32, 64), (64, 64)])
@pytest.mark.parametrize("asked", [(64, 32), (32, 128), (64, 64)])
def test_timm_resamples_from_the_grid_that_is_stored(tmp_path, stored, asked):
    """8 or 16 positions in another shape have to be resampled too, though their number fits."""
    network = stir(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=stored, depth=1)
    )
    save_for_hf(network, tmp_path, safe_serialization=True)
    encoder = load(tmp_path, image_size=asked)
    grid = tuple(side // 16 for side in stored)
    assert encoder.grid == tuple(side // 16 for side in asked)
    wanted = resample_abs_pos_embed(network.pos_embed, encoder.grid, grid, num_prefix_tokens=1)
    assert torch.equal(encoder._network.pos_embed, wanted)


def write_preset(folder, path, **values):
    lines = ["kind: encoder", "modality: image", f"source: folder:{folder.name}"]
    if "library" not in values:
        lines += ["library: timm", "architecture: vit_tiny_patch16_224"]
    lines += [
        "preprocessing: {image_size: [32, 32], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
        *(f"{key}: {json.dumps(value)}" for key, value in values.items()),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_prefix_tokens", 5, "num_prefix_tokens = 1, its preset says 5"),
        ("grid", [3, 3], r"grid = \(2, 2\), its preset says \(3, 3\)"),
        ("dim", 768, "dim = 192, its preset says 768"),
    ],
)
def test_a_preset_that_promises_another_layout_is_an_error(folders, field, value, message):
    folder = folders["vit"]
    path = write_preset(folder, folder.parent / f"mine-{field}.yaml", **{field: value})
    with pytest.raises(EncoderError, match=message):
        load(path)


@pytest.mark.parametrize("pooled", ["class", "mean", "normalized_mean"])
def test_a_preset_chooses_the_pooled_vector(folders, pooled):
    folder = folders["vit"]
    encoder = load(write_preset(folder, folder.parent / f"pool-{pooled}.yaml", pooled=pooled))
    tokens, vector = encoder(pictures(encoder))
    mean = tokens[:, 1:].mean(1)
    expected = {
        "class": tokens[:, 0],
        "mean": mean,
        "normalized_mean": torch.nn.functional.normalize(mean, dim=-1),
    }
    assert torch.allclose(vector, expected[pooled])


def test_a_class_token_cannot_be_pooled_where_there_is_none(folders, tmp_path):
    folder = folders["cnn"]
    path = write_preset(folder, folder.parent / "cnn-class.yaml", pooled="class")
    path.write_text(path.read_text().replace("vit_tiny_patch16_224", "resnet10t"))
    with pytest.raises(EncoderError, match="no class token"):
        load(path)


def changed(folders, tmp_path, change):
    tensors = load_file(folders["vit"] / "model.safetensors")
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.attn.qkv.weight"), r"1 missing \(blocks.0.attn.qkv.weight\)"),
        (lambda t: t.update(odd=torch.zeros(1)), r"1 surplus \(odd\)"),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), "1 of another shape"),
    ],
)
def test_weights_that_do_not_fill_the_network_are_refused(folders, tmp_path, change, message):
    path = changed(folders, tmp_path, change)
    with pytest.raises(WeightsError, match=message):
        load(folders["vit"], weights=path)


def test_a_classifier_may_be_left_over(folders, tmp_path):
    path = changed(folders, tmp_path, lambda t: t.update({"head.weight": torch.zeros(5, 192)}))
    encoder, plain = load(folders["vit"], weights=path), load(folders["vit"])
    images = pictures(plain)
    assert torch.equal(encoder(images).tokens, plain(images).tokens)
    assert encoder.spec(batch_size=4).fingerprint != plain.spec(batch_size=4).fingerprint


def test_weights_of_nothing_but_nan_are_refused(folders, tmp_path):
    path = changed(folders, tmp_path, lambda t: t["norm.weight"].fill_(float("nan")))
    with pytest.raises(WeightsError, match="not finite"):
        load(folders["vit"], weights=path)


def test_half_precision_weights_run_in_float32(folders, tmp_path):
    tensors = load_file(folders["dinov2"] / "model.safetensors")
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    (tmp_path / "config.json").write_text((folders["dinov2"] / "config.json").read_text())
    encoder = load(folders["dinov2"], weights=path)
    assert encoder(pictures(encoder)).tokens.dtype == torch.float32


def test_surplus_weights_of_transformers_are_refused_too(folders, tmp_path):
    tensors = load_file(folders["dinov2"] / "model.safetensors") | {"odd.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folders["dinov2"] / name).read_text())
    with pytest.raises(WeightsError, match=r"1 surplus \(odd.weight\)"):
        load(tmp_path)


def test_a_folder_without_a_processor_is_told_about(folders, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["dinov2"] / name).read_bytes())
    assert load(tmp_path).preprocessing.mean == (0.5, 0.5, 0.5)
    assert "mean and std 0.5 are assumed" in capsys.readouterr().err


def test_tensors_in_another_order_are_refused_where_order_names_them(folders, tmp_path):
    tensors = load_file(folders["vit"] / "model.safetensors")
    torch.save(dict(reversed(tensors.items())), tmp_path / "model.pth")
    path = write_preset(folders["vit"], folders["vit"].parent / "o.yaml", state_dict="ordered")
    with pytest.raises(WeightsError, match="in their order"):
        load(path, weights=tmp_path / "model.pth")


class StandInAutoencoder(torch.nn.Module):
    """The outside of torchxrayvision's ResNetAE, which is not among our dependencies."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 512, 80, stride=72, bias=False)
        self.uplayer1 = torch.nn.Linear(2, 2)
        self.conv1_1 = torch.nn.Linear(2, 2)

    def encode(self, x, check_resolution=True):
        assert not check_resolution
        return self.conv1(x / 1024)


@pytest.fixture
def autoencoder(monkeypatch, tmp_path):
    module = types.ModuleType("torchxrayvision.autoencoders")
    module.ResNetAE = StandInAutoencoder
    package = types.ModuleType("torchxrayvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchxrayvision", None)
    monkeypatch.setitem(sys.modules, "torchxrayvision", package)
    monkeypatch.setitem(sys.modules, "torchxrayvision.autoencoders", module)
    monkeypatch.setattr("featcache.encoders.image.library_version", lambda _: "stand-in")
    torch.manual_seed(0)
    return StandInAutoencoder().eval()


def test_the_autoencoder_gives_its_map_row_by_row(autoencoder, tmp_path):
    torch.save(autoencoder.state_dict(), tmp_path / "ae.pt")
    encoder = load_encoder(locate_encoder("resnet-ae", "image", weights=tmp_path / "ae.pt"))
    greys = torch.randint(0, 256, (2, 224, 224), dtype=torch.uint8)
    tokens, pooled = encoder(to_input(greys, encoder.preprocessing))
    wanted = autoencoder.encode((2 * greys[:, None].float() / 255 - 1) * 1024, False)
    assert torch.allclose(tokens, wanted.flatten(2).transpose(1, 2), atol=1e-4)
    assert torch.allclose(pooled, wanted.mean((2, 3)), atol=1e-4)
    assert encoder.num_parameters == 512 * 80 * 80  # the decoder half is left out
    assert encoder.spec(batch_size=2).preprocessing["value_range"] == [-1024.0, 1024.0]


def test_the_autoencoder_needs_all_of_its_weights(autoencoder, tmp_path):
    tensors = autoencoder.state_dict()
    del tensors["conv1.weight"]
    torch.save(tensors, tmp_path / "ae.pt")
    with pytest.raises(WeightsError, match=r"1 missing \(conv1.weight\)"):
        load_encoder(locate_encoder("resnet-ae", "image", weights=tmp_path / "ae.pt"))
    with pytest.raises(WeightsError, match="not on this machine") as caught:
        locate_encoder("resnet-ae", "image")
    assert "--weights resnet-ae=FILE" in caught.value.fix


@pytest.mark.skipif(
    importlib.util.find_spec("torchxrayvision") is not None, reason="torchxrayvision is installed"
)
def test_torchxrayvision_is_named_when_it_is_missing():
    with pytest.raises(EncoderError, match="not installed") as caught:
        locate_encoder("resnet-ae", "image")
    assert "pip install torchxrayvision" in caught.value.fix


@pytest.mark.parametrize("name", ["vit-b", "dinov2-s", "swin-b"])
def test_a_presets_network_has_the_layout_that_it_promises(name, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "any.safetensors")
    located = locate_encoder(name, "image", weights=tmp_path / "any.safetensors")
    encoder = random_encoder(located, seed=0)  # compares prefix, grid and width with the preset
    assert encoder.grid == located.config.grid
    assert encoder.pooled_dim == encoder.dim
