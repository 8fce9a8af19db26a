import pytest
import torch
from torch import nn

from featcache.adaptor.model import (
    Adaptor,
    AdaptorConfig,
    Block,
    count_parameters,
    masked_mean,
)
from featcache.config import load_config
from featcache.errors import ConfigError


@pytest.fixture
def adaptor():
    torch.manual_seed(0)
    return Adaptor(12, 8, dim=16, layers=2, heads=4, feedforward=24, dropout=0.5).eval()


def texts(rows=3, tokens=5, width=8):
    torch.manual_seed(1)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [2], [1]])[:rows]
    return torch.randn(rows, tokens, width), valid


@pytest.mark.parametrize(
    ("image_dim", "count"), [(768, 12_207_617), (384, 11_912_705), (512, 12_011_009)]
)
def test_parameters_are_those_of_the_paper(image_dim, count):
    assert count_parameters(Adaptor(image_dim, 768)) == count


def test_a_block_computes_what_a_post_norm_encoder_layer_does():
    torch.manual_seed(0)
    block = Block(16, 4, 24, 0.1).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    pairs = {
        layer.self_attn.in_proj_weight: torch.cat([block.query.weight, block.key_value.weight]),
        layer.self_attn.in_proj_bias: torch.cat([block.query.bias, block.key_value.bias]),
        layer.self_attn.out_proj.weight: block.out.weight,
        layer.self_attn.out_proj.bias: block.out.bias,
        layer.linear1.weight: block.expand.weight,
        layer.linear1.bias: block.expand.bias,
        layer.linear2.weight: block.contract.weight,
        layer.linear2.bias: block.contract.bias,
    }
    pairs |= {
        getattr(theirs, name): getattr(ours, name)
        for theirs, ours in (
            (layer.norm1, block.norm_attention),
            (layer.norm2, block.norm_feedforward),
        )
        for name in ("weight", "bias")
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours)
    layer.train()  # its eval mode takes a fused path; without dropout both modes are one function
    for module in (layer.dropout, layer.dropout1, layer.dropout2):
        module.p = 0.0
    layer.self_attn.dropout = 0.0
    tokens, valid = texts(width=16)
    expected = layer(tokens, src_key_padding_mask=~valid)
    assert torch.allclose(block(tokens, tokens, valid)[valid], expected[valid], atol=1e-5)


def test_attention_starts_as_wide_as_one_matrix_of_queries_keys_and_values():
    torch.manual_seed(0)
    block, theirs = Block(64, 4, 8, 0.0), nn.MultiheadAttention(64, 4).in_proj_weight
    for part in (block.query.weight, block.key_value.weight):
        assert part.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_projected_tokens_have_norm_one(adaptor):
    images, (tokens, valid) = torch.randn(2, 7, 12), texts()
    assert torch.allclose(adaptor.project_images(images).norm(dim=-1), torch.ones(2, 7))
    norms = adaptor.project_texts(tokens, valid).norm(dim=-1)
    assert torch.allclose(norms, valid.float())


def test_half_precision_tokens_are_read(adaptor):
    tokens = torch.randn(2, 7, 12).half()
    assert torch.equal(adaptor.encode_images(tokens), adaptor.encode_images(tokens.float()))


def test_what_stands_in_padding_has_no_influence(adaptor):
    tokens, valid = texts()
    clean = adaptor.encode_texts(tokens, valid)
    dirty = adaptor.encode_texts(tokens.masked_fill(~valid.unsqueeze(-1), torch.nan), valid)
    assert torch.equal(clean, dirty)
    assert torch.equal(masked_mean(clean, valid), masked_mean(dirty, valid))


def test_more_padding_changes_nothing(adaptor):
    tokens, valid = texts()
    short = adaptor.encode_texts(tokens, valid)
    longer = adaptor.encode_texts(
        nn.functional.pad(tokens, (0, 0, 0, 4)), nn.functional.pad(valid, (0, 4))
    )
    assert torch.allclose(short[valid], longer[:, :5][valid], atol=1e-6)


