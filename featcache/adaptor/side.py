"""One modality's way through an Adaptor, from tokens to a vector.

Shapes: `B` batch, `L` image tokens, `T` text tokens, `D`, `E` the encoders' widths, `F` the
vector's.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcache.adaptor.saved import TrainedAdaptor


class ImageSide(nn.Module):
    """The vector that heads read of an image.

    Args:
        trained: Whose.
    """

    def __init__(self, trained: TrainedAdaptor):
        super().__init__()
        self.adaptor, self.objective = trained.adaptor, trained.objective
        self.eval()

    def forward(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B F"]:
        """A vector for each image, which depends on this image alone."""
        vectors: Tensor = self.objective.image_vector(self.adaptor, tokens)
        return vectors


class TextSide(nn.Module):
    """The vector with which a text is compared.

    Args:
        trained: Whose.
    """

    def __init__(self, trained: TrainedAdaptor):
        super().__init__()
        self.adaptor, self.objective = trained.adaptor, trained.objective
        self.eval()

    def forward(
        self, tokens: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B F"]:
        """A vector for each text, which depends on this text's real tokens alone."""
        vectors: Tensor = self.objective.encode_texts(self.adaptor, tokens, valid)
        return vectors
