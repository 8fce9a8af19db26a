"""Sentences pass through the very storage that a run's texts went through."""

import numpy as np
import pytest
import torch
from heads.kit_sentences import SAID, Reads, open_bert, plain_run, write_texts

from featcache.adaptor.saved import load_adaptor
from featcache.cache.folder import SCALE_FILE
from featcache.encoders.request import EncoderRequest, locate_all, save_request
from featcache.errors import CacheError, StaleFeatureSetError
from featcache.heads.prompt_reader import open_prompt_reader
from featcache.loader.gather import iterate_rows
from featcache.manifest.table import text_id

SENTENCES = sorted(one for some in SAID.values() for one in some)


@pytest.fixture(scope="module")
def texts_of(tmp_path_factory):
    """The text set of each stored type, all by one encoder."""
    root = tmp_path_factory.mktemp("texts")
    made = {}

    def make(dtype):
        if dtype not in made:
            encoder, request = open_bert(root / "bert", dtype=dtype)
            made[dtype] = write_texts(root / dtype, encoder, request, SENTENCES)
        return made[dtype]

    return make


def scores(trained, images, texts):
    with torch.inference_mode():
        encoded = trained.objective.encode_images(trained.adaptor, images)
        return trained.objective.score(encoded, texts, trained.adaptor.scale)


def cached_vectors(trained, texts, sentences):
    rows = np.array([texts.row_of[text_id(one)] for one in sentences])
    with torch.inference_mode():
        return torch.cat(
            [
                trained.objective.encode_texts(
                    trained.adaptor,
                    tokens.float(),
                    torch.ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid,
                )
                for _, tokens, valid in iterate_rows(texts, rows, 4, **trained.reading)
            ]
        )


@pytest.mark.parametrize(
    ("dtype", "reads"),
    [
        ("float16", Reads()),
        ("float32", Reads()),
        ("int8", Reads()),
        ("float16", Reads(text_tokens=3)),
        # Pooled vectors are float16 in every set, whatever its tokens are.
        ("float32", Reads(tokens="pooled")),
    ],
)
def test_prompt_scores_as_the_cached_report_of_the_same_words(
    toy, texts_of, tmp_path, dtype, reads
):
    texts = texts_of(dtype)
    images = toy.images
    if reads.tokens == "pooled":
        images_dim = torch.randn(6, 1, 12, generator=torch.Generator().manual_seed(0))
    else:
        images_dim = torch.from_numpy(images.read_tokens(np.arange(6))).float()
    trained = load_adaptor(plain_run(tmp_path / "run", images, texts, reads=reads))
    reader = open_prompt_reader(texts.folder, trained, device="cpu")
    turned = SENTENCES[::-1]
    [found] = reader.vectors([trained], turned)
    expected = cached_vectors(trained, texts, turned)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    ours, theirs = (scores(trained, images_dim, one) for one in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_stored_type_is_not_taken_for_another(toy, texts_of, tmp_path):
    """Else the test above would hold for a reader that rounds nothing."""
    found = {}
    for dtype in ("float16", "float32", "int8"):
        texts = texts_of(dtype)
        trained = load_adaptor(plain_run(tmp_path / dtype, toy.images, texts))
        reader = open_prompt_reader(texts.folder, trained, device="cpu")
        [found[dtype]] = reader.vectors([trained], SENTENCES)
    half, single, whole = found["float16"], found["float32"], found["int8"]
    assert 0 < (half - single).abs().max() < 2e-3
    assert 0 < (whole - single).abs().max() < 5e-2


def test_several_adaptors_read_the_sentences_in_the_order_asked(toy, texts_of, tmp_path):
    texts = texts_of("float16")
    adaptors = [
        load_adaptor(plain_run(tmp_path / str(seed), toy.images, texts, seed=seed))
        for seed in (0, 1)
    ]
    reader = open_prompt_reader(texts.folder, adaptors[0], device="cpu")
    both = reader.vectors(adaptors, SENTENCES)
    assert not torch.equal(*both)
    turned = reader.vectors(adaptors, SENTENCES[::-1])
    for one, other in zip(both, turned, strict=True):
        torch.testing.assert_close(one.flip(0), other, atol=1e-6, rtol=1e-6)


def test_cut_sentences_are_counted(toy, texts_of, tmp_path):
    texts = texts_of("float16")
    trained = load_adaptor(plain_run(tmp_path / "run", toy.images, texts))
    reader = open_prompt_reader(texts.folder, trained, device="cpu")
    assert reader.count_cut([*SENTENCES, "opacity " * 40]) == 1


def test_text_encoder_of_other_settings_is_refused(toy, texts_of, tmp_path):
    texts = texts_of("float16")
    trained = load_adaptor(plain_run(tmp_path / "run", toy.images, texts))
    _, other = open_bert(texts.folder.parent / "bert", max_tokens=12)
    save_request(tmp_path, other)
    with pytest.raises(StaleFeatureSetError, match="is not the one the Adaptor was trained on"):
        open_prompt_reader(tmp_path, trained, device="cpu")


def test_int8_texts_without_their_scale_are_refused(toy, tmp_path):
    encoder, request = open_bert(tmp_path / "bert", dtype="int8")
    texts = write_texts(tmp_path / "set", encoder, request, SENTENCES)
    trained = load_adaptor(plain_run(tmp_path / "run", toy.images, texts))
    for name in (SCALE_FILE, "shard-000000.h5"):
        (texts.folder / name).unlink()
    with pytest.raises(CacheError, match="has lost its channel scale"):
        open_prompt_reader(texts.folder, trained, device="cpu")


def test_request_names_files_that_are_there(texts_of):
    """What the reader goes by is kept beside every set."""
    folder = texts_of("float16").folder
    request = EncoderRequest.model_validate_json((folder / "request.json").read_text())
    assert locate_all([request])
