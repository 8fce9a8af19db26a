"""Which encoders a command asks for, and where their weights are.

What was asked for is kept beside each feature set in `request.json`, so that another manifest can
be encoded in the same way, and a rerun needs no option twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from featcache.config import Config, read_json, read_yaml, to_plain, validate, write_json
from featcache.console import note
from featcache.encoders.interface import (
    LocatedEncoder,
    Modality,
    locate_encoder,
    resolve_encoder,
    short_name,
    split_view,
)
from featcache.errors import UsageError, WeightsError, WorkspaceError
from featcache.workspace import Workspace

REQUEST_FILE = "request.json"
DEFAULT_TEXT_ENCODER = "cxr-bert"
NONE = "none"


class EncoderRequest(Config):
    """One encoder as asked for; everything that `extract` needs to encode the same way again."""

    modality: Modality = Field(description="image or text.")
    name: str = Field(description="As typed: a short name, timm:NAME, hf:NAME or a folder.")
    weights: str | None = Field(None, description="File given by --weights.")
    image_size: int | tuple[int, int] | None = Field(
        None, description="Input side in pixels, or height and width; None: its own."
    )
    max_tokens: int | None = Field(None, description="Longest text in tokens; None: its own.")
    layers: tuple[int, ...] | None = Field(None, description="Blocks to store; None: the last.")
    pool_grid: int | None = Field(None, description="Windows that the grid is averaged over.")
    decode: Literal["cpu", "gpu"] = Field("cpu", description="Where JPEGs are decoded.")
    dtype: Literal["float16", "float32", "int8"] = Field(
        "float16", description="Type of stored tokens."
    )
    batch_size: int = Field(32, description="Rows of every forward pass.")
    shard_mb: int = Field(512, description="Size of a shard in MiB of tokens.")


def save_request(folder: Path, request: EncoderRequest) -> None:
    """Keep a request beside the feature set that it made."""
    write_json(folder / REQUEST_FILE, to_plain(request))


def read_request(folder: Path) -> EncoderRequest:
    """The request that made a feature set.

    Raises:
        CacheError: There is none.
    """
    path = folder / REQUEST_FILE
    return validate(EncoderRequest, read_json(path), where=path)


def split_weights(typed: Sequence[str]) -> dict[str, Path]:
    """Read `--weights` values: `NAME=FILE`, or one `FILE` (under the empty name).

    Raises:
        UsageError: A file is not there, or two come for one name.
    """
    named: dict[str, Path] = {}
    for text in typed:
        name, equals, file = text.partition("=")
        name, path = (name, Path(file)) if equals and not Path(text).exists() else ("", Path(text))
        if not path.exists():
            raise UsageError("there is no such weights file", where=path, fix="check the path")
        if name in named:
            raise UsageError(
                f"two weights files for `{name}`" if name else "two weights files without a name",
                where="--weights",
                fix="--weights NAME=FILE for each encoder",
            )
        named[name] = path
    return named


def run_features(workspace: Workspace, run: str, modality: Modality) -> Path:
    """Folder of the feature set that a run was trained on, with the request that made it.

    Args:
        workspace: Where a run's name is looked up.
        run: Name or folder of a run, or a workspace (its current run).
        modality: Which of its two encoders.

    Raises:
        WorkspaceError: There is no such run, or its feature set is gone.
    """
    folder = workspace.run(run)
    name = str(read_yaml(folder / "config.yaml")[f"{modality}s"])
    made = Workspace(folder.parent.parent).folder(modality) / name  # moves with its workspace
    if not made.is_dir():
        made = Path(read_json(folder / "run.json")[f"{modality}s"]["folder"])
    if not (made / REQUEST_FILE).is_file():
        raise WorkspaceError(
            f"the {modality} feature set `{name}` that this run was trained on is gone",
            where=made,
            fix=f"featcache extract makes it again from `{name}`, or name another --run",
        )
    return made


def run_request(workspace: Workspace, run: str, modality: Modality) -> EncoderRequest:
    """The encoder that a run was trained on; see `run_features`."""
    return read_request(run_features(workspace, run, modality))


def choose_request(
    workspace: Workspace, modality: Modality, name: str | None, run: str | None
) -> EncoderRequest | None:
    """What one side of `extract` should encode with.

    Args:
        workspace: Gives the current set and what was asked for earlier.
        modality: The side.
        name: As typed; None: the run's, else the current set's, else the default.
        run: A run whose encoders to take.

    Returns:
        The request, or None where the user typed `none` or (images) nothing is known.
    """
    if name == NONE:
        return None
    if run is not None and name is None:
        return run_request(workspace, run, modality)
    if name is None:
        current = workspace.current(modality)
        if current is not None:
            return read_request(workspace.feature_set(modality, current))
        return (
            EncoderRequest(modality=modality, name=DEFAULT_TEXT_ENCODER)
            if modality == "text"
            else None
        )
    resolve_encoder(name, modality)
    earlier = workspace.folder(modality) / short_name(name) / REQUEST_FILE
    if earlier.is_file():
        return read_request(earlier.parent)
    return EncoderRequest(modality=modality, name=name)


def _brings_weights(request: EncoderRequest) -> bool:
    """Whether an encoder's weights are part of a package or a folder, or were given before."""
    source = resolve_encoder(request.name, request.modality).source
    return request.weights is not None or source.startswith(("package:", "folder:"))


