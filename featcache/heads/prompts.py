"""Prompts: what a class is called in words, and what an Adaptor's text side makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import FeatureSetSpec
from featcache.config import Config, find_config, list_configs, load_config
from featcache.encoders.forward import Pace
from featcache.encoders.request import EncoderRequest
from featcache.encoders.text import FrozenTextEncoder
from featcache.errors import StaleFeatureSetError, UsageError
from featcache.manifest.table import Manifest

Sentences = tuple[str, ...]


class FindingPrompts(Config):
    """Sentences of one finding that is there or not."""

    present: Sentences = Field(min_length=1, description="As a report says that it is there.")
    absent: Sentences = Field(min_length=1, description="As a report says that it is not.")


class Prompts(Config):
    """A file of prompts: for the classes of one label, or for findings that are there or not."""

    kind: Literal["prompts"] = Field("prompts", description="What this file holds.")
    label: str = Field("class", description="Label column of `classes`.")
    classes: dict[str, Sentences] = Field(
        default_factory=dict, description="Name of each class to its sentences."
    )
    findings: dict[str, FindingPrompts] = Field(
        default_factory=dict, description="Label column of each finding to its sentences."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Prompts":
        if bool(self.classes) == bool(self.findings):
            raise ValueError("either `classes` or `findings` is needed, not both")
        empty = [name for name, some in self.classes.items() if not some]
        if len(self.classes) == 1 or empty:
            raise ValueError("`classes` needs two or more, each with a sentence")
        return self

    def groups(self, names: Sequence[str]) -> list[Sentences]:
        """The sentences whose scores are averaged: a group a class, or present and absent by turns.

        Within a group sentences stand in the order of their letters, so that the order of a file
        changes nothing.

        Args:
            names: Classes or findings, in the order of the answers.
        """
        if self.classes:
            return [tuple(sorted(set(self.classes[name]))) for name in names]
        return [
            tuple(sorted(set(some)))
            for name in names
            for some in (self.findings[name].present, self.findings[name].absent)
        ]

    def first_alone(self) -> "Prompts":
        """The same with one sentence of each group, the first of the file."""
        return self.model_copy(
            update={
                "classes": {name: some[:1] for name, some in self.classes.items()},
                "findings": {
                    name: FindingPrompts(present=one.present[:1], absent=one.absent[:1])
                    for name, one in self.findings.items()
                },
            }
        )


def find_prompts(name: str | None, manifest: Manifest) -> tuple[str, Prompts]:
    """The prompts by name or file, with the name they go by.

    Args:
        name: A shipped name or a YAML file; None: those of the manifest's data set.
        manifest: Its reader's name is that of its prompts.

    Raises:
        UsageError: There are none of that name, or none for the data set.
        ConfigError: The file does not fit.
    """
    if name is not None and Path(name).suffix in (".yaml", ".yml"):
        return Path(name).stem, load_config(Prompts, path=Path(name))
    known = list_configs("prompts")
    chosen = name or manifest.meta.dataset
    if name is None and chosen not in known:
        raise UsageError(
            f"no prompts are known for data set `{chosen}`",
            where=manifest.folder,
            fix=f"--prompts FILE.yaml, or one of: {', '.join(known)}",
        )
    return chosen, load_config(Prompts, path=find_config("prompts", chosen))


def text_spec(
    encoder: FrozenTextEncoder, request: EncoderRequest, trained: TrainedAdaptor
) -> FeatureSetSpec:
    """How this encoder would store texts, once it is known to be the one the Adaptor reads.

    Args:
        encoder: Found here.
        request: How the Adaptor's text set was asked for.
        trained: Carries the fingerprint of that set.

    Raises:
        StaleFeatureSetError: It is another encoder, or another version of it.
    """
    for autocast in (None, "bfloat16"):
        spec = encoder.spec(dtype=request.dtype, batch_size=request.batch_size, autocast=autocast)
        if spec.fingerprint == trained.text_fingerprint:
            return spec
    raise StaleFeatureSetError(
        f"the text encoder `{encoder.name}` found here is not the one the Adaptor was trained on: "
        f"its fingerprint is {spec.fingerprint}, the Adaptor reads {trained.text_fingerprint}",
        where=encoder.located.weights,
        fix="bring back the weights and tokenizer that the text set was made with, or train again",
    )


@torch.inference_mode()
def encode_prompts(
    trained: TrainedAdaptor,
    encoder: FrozenTextEncoder,
    spec: FeatureSetSpec,
    sentences: Sequence[str],
    *,
    device: str = "cpu",
) -> Float[Tensor, "J dim"]:
    """Sentences as the Adaptor's objective takes texts, read exactly like cached ones.

    Args:
        trained: Adaptor and objective.
        encoder: The text encoder it was trained on, on the device.
        spec: From `text_spec`: rounding, batch size and autocast of the cached texts.
        sentences: In the order of the result.
        device: Where it runs.
    """
    pace, made = Pace(1, device, spec.autocast), []
    rounded = torch.float32 if spec.dtype == "float32" else torch.float16
    tokenized = encoder.tokenize(list(sentences)).ids
    limit, pooled = trained.facts.text.text_tokens, trained.facts.text.tokens == "pooled"
    for start in range(0, len(tokenized), spec.batch_size):
        batch = tokenized[start : start + spec.batch_size]
        ids, valid = encoder.pad_batch(batch + [batch[-1]] * (spec.batch_size - len(batch)))
        with pace.precision():
            encoded = encoder(ids.to(device), valid.to(device))
        tokens, real = encoded.tokens[: len(batch), :limit], valid[: len(batch), :limit]
        if pooled and encoded.pooled is not None:
            tokens, real = encoded.pooled[: len(batch), None], torch.ones(len(batch), 1).bool()
        tokens = tokens.to(rounded).float()
        made.append(trained.objective.encode_texts(trained.adaptor, tokens, real.to(device)))
    return torch.cat(made)
