"""The one interface that every frozen encoder has.

An encoder goes through three steps: `resolve_encoder` reads what is known about a name,
`locate_encoder` finds and hashes its files before anything is decoded, `load_encoder` builds the
network. Weights are never random: only `random_encoder` makes such a network, by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from featcache.cache.format import FeatureSetSpec
from featcache.config import Config, find_config, list_configs, load_config
from featcache.encoders.preprocessing import VIEWS, Preprocessing
from featcache.errors import EncoderError, UsageError, WeightsError, nearest

Modality = Literal["image", "text"]
Library = Literal["timm", "transformers", "torchxrayvision"]
Dtype = Literal["float16", "float32", "int8"]


class EncoderConfig(Config):
    """What is known about an encoder before its files are looked at: one YAML file.

    Sources are `timm:NAME` and `hf:ID` (a model hub), `package:MODULE/PATH` (a file or folder
    inside an installed package), `xrv:NAME` (torchxrayvision) and `folder:PATH` (this machine).
    """

    kind: Literal["encoder"] = Field(default="encoder", description="What this file describes.")
    modality: Modality = Field(description="Whether it reads pictures or texts.")
    source: str = Field(
        pattern=r"^(timm|hf|package|xrv|folder):.+", description="Where its weights come from."
    )
    library: Library = Field(description="The library whose network it is.")
    architecture: str | None = Field(
        default=None, description="timm's architecture name, where the source does not say it."
    )
    licence: str = Field(default="", description="Licence of the weights, as far as known.")
    extra: str | None = Field(
        default=None, description="The optional dependency that holds the weights."
    )
    sha256: dict[str, str] = Field(
        default_factory=dict, description="File name to the SHA-256 that it must have."
    )
    state_dict: Literal["named", "ordered"] = Field(
        default="named", description="`ordered`: tensors in the network's order under other names."
    )
    preprocessing: Preprocessing | None = Field(
        default=None, description="Images: pixels to input."
    )
    num_prefix_tokens: int | None = Field(
        default=None, ge=0, description="Expected; checked at load."
    )
    grid: tuple[int, int] | None = Field(
        default=None, description="Expected height, width in tokens."
    )
    dim: int | None = Field(default=None, gt=0, description="Expected width of a token.")
    pooled: Literal["own", "class", "mean", "normalized_mean"] = Field(
        default="own", description="The pooled vector; `own` is what the network itself pools."
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="Blocks whose tokens are stored side by side, from 1, or from -1 backwards; "
        "None: the last.",
    )
    pool_grid: int = Field(
        default=1, ge=1, description="Images: tokens of n x n places are averaged to one."
    )
    max_tokens: int | None = Field(
        default=None, gt=2, description="Texts: longest, specials included."
    )
    lowercase: bool | None = Field(
        default=None, description="Texts: whether the tokenizer lower-cases."
    )

    @property
    def public_source(self) -> str:
        """The source as a feature set records it: no folder of this machine."""
        return "folder" if self.source.startswith("folder:") else self.source


@dataclass(frozen=True)
class LocatedEncoder:
    """An encoder whose files are there and hashed; plain values, cheap to pickle.

    Attributes:
        name: Short name; also the feature set's folder name.
        config: What is known about it, with the caller's size or length laid over.
        network: What is built: timm's architecture, or a type and a hash of its `config.json`.
        weights: The file of weights.
        weights_sha256: SHA-256 of that file, 64 hex digits.
        model_config: The architecture's `config.json`, None where a name says it all.
        tokenizer: The files of the tokenizer; empty for images.
        tokenizer_sha256: Hash over their names and contents; None for images.
    """

    name: str
    config: EncoderConfig
    network: str
    weights: Path
    weights_sha256: str
    model_config: Path | None = None
    tokenizer: tuple[Path, ...] = ()
    tokenizer_sha256: str | None = None

    @property
    def modality(self) -> Modality:
        """`image` or `text`."""
        return self.config.modality

    @property
    def preprocessing(self) -> Preprocessing:
        """Of an image encoder: from pixels to input."""
        if self.config.preprocessing is None:
            raise EncoderError(f"`{self.name}` has no preprocessing", where=self.config.source)
        return self.config.preprocessing

    @property
    def network_key(self) -> tuple[object, ...]:
        """Equal for encoders that one loaded network serves: they may differ in name and pictures.

        What a picture goes through before the network (view, fit, mean, std) is left out; its size
        and everything that decides what the network gives is in.
        """
        config, given = self.config, self.config.preprocessing
        return (
            config.modality,
            config.library,
            config.public_source,
            config.state_dict,
            self.network,
            self.weights,
            self.weights_sha256,
            self.model_config,
            self.tokenizer_sha256,
            None if given is None else (given.image_size, given.channels),
            config.pooled,
            config.layers,
            config.pool_grid,
            config.max_tokens,
            config.lowercase,
        )


class Encoded(NamedTuple):
    """What an encoder gives for one batch."""

    tokens: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B E"] | None


class Features(NamedTuple):
    """What a forward pass of any library's image network gives."""

    tokens: Float[Tensor, "B L D"]  # of the last layer
    grid: tuple[int, int]
    pooled: Float[Tensor, "B E"] | None
    is_map: bool  # a CNN's map, which is faster with channels last
    layers: tuple[Float[Tensor, "B L D"], ...] = ()  # those asked for, in that order


