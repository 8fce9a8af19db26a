"""Networks of the timm library, built from files alone."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import JsonValue
from timm.models import PretrainedCfg
from torch import Tensor, nn

from featcache.config import canonical_json, read_json, validate
from featcache.encoders.interface import Built, EncoderConfig, Features, LocatedEncoder
from featcache.encoders.preprocessing import Preprocessing
from featcache.encoders.weights import (
    Shelf,
    check_keys,
    open_shelf,
    read_state_dict,
    ways_to_get,
)
from featcache.errors import EncoderError, UsageError, WeightsError, nearest

# Beginnings of tensors that an encoder may do without, besides the classifier that timm names.
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.", "attn_pool.")
# Families whose positions are resampled in ways of their own, which only timm's own loading knows.
_OWN_RESAMPLING = ("flexi", "radio")


def describe_timm(name: str) -> EncoderConfig:
    """What timm says about one of its names; an untagged one gets today's default tag.

    Raises:
        UsageError: timm has no such network, or none with that tag.
    """
    registered = _registered(name)
    tag = f".{registered.tag}" if registered.tag else ""
    return EncoderConfig(
        modality="image",
        source=f"timm:{registered.architecture}{tag}",
        library="timm",
        preprocessing=_describe_input(asdict(registered), where=f"timm:{name}"),
    )


def describe_timm_folder(folder: Path) -> EncoderConfig | None:
    """What a folder of timm's `save_for_hf` says; None when it is none of timm's."""
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(values, dict) or "architecture" not in values:
        return None
    registered = asdict(_registered(str(values["architecture"])))
    return EncoderConfig(
        modality="image",
        source=f"folder:{folder.resolve()}",
        library="timm",
        architecture=str(values["architecture"]),
        preprocessing=_describe_input(
            registered | values.get("pretrained_cfg", {}), where=str(folder)
        ),
    )


def _registered(name: str) -> PretrainedCfg:
    """Timm's entry for a name."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"timm has no network `{base}`; {_few(base, timm.list_models())}", where=f"timm:{name}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"timm has no weights `{tag}` of `{base}`; {nearest(tag, tags)}", where=f"timm:{name}"
        )
    registered = timm.get_pretrained_cfg(name)
    if registered is None:
        raise UsageError(f"timm says nothing of the input of `{base}`", where=f"timm:{name}")
    return registered


def _few(name: str, known: list[str]) -> str:
    """The nearest names, and not all thousand of them where none is near."""
    hint = nearest(name, known)
    return hint if hint.startswith("did") else "timm.list_models() lists them"


def _describe_input(values: Mapping[str, Any], where: str) -> Preprocessing:
    size = list(values["input_size"])
    wanted = {
        "image_size": size[1:],
        "mean": list(values["mean"]),
        "std": list(values["std"]),
        "interpolation": values["interpolation"],
    }
    return validate(Preprocessing, wanted, where=where)


def _architecture(config: EncoderConfig) -> str:
    """Timm's name of the network, with its tag if it has one."""
    if config.source.startswith("timm:"):
        return config.source.removeprefix("timm:")
    if config.architecture is None:
        raise EncoderError("an encoder of timm without `architecture`", where=config.source)
    return config.architecture


def find_timm(name: str, config: EncoderConfig, weights: Path | None) -> tuple[Shelf, str]:
    """Where the files of a timm encoder lie, and what network is built of them.

    Raises:
        WeightsError: They are in no place that can be asked for them.
    """
    architecture = _architecture(config)
    repo = None
    if config.source.startswith("timm:"):
        registered = _registered(architecture)
        repo = registered.hf_hub_id
        if repo is None and weights is None:
            raise WeightsError(
                f"timm keeps the weights of `{name}` at no hub",
                where=str(registered.url or config.source),
                fix=f"download them yourself, then --weights {name}=FILE",
            )
    shelf = open_shelf(name, config.source, extra=config.extra, weights=weights, repo=repo)
    base = architecture.partition(".")[0]
    options = _options(shelf.folder) if config.source.startswith("folder:") else {}
    return shelf, f"{base} {canonical_json(options)}" if options else base


def _options(folder: Path | None) -> dict[str, JsonValue]:
    """Arguments with which the network of a timm folder was built, but for its size."""
    if folder is None:
        return {}
    options = read_json(folder / "config.json").get("model_args", {})
    return {key: value for key, value in options.items() if key not in ("img_size", "num_classes")}


