"""Image encoders: pictures of one size to prefix tokens and a grid."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcache.cache.format import FeatureSetSpec
from featcache.config import file_sha256
from featcache.encoders.interface import (
    Built,
    Dtype,
    Encoded,
    EncoderConfig,
    Features,
    LocatedEncoder,
    library_version,
)
from featcache.encoders.tokens import (
    choose_blocks,
    no_layers,
    pool_tokens,
    pooled_grid,
    token_record,
)
from featcache.encoders.weights import (
    DEMO,
    Shelf,
    check_keys,
    check_pin,
    read_state_dict,
)
from featcache.errors import EncoderError, UsageError, WeightsError

_XRV_FOLDER = Path("~/.torchxrayvision/models_data")
_XRV_FILES = {"101-elastic": "nihpcrsnamimic_ch-resnet101-2-ae-test2-elastic-e250.pt"}

_XRV_DECODER = ("uplayer", "conv1_1")


class FrozenImageEncoder:
    """One network behind the `ImageEncoder` interface.

    Args:
        located: Its files.
        device: Where it runs.
        random: Leave the weights as initialised; only `random_encoder` asks for that.

    Raises:
        EncoderError: It gives other tokens than its preset says.
        UsageError: The image size is no multiple of the patch size.
        WeightsError: The weights do not fill the network, or give numbers that are not finite.
    """

    def __init__(self, located: LocatedEncoder, *, device: str = "cpu", random: bool = False):
        self.located, self.name = located, located.name
        self.preprocessing = located.preprocessing
        network, self._forward, self._depth = _build(located, random=random)
        network.eval().requires_grad_(False).float().to(device)
        self._network = network
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        self._memory_format = torch.contiguous_format
        self._blocks = choose_blocks(
            located.config.layers, self._depth, encoder=self.name, network=located.network
        )
        blank = torch.zeros(1, self.preprocessing.channels, *self.preprocessing.image_size)
        probe = (self._depth,) if self._blocks and self._depth else ()
        with torch.inference_mode():
            features = self._forward(blank.to(device), probe)
        if features.is_map:
            network.to(memory_format=torch.channels_last)
            self._memory_format = torch.channels_last
        self._grid = features.grid
        self.num_prefix_tokens = int(features.tokens.shape[1]) - self._grid[0] * self._grid[1]
        pooled = self._pool(features)
        self.pooled_dim = None if pooled is None else int(pooled.shape[1])
        self._check(features)
        self.grid = pooled_grid(self._grid, located.config.pool_grid, encoder=self.name)
        self.dim = int(features.tokens.shape[2]) * max(1, len(self._blocks))

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Encoded:
        """Encode a batch; see `ImageEncoder`."""
        with torch.inference_mode():
            images = images.contiguous(memory_format=self._memory_format)
            features = self._forward(images, self._blocks)
            tokens = torch.cat(features.layers, -1) if self._blocks else features.tokens
            size = self.located.config.pool_grid
            if size != 1:
                tokens = pool_tokens(tokens, self.num_prefix_tokens, self._grid, size)
            return Encoded(tokens.contiguous(), self._pool(features))

    def _pool(self, features: Features) -> Float[Tensor, "B E"] | None:
        """The pooled vector that the preset asks for."""
        how = self.located.config.pooled
        if how == "own":
            return features.pooled
        if how == "class":
            return features.tokens[:, 0]
        mean = features.tokens[:, self.num_prefix_tokens :].mean(1)  # B D
        return nn.functional.normalize(mean, dim=-1) if how == "normalized_mean" else mean

    def _check(self, features: Features) -> None:
        """Compare what the network gave with what the preset says."""
        config = self.located.config
        layout = {
            "num_prefix_tokens": self.num_prefix_tokens,
            "grid": self._grid,
            "dim": int(features.tokens.shape[2]),
        }
        for field, found in layout.items():
            expected = getattr(config, field)
            if expected is not None and expected != found:
                raise EncoderError(
                    f"`{self.name}` has {field} = {found}, its preset says {expected}",
                    where=self.located.network,
                    fix="correct the preset, or give the weights of the network it names",
                )
        if config.pooled == "class" and self.num_prefix_tokens == 0:
            raise EncoderError(f"`{self.name}` has no class token to pool", where=config.source)
        if not torch.isfinite(features.tokens).all():
            raise WeightsError(
                f"`{self.name}` gives numbers that are not finite for a blank picture",
                where=self.located.weights,
                fix="download or copy the weights again",
            )
        # What a block gives must become what the encoder gives, or inner blocks mean nothing.
        if self._blocks and not torch.allclose(features.layers[0], features.tokens, atol=1e-4):
            raise no_layers(self.name, self.located.network)

    def spec(
        self, *, dtype: Dtype = "float16", batch_size: int, autocast: str | None = None
    ) -> FeatureSetSpec:
        """Everything that decides the bytes of a row; see `Encoder`."""
        config = self.located.config
        return FeatureSetSpec(
            modality="image",
            encoder=self.name,
            source=config.public_source,
            library=config.library,
            library_version=library_version(config.library),
            weights_sha256=self.located.weights_sha256,
            preprocessing=self.preprocessing.record()
            | {"network": self.located.network, "pooled": config.pooled}
            | token_record(config, self._depth),
            num_prefix_tokens=self.num_prefix_tokens,
            grid=self.grid,
            num_tokens=self.num_prefix_tokens + self.grid[0] * self.grid[1],
            dim=self.dim,
            pooled_dim=self.pooled_dim,
            dtype=dtype,
            batch_size=batch_size,
            autocast=autocast,
        )


def _build(located: LocatedEncoder, *, random: bool) -> Built:
    """The network of one library and its forward pass; the others are not imported."""
    if located.config.library == "timm":
        from featcache.encoders.timm_network import build_timm  # noqa: PLC0415

        return build_timm(located, random=random)
    if located.config.library == "transformers":
        from featcache.encoders.huggingface import build_vision  # noqa: PLC0415

        return build_vision(located, random=random)
    return _build_xrv(located, random=random)


def locate_image(
    name: str,
    config: EncoderConfig,
    *,
    weights: Path | None,
    image_size: tuple[int, int] | None,
    view: str = "identity",
) -> LocatedEncoder:
    """Find and hash the files of an image encoder; see `locate_encoder`."""
    model_config = None
    if config.library == "timm":
        from featcache.encoders.timm_network import find_timm  # noqa: PLC0415

        shelf, network = find_timm(name, config, weights)
        if config.source.startswith("folder:"):
            model_config = shelf.file(["config.json"])
    elif config.library == "transformers":
        from featcache.encoders.huggingface import find_vision  # noqa: PLC0415

        shelf, network, config = find_vision(name, config, weights)
        model_config = shelf.file(["config.json"])
    else:
        shelf, network = _find_xrv(name, config, weights)
    file = shelf.weights_file()
    for pinned, expected in config.sha256.items():
        check_pin(file.parent / pinned, expected, encoder=name)
    return LocatedEncoder(
        name=name,
        config=_rendered(config, image_size, view),
        network=network,
        weights=file,
        weights_sha256=file_sha256(file),
        model_config=model_config,
    )


def _rendered(
    config: EncoderConfig, image_size: tuple[int, int] | None, view: str
) -> EncoderConfig:
    """The config for a view and for another input size, which the preset's grid does not fit."""
    have = config.preprocessing
    if have is None:
        return config
    if image_size is not None and min(image_size) < 1:
        raise UsageError(f"an image size of {min(image_size)} pixels", where="--image-size")
    size = image_size or have.image_size
    shown = {} if view == "identity" else {"view": view}
    rendered = have.model_copy(update={"image_size": size} | shown)
    grid = config.grid if size == have.image_size else None
    return config.model_copy(update={"preprocessing": rendered, "grid": grid})