# Pictures, and the numbers from 1 of blocks whose tokens are wanted besides the last layer's.
Forward = Callable[[Float[Tensor, "B C H W"], tuple[int, ...]], Features]


class Built(NamedTuple):
    """A network of any library, and how pictures go through it."""

    network: nn.Module
    forward: Forward
    depth: int | None  # number of its blocks, None where they are not of one kind


class Tokenized(NamedTuple):
    """Texts as token ids, special tokens included, at most `max_tokens` each."""

    ids: list[list[int]]
    truncated: list[bool]


@runtime_checkable
class Encoder(Protocol):
    """What image and text encoders have in common."""

    located: LocatedEncoder
    name: str
    dim: int
    pooled_dim: int | None
    num_prefix_tokens: int
    num_parameters: int

    def spec(
        self, *, dtype: Dtype = "float16", batch_size: int, autocast: str | None = None
    ) -> FeatureSetSpec:
        """Everything that decides the bytes of a row.

        Args:
            dtype: What tokens are stored as.
            batch_size: Rows per forward pass.
            autocast: `bfloat16`, `float16`, or None: plain float32.
        """


@runtime_checkable
class ImageEncoder(Encoder, Protocol):
    """Pictures to tokens: prefix tokens first, then the grid row by row.

    The network is in eval mode, its parameters are float32, and a call runs in inference mode.
    Autocast is the caller's. A call may be made from one thread at a time.
    """

    preprocessing: Preprocessing
    grid: tuple[int, int]

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Encoded:
        """Encode a batch.

        Args:
            images: What `to_input` gives, on the encoder's device.

        Returns:
            Tokens, L = prefix + grid height * grid width, and the pooled vectors.
        """


