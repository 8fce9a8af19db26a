"""Attention heads: one trained query weighs an image's patch tokens, a linear layer reads the mean.

The small form of the attentive probes of AIM and V-JEPA: no projections, a single query, so that an
image's vector is a weighted mean of its patch tokens. The query begins at zero, where that is the
plain mean which linear probes read. Tokens are streamed; of none is more than a batch in memory.

Letters: `K` heads, `N` images, `P` patch tokens of each, `D` width of a token, `C` classes or
findings, `b` images of a batch.

**Source:** El-Nouby et al. 2024 (AIM), Bardes et al. 2024 (V-JEPA).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from featcache.errors import TrainingError
from featcache.heads.mlp import AdamWs, Schedule, batch_sizes, row_orders, summed_loss
from featcache.heads.problem import softened
from featcache.heads.segment_tokens import GridTokens

READ = 64  # images read at a time where nothing is trained


class TokenRows:
    """Patch tokens of some images; like an array of vectors it has a shape and is indexed by rows.

    Args:
        tokens: Of all labelled images.
        numbers: Which of them, in the order of the rows.
    """

    def __init__(self, tokens: GridTokens, numbers: Int64[np.ndarray, " N"]):
        self.tokens, self.numbers = tokens, numbers

    @property
    def shape(self) -> tuple[int, int]:
        """Images, and the width of the vector that a head makes of each."""
        return len(self.numbers), self.tokens.dim

    def __getitem__(self, rows: Int64[np.ndarray, " n"]) -> "TokenRows":
        return TokenRows(self.tokens, self.numbers[rows])

    def batches(
        self, rows: Int64[np.ndarray, " n"], batch_size: int, device: str = "cpu"
    ) -> Iterator[Float[Tensor, "b P D"]]:
        """Float32 tokens of some rows in the order given; each is valid until the next.

        Args:
            rows: Any order, repeats allowed.
            batch_size: Images of a batch; the last one may be short.
            device: Where they are wanted.
        """
        for tokens in self.tokens.batches(self.numbers[rows], batch_size):
            yield tokens.flatten(1, 2).to(device, torch.float32)

    def moments(
        self, rows: Int64[np.ndarray, " n"]
    ) -> tuple[Float64[Tensor, " D"], Float64[Tensor, " D"]]:
        """Mean of some rows' tokens, channel by channel, and their softened standard deviation."""
        mean, spread = (torch.zeros(self.shape[1], dtype=torch.float64) for _ in range(2))
        count = 0
        for tokens in self.batches(rows, READ):
            mean += tokens.sum(dim=(0, 1), dtype=torch.float64)
            count += tokens.shape[0] * tokens.shape[1]
        mean /= count
        for tokens in self.batches(rows, READ):
            spread += (tokens - mean.float()).square_().sum(dim=(0, 1), dtype=torch.float64)
        return mean, softened((spread / count).sqrt())


@dataclass(frozen=True)
class AttentionHeads:
    """Trained heads, numbered subset by subset, in it setting by setting, in it seed by seed.

    Attributes:
        mean: Over the patch tokens of the head's training subset.
        sd: See above; softened as for linear probes.
        parameters: Weight and bias of the linear layer, the query.
        subset: Number of the subset each head was trained on.
        decay: Its weight decay.
        rate: Its learning rate.
        seed: Its seed.
        steps: Steps that it took.
        of_findings: Whether an image may have several.
    """

    mean: Float[Tensor, "K D"]
    sd: Float[Tensor, "K D"]
    parameters: tuple[Float[Tensor, "K D C"], Float[Tensor, "K 1 C"], Float[Tensor, "K 1 D"]]
    subset: Int64[np.ndarray, " K"]
    decay: Float[np.ndarray, " K"]
    rate: Float[np.ndarray, " K"]
    seed: Int64[np.ndarray, " K"]
    steps: Int64[np.ndarray, " K"]
    of_findings: bool

    @torch.inference_mode()
    def probabilities(
        self, vectors: TokenRows, numbers: Sequence[int] | None = None
    ) -> Float[np.ndarray, "K N C"]:
        """Probabilities of some heads; see `Probes.probabilities`.

        Args:
            vectors: The images' tokens.
            numbers: Which heads; None is all.
        """
        some = list(range(len(self.subset)) if numbers is None else numbers)
        own = [one[some] for one in self.parameters]
        found = []
        for tokens in vectors.batches(np.arange(vectors.shape[0]), READ):
            logits = _forward(tokens, own, self.mean[some], self.sd[some]).double()
            found.append(logits.sigmoid() if self.of_findings else logits.softmax(dim=-1))
        return torch.cat(found, dim=1).numpy()


