"""What the Adaptor is trained for: objectives behind one interface, their loss, retrieval ranks.

An objective says how an image is scored against a text. docs/objectives.md has the formulas.
Shapes: `B` batch, `I` images, `J` texts, `L` image tokens, `T` text tokens, `dim` Adaptor width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from featcache.adaptor.model import Adaptor, AdaptorConfig, masked_mean, unit, widen
from featcache.adaptor.pooling import pooled_cosine
from featcache.errors import ConfigError, TrainingError, nearest
from featcache.loader.gather import Batch

TEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class ObjectiveOutput:
    """One batch's loss, with the logits it was made of."""

    loss: Float[Tensor, ""]
    logits_per_image: Float[Tensor, "B B"]


class Objective(nn.Module):
    """How images and texts are scored, and what a head gets of an image.

    A new objective says what it makes of an image and of a text, how it scores them, and gets a
    line in `OBJECTIVES`. Nothing in here may let an image see its own text before the score.

    Attributes:
        notice: What every run of it must say about itself, or None.
        text_to_image_weight: See `infonce`.
    """

    notice: str | None = None

    def __init__(self, text_to_image_weight: float = 0.5):
        super().__init__()
        self.text_to_image_weight = text_to_image_weight

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Objective":
        """Build it as a config says."""
        return cls(config.text_to_image_weight)

    def forward(self, adaptor: Adaptor, batch: Batch) -> ObjectiveOutput:
        """Encode both sides apart, score all pairs, compare with the batch's positives."""
        images = self.encode_images(adaptor, batch.image_tokens)
        texts = self.encode_texts(adaptor, batch.text_tokens, batch.text_valid)
        logits = self.score(images, texts, adaptor.scale)
        loss = infonce(logits, batch_positives(batch), self.text_to_image_weight)
        return ObjectiveOutput(loss, logits)

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B ..."]:
        """What `score` takes of each image, a function of this image alone."""
        raise NotImplementedError

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """What `score` takes of each text, a function of this text alone."""
        raise NotImplementedError

    def score(
        self,
        images: Float[Tensor, "I ..."],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Logits of every image with every text, the same function for each pair."""
        raise NotImplementedError

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B F"]:
        """One vector per image for a linear probe, a function of this image alone."""
        raise NotImplementedError


def batch_positives(batch: Batch) -> Bool[Tensor, "B B"]:
    """Which texts of a batch belong to which images: its own pairs, and all that equal them.

    An image that stands twice belongs to the texts of both places, and a text that is shared by
    several images belongs to each of them.
    """
    same_image = batch.image_rows.unsqueeze(1) == batch.image_rows
    same_text = batch.text_rows.unsqueeze(1) == batch.text_rows
    both: Tensor = same_image | same_text
    return both


def infonce(
    logits_per_image: Float[Tensor, "I J"],
    positives: Bool[Tensor, "I J"],
    text_to_image_weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Cross entropy against a target shared equally by all positives, in both directions.

    A row with k positives cannot go below log k, which it reaches when they score equally and
    everything else infinitely lower.

    Args:
        logits_per_image: Scaled scores; half precision is widened first.
        positives: At least one True in each row and column.
        text_to_image_weight: Share, in [0, 1], of the direction that ranks images for a text.
    """
    logits = widen(logits_per_image)

    to_texts, to_images = _one_way(logits, positives), _one_way(logits.T, positives.T)
    return (1 - text_to_image_weight) * to_texts + text_to_image_weight * to_images


def _one_way(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy of each row against a target shared equally by its positives."""
    share = positives.to(logits.dtype)
    return functional.cross_entropy(logits, share / share.sum(dim=1, keepdim=True))


class Dual(Objective):
    """Each modality through the shared blocks alone; cosine of the mean adapted tokens."""

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each image, with norm 1."""
        return unit(self.image_vector(adaptor, tokens))

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each text, with norm 1."""
        return unit(masked_mean(adaptor.encode_texts(tokens, valid), valid))

    def score(
        self,
        images: Float[Tensor, "I dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled cosines."""
        return scale * images @ texts.T

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each image."""
        return adaptor.encode_images(tokens).mean(dim=1)


class AllPairs(Objective):
    """Every text looks at every image: attention pooling by the text, then a cosine with it.

    A text's vector t asks with `query(t)`, which stands for key and query projection at once
    (<Wk x, Wq t> = <x, Wk' Wq t>), so there is no tensor of keys. It starts as the identity: a
    text first looks at the tokens that resemble it.

    **Source:** one text attending over one image for every pair, as in CARZero (Lai et al.,
    CVPR 2024); the single head without keys is docs/objectives.md, "allpairs".
    """

    def __init__(self, dim: int, text_to_image_weight: float = 0.5):
        super().__init__(text_to_image_weight)
        self.query = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "AllPairs":
        """Build it as a config says."""
        return cls(config.dim, config.text_to_image_weight)

    def encode_images(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L dim"]:
        """All adapted tokens of each image."""
        return adaptor.encode_images(tokens)

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token of each text."""
        return masked_mean(adaptor.encode_texts(tokens, valid), valid)

    def score(
        self,
        images: Float[Tensor, "I L dim"],
        texts: Float[Tensor, "J dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "I J"]:
        """Scaled cosines of each text with what it pooled from each image."""
        queries = self.query(texts) / math.sqrt(texts.shape[1])
        return scale * pooled_cosine(images, queries, unit(texts))

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Mean adapted token: what a text pools that looks nowhere in particular."""
        return adaptor.encode_images(tokens).mean(dim=1)


class Paper(Dual):
    """The reference's function, kept to compare with; see the notices for what is wrong with it.

    Its targets are the diagonal: a text that two images share counts as a negative of each.
    Unpaired candidates and probes see the image without any text, as downstream in the paper.
    """

    def __init__(self, text_to_image_weight: float, fusion: str, vector: str):
        super().__init__(text_to_image_weight)
        self.fusion = fusion
        self.vector = vector
        self.notice = PAPER_NOTICES[fusion]

    @classmethod
    def from_config(cls, config: AdaptorConfig) -> "Paper":
        """Build it as a config says."""
        return cls(config.text_to_image_weight, config.fusion, config.paper_vector)

    def forward(self, adaptor: Adaptor, batch: Batch) -> ObjectiveOutput:
        """Score a batch; with own-pair fusion the logits have seen which text is whose."""
        if self.fusion == "none":
            images = self.encode_images(adaptor, batch.image_tokens)
            texts = self.encode_texts(adaptor, batch.text_tokens, batch.text_valid)
        else:
            image_tokens, text_tokens = adaptor.fuse(
                batch.image_tokens, batch.text_tokens, batch.text_valid
            )
            images = unit(image_tokens.mean(dim=1))
            texts = unit(masked_mean(text_tokens, batch.text_valid))
        logits = self.score(images, texts, adaptor.scale)
        diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return ObjectiveOutput(infonce(logits, diagonal, self.text_to_image_weight), logits)

    def encode_texts(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B dim"]:
        """One vector per text, with norm 1."""
        if self.fusion == "none":
            tokens = tokens.to(adaptor.logit_scale.dtype)
            pooled = tokens[:, 0] if self.vector == "first" else masked_mean(tokens, valid)
            tokens, valid = pooled.unsqueeze(1), valid.any(dim=1, keepdim=True)  # (B, 1, E)
        return super().encode_texts(adaptor, tokens, valid)

    def image_vector(
        self, adaptor: Adaptor, tokens: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B dim"]:
        """Without fusion one adapted vector made of one token, else the mean adapted token."""
        if self.fusion == "none":
            tokens = tokens.to(adaptor.logit_scale.dtype)
            pooled = tokens[:, 0] if self.vector == "first" else tokens.mean(dim=1)
            tokens = pooled.unsqueeze(1)  # (B, 1, D)
        return super().image_vector(adaptor, tokens)


@torch.no_grad()
def unpaired_scores(
    objective: Objective,
    adaptor: Adaptor,
    image_batches: Iterable[Float[Tensor, "_ L D"]],
    text_batches: Iterable[tuple[Float[Tensor, "_ _ E"], Bool[Tensor, "_ _"]]],
) -> Float[Tensor, "I J"]:
    """Score every image against every text, none of them knowing a partner.

    Holds all text vectors, the adapted tokens of one batch of images, and the result.

    Args:
        objective: What scores.
        adaptor: Its modules should be in eval mode.
        image_batches: Tokens, on the Adaptor's device.
        text_batches: Tokens with their validity, on the Adaptor's device.

    Returns:
        Logits in float32 on the CPU, rows and columns in the order of the batches.
    """
    texts = torch.cat([objective.encode_texts(adaptor, *batch) for batch in text_batches])
    rows = []
    for tokens in image_batches:
        images = objective.encode_images(adaptor, tokens)
        parts = (
            objective.score(images, some, adaptor.scale)
            for some in torch.split(texts, TEXTS_AT_ONCE)
        )
        rows.append(torch.cat([part.float().cpu() for part in parts], dim=1))
    return torch.cat(rows)


def retrieval_ranks(
    scores: Float[Tensor, "Q N"], positives: Bool[Tensor, "Q N"]
) -> Int64[Tensor, " Q"]:
    """Rank, from 1, of each query's best positive among the candidates that are not positive.

    Ties count against us: a negative that scores the same stands before the positive, and so
    does one whose score is NaN; a positive that is NaN comes last. A constant scorer is
    therefore never above chance.

    Args:
        scores: Higher is better; one row per query.
        positives: At least one True per row.

    Raises:
        TrainingError: A query has no positive.
    """
    without = int((~positives.any(dim=1)).sum())
    if without:
        raise TrainingError(f"{without} of {len(scores)} queries have no positive candidate")
    best = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    best = best.masked_fill(~positives, -math.inf).amax(dim=1, keepdim=True)
    before = (scores >= best) | scores.isnan()
    return 1 + (before & ~positives).sum(dim=1)


def retrieval_metrics(ranks: Int64[Tensor, " Q"]) -> dict[str, float]:
    """Recall at 1, 5 and 10 in [0, 1], mean reciprocal rank, and median rank, of `ranks`."""
    metrics = {f"recall_at_{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    metrics["mrr"] = ranks.double().reciprocal().mean().item()
    metrics["median_rank"] = ranks.double().quantile(0.5).item()
    return metrics


def chance_recall(positives: Bool[Tensor, "Q N"], k: int) -> float:
    """Expected recall at k of a random order, given how many positives each query has."""
    candidates = positives.shape[1]
    negatives = candidates - positives.sum(dim=1).double()
    miss = torch.ones_like(negatives)
    for drawn in range(min(k, candidates)):
        miss = miss * ((negatives - drawn).clamp(min=0) / (candidates - drawn))
    return (1 - miss).mean().item()


def build_objective(config: AdaptorConfig) -> Objective:
    """The objective that a config names.

    Raises:
        ConfigError: There is none of that name.
    """
    if config.objective not in OBJECTIVES:
        hint = nearest(config.objective, list(OBJECTIVES))
        raise ConfigError(
            f"unknown objective `{config.objective}`; {hint}",
            where="adaptor.objective",
            fix="known: " + ", ".join(OBJECTIVES),
        )
    return OBJECTIVES[config.objective].from_config(config)


PAPER_NOTICES = {
    "none": "objective `paper` without fusion: one vector per modality, attention over one key, so "
    "the modalities never meet before the loss and query and key weights are never trained",
    "own-pair": "objective `paper` with own-pair fusion LEAKS: each image has seen its own text "
    "before it is compared, so the training loss says nothing about what was learnt",
}

OBJECTIVES: dict[str, type[Objective]] = {
    "allpairs": AllPairs,
    "dual": Dual,
    "paper": Paper,
}
