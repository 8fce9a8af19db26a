import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch
from torch.nn import functional

from featcache.adaptor import matching
from featcache.adaptor.losses import Ids, batch_positives
from featcache.adaptor.matching import Matching, hard_negatives
from featcache.adaptor.model import Adaptor, AdaptorConfig
from featcache.config import load_config
from featcache.errors import ConfigError


@pytest.fixture
def adaptor():
    torch.manual_seed(0)
    return Adaptor(IMAGE_DIM, TEXT_DIM, dim=DIM, layers=1, heads=4, feedforward=24, dropout=0.0)


def unit_vectors(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, DIM, generator=generator), dim=-1)


@pytest.mark.parametrize("rows", [3, 1024])
def test_a_hard_negative_is_wrong_and_scores_high(monkeypatch, rows):
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", rows)
    queries, candidates = unit_vectors(40, 0), unit_vectors(40, 1)
    batch = random_batch(40)
    batch.image_rows = torch.arange(40) // 2
    own = batch_positives(batch)
    torch.manual_seed(0)
    drawn, exists = hard_negatives(queries, candidates, torch.tensor(100.0), Ids.of(batch))
    assert exists.all()
    assert not own[torch.arange(40), drawn].any()
    best = (queries @ candidates.T).masked_fill(own, -1).argmax(dim=1)
    assert (best == drawn).float().mean() > 0.8


def test_where_all_belong_together_there_is_no_negative(adaptor):
    batch = random_batch(4)
    batch.text_rows = torch.zeros(4, dtype=torch.int64)
    _, exists = hard_negatives(
        unit_vectors(4, 0), unit_vectors(4, 1), torch.tensor(10.0), Ids.of(batch)
    )
    assert not exists.any()
    found = Matching(DIM, 1.0)(
        adaptor, batch, unit_vectors(4, 0), unit_vectors(4, 1), adaptor.scale, Ids.of(batch)
    )
    assert found.isfinite()


def test_the_loss_asks_three_times_about_each_pair(adaptor):
    torch.manual_seed(0)
    module, batch = Matching(DIM, 2.0), random_batch()
    torch.nn.init.zeros_(module.judge.weight)
    torch.nn.init.constant_(module.judge.bias, 1.0)
    found = module(
        adaptor, batch, unit_vectors(6, 0), unit_vectors(6, 1), adaptor.scale, Ids.of(batch)
    )
    one = functional.softplus(torch.tensor([-1.0, 1.0, 1.0])).mean()  # right, wrong, wrong
    assert found.item() == pytest.approx(2 * one.item())


def test_it_belongs_to_dual():
    with pytest.raises(ConfigError, match=r"`matching` 0\.5 belongs to the objective `dual`"):
        load_config(AdaptorConfig, overrides=["matching=0.5"])


def test_pooling_belongs_to_allpairs_and_the_sigmoid_loss_has_no_directions():
    with pytest.raises(ConfigError, match="`pooling` heads belongs to the objective `allpairs`"):
        load_config(AdaptorConfig, overrides=["pooling=heads", "objective=dual"])
    with pytest.raises(ConfigError, match="`sigmoid` has no directions"):
        load_config(AdaptorConfig, overrides=["loss=sigmoid", "text_to_image_weight=0.75"])