def _forward(
    tokens: Float[Tensor, "b P D"],
    parameters: Sequence[Tensor],
    mean: Float[Tensor, "K D"],
    sd: Float[Tensor, "K D"],
) -> Float[Tensor, "K b C"]:
    """Logits of all heads on the same images.

    Standardising is left to the end: the weights add up to 1, and what a mean adds to all scores of
    an image does not change its weights.
    """
    weight, bias, query = parameters
    asked = (query[:, 0] / sd) * tokens.shape[-1] ** -0.5  # K D
    scores = (tokens @ asked.mT).mT  # b K P
    pooled = torch.bmm(scores.softmax(dim=-1), tokens).transpose(0, 1)  # K b D
    return torch.baddbmm(bias, (pooled - mean[:, None]) / sd[:, None], weight)


def train_attention(
    vectors: TokenRows,
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"],
    subsets: Sequence[Int64[np.ndarray, " _"]],
    *,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    schedule: Schedule | None = None,
) -> AttentionHeads:
    """Train a head for every subset, setting and seed; the settings of a seed read tokens together.

    A head is what it would be alone, and no image's answer depends on its batch.

    Args:
        vectors: Tokens of all images.
        targets: Class numbers in `[0, num_classes)`; or for each finding 1, 0, or -1 = unknown.
        subsets: Row numbers of each training subset, at least one row each.
        num_classes: Of classes or findings.
        settings: Learning rate and weight decay of each.
        seeds: Seeds of first weights and orders.
        schedule: Length and device; None: as they are by default.

    Raises:
        TrainingError: A subset is empty, or a token is not finite.
    """
    if any(len(rows) == 0 for rows in subsets):
        raise TrainingError("a training subset holds no image", fix="a larger fraction")
    plan = Schedule() if schedule is None else schedule
    means, spreads, trained, steps = [], [], [], []
    each = len(settings) * len(seeds)
    for rows in subsets:
        mean, sd = (one.float() for one in vectors.moments(rows))
        if not bool(torch.isfinite(mean).all() & torch.isfinite(sd).all()):
            raise TrainingError("a token is not finite", fix="featcache verify --deep")
        some = [
            _train(vectors, rows, targets, (mean, sd), num_classes, settings, seed, plan)
            for seed in seeds
        ]
        # Setting by setting, in it seed by seed.
        trained.append([torch.stack(one, dim=1).flatten(0, 1) for one in zip(*some, strict=True)])
        means += [mean] * each
        spreads += [sd] * each
        steps += [sum(1 for _ in _cuts(len(rows), plan))] * each
    joined = [torch.cat([one[number] for one in trained]) for number in range(3)]
    grid = np.array([(*pair, seed) for pair in settings for seed in seeds], dtype=np.float64)
    values = np.tile(grid, (len(subsets), 1))
    return AttentionHeads(
        mean=torch.stack(means),
        sd=torch.stack(spreads),
        parameters=(joined[0], joined[1], joined[2]),
        subset=np.repeat(np.arange(len(subsets)), each),
        decay=values[:, 1],
        rate=values[:, 0],
        seed=np.tile(np.array(list(seeds) * len(settings), dtype=np.int64), len(subsets)),
        steps=np.array(steps, dtype=np.int64),
        of_findings=targets.ndim == 2,
    )


def _cuts(count: int, plan: Schedule) -> Iterator[slice]:
    """Places of each step's images in the orders of all epochs, end to end."""
    size = batch_sizes(count, plan.batch_size)[0]
    epochs = max(plan.epochs, -(-plan.fewest_steps * size // count))
    edges = [*range(0, epochs * count, size), epochs * count]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _train(
    vectors: TokenRows,
    rows: Int64[np.ndarray, " n"],
    targets: Int64[np.ndarray, " N"] | Int64[np.ndarray, "N T"],
    moments: tuple[Float[Tensor, " D"], Float[Tensor, " D"]],
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    seed: int,
    plan: Schedule,
) -> list[Tensor]:
    """The parameters of one subset's heads of one seed, in one pass over its batches."""
    device, many, width = plan.device, len(settings), vectors.shape[1]
    cuts = list(_cuts(len(rows), plan))
    epochs = cuts[-1].stop // len(rows)
    order = torch.cat(list(row_orders(len(rows), epochs, [seed])), dim=1)[0].numpy()
    generator = torch.Generator().manual_seed(seed)
    first = 0.01 * torch.randn(width, num_classes, generator=generator)
    fresh = [first, torch.zeros(1, num_classes), torch.zeros(1, width)]
    parameters = [one.repeat(many, 1, 1).to(device).requires_grad_(True) for one in fresh]
    mean, sd = (one.to(device).expand(many, -1) for one in moments)
    rates, decays = (torch.tensor([one[i] for one in settings], device=device) for i in (0, 1))
    optimizer = AdamWs(parameters, rates, decays, len(cuts))
    read = vectors.batches(rows[order], cuts[0].stop, device)
    for cut, tokens in zip(cuts, read, strict=True):
        asked = torch.from_numpy(targets[rows[order[cut]]]).to(device)
        logits = _forward(tokens, parameters, mean, sd)
        loss = summed_loss(logits, asked.expand(many, *asked.shape))
        optimizer.step(torch.autograd.grad(loss, parameters))
    return [one.detach().cpu() for one in parameters]