def test_a_row_without_any_real_token_gives_finite_numbers_and_gradients(adaptor):
    tokens, valid = texts()
    valid[1] = False
    adapted = adaptor.encode_texts(tokens, valid)
    assert adapted.isfinite().all()
    assert torch.equal(masked_mean(adapted, valid)[1], torch.zeros(16))
    images, fused = adaptor.fuse(torch.randn(3, 4, 12), tokens, valid)
    (adapted.sum() + images.sum() + fused.sum()).backward()
    assert all(p.grad.isfinite().all() for p in adaptor.parameters() if p.grad is not None)


def test_a_row_without_context_gets_nothing_from_attention(adaptor):
    tokens, _ = texts(width=16)
    block = adaptor.blocks[0]
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    one, other = (block(tokens, torch.randn(3, 5, 16), nothing) for _ in range(2))
    assert torch.equal(one, other)


def test_a_row_does_not_depend_on_its_batch(adaptor):
    images, (tokens, valid) = torch.randn(6, 7, 12), texts()
    together = adaptor.encode_images(images)
    order = torch.randperm(6)
    assert torch.allclose(adaptor.encode_images(images[2:3]), together[2:3], atol=1e-6)
    assert torch.allclose(adaptor.encode_images(images[order]), together[order], atol=1e-6)
    alone = adaptor.encode_texts(tokens[1:2], valid[1:2])
    assert torch.allclose(alone, adaptor.encode_texts(tokens, valid)[1:2], atol=1e-6)


def test_both_modalities_pass_through_the_same_blocks():
    torch.manual_seed(0)
    adaptor = Adaptor(8, 8, dim=16, layers=2, heads=4, feedforward=24, dropout=0.0)
    adaptor.text_projection.load_state_dict(adaptor.image_projection.state_dict())
    tokens = torch.randn(2, 5, 8)
    valid = torch.ones(2, 5, dtype=torch.bool)
    same = torch.allclose(adaptor.encode_images(tokens), adaptor.encode_texts(tokens, valid))
    assert same


def test_fused_tokens_have_seen_the_other_modality_and_keep_their_length(adaptor):
    images, (tokens, valid) = torch.randn(3, 7, 12), texts()
    fused_images, fused_texts = adaptor.fuse(images, tokens, valid)
    assert fused_images.shape == (3, 7, 16)
    assert fused_texts.shape == (3, 5, 16)
    other_images, _ = adaptor.fuse(images, tokens.flip(0), valid)
    assert (other_images[0] - fused_images[0]).abs().max() > 1e-3
    hidden, _ = adaptor.fuse(images, tokens.masked_fill(~valid.unsqueeze(-1), 7.0), valid)
    assert torch.equal(hidden, fused_images)


def test_dropout_acts_in_training_alone(adaptor):
    tokens = torch.randn(2, 7, 12)
    assert torch.equal(adaptor.encode_images(tokens), adaptor.encode_images(tokens))
    adaptor.train()
    assert not torch.equal(adaptor.encode_images(tokens), adaptor.encode_images(tokens))


def test_the_scale_is_a_hundred_at_most_and_can_come_back(adaptor):
    with torch.no_grad():
        adaptor.logit_scale.fill_(12.0)
    assert 99.99 < adaptor.scale.item() <= 100.0
    adaptor.clamp_logit_scale()
    assert 99.99 < adaptor.scale.item() <= 100.0
    adaptor.scale.backward()
    assert adaptor.logit_scale.grad.item() == pytest.approx(100.0, rel=1e-3)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match="`dim` 512 cannot be shared out equally among `heads` 12"
    ):
        Adaptor(8, 8, dim=512)
    with pytest.raises(ConfigError, match="`dim` 512 cannot be shared out"):
        load_config(AdaptorConfig, overrides=["dim=512"])


def test_fusion_belongs_to_the_paper():
    with pytest.raises(ConfigError, match="belongs to the objective `paper`"):
        load_config(AdaptorConfig, overrides=["fusion=own-pair"])