def _find_xrv(name: str, config: EncoderConfig, weights: Path | None) -> tuple[Shelf, str]:
    """The file that torchxrayvision keeps in the user's home, or the one that was given."""
    which = config.source.removeprefix("xrv:")
    if importlib.util.find_spec("torchxrayvision") is None:
        raise EncoderError(
            f"the network of `{name}` is in a package that is not installed",
            where="package torchxrayvision",
            fix="pip install torchxrayvision",
        )
    file = weights or _XRV_FOLDER.expanduser() / _XRV_FILES.get(which, which)
    if not file.is_file():
        raise WeightsError(
            f"the weights of `{name}` are not on this machine",
            where=file,
            fix=f"where there is a network, torchxrayvision.autoencoders.ResNetAE({which!r}) "
            f"fetches them; or --weights {name}=FILE; {DEMO}",
        )
    return Shelf(name, weights=file), "torchxrayvision.ResNetAE101"


def _build_xrv(located: LocatedEncoder, *, random: bool = False) -> Built:
    """The encoder half of torchxrayvision's ResNet autoencoder."""
    autoencoders: Any = importlib.import_module("torchxrayvision.autoencoders")

    network = autoencoders.ResNetAE()
    if not random:
        tensors = read_state_dict(located.weights)
        wanted = network.state_dict()
        check_keys(
            [key for key in wanted if key not in tensors],
            [key for key in tensors if key not in wanted],
            [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape],
            allowed_surplus=(),
            where=located.weights,
        )
        network.load_state_dict(tensors)
    for part in [name for name, _ in network.named_children() if name.startswith(_XRV_DECODER)]:
        delattr(network, part)

    def forward(images: Float[Tensor, "B C H W"], blocks: tuple[int, ...]) -> Features:
        features = network.encode(images, check_resolution=False)  # B C H W
        grid = (features.shape[2], features.shape[3])
        tokens = features.flatten(2).transpose(1, 2)  # B (H W) C
        return Features(tokens, grid, features.mean((2, 3)), is_map=True)

    return Built(network, forward, depth=None)
