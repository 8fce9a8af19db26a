import math
from dataclasses import replace

import pytest
import torch
from contracts.objective_contract import DIM, ObjectiveContract, random_batch
from torch.nn import functional

from featcache.adaptor.dual import Dual
from featcache.adaptor.model import Adaptor, AdaptorConfig, count_parameters
from featcache.adaptor.objectives import (
    OBJECTIVES,
    build_objective,
)
from featcache.errors import ConfigError


def small(**changes) -> AdaptorConfig:
    return AdaptorConfig(dim=DIM, heads=4, feedforward=24, **changes)


class TestAllPairs(ObjectiveContract):
    config = small(objective="allpairs")

    def test_a_score_is_the_cosine_of_what_the_text_pools_from_the_image(self, objective, adaptor):
        batch = random_batch()
        images, texts = self.encode(objective, adaptor, batch)
        torch.nn.init.normal_(objective.query.weight)
        scores = objective.score(images, texts, adaptor.scale)
        for i, image in enumerate(images):
            for j, text in enumerate(texts):
                weights = (image @ objective.query(text) / math.sqrt(DIM)).softmax(dim=0)
                cosine = functional.cosine_similarity(weights @ image, text, dim=0)
                assert scores[i, j].item() == pytest.approx(
                    (adaptor.scale * cosine).item(), abs=1e-4
                )

    def test_all_weights_are_trained(self, objective, adaptor):
        objective(adaptor, random_batch()).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in (*adaptor.parameters(), *objective.parameters()))

    def test_it_adds_one_matrix(self, objective):
        assert count_parameters(objective) == DIM * DIM


class TestLogSumExp(ObjectiveContract):
    config = small(objective="allpairs", pooling="logsumexp")

    def test_a_score_lies_between_the_mean_and_the_largest_cosine(self, objective, adaptor):
        images, texts = self.encode(objective, adaptor, random_batch())
        cosines = torch.einsum("ild,jd->ijl", images, texts)
        scores = objective.score(images, texts, torch.ones(()))
        assert (scores >= cosines.mean(dim=2) - 1e-6).all()
        assert (scores <= cosines.amax(dim=2) + 1e-6).all()
        with torch.no_grad():
            objective.sharpness_logit.fill_(20)
        sharp = objective.score(images, texts, torch.ones(()))
        assert torch.allclose(sharp, cosines.amax(dim=2), atol=0.02)

    def test_the_sharpness_starts_at_ten(self, objective):
        assert objective.sharpness.item() == pytest.approx(10)


class TestManyHeads(ObjectiveContract):
    config = small(objective="allpairs", pooling="heads")

    def test_a_score_is_what_attention_of_torch_gives(self, objective, adaptor):
        images, texts = self.encode(objective, adaptor, random_batch())
        theirs = torch.nn.MultiheadAttention(DIM, 4, batch_first=True)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(
                torch.cat([objective.query.weight, objective.key_value.weight])
            )
            theirs.out_proj.load_state_dict(objective.out.state_dict())
        asked = texts.expand(6, 6, DIM)
        drawn, _ = theirs(asked, images, images)
        expected = adaptor.scale * functional.cosine_similarity(drawn, asked, dim=2)
        assert torch.allclose(objective.score(images, texts, adaptor.scale), expected, atol=1e-4)


class TestDual(ObjectiveContract):
    config = small(objective="dual")

    def test_it_adds_no_weights(self, objective):
        assert count_parameters(objective) == 0


class TestDualWithMatching(ObjectiveContract):
    config = small(objective="dual", matching=0.5)

    def test_the_contrast_is_that_of_dual(self, objective, adaptor):
        batch = random_batch()
        with_matching, without = objective(adaptor, batch), Dual()(adaptor, batch)
        assert torch.equal(with_matching.logits_per_image, without.logits_per_image)
        assert with_matching.loss > without.loss


class TestSigmoid(ObjectiveContract):
    config = small(objective="dual", loss="sigmoid")

    def test_it_adds_a_bias(self, objective):
        assert count_parameters(objective) == 1


class TestPaperWithoutFusion(ObjectiveContract):
    config = small(objective="paper", text_to_image_weight=0.75)
    has_map = False

    def test_query_and_key_weights_get_no_gradient(self, objective, adaptor):
        objective(adaptor, random_batch()).loss.backward()
        for block in adaptor.blocks:
            assert block.query.weight.grad.abs().max() == 0
            keys, values = block.key_value.weight.grad.chunk(2)
            assert keys.abs().max() == 0
            assert values.abs().max() > 0

    def test_the_paper_model_leaves_a_fifth_of_its_weights_untrained(self):
        adaptor = Adaptor(768, 768)
        untrained = sum(2 * (768 * 768 + 768) for _ in adaptor.blocks)
        assert untrained == 2_362_368
        assert round(100 * untrained / count_parameters(adaptor), 1) == 19.4

    def test_a_shared_text_counts_as_a_negative(self, objective, adaptor):
        batch = random_batch()
        shared = replace(batch, text_rows=torch.zeros(6, dtype=torch.int64))
        assert objective(adaptor, shared).loss == objective(adaptor, batch).loss

    def test_it_says_what_it_is(self, objective):
        assert "never meet before the loss" in objective.notice


class TestPaperWithFirstToken(ObjectiveContract):
    config = small(objective="paper", paper_vector="first")
    has_map = False

    def test_other_tokens_have_no_influence(self, objective, adaptor):
        tokens = random_batch().image_tokens
        changed = torch.cat([tokens[:, :1], tokens[:, 1:] + 1], dim=1)
        one, other = (objective.image_vector(adaptor, x) for x in (tokens, changed))
        assert torch.equal(one, other)


class TestPaperOwnPair(ObjectiveContract):
    config = small(objective="paper", fusion="own-pair")
    leaks = True
    has_map = False

    def test_it_says_that_it_leaks(self, objective):
        assert "LEAKS" in objective.notice

    def test_another_text_changes_what_is_made_of_the_image(self, objective, adaptor):
        batch = random_batch()
        before = objective(adaptor, batch).logits_per_image
        texts = batch.text_tokens.clone()
        texts[0] += 1
        after = objective(adaptor, replace(batch, text_tokens=texts)).logits_per_image
        assert (after - before)[0, 1:].abs().max() > 1e-4


def test_every_objective_has_a_contract():
    tested = {cls.config.objective for cls in ObjectiveContract.__subclasses__()}
    assert tested == set(OBJECTIVES)


def test_an_unknown_objective_offers_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown objective `duall`; did you mean `dual`"):
        build_objective(small(objective="duall"))
