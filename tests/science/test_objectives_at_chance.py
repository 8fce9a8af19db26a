"""An objective must not find what is not there.

On images and texts drawn independently nothing can be learnt, so retrieval among held-out pairs
has to stay at chance however well the training pairs are fitted. Fusing each image with its own
text first breaks this: it is kept here as the demonstration of the leak.
"""

import jaxtyping
import pytest
import torch

from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.retrieval import (
    chance_recall,
    retrieval_metrics,
    retrieval_ranks,
    unpaired_scores,
)
from featcache.adaptor.saved import build_adaptor
from featcache.loader.batch import Batch

IMAGE_DIM, TEXT_DIM, DIM = 16, 12, 32
HELD_OUT = 256
OWN = torch.eye(HELD_OUT, dtype=torch.bool)
CHANCE_AT_10 = 10 / HELD_OUT
# Four standard deviations of a proportion of 256 above chance, rounded up.
LUCKY_AT_10 = CHANCE_AT_10 + 0.05


@pytest.fixture(autouse=True)
def _without_shape_checks():
    """They cost more than these small nets; other tests have them on."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pairs(count: int, seed: int, *, related: bool) -> Batch:
    """Random tokens; with `related` each text repeats a fixed linear view of its image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, IMAGE_DIM, generator=generator)
    texts = torch.randn(count, 4, TEXT_DIM, generator=generator)
    if related:
        view = torch.randn(IMAGE_DIM, TEXT_DIM, generator=torch.Generator().manual_seed(99)) / 4
        texts = 0.3 * texts + (images.mean(dim=1) * 6**0.5 @ view).unsqueeze(1)
    rows = torch.arange(count)
    return Batch(images, texts, torch.ones(count, 4, dtype=torch.bool), rows, rows, rows)


def take(batch: Batch, rows: torch.Tensor) -> Batch:
    return Batch(**{name: tensor[rows] for name, tensor in vars(batch).items()})


def trained(config: AdaptorConfig, *, related: bool, steps: int):
    """An Adaptor with its objective after some steps, and the loss of the last one."""
    torch.manual_seed(0)
    adaptor, objective = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
    optimizer = torch.optim.AdamW([*adaptor.parameters(), *objective.parameters()], lr=2e-3)
    training, loss = pairs(512, 1, related=related), None
    for _ in range(steps):
        loss = objective(adaptor, take(training, torch.randperm(512)[:64])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adaptor.eval(), objective.eval(), None if loss is None else loss.item()


def unpaired(adaptor, objective, *, related: bool) -> dict[str, float]:
    """Retrieval on held-out pairs, image and text encoded apart; both directions averaged."""
    held_out = pairs(HELD_OUT, 2, related=related)
    texts = [(held_out.text_tokens, held_out.text_valid)]
    scores = unpaired_scores(objective, adaptor, [held_out.image_tokens], texts)
    one, other = (retrieval_metrics(retrieval_ranks(s, OWN)) for s in (scores, scores.T))
    return {name: (one[name] + other[name]) / 2 for name in one}


def small(objective: str, **changes) -> AdaptorConfig:
    return AdaptorConfig(
        dim=DIM, heads=4, feedforward=64, dropout=0.0, objective=objective, **changes
    )


HONEST = {
    "allpairs": small("allpairs"),
    "allpairs, log-sum-exp": small("allpairs", pooling="logsumexp"),
    "dual": small("dual"),
    "paper": small("paper"),
}
honest = pytest.mark.parametrize("config", HONEST.values(), ids=HONEST.keys())


@honest
def test_an_untrained_model_retrieves_at_chance(config):
    adaptor, built, _ = trained(config, related=True, steps=0)
    assert unpaired(adaptor, built, related=True)["recall_at_10"] < LUCKY_AT_10


@honest
def test_training_on_independent_pairs_stays_at_chance_on_held_out_ones(config):
    adaptor, built, loss = trained(config, related=False, steps=100)
    assert loss < 4.16  # log 64: the training pairs themselves are being learnt by heart
    assert unpaired(adaptor, built, related=False)["recall_at_10"] < LUCKY_AT_10


def test_matching_on_fused_pairs_does_not_leak_into_retrieval():
    config = small("dual", matching=1.0)
    adaptor, built, _ = trained(config, related=False, steps=30)
    assert unpaired(adaptor, built, related=False)["recall_at_10"] < LUCKY_AT_10


FINDERS = {name: config for name, config in HONEST.items() if name != "paper"}
FINDERS["dual, sigmoid"] = small("dual", loss="sigmoid")


@pytest.mark.parametrize("config", FINDERS.values(), ids=FINDERS.keys())
def test_what_is_there_is_found(config):
    adaptor, built, _ = trained(config, related=True, steps=100)
    assert unpaired(adaptor, built, related=True)["recall_at_1"] > 0.9


def test_own_pair_fusion_solves_independent_pairs_because_it_has_seen_the_answer():
    config = small("paper", fusion="own-pair")
    adaptor, built, loss = trained(config, related=False, steps=100)
    held_out = pairs(HELD_OUT, 2, related=False)
    fused = built(adaptor, held_out).logits_per_image.detach()
    assert loss < 0.1
    assert retrieval_metrics(retrieval_ranks(fused, OWN))["recall_at_1"] > 0.95
    # The same weights know nothing once image and text are encoded apart.
    assert unpaired(adaptor, built, related=False)["recall_at_10"] < LUCKY_AT_10


def test_a_constant_scorer_is_not_above_chance():
    metrics = retrieval_metrics(retrieval_ranks(torch.ones(HELD_OUT, HELD_OUT), OWN))
    assert metrics["recall_at_10"] <= chance_recall(OWN, 10) == pytest.approx(CHANCE_AT_10)
