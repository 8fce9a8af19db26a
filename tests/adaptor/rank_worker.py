"""One rank of `test_ranks.py`, started as a process of its own.

    python rank_worker.py RANK WORLD_SIZE FOLDER

Writes the loss and the averaged gradients of every case to FOLDER/RANK.safetensors.
"""

import sys
from dataclasses import fields
from pathlib import Path

import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from featcache.adaptor.known import KnownPairs
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.queue import Queue
from featcache.adaptor.ranks import Ranks
from featcache.adaptor.saved import build_adaptor
from featcache.loader.batch import Batch

PAIRS = 16
CASES = {
    f"{objective}-{pooling}-{loss}-{extra}": (objective, pooling, loss, extra)
    for objective, pooling in (
        ("dual", "cosine"),
        ("allpairs", "cosine"),
        ("allpairs", "logsumexp"),
        ("paper", "cosine"),
    )
    for loss in ("infonce", "sigmoid")
    for extra in ("plain", "chunked", "queue", "known")
}


def whole_batch() -> Batch:
    """Pairs of which some share an image or a text, also across the two halves."""
    batch = random_batch(PAIRS)
    batch.image_rows = torch.arange(PAIRS) % 13
    batch.text_rows = torch.arange(PAIRS) // 2 * 2 % 12
    return batch


def known_pairs() -> KnownPairs:
    """The pairs of the batch, and some of its images with texts of other pairs."""
    batch, further = whole_batch(), torch.arange(PAIRS) % 3 == 0
    images = torch.cat([batch.image_rows, batch.image_rows[further]])
    texts = torch.cat([batch.text_rows, batch.text_rows.roll(5)[further]])
    return KnownPairs.of(images.numpy(), texts.numpy())


class Step(nn.Module):
    """What DDP wraps: an Adaptor with its objective."""

    def __init__(self, case: str):
        super().__init__()
        objective, pooling, loss, self.extra = CASES[case]
        config = AdaptorConfig(
            dim=DIM, layers=2, heads=4, feedforward=24, dropout=0.0,
            objective=objective, pooling=pooling, loss=loss,
        )  # fmt: skip
        torch.manual_seed(0)
        self.adaptor, self.objective = build_adaptor(config, IMAGE_DIM, TEXT_DIM)
        # Where W is the identity and the bias -10, some gradients would be all but zero.
        for parameter in self.objective.parameters():
            nn.init.normal_(parameter)
        self.queue = Queue(10, DIM) if self.extra in ("queue", "known") else None
        self.known = known_pairs() if self.extra == "known" else None

    def forward(self, batch: Batch, ranks: Ranks | None) -> torch.Tensor:
        if self.queue is not None:  # two steps of which the first fills it
            self.objective(self.adaptor, batch, ranks=ranks, queue=self.queue)
        chunk = 3 if self.extra == "chunked" else None
        how = {"ranks": ranks, "queue": self.queue, "known": self.known}
        return self.objective(self.adaptor, batch, chunk=chunk, **how).loss


def results(step: nn.Module, loss: torch.Tensor, case: str) -> dict[str, torch.Tensor]:
    """The loss and all gradients, by name."""
    loss.backward()
    named = {f"{case}/loss": loss.detach().reshape(1)}
    for name, parameter in step.named_parameters():
        named[f"{case}/{name.removeprefix('module.')}"] = parameter.grad
    return named


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world_size
    )
    ranks = Ranks.current()
    whole, size = whole_batch(), PAIRS // world_size
    part = slice(rank * size, (rank + 1) * size)
    own = Batch(**{field.name: getattr(whole, field.name)[part] for field in fields(Batch)})
    found = {}
    for case in CASES:
        step = DistributedDataParallel(Step(case))
        found |= results(step, step(own, ranks), case)
    save_file(found, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
