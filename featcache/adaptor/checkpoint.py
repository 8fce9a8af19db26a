"""Checkpoints of a training: a folder of tensors and JSON, written beside its place and renamed.

    checkpoints/step-000000120/
        tensors.safetensors   weights, moments of the optimiser, states of the generators
        state.json            everything else; a tensor's place says which one belongs there

There is no pickle in it, and reading it runs nothing: only numbers, texts, lists and mappings come
out. A file that was changed, cut or made by something else is refused by its checksum.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from featcache import __version__
from featcache.config import canonical_json, explained_refusals
from featcache.errors import TrainingError
from featcache.partial import partial_path, remove_dead_partials

CHECKPOINTS = "checkpoints"
TENSORS = "tensors.safetensors"
STATE = "state.json"
VERSION = 1
KEPT = 2
"""Checkpoints that stay on disk: the last one, and the one before in case it gets damaged."""
REMEDY = "delete this folder: the same command goes on from the checkpoint before, or starts anew"


class FolderCheckpointIO(CheckpointIO):
    """How Lightning's trainer writes and reads its state here."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write what the trainer gives; see `write_checkpoint`."""
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it back, tensors on the CPU; see `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint's folder."""
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after a step of a run lies."""
    return run / CHECKPOINTS / f"step-{step:09d}"


def checkpoints(run: Path) -> list[Path]:
    """All finished checkpoints of a run, the oldest first; other things in the folder are none."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{9,}", path.name))


def latest_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, None when there is none."""
    found = checkpoints(run)
    return found[-1] if found else None


def prune_checkpoints(run: Path, keep: int = KEPT) -> None:
    """Remove all but the last `keep` checkpoints of a run, and the folder with the last of them."""
    for path in checkpoints(run)[: -keep or None]:
        shutil.rmtree(path, ignore_errors=True)
    if not keep:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; it is there as a whole, synced, or not at all.

    Args:
        folder: Where it will lie; what is there is replaced.
        state: Nested mappings, lists and tuples of tensors and plain values.

    Raises:
        TrainingError: A value is neither a tensor nor plain.
        CacheError: The disk is full, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    values = {"version": VERSION, "made_with": __version__, "state": _flatten(state, (), tensors)}
    packed = save(tensors)
    values["tensors_sha256"] = hashlib.sha256(packed).hexdigest()
    values["state_sha256"] = _digest(values)
    text = json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_partials(folder.parent)
    partial = partial_path(folder)
    with explained_refusals(folder):
        try:
            partial.mkdir()
            _write_synced(partial / TENSORS, packed)
            _write_synced(partial / STATE, (text + "\n").encode())
            _sync_folder(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a checkpoint that `write_checkpoint` wrote.

    Returns:
        What was written, tensors on the CPU. Nothing else than mappings, lists, tuples, tensors,
        numbers, texts and None can come out.

    Raises:
        TrainingError: It is missing, damaged, changed, of another version, or no checkpoint of
            this program.
    """
    if not folder.is_dir():
        what = "this is a file" if folder.exists() else "there is no checkpoint here"
        raise TrainingError(
            f"{what}; a checkpoint is a folder of {TENSORS} and {STATE}", where=folder, fix=REMEDY
        )
    values = _read_state(folder / STATE)
    tensors = _read_tensors(folder / TENSORS, values["tensors_sha256"])
    state = _unflatten(values["state"], (), tensors, folder / STATE)
    if not isinstance(state, dict):
        raise TrainingError(
            "the checkpoint holds no mapping under `state`", where=folder / STATE, fix=REMEDY
        )
    return state


def check_fit(
    expected: Mapping[str, Shaped[Tensor, "..."]], found: Any, folder: Path, what: str
) -> None:
    """See that a checkpoint's tensors are those that a module has.

    Args:
        expected: The module's own.
        found: The checkpoint's.
        folder: Of the checkpoint, for the message.
        what: Of the tensors, for the message, e.g. `weights`.

    Raises:
        TrainingError: One is missing, unknown, or of another shape.
    """
    have = found if isinstance(found, Mapping) else {}
    problems = [f"`{name}` is missing" for name in sorted(expected.keys() - have.keys())]
    problems += [f"`{name}` is unknown" for name in sorted(have.keys() - expected.keys())]
    for name in sorted(expected.keys() & have.keys()):
        shape = tuple(have[name].shape) if isinstance(have[name], Tensor) else None
        if shape != tuple(expected[name].shape):
            problems.append(f"`{name}` has shape {shape}, not {tuple(expected[name].shape)}")
    if problems:
        raise TrainingError(
            f"the checkpoint's {what} do not fit this run: {problems[0]}"
            + (f", and {len(problems) - 1} more like this" if len(problems) > 1 else ""),
            where=folder / TENSORS,
            fix=REMEDY,
        )


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors put aside under their path."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        if name in tensors:
            raise TrainingError(f"two tensors of the checkpoint have the name `{name}`")
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _flatten(one, (*path, key), tensors) for key, one in value.items()}
        items = [
            [_flatten(key, path, tensors), _flatten(one, (*path, str(key)), tensors)]
            for key, one in value.items()
        ]
        return {"$items": items}
    if isinstance(value, list | tuple):
        parts = [_flatten(one, (*path, str(at)), tensors) for at, one in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise TrainingError(
        f"`{'.'.join(path)}` of the checkpoint is a {type(value).__name__}, which is neither a "
        "tensor nor a plain value"
    )


def _unflatten(
    value: Any, path: tuple[str, ...], tensors: Mapping[str, Tensor], source: Path
) -> Any:
    """The value that `_flatten` was given."""
    if isinstance(value, list):
        return [_unflatten(one, (*path, str(at)), tensors, source) for at, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _unflatten(one, (*path, key), tensors, source) for key, one in value.items()}
    match value:
        case {"$tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"$float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"$tuple": list(parts)}:
            return tuple(_unflatten(parts, path, tensors, source))
        case {"$items": list(pairs)} if all(_is_item(pair) for pair in pairs):
            return {key: _unflatten(one, (*path, str(key)), tensors, source) for key, one in pairs}
    raise TrainingError(
        f"`{'.'.join(path)}` holds what no checkpoint of ours can hold, or a tensor that is not "
        f"in {TENSORS}",
        where=source,
        fix=REMEDY,
    )


def _is_item(pair: Any) -> bool:
    """Whether this is a key, which is no text, with its value."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int | str)


def _digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of everything in `state.json` but this value itself."""
    rest = {name: value for name, value in values.items() if name != "state_sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    """Content of `state.json`, known to be what was written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"the checkpoint has no {STATE}", where=path, fix=REMEDY) from None
    except (OSError, ValueError, RecursionError):
        raise TrainingError(
            "the checkpoint is damaged: the file is no JSON", where=path, fix=REMEDY
        ) from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise TrainingError(
            f"the checkpoint has `version` {version!r}, this featcache reads {VERSION}",
            where=path,
            fix=REMEDY,
        )
    for name in ("state", "tensors_sha256", "state_sha256"):
        if name not in values:
            raise TrainingError(f"the checkpoint lacks `{name}`", where=path, fix=REMEDY)
    if values["state_sha256"] != _digest(values):
        raise TrainingError(
            "the checkpoint was damaged or changed: its content is not what `state_sha256` says",
            where=path,
            fix=REMEDY,
        )
    found: dict[str, Any] = values
    return found


def _read_tensors(path: Path, expected: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint, known to be what was written."""
    try:
        packed = path.read_bytes()
    except OSError:
        raise TrainingError(
            f"the checkpoint has no readable {TENSORS}", where=path, fix=REMEDY
        ) from None
    have = hashlib.sha256(packed).hexdigest()
    if have != expected:
        raise TrainingError(
            f"the checkpoint was damaged or changed: SHA-256 of the tensors is {have}, "
            f"`tensors_sha256` says {expected}",
            where=path,
            fix=REMEDY,
        )
    try:
        tensors: dict[str, Tensor] = load(packed)
    except SafetensorError:
        raise TrainingError("the tensors are no safetensors file", where=path, fix=REMEDY) from None
    return tensors


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
