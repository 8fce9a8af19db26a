"""No row depends on its batch: what shares the forward pass, where it stands, or the padding."""

import pytest
import torch
from encoders.conftest import TIMM, save_bert, save_dinov2, save_timm
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.encoders.interface import load_encoder, locate_encoder

KINDS = [*TIMM, "dinov2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    folders = {kind: save_timm(kind, root / kind) for kind in TIMM}
    folders["dinov2"] = save_dinov2(root / "dinov2")
    return {kind: load_encoder(locate_encoder(str(f), "image")) for kind, f in folders.items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = save_bert(tmp_path_factory.mktemp("alone-bert"))
    return load_encoder(locate_encoder(str(folder), "text"))


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(KINDS), size=st.integers(2, 6), data=st.data())
def test_image_rows(images, kind, size, data):
    encoder = images[kind]
    place = data.draw(st.integers(0, size - 1))
    loudness = data.draw(st.sampled_from([0.0, 1.0, 50.0]))
    torch.manual_seed(size)
    batch = torch.randn(size, 3, *encoder.preprocessing.image_size) * loudness
    picture = torch.randn(1, 3, *encoder.preprocessing.image_size)
    batch[place] = picture[0]
    alone, together = encoder(picture), encoder(batch)
    for one, many in zip(alone, together, strict=True):
        assert (one[0] - many[place]).abs().max() <= 1e-5 * one.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    place=st.integers(0, 5),
    multiple=st.sampled_from([1, 8, 32]),
)
def test_text_rows(bert, lengths, place, multiple):
    torch.manual_seed(0)
    rows = [[2, *torch.randint(5, 40, (length,)).tolist(), 3] for length in lengths]
    place = min(place, len(rows) - 1)
    alone = bert(*bert.pad_batch([rows[place]], multiple=1))
    together = bert(*bert.pad_batch(rows, multiple=multiple))
    length = len(rows[place])
    for one, many in [
        (alone.tokens[0], together.tokens[place, :length]),
        (alone.pooled[0], together.pooled[place]),
    ]:
        assert (one - many).abs().max() <= 1e-5 * one.abs().max()


def test_equal_shapes_give_equal_bits(images, bert):
    """Stage one always fills its batches up, so a row is the same bits at any place in one."""
    for encoder in images.values():
        batch = torch.randn(4, 3, *encoder.preprocessing.image_size)
        turned = encoder(batch.roll(1, 0)).tokens.roll(-1, 0)
        assert torch.equal(encoder(batch).tokens, turned)
    ids, valid = bert.pad_batch([[2, 7, 8, 3], [2, 9, 3], [2, 11, 12, 13, 3]])
    turned = bert(ids.roll(1, 0), valid.roll(1, 0)).tokens.roll(-1, 0)
    assert torch.equal(bert(ids, valid).tokens, turned)
