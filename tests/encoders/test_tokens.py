"""Which tokens of a network are stored: layers side by side, and a coarser grid."""

import pytest
import torch

from featcache.encoders.interface import EncoderConfig
from featcache.encoders.tokens import choose_blocks, pool_tokens, pooled_grid, token_record
from featcache.errors import UsageError

WORDS = {"encoder": "vit-b", "network": "a network"}


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [
        (None, ()),
        ((-1,), ()),
        ((12,), ()),
        ((6, 12), (6, 12)),
        ((12, 6), (12, 6)),
        ((-1, -12), (12, 1)),
        ((3, 3), (3, 3)),
    ],
)
def test_layers_are_counted_from_one_or_backwards(asked, blocks):
    assert choose_blocks(asked, 12, **WORDS) == blocks


@pytest.mark.parametrize("asked", [(13,), (1, -13), (0,)])
def test_a_layer_that_is_not_there_is_refused_with_their_number(asked):
    with pytest.raises(UsageError, match="`vit-b` has 12 layers") as caught:
        choose_blocks(asked, 12, **WORDS)
    assert "1 to 12" in caught.value.fix


def test_without_a_row_of_blocks_only_the_last_layer_can_be_asked_for():
    assert choose_blocks((-1,), None, **WORDS) == ()
    with pytest.raises(UsageError, match="only its last layer") as caught:
        choose_blocks((1,), None, **WORDS)
    assert "--layers -1" in caught.value.fix


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "size"), [((4, 6), 2), ((3, 5), 2), ((3, 3), 3), ((2, 7), 4)])
def test_windows_average_what_lies_in_them(prefix, grid, size):
    torch.manual_seed(0)
    tokens = torch.randn(2, prefix + grid[0] * grid[1], 3)
    pooled = pool_tokens(tokens, prefix, grid, size)
    rows, columns = pooled_grid(grid, size, encoder="vit-b")
    assert torch.equal(pooled[:, :prefix], tokens[:, :prefix])
    places = tokens[:, prefix:].reshape(2, *grid, 3)
    for number in range(rows * columns):
        r, c = (size * step for step in divmod(number, columns))
        window = places[:, r : r + size, c : c + size]
        assert torch.allclose(pooled[:, prefix + number], window.mean((1, 2)), atol=1e-6)
    assert pooled.shape == (2, prefix + rows * columns, 3)


def test_pooling_computes_in_float32_under_autocast():
    step = 2**-7  # between 1 and 2, bfloat16 has no number between two of these
    tokens = torch.tensor([1, 1, 1, 1 + step])[None, :, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in (torch.float32, torch.bfloat16):
            pooled = pool_tokens(tokens.to(kind), 0, (2, 2), 2)
            assert pooled.dtype == torch.float32
            assert pooled.item() == 1 + step / 4


def test_a_window_beyond_the_grid_is_refused():
    with pytest.raises(UsageError, match="grid of 2 x 3 tokens, windows of 4 x 4"):
        pooled_grid((2, 3), 4, encoder="vit-b")


def test_nothing_is_recorded_where_nothing_was_asked_for():
    config = EncoderConfig(modality="image", library="timm", source="folder:x")
    assert token_record(config, 12) == {}
    asked = config.model_copy(update={"layers": (6, -1), "pool_grid": 2})
    assert token_record(asked, 12) == {"layers": [6, 12], "pool_grid": 2}