@runtime_checkable
class TextEncoder(Encoder, Protocol):
    """Texts to tokens, special tokens included ([CLS] first, [SEP] last)."""

    max_tokens: int
    pad_id: int

    def tokenize(self, texts: list[str]) -> Tokenized:
        """Turn texts into ids; longer ones are cut, their special tokens kept at both ends."""

    def pad_batch(
        self, ids: list[list[int]], *, multiple: int = 32
    ) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Pad ids to one length, rounded up to a multiple but never beyond the positions.

        Returns:
            Ids (CPU) and `valid`, True where an id is real.
        """

    def __call__(self, ids: Int64[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Encoded:
        """Encode a padded batch; rows of `tokens` where `valid` is False are meaningless."""


def split_view(name: str) -> tuple[str, str]:
    """Take a name like `vit-b@flip` apart: the encoder, and the view of the pictures.

    A name without `@` means the view `identity`, and so does a path that is there as it stands.

    Raises:
        UsageError: There is no such view.
    """
    base, at, view = name.rpartition("@")
    if not at or "/" in view or Path(name).exists():
        return name, "identity"
    if view not in VIEWS:
        raise UsageError(
            f"there is no view `{view}` of `{base}`; {nearest(view, VIEWS)}",
            where=name,
            fix=f"views: {', '.join(VIEWS)}",
        )
    return base, view


def resolve_encoder(name: str, modality: Modality) -> EncoderConfig:
    """Read what is known about a name: a shipped short name, `timm:X`, `hf:X`, a folder, a YAML.

    A view in the name (`vit-b@flip`) is checked and left out: it is laid over by `locate_encoder`.

    Raises:
        UsageError: The name or its view is unknown, or names an encoder of the other modality.
    """
    name, view = split_view(name)
    if view != "identity" and modality == "text":
        raise UsageError(f"texts have no view `{view}`", where="--text-encoder", fix=name)
    path = Path(name)
    if name in list_configs("encoders"):
        config = load_config(EncoderConfig, path=find_config("encoders", name))
    elif name.startswith("timm:"):
        from featcache.encoders.timm_network import describe_timm  # noqa: PLC0415  takes seconds

        config = describe_timm(name.removeprefix("timm:"))
    elif name.startswith("hf:"):
        source = name.replace("--", "/")
        config = EncoderConfig(modality=modality, source=source, library="transformers")
    elif path.suffix in (".yaml", ".yml"):
        config = load_config(EncoderConfig, path=path)
        kind, _, where = config.source.partition(":")
        if kind == "folder":
            config = config.model_copy(update={"source": f"folder:{path.parent / where}"})
    elif path.is_dir():
        config = _describe_folder(path, modality)
    else:
        find_config("encoders", name)  # raises, with the nearest names
        raise UsageError(f"unknown encoder `{name}`")
    if config.modality != modality:
        raise UsageError(
            f"`{name}` encodes {config.modality}s, an encoder of {modality}s is asked for",
            where="--backbone" if modality == "image" else "--text-encoder",
            fix=f"{'--text-encoder' if modality == 'image' else '--backbone'} {name}",
        )
    return config


def _describe_folder(folder: Path, modality: Modality) -> EncoderConfig:
    """A folder as `save_pretrained` of transformers or `save_for_hf` of timm writes it."""
    source = f"folder:{folder.resolve()}"
    if modality == "image":
        from featcache.encoders.timm_network import describe_timm_folder  # noqa: PLC0415

        config = describe_timm_folder(folder)
        if config is not None:
            return config
    return EncoderConfig(modality=modality, source=source, library="transformers")


def locate_encoder(
    name: str,
    modality: Modality,
    *,
    weights: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    max_tokens: int | None = None,
    layers: tuple[int, ...] | None = None,
    pool_grid: int | None = None,
) -> LocatedEncoder:
    """Find and hash an encoder's files, within seconds when no hub answers.

    Args:
        name: Short name, `timm:NAME`, `hf:ID`, a local folder, or a YAML file; for images perhaps
            with a view: `vit-b@flip`.
        modality: `image` or `text`.
        weights: A `.safetensors` file (or a folder) to take instead of a hub's.
        image_size: Side, or (height, width), in pixels; None is the encoder's own.
        max_tokens: Longest text, special tokens included; None is the encoder's own.
        layers: Blocks whose tokens are stored side by side, counted from 1, or backwards from -1;
            None is the last.
        pool_grid: Tokens of so many by so many places of the grid are averaged to one.

    Raises:
        UsageError: The name or view is unknown, or the size, length or layers cannot be.
        WeightsError: The weights are not here, or are not what they claim to be.
    """
    base, view = split_view(name)
    config = _asked(resolve_encoder(name, modality), layers, pool_grid)
    if weights is not None and not weights.exists():
        raise WeightsError("there is no such file of weights", where=weights, fix="check the path")
    if weights is not None:
        config = config.model_copy(update={"sha256": {}})
    if modality == "image":
        from featcache.encoders.image import locate_image  # noqa: PLC0415  seconds to import

        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        located = locate_image(base, config, weights=weights, image_size=size, view=view)
    else:
        from featcache.encoders.text import locate_text  # noqa: PLC0415  seconds to import

        located = locate_text(name, config, weights=weights, max_tokens=max_tokens)
    return replace(located, name=short_name(name))


def _asked(
    config: EncoderConfig, layers: tuple[int, ...] | None, pool_grid: int | None
) -> EncoderConfig:
    """The config with the caller's layers and pooling laid over what its file says.

    Raises:
        UsageError: They cannot be, whatever the network.
    """
    if layers is not None and (not layers or 0 in layers):
        raise UsageError(
            "layers are counted from 1, or backwards from -1",
            where="--layers",
            fix="--layers -1 for the last one",
        )
    if pool_grid is not None and pool_grid < 1:
        raise UsageError(f"a pooling of {pool_grid} places", where="--pool-grid", fix="at least 1")
    config = config.model_copy(
        update={
            "layers": config.layers if layers is None else layers,
            "pool_grid": config.pool_grid if pool_grid is None else pool_grid,
        }
    )
    if config.modality == "text" and config.pool_grid != 1:
        raise UsageError(
            "tokens of texts have no grid to pool", where="--pool-grid", fix="leave it out"
        )
    return config


def short_name(name: str) -> str:
    """A name that can be a folder's: the last part of a path, `--` for a hub id's slash."""
    base, view = split_view(name)
    path = Path(base)
    if base.startswith(("timm:", "hf:")):
        short = base.replace("/", "--")
    elif path.suffix in (".yaml", ".yml"):
        short = path.stem
    else:
        short = path.resolve().name if path.is_dir() else base
    return short if view == "identity" else f"{short}@{view}"


def load_encoder(located: LocatedEncoder, *, device: str = "cpu") -> ImageEncoder | TextEncoder:
    """Build the network, load its weights completely, and check what it gives.

    Raises:
        EncoderError: Tokens, grid or width are not what the preset expects.
        UsageError: The image size is none that the network can take.
        WeightsError: Weights are missing, surplus, or of another shape.
    """
    if located.modality == "image":
        from featcache.encoders.image import FrozenImageEncoder  # noqa: PLC0415

        return FrozenImageEncoder(located, device=device)
    from featcache.encoders.text import FrozenTextEncoder  # noqa: PLC0415

    return FrozenTextEncoder(located, device=device)


def random_encoder(
    located: LocatedEncoder, *, seed: int, device: str = "cpu"
) -> ImageEncoder | TextEncoder:
    """The same architecture with random weights: the baseline row, never a fall-back.

    Its `name` ends in `-random<seed>`, and its spec says so in place of the weights' hash. The
    caller's random state is left as it was.
    """
    base, at, view = located.name.partition("@")
    name = f"{base}-random{seed}{at}{view}"
    named = replace(located, name=name, weights_sha256=f"random-{seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if located.modality == "image":
            from featcache.encoders.image import FrozenImageEncoder  # noqa: PLC0415

            return FrozenImageEncoder(named, device=device, random=True)
        from featcache.encoders.text import FrozenTextEncoder  # noqa: PLC0415

        return FrozenTextEncoder(named, device=device, random=True)


def library_version(library: Library) -> str:
    """Versions of all that computes: recorded with a set, not part of its fingerprint."""
    names = (library, "torch", "pillow")
    return ", ".join(f"{name} {version(name)}" for name in names)
