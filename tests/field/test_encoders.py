"""What went wrong with encoders elsewhere: registers, lengths, sizes, batches, ranges."""

import numpy as np
import pytest
import timm
import torch
from encoders.conftest import REPORT, save_bert, stir
from PIL import Image
from timm.models import save_for_hf

from featcache.encoders.decode import Preprocessing, decode_image, to_input
from featcache.encoders.interface import load_encoder, locate_encoder, resolve_encoder
from featcache.errors import UsageError

VIT = {"img_size": 224, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 0}


def saved(folder, name):
    save_for_hf(stir(timm.create_model(name, **VIT)), folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224")


def load(folder, modality="image", **options):
    return load_encoder(locate_encoder(str(folder), modality, **options))


def encode(encoder, paths):
    greys = np.stack([decode_image(path, encoder.preprocessing) for path in paths])
    return encoder(to_input(torch.from_numpy(greys), encoder.preprocessing)).tokens


def drawn(path, height, width, square=None, seed=None):
    """A picture file: black with a white square of 16 pixels, or noise."""
    levels = np.zeros((height, width), np.uint8)
    if seed is not None:
        levels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    if square is not None:
        row, column = (16 * place for place in square)
        levels[row : row + 16, column : column + 16] = 255
    Image.fromarray(levels).save(path)
    return path


def test_registers_are_prefix_tokens_and_never_patches(tmp_path):
    """Five tokens stand before the grid: counted as one, four would lie in the map."""
    encoder = load(saved(tmp_path, "vit_small_patch14_reg4_dinov2"))
    spec = encoder.spec(batch_size=1)
    assert (spec.num_prefix_tokens, spec.grid, spec.num_tokens) == (5, (16, 16), 261)
    tokens = encode(encoder, [drawn(tmp_path / "a.png", 224, 224, seed=0)])
    assert tokens[:, spec.num_prefix_tokens :].shape[1] == 256
    halved = load(tmp_path, pool_grid=2)
    pooled = encode(halved, [tmp_path / "a.png"])
    assert pooled.shape[1] == 5 + 64
    assert torch.equal(pooled[:, :5], tokens[:, :5])


def test_a_report_of_two_thousand_words_is_cut_between_its_special_tokens(tmp_path):
    """Beyond its positions a BERT fails with an index error in the middle of a run."""
    words = [word for word in REPORT.split() if word.isalpha()]
    long = " ".join(words * (2000 // len(words) + 1))
    encoder = load(save_bert(tmp_path, max_position_embeddings=512), "text")
    ids, truncated = encoder.tokenize(["lungs are clear", long])
    assert truncated == [False, True]
    assert (len(ids[1]), ids[1][0], ids[1][-1]) == (512, ids[0][0], ids[0][-1])
    once = encoder.tokenize([" ".join(words)]).ids[0][1:-1]
    assert ids[1][1:-1] == (once * 70)[:510]
    assert torch.isfinite(encoder(*encoder.pad_batch(ids)).tokens).all()
    with pytest.raises(UsageError, match="3 to 512 tokens of a text, 600 were asked for"):
        locate_encoder(str(tmp_path), "text", max_tokens=600)


@pytest.mark.parametrize(
    ("asked", "grid"), [(None, (14, 14)), (256, (16, 16)), ((224, 448), (14, 28))]
)
def test_a_white_square_moves_its_own_token_at_every_size(vit, tmp_path, asked, grid):
    """From the file to the token, over positions resampled from a square grid of 14 x 14."""
    encoder = load(vit, image_size=asked)
    spec = encoder.spec(batch_size=1)
    assert (spec.grid, spec.num_tokens) == (grid, 1 + grid[0] * grid[1])
    height, width = (16 * side for side in grid)
    assert spec.preprocessing["image_size"] == [height, width]
    dark = encode(encoder, [drawn(tmp_path / "dark.png", height, width)])
    for r, c in [(0, 0), (0, grid[1] - 1), (grid[0] - 1, 0), (3, 9)]:
        path = drawn(tmp_path / "lit.png", height, width, square=(r, c))
        moved = (encode(encoder, [path]) - dark)[0].norm(dim=-1)
        assert int(moved[1:].argmax()) == r * grid[1] + c


def test_a_size_that_cannot_be_names_those_that_can(vit):
    with pytest.raises(UsageError, match="250 x 500 pixels is no whole number") as caught:
        load(vit, image_size=(250, 500))
    assert caught.value.fix == "--image-size 240x496 or --image-size 256x512"
    for height, width in [(240, 496), (256, 512)]:
        assert load(vit, image_size=(height, width)).grid == (height // 16, width // 16)


@pytest.mark.parametrize("wide", [256, 512])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_picture_is_the_same_whoever_shares_its_batch(vit, tmp_path, wide, batch):
    """Padded to the largest of a batch, a picture would get other tokens beside a wide one."""
    encoder = load(vit)
    one = drawn(tmp_path / "one.png", 256, 256, seed=1)
    others = [
        drawn(tmp_path / f"{number}.png", 256, wide, seed=number) for number in range(2, batch + 1)
    ]
    alone = encode(encoder, [one])[0]
    together = encode(encoder, [*others, one])[-1]
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_the_autoencoder_sees_hounsfield_like_numbers_not_zero_to_one(tmp_path):
    """Fed with 0 to 1 it answers the same for every picture, and nothing complains."""
    preprocessing = resolve_encoder("resnet-ae", "image").preprocessing
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(14, 0).repeat(14, 1)
    Image.fromarray(levels).save(tmp_path / "a.png")
    greys = torch.from_numpy(decode_image(tmp_path / "a.png", preprocessing))[None]
    values = to_input(greys, preprocessing)
    by_hand = (2 * levels.astype(np.float64) / 255 - 1) * 1024
    assert values.shape == (1, 1, 224, 224)
    assert np.abs(values[0, 0].numpy() - by_hand).max() <= 1e-4 * 1024
    assert (values.min(), values.max()) == (-1024, 1024)
    usual = to_input(greys, Preprocessing(image_size=(224, 224), mean=(0.0,), std=(1.0,)))
    assert (usual.min(), usual.max()) == (0, 1)
