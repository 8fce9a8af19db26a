"""Networks of the transformers library, built from files alone."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from pydantic import JsonValue
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from featcache.config import canonical_json, validate
from featcache.console import note
from featcache.encoders.interface import Built, EncoderConfig, Features, LocatedEncoder
from featcache.encoders.preprocessing import Preprocessing
from featcache.encoders.weights import Shelf, check_keys, open_shelf, read_state_dict
from featcache.errors import EncoderError, UsageError

# Beginnings of tensors that an encoder may do without: poolers, heads of other tasks, old buffers.
_HEADS = (
    "pooler.",
    "cls.",
    "cls_projection_head.",
    "classifier.",
    "lm_head.",
    "embeddings.position_ids",
)
_log: Any = transformers_logging  # its functions are untyped
_FILTERS = {"2": "bilinear", "3": "bicubic"}  # Pillow's numbers
_SAME_NETWORK = {"cxr-bert": "bert"}
# What a `config.json` says besides the network.
_NO_ARCHITECTURE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def architecture_hash(config: Mapping[str, JsonValue]) -> str:
    """16 hex digits over what a `config.json` says of the network, leaving out its history."""
    kept = {key: value for key, value in config.items() if key not in _NO_ARCHITECTURE}
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()[:16]


def read_architecture(path: Path) -> dict[str, JsonValue]:
    """Read a `config.json`, without anything that would make a library run code beside it.

    Raises:
        EncoderError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise EncoderError("the encoder's config.json is damaged", where=path)
    for key in ("auto_map", "custom_pipelines", "quantization_config"):
        values.pop(key, None)
    return values


