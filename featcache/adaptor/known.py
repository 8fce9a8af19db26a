"""The known pairs of a training set, by which positives are found that no pair of a batch shows.

Shapes: `P` pairs kept, `M` pairs given, `I` images, `J` texts, `E` texts of these images.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn


class KnownPairs(nn.Module):
    """Sorted codes `image_row * num_texts + text_row`, 8 bytes for each pair.

    Two pairs of a batch show each other's positives by an equal image row or an equal text row.
    They miss a pair only where its image has further texts *and* its text has further images; no
    other pair is kept. So where each image has one report there is nothing to look up.

    The codes are a buffer, so that they move with the module that holds them; a checkpoint does not
    have them, since the training set does.

    Args:
        codes: Ascending, each once.
        num_texts: More than the largest text row.
    """

    codes: Int64[Tensor, " P"]

    def __init__(self, codes: Int64[Tensor, " P"], num_texts: int):
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.num_texts = num_texts

    @classmethod
    def of(
        cls, image_rows: Int64[np.ndarray, " M"], text_rows: Int64[np.ndarray, " M"]
    ) -> "KnownPairs | None":
        """Of all pairs of a training set.

        Args:
            image_rows: Of each pair, at least 0.
            text_rows: Of each pair, at least 0.

        Returns:
            None when equal rows miss nothing.
        """
        num_texts = int(text_rows.max(initial=-1)) + 1
        codes = np.unique(image_rows * num_texts + text_rows)
        images, texts = np.divmod(codes, max(1, num_texts))
        missed = (np.bincount(images)[images] > 1) & (np.bincount(texts)[texts] > 1)
        return cls(torch.from_numpy(codes[missed]), num_texts) if missed.any() else None

    def __len__(self) -> int:
        return len(self.codes)

    def texts_of(
        self, images: Int64[Tensor, " I"]
    ) -> tuple[Int64[Tensor, " E"], Int64[Tensor, " E"]]:
        """The texts that are kept for images: places in `images`, ascending, and text rows."""
        first = torch.searchsorted(self.codes, images * self.num_texts)
        counts = torch.searchsorted(self.codes, (images + 1) * self.num_texts) - first
        numbers = torch.arange(len(images), device=images.device)
        places = torch.repeat_interleave(numbers, counts)
        shift = first - counts.cumsum(dim=0) + counts  # from a place in the result to one in codes
        found = torch.arange(len(places), device=images.device) + shift[places]
        return places, self.codes[found] - images[places] * self.num_texts

    def belong(
        self, images: Int64[Tensor, " I"], texts: Int64[Tensor, " J"]
    ) -> Bool[Tensor, "I J"]:
        """Which pairs of these images and texts are kept.

        The few texts of each image are looked up among those of the block, not each pair of the
        block among all codes, which took twenty times as long at a batch of 1,024 on a CPU.
        """
        wanted, column_of = torch.unique(texts, return_inverse=True)
        places, owned = self.texts_of(images)
        column = torch.searchsorted(wanted, owned).clamp_(max=len(wanted) - 1)
        # What is not among the texts goes into a last column, which nobody reads.
        column = torch.where(wanted[column] == owned, column, len(wanted))
        # Turned, since whole rows are cheaper to pick than columns.
        table = torch.zeros(len(wanted) + 1, len(images), dtype=torch.bool, device=images.device)
        table[column, places] = True
        return table[column_of].T.contiguous()
