"""A linear map from mean image tokens to mean text tokens: retrieval without an Adaptor.

Raw image and text tokens live in spaces of different width, so they cannot be compared as they
are. The least that makes them comparable is a linear map, which has a closed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from featcache.errors import TrainingError

PAIRS_AT_ONCE = 65_536
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LinearMap:
    """Ridge regressions from standardised images to standardised texts, one for each penalty.

    Attributes:
        weights: Map of each penalty.
        image_mean: Over the training pairs, as the next three.
        image_sd: 1 where a channel is constant.
        text_mean: See above.
        text_sd: See above.
    """

    weights: Float64[np.ndarray, "P D E"]
    image_mean: Float64[np.ndarray, " D"]
    image_sd: Float64[np.ndarray, " D"]
    text_mean: Float64[np.ndarray, " E"]
    text_sd: Float64[np.ndarray, " E"]

    def scores(
        self, images: Float32[np.ndarray, "I D"], texts: Float32[np.ndarray, "J E"], penalty: int
    ) -> Iterator[Float32[np.ndarray, "_ J"]]:
        """Cosine of each mapped image with each text, in blocks of images.

        Args:
            images: Mean tokens.
            texts: Mean tokens.
            penalty: Number of the penalty.
        """
        scaled = _normalised((texts - self.text_mean) / self.text_sd).T
        for start in range(0, len(images), ROWS_AT_ONCE):
            given = (images[start : start + ROWS_AT_ONCE] - self.image_mean) / self.image_sd
            mapped = _normalised(given @ self.weights[penalty])
            yield np.asarray(mapped @ scaled, dtype=np.float32)


def _normalised(rows: Float64[np.ndarray, "N E"]) -> Float64[np.ndarray, "N E"]:
    """Rows with norm 1; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _moments(
    vectors: Float32[np.ndarray, "N D"], rows: Int64[np.ndarray, " M"]
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """Mean and standard deviation over rows, repeats counted; in blocks, for memory's sake."""
    counts = np.bincount(rows, minlength=len(vectors)) / len(rows)
    starts = range(0, len(vectors), PAIRS_AT_ONCE)
    blocks = [slice(start, start + PAIRS_AT_ONCE) for start in starts]
    mean, variance = (np.zeros(vectors.shape[1]) for _ in range(2))
    for some in blocks:
        mean += counts[some] @ vectors[some].astype(np.float64)
    for some in blocks:
        variance += counts[some] @ (vectors[some] - mean) ** 2
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def fit_linear_map(
    images: Float32[np.ndarray, "I D"],
    texts: Float32[np.ndarray, "J E"],
    image_of: Int64[np.ndarray, " M"],
    text_of: Int64[np.ndarray, " M"],
    penalties: Sequence[float],
) -> LinearMap:
    """Fit the map on training pairs, for all penalties by one eigendecomposition.

    With X and Y standardised over the M pairs it is (X'X / M + penalty)^-1 X'Y / M.

    Args:
        images: Mean tokens of the training images.
        texts: Mean tokens of the training texts.
        image_of: Image of each pair.
        text_of: Text of each pair.
        penalties: Each > 0.

    Raises:
        TrainingError: There are fewer than two pairs.
    """
    if len(image_of) < 2:
        raise TrainingError(
            f"a linear map needs at least 2 training pairs, there are {len(image_of)}"
        )
    image_mean, image_sd = _moments(images, image_of)
    text_mean, text_sd = _moments(texts, text_of)
    within = np.zeros((images.shape[1], images.shape[1]))
    across = np.zeros((images.shape[1], texts.shape[1]))
    for start in range(0, len(image_of), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        x = (images[image_of[some]] - image_mean) / image_sd
        within += x.T @ x
        across += x.T @ ((texts[text_of[some]] - text_mean) / text_sd)
    values, basis = np.linalg.eigh(within / len(image_of))
    turned = basis.T @ (across / len(image_of))
    weights = [basis @ (turned / (values.clip(min=0) + penalty)[:, None]) for penalty in penalties]
    return LinearMap(np.stack(weights), image_mean, image_sd, text_mean, text_sd)
