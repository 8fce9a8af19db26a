import numpy as np
import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch
from torch.nn import functional

from featcache.adaptor import matching
from featcache.adaptor.known import KnownPairs
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


@pytest.fixture
def known_batch():
    """Beside the pairs of the batch, image 0 belongs to text 2."""
    batch = random_batch(4)
    batch.image_rows, batch.text_rows = torch.arange(4), torch.arange(4)
    return batch, KnownPairs.of(np.array([0, 1, 2, 3, 0]), np.array([0, 1, 2, 3, 2]))


@pytest.mark.parametrize(("of_texts", "of_0", "of_2"), [(False, "13", "013"), (True, "123", "13")])
def test_a_pair_of_the_training_set_is_no_hard_negative(known_batch, of_texts, of_0, of_2):
    batch, known = known_batch
    alike, ids = unit_vectors(1, 0).expand(4, DIM), Ids.of(batch, known)
    torch.manual_seed(0)
    drawn = [
        hard_negatives(alike, alike, torch.tensor(1.0), ids, of_texts=of_texts)[0].tolist()
        for _ in range(60)
    ]
    assert {one[0] for one in drawn} == {int(number) for number in of_0}
    assert {one[2] for one in drawn} == {int(number) for number in of_2}


def test_what_is_fused_as_wrong_is_wrong(adaptor, known_batch, monkeypatch):
    batch, known = known_batch
    whole, wrong = Matching._judge, set()

    def noting(module, adaptor, batch, rows, columns):
        wrong.update(zip(rows[4:].tolist(), columns[4:].tolist(), strict=True))
        return whole(module, adaptor, batch, rows, columns)

    monkeypatch.setattr(Matching, "_judge", noting)
    alike, module = unit_vectors(1, 0).expand(4, DIM), Matching(DIM, 1.0)
    torch.manual_seed(0)
    for _ in range(40):
        module(adaptor, batch, alike, alike, torch.tensor(1.0), Ids.of(batch, known))
    assert wrong == {(i, j) for i in range(4) for j in range(4) if i != j and (i, j) != (0, 2)}


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
