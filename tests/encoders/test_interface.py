"""Names to encoders: shipped presets, libraries' names, folders, and what cannot be."""

import pytest

from featcache.config import list_configs
from featcache.encoders.decode import VIEWS
from featcache.encoders.interface import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    load_encoder,
    locate_encoder,
    random_encoder,
    resolve_encoder,
    short_name,
    split_view,
)
from featcache.errors import UsageError

TEXTS = {"bert", "biobert", "clinicalbert", "pubmedbert", "cxr-bert", "minilm", "minilm-demo"}
IMAGES = {"vit-b", "dinov2-s", "dinov2-b", "swin-b", "rad-dino", "resnet-ae", "lite0-demo"}
CASED = {"biobert", "clinicalbert"}


def test_every_preset_resolves_to_its_modality():
    assert set(list_configs("encoders")) >= TEXTS | IMAGES
    for name in TEXTS:
        config = resolve_encoder(name, "text")
        assert config.lowercase is (name not in CASED)
        assert config.dim in (384, 768)
    for name in IMAGES:
        config = resolve_encoder(name, "image")
        assert None not in (config.grid, config.dim, config.num_prefix_tokens)
        assert config.preprocessing.fit == "pad"


def test_presets_of_timm_say_what_timm_says():
    for name in ("vit-b", "dinov2-b", "dinov2-s", "swin-b"):
        ours = resolve_encoder(name, "image")
        theirs = resolve_encoder(ours.source, "image")
        assert ours.source == theirs.source
        assert ours.preprocessing.mean == theirs.preprocessing.mean
        assert ours.preprocessing.std == theirs.preprocessing.std
        assert ours.preprocessing.interpolation == theirs.preprocessing.interpolation


def test_the_autoencoder_reads_its_own_range():
    preprocessing = resolve_encoder("resnet-ae", "image").preprocessing
    assert preprocessing.value_range == (-1024.0, 1024.0)
    assert (preprocessing.channels, preprocessing.mean, preprocessing.std) == (1, (0.0,), (1.0,))


def test_an_untagged_name_of_timm_gets_its_tag():
    config = resolve_encoder("timm:vit_base_patch16_224", "image")
    assert config.source == "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("vitb", "image", "did you mean `vit-b`"),
        ("bert", "image", "`bert` encodes texts, an encoder of images is asked for"),
        ("vit-b", "text", "`vit-b` encodes images, an encoder of texts is asked for"),
        ("timm:vit_base_patch16_22", "image", "timm has no network"),
        ("timm:no-such-thing-at-all", "image", "timm.list_models"),
        ("timm:resnet18.nothing", "image", "no weights `nothing` of `resnet18`"),
    ],
)
def test_what_cannot_be_is_a_usage_error(name, modality, message):
    with pytest.raises(UsageError, match=message):
        resolve_encoder(name, modality)


def test_a_folder_is_an_encoder_named_after_it(folders):
    located = locate_encoder(str(folders["vit"]), "image")
    assert (located.name, located.config.library) == ("vit", "timm")
    assert located.network.startswith("vit_tiny_patch16_224 {")
    assert isinstance(load_encoder(located), ImageEncoder)
    assert isinstance(load_encoder(locate_encoder(str(folders["bert"]), "text")), TextEncoder)


def test_a_yaml_of_ones_own_is_an_encoder(folders, tmp_path):
    path = folders["bert"].parent / "mine.yaml"
    path.write_text(
        "kind: encoder\nmodality: text\nlibrary: transformers\nsource: folder:bert\n"
        "pooled: mean\nmax_tokens: 16\n"
    )
    encoder = load_encoder(locate_encoder(str(path), "text"))
    assert (encoder.name, encoder.max_tokens) == ("mine", 16)
    assert encoder.spec(batch_size=2).preprocessing["pooled"] == "mean"


def test_a_source_has_a_kind():
    with pytest.raises(ValueError, match="pattern"):
        EncoderConfig(modality="text", library="transformers", source="somewhere")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vit-b", ("vit-b", "identity")),
        ("vit-b@flip", ("vit-b", "flip")),
        ("vit-b@identity", ("vit-b", "identity")),
        ("hf:some/model@crop-center", ("hf:some/model", "crop-center")),
        ("/home/me@here/vit", ("/home/me@here/vit", "identity")),
        ("/home/me@here/vit@flip", ("/home/me@here/vit", "flip")),
    ],
)
def test_a_name_may_end_in_a_view(name, parts):
    assert split_view(name) == parts


def test_a_folder_whose_name_has_an_at_sign_is_itself(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert split_view(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), "identity")
    assert split_view(str(tmp_path / "a@b@flip")) == (str(tmp_path / "a@b"), "flip")


@pytest.mark.parametrize(("view", "hint"), [("flop", "did you mean `flip`"), ("", "no view ``")])
def test_an_unknown_view_is_a_usage_error(view, hint):
    with pytest.raises(UsageError, match=hint) as caught:
        resolve_encoder(f"vit-b@{view}", "image")
    assert "crop-center" in caught.value.fix


def test_texts_have_no_views():
    with pytest.raises(UsageError, match="texts have no view `flip`"):
        resolve_encoder("bert@flip", "text")


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_views_share_one_network_and_nothing_else_is_alike(folders, kind):
    name = str(folders[kind])
    plain = locate_encoder(name, "image")
    seen = {load_encoder(plain).spec(batch_size=4).fingerprint}
    for view in VIEWS[1:]:
        located = locate_encoder(f"{name}@{view}", "image")
        assert located.name == short_name(f"{name}@{view}") == f"{kind}@{view}"
        assert located.preprocessing.view == view
        assert located.preprocessing.image_size == plain.preprocessing.image_size
        assert located.network_key == plain.network_key
        spec = load_encoder(located).spec(batch_size=4)
        assert spec.extract_command.startswith(f"featcache extract --backbone {kind}@{view}")
        seen.add(spec.fingerprint)
    assert len(seen) == len(VIEWS)
    assert locate_encoder(f"{name}@identity", "image") == plain


def test_another_network_has_another_key(folders):
    name = str(folders["vit"])
    options = [{}, {"image_size": 64}, {"image_size": (32, 64)}, {"layers": (1,)}, {"pool_grid": 2}]
    keys = {locate_encoder(name, "image", **each).network_key for each in options}
    keys.add(random_encoder(locate_encoder(name, "image"), seed=1).located.network_key)
    keys.add(locate_encoder(str(folders["registers"]), "image").network_key)
    assert len(keys) == len(options) + 2


def test_a_random_encoder_of_a_view_keeps_the_view_last(folders):
    located = locate_encoder(f"{folders['vit']}@flip", "image")
    name = random_encoder(located, seed=3).name
    assert name == "vit-random3@flip"
    assert split_view(name) == ("vit-random3", "flip")


@pytest.mark.parametrize("layers", [(), (0,), (1, 0)])
def test_layers_without_a_number_are_a_usage_error(folders, layers):
    with pytest.raises(UsageError, match="counted from 1") as caught:
        locate_encoder(str(folders["vit"]), "image", layers=layers)
    assert caught.value.where == "--layers"


def test_a_pooling_below_one_is_a_usage_error(folders):
    with pytest.raises(UsageError, match="a pooling of 0"):
        locate_encoder(str(folders["vit"]), "image", pool_grid=0)
