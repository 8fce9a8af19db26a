"""Names to encoders: shipped presets, libraries' names, folders, and what cannot be."""

import pytest

from featcache.config import list_configs
from featcache.encoders.interface import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    load_encoder,
    locate_encoder,
    resolve_encoder,
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