def _base(request: EncoderRequest) -> str:
    """An encoder's name without its view: all views share one file of weights."""
    return split_view(request.name)[0]


def assign_weights(
    requests: Sequence[EncoderRequest], weights: Mapping[str, Path]
) -> list[EncoderRequest]:
    """Give each `--weights` file to its encoder.

    Args:
        requests: The encoders of this command.
        weights: From `split_weights`; a file without a name goes to the only encoder that still
            lacks weights, or to the only encoder.

    Raises:
        UsageError: A name is no encoder of this command, or a file without a name fits several.
    """
    names = [_base(request) for request in requests]
    for name in weights:
        if name and name not in names:
            raise UsageError(
                f"`{name}` is no encoder of this command, which has {' and '.join(names)}",
                where="--weights",
            )
    given = {name: path for name, path in weights.items() if name}
    if "" in weights:
        open_names = [name for name in dict.fromkeys(names) if name not in given]
        lacking = [_base(r) for r in requests if not _brings_weights(r)]
        candidates = [name for name in open_names if name in lacking] or open_names
        if len(candidates) != 1:
            raise UsageError(
                f"the weights file could be for {' or '.join(candidates) or 'no encoder'}",
                where=weights[""],
                fix=f"--weights {(candidates or names)[0]}={weights['']}",
            )
        given[candidates[0]] = weights[""]
    return [
        request.model_copy(update={"weights": str(given[_base(request)].resolve())})
        if _base(request) in given
        else request
        for request in requests
    ]


def _locate(request: EncoderRequest) -> LocatedEncoder:
    """Find and hash one encoder's files."""
    located = locate_encoder(
        request.name,
        request.modality,
        weights=None if request.weights is None else Path(request.weights),
        image_size=request.image_size,
        max_tokens=request.max_tokens,
        layers=request.layers,
        pool_grid=request.pool_grid,
    )
    if request.decode == "gpu" and located.modality == "image":
        decoder = located.preprocessing.model_copy(update={"decoder": "gpu"})
        config = located.config.model_copy(update={"preprocessing": decoder})
        return replace(located, config=config)
    return located


def locate_all(requests: Sequence[EncoderRequest]) -> list[LocatedEncoder]:
    """Find and hash the weights of all encoders before anything is decoded.

    Raises:
        WeightsError: One or more are missing; the error names all of them.
    """
    found, missing = [], []
    for request in requests:
        try:
            found.append(_locate(request))
        except WeightsError as error:
            missing.append(error)
    if len(missing) > 1:
        note(f"also: {missing[1].what}")
    if missing:
        raise missing[0]
    return found