def build_timm(located: LocatedEncoder, *, random: bool = False) -> Built:
    """Build the network, and fill it unless random weights are asked for by name.

    Raises:
        EncoderError: timm refuses to build it.
        UsageError: The image size is none that it can take.
        WeightsError: The weights do not fill it.
    """
    config, preprocessing = located.config, located.preprocessing
    architecture = _architecture(config)
    options: dict[str, Any] = {"in_chans": preprocessing.channels}
    if config.state_dict == "named":
        options["num_classes"] = 0
    if located.model_config is not None:
        folder = located.model_config.parent
        options |= _options(folder)
        native = read_json(located.model_config).get("pretrained_cfg", {})
        registered = asdict(_registered(architecture)) | native
        create = f"local-dir:{folder}"
    else:
        registered = asdict(_registered(architecture))
        create = architecture
    if registered.get("fixed_input_size"):
        options["img_size"] = preprocessing.image_size
        resized = tuple(registered["input_size"][1:]) != preprocessing.image_size
        if resized and any(family in architecture for family in _OWN_RESAMPLING):
            raise UsageError(
                f"`{located.name}` can only be used at its own size", where="--image-size"
            )
    try:
        network: Any = timm.create_model(create, pretrained=False, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise EncoderError(
            f"timm cannot build `{architecture}` for {preprocessing.image_size}: {error}",
            where=located.model_config or config.source,
        ) from None
    stages: Any = getattr(network, "feature_info", None)
    if registered.get("fixed_input_size") and stages:
        preprocessing.check_patches(int(stages[-1]["reduction"]), encoder=located.name)
    if not random:
        _fill(network, located, registered)
    if config.state_dict == "ordered":
        network.reset_classifier(0)
    return Built(
        network, lambda images, blocks: _forward(network, images, blocks), _count_blocks(network)
    )


def _count_blocks(network: Any) -> int | None:
    """How many blocks a vision transformer has; None for what goes on in stages of other sizes."""
    if not hasattr(network, "blocks") or not hasattr(network, "forward_intermediates"):
        return None
    options = inspect.signature(network.forward_intermediates).parameters
    return len(network.blocks) if {"norm", "return_prefix_tokens"} <= set(options) else None


def _fill(network: nn.Module, located: LocatedEncoder, registered: Mapping[str, Any]) -> None:
    """Load the weights completely; positions are resampled by timm's own filter."""
    tensors = read_state_dict(located.weights)
    if located.config.state_dict == "ordered":
        tensors = _by_order(tensors, network, located.weights)
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        try:
            tensors = adapt(tensors, network)
        except (KeyError, ValueError, RuntimeError, AttributeError, AssertionError):
            raise WeightsError(
                f"the weights do not fit the network `{located.network}`", where=located.weights,
                fix=ways_to_get(located.name),
            ) from None  # fmt: skip
    wanted = network.state_dict()
    classifiers = registered.get("classifier") or ()
    named = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    check_keys(
        # a counter of training steps, which old files lack and evaluation never reads
        [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")],
        [k for k in tensors if k not in wanted],
        [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape],
        allowed_surplus=(*_HEADS, *(f"{name}." for name in named)),
        where=located.weights,
    )
    network.load_state_dict({k: v for k, v in tensors.items() if k in wanted}, strict=False)


def _by_order(tensors: Mapping[str, Tensor], network: nn.Module, where: Path) -> dict[str, Tensor]:
    """Name tensors as the network does; both list them in the same order."""
    wanted = network.state_dict()
    pairs = list(zip(tensors.items(), wanted.items(), strict=False))
    fits = len(tensors) == len(wanted) and all(
        have.shape == want.shape and name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        for (name, have), (key, want) in pairs
    )
    if not fits:
        raise WeightsError(
            f"the file has {len(tensors)} tensors, which are not the network's {len(wanted)} in "
            "their order",
            where=where,
            fix="give the very file that the preset names",
        )
    return {key: have for (_, have), (key, _) in pairs}


def _forward(network: Any, images: Tensor, blocks: tuple[int, ...]) -> Features:
    """Last-layer tokens, timm's own pooled vector, and tokens of inner blocks."""
    features, layers = _run(network, images, blocks)
    pooled = network.forward_head(features, pre_logits=True)
    pooled = pooled if pooled.ndim == 2 else None
    if features.ndim == 4 and getattr(network, "output_fmt", "NCHW") == "NHWC":
        grid = (features.shape[1], features.shape[2])
        return Features(features.flatten(1, 2), grid, pooled, is_map=False)  # B (H W) C
    if features.ndim == 4:
        grid = (features.shape[2], features.shape[3])
        tokens = features.flatten(2).transpose(1, 2)  # B C H W -> B (H W) C
        return Features(tokens, grid, pooled, is_map=True)
    patches = getattr(network, "patch_embed", None)
    grid = tuple(getattr(patches, "grid_size", ()))
    prefix = getattr(network, "num_prefix_tokens", 0)
    if len(grid) != 2 or features.shape[1] != prefix + grid[0] * grid[1]:
        raise EncoderError(
            f"the tokens of `{type(network).__name__}` are no prefix and grid",
            fix="use another network; ViT, DINOv2, Swin, ConvNeXt and CNNs are known to work",
        )
    return Features(features, (grid[0], grid[1]), pooled, is_map=False, layers=layers)


def _run(
    network: Any, images: Tensor, blocks: tuple[int, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the last layer gives, and tokens of inner blocks behind the network's final norm."""
    if not blocks:
        return network.forward_features(images), ()
    numbers = sorted(set(blocks))
    features, found = network.forward_intermediates(
        images,
        indices=[number - 1 for number in numbers],
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
    )
    # each is patch tokens, or patch tokens and prefix tokens where there are any of these
    whole = [torch.cat(each[::-1], 1) if isinstance(each, tuple) else each for each in found]
    layers = dict(zip(numbers, whole, strict=True))
    return features, tuple(layers[number] for number in blocks)
