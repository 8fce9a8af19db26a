"""A trained Adaptor on disk: weights as safetensors, everything else as JSON, never a pickle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from featcache import __version__
from featcache.adaptor.model import (
    SIGMOID_LOGIT_SCALE,
    WIDEST,
    Adaptor,
    AdaptorConfig,
    count_parameters,
)
from featcache.adaptor.objective import Objective
from featcache.adaptor.objectives import build_objective
from featcache.config import Config, file_sha256, read_json, replace_file, validate, write_json
from featcache.device import resolve_device
from featcache.errors import CacheError, ConfigError, TrainingError
from featcache.loader.rows import TOKENS_PATTERN

WEIGHTS = "adaptor.safetensors"
FACTS = "adaptor.json"
EXPORTED_FACTS = "config.json"
"""The same in a folder that was exported."""
NAMED = 5  # problems that a message spells out


class FeaturesRead(Config):
    """The features that an Adaptor was trained on, of one modality."""

    encoder: str = Field(description="The encoder's short name.")
    fingerprint: str = Field(description="Fingerprint of the feature set.")
    dim: int = Field(ge=1, le=WIDEST, description="Width of its tokens.")
    tokens: str = Field(
        default="all", pattern=TOKENS_PATTERN, description="Which tokens of a row it reads."
    )
    text_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of each text it reads, the first ones; null = all."
    )


class AdaptorFacts(Config):
    """Content of `adaptor.json`."""

    version: Literal[1] = Field(description="Version of this layout.")
    made_with: str = Field(description="Version of featcache.")
    config: AdaptorConfig = Field(description="Size and objective.")
    image: FeaturesRead = Field(description="Image features it reads.")
    text: FeaturesRead = Field(description="Text features it reads.")
    parameters: dict[str, int] = Field(description="Trainable parameters: adaptor, objective.")
    notes: list[str] = Field(description="Sentences that every table about it must carry.")
    weights_sha256: str = Field(description="SHA-256 of `adaptor.safetensors`.")


@dataclass(frozen=True)
class TrainedAdaptor:
    """An Adaptor with its objective, in eval mode and without gradients.

    Attributes:
        folder: Where it was loaded from.
        adaptor: The net.
        objective: How it scores, and what it gives to heads.
        facts: What `adaptor.json` says.
    """

    folder: Path
    adaptor: Adaptor
    objective: Objective
    facts: AdaptorFacts

    @property
    def config(self) -> AdaptorConfig:
        """Size and objective."""
        return self.facts.config

    @property
    def image_fingerprint(self) -> str:
        """Fingerprint of the image features it was trained on, the only ones it may read."""
        return self.facts.image.fingerprint

    @property
    def text_fingerprint(self) -> str:
        """Fingerprint of the text features it was trained on, the only ones it may read."""
        return self.facts.text.fingerprint

    @property
    def reading(self) -> dict[str, int | str | None]:
        """What to give to `iterate_rows`, so that it reads the tokens it was trained on.

        Trained on some random tokens of each image, it reads all of them.
        """
        tokens = self.facts.image.tokens
        return {
            "tokens": "all" if tokens.startswith("random") else tokens,
            "text_tokens": self.facts.text.text_tokens,
        }

    @property
    def notes(self) -> list[str]:
        """Sentences that every table about it must carry."""
        return self.facts.notes


def build_adaptor(
    config: AdaptorConfig, image_dim: int, text_dim: int
) -> tuple[Adaptor, Objective]:
    """An untrained Adaptor with its objective, as a config says.

    Args:
        config: Size and objective.
        image_dim: Width of the image tokens.
        text_dim: Width of the text tokens.

    Raises:
        ConfigError: The objective is unknown.
    """
    adaptor = Adaptor(
        image_dim,
        text_dim,
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        feedforward=config.feedforward,
        dropout=config.dropout,
    )
    if config.loss == "sigmoid":
        nn.init.constant_(adaptor.logit_scale, SIGMOID_LOGIT_SCALE)
    return adaptor, build_objective(config)


def save_adaptor(
    folder: Path,
    adaptor: Adaptor,
    objective: Objective,
    config: AdaptorConfig,
    *,
    image: FeaturesRead,
    text: FeaturesRead,
    notes: list[str],
) -> AdaptorFacts:
    """Write an Adaptor; `adaptor.json` comes last, so a folder that has it is complete.

    Args:
        folder: Made when missing; an Adaptor in it is replaced.
        adaptor: The net.
        objective: Its objective, whose own weights are saved with it.
        config: What both were built from.
        image: Image features it was trained on.
        text: Text features it was trained on.
        notes: Sentences that every table about it must carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in _tensors(adaptor, objective).items()}
    replace_file(folder / WEIGHTS, save(tensors))
    facts = AdaptorFacts(
        version=1,
        made_with=__version__,
        config=config,
        image=image,
        text=text,
        parameters={
            "adaptor": count_parameters(adaptor),
            "objective": count_parameters(objective),
        },
        notes=notes,
        weights_sha256=file_sha256(folder / WEIGHTS),
    )
    write_json(folder / FACTS, facts.model_dump(mode="json"))
    return facts