def _describe_network(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The class that a `config.json` names, its configuration, and arguments beside it."""
    values = read_architecture(path)
    model_type = str(values.get("model_type"))
    model_type = _SAME_NETWORK.get(model_type, model_type)
    if model_type not in CONFIG_MAPPING:
        raise EncoderError(f"transformers knows no network of the type `{model_type}`", where=path)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values | {"model_type": model_type})
    except (TypeError, ValueError, AttributeError, StrictDataclassError):
        raise EncoderError("the encoder's config.json says what cannot be", where=path) from None
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(f"`{model_type}` is no encoder that gives tokens", where=path)
    network: Any = MODEL_MAPPING[type(config)]
    network = network[0] if isinstance(network, tuple) else network
    options = {}
    if "add_pooling_layer" in inspect.signature(network).parameters:
        options["add_pooling_layer"] = False  # BERT's and ViT's extra layer was never ours
    return network, config, options


def build_network(config_path: Path, weights: Path | None) -> Any:
    """Build a network of transformers in float32 from its `config.json`, and fill it completely.

    The state dict is handed over by value, so the library translates old names, but looks for no
    file and asks no hub; code beside the weights is never run.

    Args:
        config_path: The `config.json`.
        weights: File of weights, or None: random ones, for `random_encoder` alone.

    Returns:
        The `PreTrainedModel`.

    Raises:
        EncoderError: The library does not know the architecture.
        WeightsError: The weights do not fill it.
    """
    network, config, options = _describe_network(config_path)
    if weights is None:
        return network(config, **options)
    with _quiet_transformers():
        model, found = network.from_pretrained(
            None,
            config=config,
            state_dict=read_state_dict(weights),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they come back as a list, refused below
            output_loading_info=True,
            **options,
        )
    prefix = f"{model.base_model_prefix}."
    check_keys(
        found["missing_keys"],
        [key.removeprefix(prefix) for key in found["unexpected_keys"]],
        [key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]],
        allowed_surplus=_HEADS,
        where=weights,
    )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the library's table of keys and its bar off the terminal; the lists are checked."""
    verbosity, bar = _log.get_verbosity(), _log.is_progress_bar_enabled()
    _log.set_verbosity_error()
    _log.disable_progress_bar()
    try:
        yield
    finally:
        _log.set_verbosity(verbosity)
        if bar:
            _log.enable_progress_bar()


def network_name(values: Mapping[str, JsonValue]) -> str:
    """What a `config.json` builds: its type, and a hash over the rest."""
    return f"{values.get('model_type')} {architecture_hash(values)}"


def find_vision(
    name: str, config: EncoderConfig, weights: Path | None
) -> tuple[Shelf, str, EncoderConfig]:
    """Where the files of an image encoder lie, its network, and the preset with preprocessing.

    Raises:
        WeightsError: They are in no place that can be asked for them.
    """
    repo = config.source.removeprefix("hf:") if config.source.startswith("hf:") else None
    shelf = open_shelf(name, config.source, extra=config.extra, weights=weights, repo=repo)
    network = network_name(read_architecture(shelf.file(["config.json"])))
    if config.preprocessing is None:
        if shelf.folder is None or (shelf.folder / "preprocessor_config.json").is_file():
            processor = read_processor(shelf.file(["preprocessor_config.json"]))
        else:
            processor = _assume_processor(name, shelf.file(["config.json"]))
        config = config.model_copy(update={"preprocessing": processor})
    return shelf, network, config


def _assume_processor(name: str, path: Path) -> Preprocessing:
    """Preprocessing for a local folder that holds a network alone; the user is told."""
    values = read_architecture(path)
    size, channels = values.get("image_size", 224), values.get("num_channels", 3)
    note(
        f"`{name}` has no preprocessor_config.json: mean and std 0.5 are assumed, a YAML file of "
        "your own (--backbone FILE.yaml) can say otherwise"
    )
    half = [0.5] * (channels if isinstance(channels, int) else 3)
    wanted = {"image_size": [size, size] if isinstance(size, int) else size}
    return validate(Preprocessing, wanted | {"mean": half, "std": half}, where=path)


def read_processor(path: Path) -> Preprocessing:
    """The preprocessing that a `preprocessor_config.json` of transformers describes.

    Size, filter, mean and std are taken over; a crop is not: the whole picture is padded.

    Raises:
        EncoderError: It is damaged, or asks for what we do not do.
    """
    values = read_architecture(path)
    size = values.get("crop_size") if values.get("do_center_crop") else None
    size = values.get("size") if size is None else size
    if isinstance(size, dict):
        side = size.get("shortest_edge", size.get("longest_edge"))
        size = [size.get("height", side), size.get("width", side)]
    elif isinstance(size, int):
        size = [size, size]
    rescale = values.get("rescale_factor", 1 / 255)
    filter_name = _FILTERS.get(str(values.get("resample", 2)))
    normalizes = values.get("do_normalize", True)
    if not isinstance(rescale, float) or abs(rescale * 255 - 1) > 1e-3 or filter_name is None:
        raise EncoderError(
            "the image processor rescales or resamples in a way that is not known here",
            where=path,
            fix="describe the encoder in a YAML file of your own, with `preprocessing`",
        )
    wanted = {
        "image_size": size,
        "interpolation": filter_name,
        "mean": values.get("image_mean") if normalizes else [0.0, 0.0, 0.0],
        "std": values.get("image_std") if normalizes else [1.0, 1.0, 1.0],
    }
    return validate(Preprocessing, wanted, where=path)


def _position_options(
    network: Any, preprocessing: Preprocessing, *, encoder: str
) -> dict[str, bool]:
    """Arguments of a forward pass that make the library resample positions where it has to.

    Raises:
        UsageError: The library would resample them as if the stored grid were square.
    """
    stored = getattr(network.config, "image_size", None)
    stored = (stored, stored) if isinstance(stored, int) else stored
    at_own_size = stored is not None and tuple(stored) == preprocessing.image_size
    chooses = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
    if at_own_size and chooses:
        return {}
    if stored is not None and stored[0] != stored[1]:
        raise UsageError(
            f"transformers resamples the positions of `{encoder}` as if {stored[0]} x {stored[1]} "
            "pixels were a square",
            where="--image-size",
            fix=f"--image-size {stored[0]}x{stored[1]}"
            if chooses
            else "take the same network from timm: --backbone timm:NAME",
        )
    return {"interpolate_pos_encoding": True} if chooses else {}


def build_vision(located: LocatedEncoder, *, random: bool = False) -> Built:
    """Build a vision transformer of transformers; random weights only when asked for by name.

    Raises:
        EncoderError: It is no network whose tokens are a prefix and a grid of patches.
        UsageError: The image size is none that it can take.
        WeightsError: The weights do not fill it.
    """
    config = located.model_config
    if config is None:
        raise EncoderError("an encoder of transformers without config.json", where=located.name)
    network = build_network(config, None if random else located.weights)
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise EncoderError(
            f"a `{network.config.model_type}` of transformers has no grid of square patches",
            where=config,
            fix="take the same network from timm: --backbone timm:NAME",
        )
    preprocessing = located.preprocessing
    preprocessing.check_patches(patch, encoder=located.name)
    height, width = preprocessing.image_size
    grid = (height // patch, width // patch)
    options = _position_options(network, preprocessing, encoder=located.name)
    norm = getattr(network, "layernorm", None) or getattr(network, "norm", None)
    depth = getattr(network.config, "num_hidden_layers", None) if norm is not None else None

    def forward(images: Float[Tensor, "B C H W"], blocks: tuple[int, ...]) -> Features:
        asked = options | ({"output_hidden_states": True} if blocks else {})
        try:
            output = network(pixel_values=images, **asked)
            tokens = output.last_hidden_state  # B L D
        except (AttributeError, TypeError, ValueError):
            tokens = None
        if tokens is None or tokens.ndim != 3 or tokens.shape[1] < grid[0] * grid[1]:
            raise EncoderError(
                f"a `{network.config.model_type}` gives no prefix and grid for a picture alone",
                where=config,
            )
        pooled = getattr(output, "pooler_output", None)
        pooled = tokens[:, 0] if pooled is None else pooled
        layers = tuple(norm(output.hidden_states[block]) for block in blocks) if norm else ()
        return Features(tokens, grid, pooled, is_map=False, layers=layers)

    return Built(network, forward, depth)
