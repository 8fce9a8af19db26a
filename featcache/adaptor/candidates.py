"""The images and texts of a split as retrieval candidates, none of them knowing its partner."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featcache.adaptor.model import Adaptor
from featcache.adaptor.objective import Objective
from featcache.adaptor.retrieval import (
    chance_recall,
    retrieval_metrics,
    retrieval_ranks,
    unpaired_scores,
)
from featcache.cache.reader import Cache
from featcache.loader.gather import iterate_rows

BATCH_SIZE = 64


@dataclass(frozen=True)
class Candidates:
    """Images and texts of one split, each once, with who belongs to whom.

    Attributes:
        cache: Where their tokens are.
        image_rows: Rows of the image set, ascending.
        text_rows: Rows of the text set, ascending.
        positives: True where an image has this very text.
        reading: Fields of `Reading`: which tokens of a row are read.
    """

    cache: Cache
    image_rows: Int64[np.ndarray, " I"]
    text_rows: Int64[np.ndarray, " J"]
    positives: Bool[Tensor, "I J"]
    reading: Mapping[str, int | str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache, **reading: int | str | None) -> "Candidates":
        """All that the pairs of a cache name, read as `reading` says."""
        image_rows, images = np.unique(cache.image_rows, return_inverse=True)
        text_rows, texts = np.unique(cache.text_rows, return_inverse=True)
        positives = torch.zeros(len(image_rows), len(text_rows), dtype=torch.bool)
        positives[torch.from_numpy(images), torch.from_numpy(texts)] = True
        return cls(cache, image_rows, text_rows, positives, reading)

    def scores(self, objective: Objective, adaptor: Adaptor, device: str) -> Float[Tensor, "I J"]:
        """Every image against every text, unpaired."""
        images = iterate_rows(self.cache.images, self.image_rows, BATCH_SIZE, **self.reading)
        texts = iterate_rows(self.cache.texts, self.text_rows, BATCH_SIZE, **self.reading)
        return unpaired_scores(
            objective,
            adaptor,
            (tokens.to(device) for _, tokens, _ in images),
            (
                (tokens.to(device), valid.to(device))
                for _, tokens, valid in texts
                if valid is not None  # None means an image set
            ),
        )

    def metrics(self, objective: Objective, adaptor: Adaptor, device: str) -> dict[str, float]:
        """Retrieval both ways, with the recall that guessing would have."""
        scores = self.scores(objective, adaptor, device)
        found: dict[str, float] = {"images": len(self.image_rows), "texts": len(self.text_rows)}
        for way, one, positives in (
            ("image_to_text", scores, self.positives),
            ("text_to_image", scores.T, self.positives.T),
        ):
            metrics = retrieval_metrics(retrieval_ranks(one, positives))
            found |= {f"{way}_{name}": value for name, value in metrics.items()}
            found |= {
                f"{way}_chance_recall_at_{k}": chance_recall(positives, k) for k in (1, 5, 10)
            }
        found["mrr"] = (found["image_to_text_mrr"] + found["text_to_image_mrr"]) / 2
        return found
