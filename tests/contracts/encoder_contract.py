"""What every encoder must hold to; the test class of each one inherits one of these."""

import pickle
from dataclasses import replace

import pytest
import torch

from featcache.cache.format import FeatureSetSpec


def asked(encoder, **changes):
    """Where an encoder is, with more asked of it."""
    return replace(encoder.located, config=encoder.located.config.model_copy(update=changes))


class EncoderContract:
    """Both modalities. A subclass gives the fixture `encoder`; `batch` is what to call it with."""

    def test_its_weights_are_frozen_in_float32(self, encoder):
        assert encoder.num_parameters > 0
        spec = encoder.spec(dtype="float16", batch_size=4)
        assert isinstance(spec, FeatureSetSpec)
        assert (spec.dim, spec.pooled_dim) == (encoder.dim, encoder.pooled_dim)
        assert spec.num_prefix_tokens == encoder.num_prefix_tokens
        assert len(spec.weights_sha256) == 64

    def test_its_spec_follows_what_decides_a_row(self, encoder):
        first = encoder.spec(dtype="float16", batch_size=4)
        assert first == encoder.spec(dtype="float16", batch_size=4)
        for change in ({"dtype": "float32"}, {"batch_size": 8}, {"autocast": "bfloat16"}):
            other = encoder.spec(**({"dtype": "float16", "batch_size": 4} | change))
            assert other.fingerprint != first.fingerprint

    def test_its_spec_holds_no_folder_of_this_machine(self, encoder):
        text = encoder.spec(batch_size=4).model_dump_json()
        assert str(encoder.located.weights.parent) not in text

    def test_its_location_travels_to_a_worker(self, encoder):
        sent = pickle.dumps(encoder.located)
        assert len(sent) < 10_000
        assert pickle.loads(sent) == encoder.located
        assert hash(pickle.loads(sent).network_key) == hash(encoder.located.network_key)

    def test_its_last_layer_by_number_is_what_it_gives_anyway(self, encoder, batch):
        again = type(encoder)(asked(encoder, layers=(-1,)))
        for one, other in zip(encoder(*batch), again(*batch), strict=True):
            assert torch.equal(one, other)
        assert again.dim == encoder.dim
        assert "layers" not in encoder.spec(batch_size=4).preprocessing
        assert again.spec(batch_size=4).fingerprint != encoder.spec(batch_size=4).fingerprint