def load_adaptor(folder: Path | str, device: str = "cpu") -> TrainedAdaptor:
    """Load an Adaptor that `save_adaptor` wrote.

    Args:
        folder: A run's folder, the folder `adaptor` or `best` in it, or an exported one.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        TrainingError: There is none, or it is damaged, or its weights do not fit its config.
        UsageError: This machine has no such device.
    """
    folder = Path(folder)
    if (folder / "adaptor").is_dir():
        folder = folder / "adaptor"
    facts = _read_facts(folder)
    tensors = _read_tensors(folder / WEIGHTS, facts)
    dims = (facts.image.dim, facts.text.dim)
    with torch.device("meta"):  # shapes alone: a config that lies about them costs no memory
        expected = _tensors(*build_adaptor(facts.config, *dims))
    problems = _misfits(expected, tensors)
    if problems:
        more = len(problems) - NAMED
        sentences = problems[:NAMED] + ([f"and {more} more"] if more > 0 else [])
        raise TrainingError(
            "the weights do not fit the config beside them:\n  " + "\n  ".join(sentences),
            where=folder / WEIGHTS,
            fix="restore both files from the run that wrote them, or train again",
        )
    adaptor, objective = build_adaptor(facts.config, *dims)
    for name, module in (("adaptor", adaptor), ("objective", objective)):
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        module.load_state_dict(own)
        module.to(resolve_device(device)).eval().requires_grad_(False)
    adaptor.clamp_logit_scale()
    return TrainedAdaptor(folder, adaptor, objective, facts)


def _tensors(adaptor: nn.Module, objective: nn.Module) -> dict[str, Tensor]:
    """All weights of both modules under the names they have on disk."""
    modules = {"adaptor": adaptor, "objective": objective}
    return {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}


def _read_facts(folder: Path) -> AdaptorFacts:
    path = folder / FACTS
    if not path.is_file() and (folder / EXPORTED_FACTS).is_file():
        path = folder / EXPORTED_FACTS
    if not path.is_file():
        raise TrainingError(
            f"there is no trained Adaptor here: {FACTS} is missing",
            where=folder,
            fix="featcache train-adaptor trains one; an interrupted run leaves none",
        )
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ConfigError("the file holds no JSON object")
        return validate(AdaptorFacts, values, where=path)
    except (CacheError, ConfigError) as error:
        raise TrainingError(
            error.what, where=path, fix="restore it from a copy, or train again"
        ) from None


def _read_tensors(path: Path, facts: AdaptorFacts) -> dict[str, Tensor]:
    fix = "restore it from a copy, or train again"
    if not path.is_file():
        raise TrainingError("the Adaptor's weights are missing", where=path, fix=fix)
    have = file_sha256(path)
    if have != facts.weights_sha256:
        raise TrainingError(
            f"the weights are damaged: their SHA-256 is {have}, the file beside "
            f"them says {facts.weights_sha256}",
            where=path,
            fix=fix,
        )
    try:
        return load_file(path)
    except SafetensorError:
        raise TrainingError("the weights are no safetensors file", where=path, fix=fix) from None


def _misfits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """A sentence for each tensor that is missing, unknown, of a wrong shape, or not finite."""
    problems = [f"`{name}` is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"`{name}` is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        have, want = tuple(found[name].shape), tuple(expected[name].shape)
        if have != want:
            problems.append(f"`{name}` has shape {have}, the config makes {want}")
        elif not found[name].isfinite().all():
            problems.append(f"`{name}` holds values that are not finite")
    return problems
