"""What every objective must keep to; a test class per objective inherits it.

The class gives `config` (an `AdaptorConfig` of width 16). An objective whose training score is
meant to know the partner says so with `leaks = True`, one that knows no places of an image with
`has_map = False`.
"""

import pytest
import torch

from featcache.adaptor.model import Adaptor
from featcache.adaptor.objectives import build_objective
from featcache.errors import UsageError
from featcache.loader.batch import Batch

IMAGE_DIM, TEXT_DIM, DIM = 12, 8, 16


def gradients(objective, adaptor, batch, **how) -> dict[str, torch.Tensor]:
    """Of one step, by the names of the parameters, with the loss beside them."""
    for module in (objective, adaptor):
        module.zero_grad()
    torch.manual_seed(3)
    loss = objective(adaptor, batch, **how).loss
    loss.backward()
    parameters = [*adaptor.named_parameters(), *objective.named_parameters(prefix="objective")]
    return {name: p.grad.clone() for name, p in parameters} | {"loss": loss.detach()}


def random_batch(
    rows: int = 6, seed: int = 0, image_tokens: int = 5, text_tokens: int = 4
) -> Batch:
    """Independent tokens, all images and texts different, texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + torch.arange(rows) % text_tokens
    numbers = torch.arange(rows)
    return Batch(
        image_tokens=torch.randn(rows, image_tokens, IMAGE_DIM, generator=generator),
        text_tokens=torch.randn(rows, text_tokens, TEXT_DIM, generator=generator),
        text_valid=torch.arange(text_tokens) < lengths.unsqueeze(1),
        pairs=numbers,
        image_rows=numbers,
        text_rows=numbers,
    )


class ObjectiveContract:
    leaks = False
    has_map = True

    @pytest.fixture
    def adaptor(self):
        torch.manual_seed(0)
        return Adaptor(
            IMAGE_DIM, TEXT_DIM, dim=DIM, layers=2, heads=4, feedforward=24, dropout=0.0
        ).eval()

    @pytest.fixture
    def objective(self):
        torch.manual_seed(1)
        return build_objective(self.config).eval()

    def encode(self, objective, adaptor, batch):
        images = objective.encode_images(adaptor, batch.image_tokens)
        return images, objective.encode_texts(adaptor, batch.text_tokens, batch.text_valid)

    def scores(self, objective, adaptor, batch):
        return objective.score(*self.encode(objective, adaptor, batch), adaptor.scale)

    def test_loss_is_finite_and_logits_have_a_row_per_image(self, objective, adaptor):
        output = objective(adaptor, random_batch())
        assert output.loss.isfinite()
        assert output.logits_per_image.shape == (6, 6)

    def test_training_scores_are_the_unpaired_scores(self, objective, adaptor):
        batch = random_batch()
        trained, unpaired = objective(adaptor, batch), self.scores(objective, adaptor, batch)
        same = torch.allclose(trained.logits_per_image, unpaired, atol=1e-5)
        assert same is not self.leaks

    def test_an_image_is_encoded_alone(self, objective, adaptor):
        tokens = random_batch().image_tokens
        together = objective.encode_images(adaptor, tokens)
        vector = objective.image_vector(adaptor, tokens)
        for row in range(len(tokens)):
            alone = tokens[row : row + 1]
            assert torch.allclose(
                objective.encode_images(adaptor, alone)[0], together[row], atol=1e-5
            )
            assert torch.allclose(objective.image_vector(adaptor, alone)[0], vector[row], atol=1e-5)

    def test_a_text_is_encoded_alone_and_without_its_padding(self, objective, adaptor):
        batch = random_batch()
        together = objective.encode_texts(adaptor, batch.text_tokens, batch.text_valid)
        for row in range(len(batch)):
            length = int(batch.text_valid[row].sum())
            alone = objective.encode_texts(
                adaptor,
                batch.text_tokens[row : row + 1, :length],
                batch.text_valid[row : row + 1, :length],
            )
            assert torch.allclose(alone[0], together[row], atol=1e-5)

    def test_a_pair_scores_the_same_whatever_else_is_scored(self, objective, adaptor):
        images, texts = self.encode(objective, adaptor, random_batch())
        scores = objective.score(images, texts, adaptor.scale)
        assert torch.allclose(
            objective.score(images[2:3], texts[[4, 1]], adaptor.scale),
            scores[2:3, [4, 1]],
            atol=1e-5,
        )

    def test_scores_are_bounded_by_the_scale(self, objective, adaptor):
        with torch.no_grad():
            adaptor.logit_scale.fill_(12.0)
        scores = self.scores(objective, adaptor, random_batch())
        assert scores.isfinite().all()
        assert scores.abs().max() <= 100.1

    def test_loss_gives_a_gradient_to_both_projections_and_the_scale(self, objective, adaptor):
        objective(adaptor, random_batch()).loss.backward()
        for parameter in (
            adaptor.image_projection.weight,
            adaptor.text_projection.weight,
            adaptor.logit_scale,
            *objective.parameters(),
        ):
            assert parameter.grad.abs().sum() > 0

    def test_an_image_vector_has_a_row_per_image(self, objective, adaptor):
        vector = objective.image_vector(adaptor, random_batch().image_tokens.half())
        assert vector.ndim == 2
        assert len(vector) == 6
        assert vector.dtype == torch.float32

    @pytest.mark.parametrize("chunk", [1, 4, 6])
    def test_the_gradient_cache_changes_nothing(self, objective, adaptor, chunk):
        batch = random_batch()
        if self.leaks:  # fused pairs cannot be encoded apart
            with pytest.raises(UsageError, match="knows no gradient cache, no ranks and no queue"):
                objective(adaptor, batch, chunk=chunk)
            return
        plain = gradients(objective, adaptor, batch)
        cached = gradients(objective, adaptor, batch, chunk=chunk)
        for name, expected in plain.items():
            assert torch.allclose(cached[name], expected, rtol=1e-4, atol=1e-6), name

    def test_the_gradient_cache_drops_the_same_in_both_passes(self, objective, adaptor):
        if self.leaks:
            return
        batch = random_batch()
        adaptor.train()
        for block in adaptor.blocks:
            block.dropout = 0.5
        plain = gradients(objective, adaptor, batch)
        cached = gradients(objective, adaptor, batch, chunk=3 * len(batch))
        for name, expected in plain.items():
            assert torch.allclose(cached[name], expected, rtol=1e-4, atol=1e-6), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_text_without_any_real_token_gives_finite_numbers(self, objective, adaptor, dtype):
        batch = random_batch()
        batch.text_valid[2] = False
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = gradients(objective, adaptor, batch)
            batch.text_tokens[2] = torch.nan
            same = gradients(objective, adaptor, batch)
        for name, gradient in found.items():
            assert gradient.isfinite().all(), name
            assert torch.equal(gradient, same[name]), name

    def test_a_map_has_a_cosine_for_each_place(self, objective, adaptor):
        batch = random_batch()
        how = (adaptor, batch.image_tokens, batch.text_tokens, batch.text_valid)
        if not self.has_map:
            with pytest.raises(UsageError, match="no places"):
                objective.similarity_map(*how, (2, 2))
            return
        found = objective.similarity_map(*how, (2, 2))
        assert found.shape == (6, 2, 2)
        assert found.abs().max() <= 1 + 1e-6
        # Five tokens: one before the grid, which is row-major.
        row = objective.similarity_map(*how, (1, 4)).flatten(1)
        assert torch.equal(found.flatten(1), row)
        with pytest.raises(UsageError, match="5 tokens do not fill a grid of 3 x 2"):
            objective.similarity_map(*how, (3, 2))