class ImageEncoderContract(EncoderContract):
    """A subclass also gives `images`: a normalised batch of at least 3 different pictures."""

    slack = 0  # tokens by which a network with a wide view may miss a lit patch

    @pytest.fixture
    def batch(self, images):
        return (images,)

    def test_its_grid_can_be_pooled(self, encoder, images):
        height, width = encoder.grid
        pooled = type(encoder)(asked(encoder, pool_grid=2))
        tokens, vectors = pooled(images)
        assert pooled.grid == (-(-height // 2), -(-width // 2))
        spec = pooled.spec(batch_size=4)
        assert (spec.grid, spec.num_tokens) == (pooled.grid, tokens.shape[1])
        assert spec.preprocessing["pool_grid"] == 2
        assert "pool_grid" not in encoder.spec(batch_size=4).preprocessing
        prefix = encoder.num_prefix_tokens
        whole = encoder(images)
        assert torch.equal(vectors, whole.pooled)
        assert torch.equal(tokens[:, :prefix], whole.tokens[:, :prefix])
        corner = whole.tokens[:, prefix:].reshape(len(images), height, width, -1)[:, :2, :2]
        assert torch.allclose(tokens[:, prefix], corner.mean((1, 2)), atol=1e-5)

    def test_tokens_are_prefix_plus_grid(self, encoder, images):
        height, width = encoder.grid
        encoded = encoder(images)
        length = encoder.num_prefix_tokens + height * width
        assert encoded.tokens.shape == (len(images), length, encoder.dim)
        assert encoded.tokens.is_contiguous()
        assert encoded.pooled.shape == (len(images), encoder.pooled_dim)
        assert torch.isfinite(encoded.tokens).all()
        assert not encoded.tokens.requires_grad
        spec = encoder.spec(batch_size=4)
        assert (spec.grid, spec.num_tokens) == (encoder.grid, length)

    def test_a_row_does_not_depend_on_its_batch(self, encoder, images):
        together = encoder(images).tokens
        alone = torch.cat([encoder(image[None]).tokens for image in images])
        assert (together - alone).abs().max() <= 1e-5 * together.abs().max()

    def test_it_gives_the_same_twice(self, encoder, images):
        assert torch.equal(encoder(images).tokens, encoder(images).tokens)

    def test_different_pictures_give_different_vectors(self, encoder, images):
        pooled = torch.nn.functional.normalize(encoder(images).pooled, dim=-1)
        assert (pooled @ pooled.T - torch.eye(len(images))).max() < 1 - 1e-6

    def test_grid_token_r_c_sees_the_patch_r_c(self, encoder):
        """A bright square moves the token that lies over it most: rows first, then columns."""
        height, width = encoder.grid
        size = encoder.preprocessing.image_size
        dark = torch.zeros(1, encoder.preprocessing.channels, *size)
        tall, wide = size[0] // height, size[1] // width
        for row, column in {(0, 0), (0, width - 1), (height - 1, 0)}:
            lit = dark.clone()
            lit[..., row * tall : (row + 1) * tall, column * wide : (column + 1) * wide] = 2.0
            moved = (encoder(lit).tokens - encoder(dark).tokens).norm(dim=-1)
            patches = moved[0, encoder.num_prefix_tokens :]
            found = divmod(int(patches.argmax()), width)
            assert max(abs(found[0] - row), abs(found[1] - column)) <= self.slack


class TextEncoderContract(EncoderContract):
    """A subclass also gives `texts`: at least 3 texts of different lengths."""

    @pytest.fixture
    def batch(self, encoder, texts):
        return encoder.pad_batch(encoder.tokenize(texts).ids)

    def test_special_tokens_stand_at_both_ends(self, encoder, texts):
        ids = encoder.tokenize(texts).ids
        assert len({row[0] for row in ids}) == 1
        assert len({row[-1] for row in ids}) == 1
        assert all(len(row) > 2 for row in ids)

    def test_a_long_text_is_cut_and_counted(self, encoder, texts):
        long = " ".join(texts * 400)
        short, cut = encoder.tokenize([texts[0], long])[0]
        assert len(cut) == encoder.max_tokens
        assert (cut[0], cut[-1]) == (short[0], short[-1])
        assert encoder.tokenize([texts[0], long]).truncated == [False, True]
        ids, valid = encoder.pad_batch([cut])
        assert encoder(ids, valid).tokens.shape[1] >= encoder.max_tokens

    def test_a_row_does_not_depend_on_its_batch(self, encoder, texts):
        ids = encoder.tokenize(texts).ids
        together = encoder(*encoder.pad_batch(ids)).tokens
        for number, row in enumerate(ids):
            alone = encoder(*encoder.pad_batch([row], multiple=1)).tokens[0]
            difference = (together[number, : len(row)] - alone).abs().max()
            assert difference <= 1e-5 * alone.abs().max()

    def test_pooled_leaves_padding_out(self, encoder, texts):
        row = encoder.tokenize(texts).ids[0]
        tight = encoder(*encoder.pad_batch([row], multiple=1)).pooled
        padded = encoder(*encoder.pad_batch([row], multiple=64)).pooled
        assert padded.shape == (1, encoder.pooled_dim)
        assert (tight - padded).abs().max() < 1e-4

    def test_its_spec_is_ragged(self, encoder):
        spec = encoder.spec(batch_size=4)
        assert (spec.num_tokens, spec.grid) == (None, None)
        assert spec.max_tokens == encoder.max_tokens
        assert len(spec.tokenizer_sha256) == 64
