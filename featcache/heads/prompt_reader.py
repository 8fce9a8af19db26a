"""Sentences read exactly as a run's texts were: encoded, rounded and stored, then read back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import ShardWriter
from featcache.encoders.forward import Pace, PartStats
from featcache.encoders.interface import load_encoder
from featcache.encoders.request import EncoderRequest, locate_all, read_request
from featcache.encoders.shard import encode_texts
from featcache.encoders.text import FrozenTextEncoder
from featcache.errors import CacheError, StaleFeatureSetError
from featcache.loader.gather import iterate_rows


@dataclass(frozen=True)
class PromptReader:
    """The text encoder of a run, with how its text set is stored.

    Attributes:
        encoder: On the device.
        spec: Of the text set: rounding, batch size and autocast.
        scale_channel: Of an int8 text set, None for others.
        device: Where encoder and Adaptors run.
    """

    encoder: FrozenTextEncoder
    spec: FeatureSetSpec
    scale_channel: "Float32[np.ndarray, ' D'] | None" = None
    device: str = "cpu"

    def count_cut(self, sentences: Sequence[str]) -> int:
        """How many sentences are longer than the encoder reads."""
        return sum(self.encoder.tokenize(list(sentences)).truncated)

    def vectors(
        self, adaptors: Sequence[TrainedAdaptor], sentences: Sequence[str]
    ) -> list[Float[Tensor, "J dim"]]:
        """What each Adaptor's objective makes of sentences.

        They become a small text set in a temporary folder, by the code that writes and reads every
        other one, so an Adaptor sees of them what it saw of the texts it was trained on.

        Args:
            adaptors: Trained on this text set, or made like one that was.
            sentences: In the order of the results.

        Raises:
            CacheError: A sentence's tokens do not fit the stored type, or the disk is full.
        """
        with TemporaryDirectory(prefix="featcache-prompts-") as folder:
            stored = self._store(list(sentences), Path(folder) / "set")
            return [self._read(adaptor, stored) for adaptor in adaptors]

    def _store(self, sentences: list[str], folder: Path) -> FeatureSet:
        """Write sentences as a set of one shard; their numbers are the keys."""
        keys = [f"sentence-{number}" for number in range(len(sentences))]
        plan = plan_shards(self.spec, keys, keys, ragged_rows=2 * len(keys))
        ids = self.encoder.tokenize(sentences).ids
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        pace = Pace(torch.get_num_threads(), self.device, self.spec.autocast)
        made = FeatureSetWriter.create(folder, self.spec, plan, "prompts")
        [shard] = made.shards
        with ShardWriter(folder, self.spec, shard, lengths, self.scale_channel) as out:
            encode_texts(
                self.encoder, out, ids, self.spec.batch_size, pace, PartStats(), lambda _: None
            )
            out.finish()
        return FeatureSet.open(folder)

    @torch.inference_mode()
    def _read(self, adaptor: TrainedAdaptor, stored: FeatureSet) -> Float[Tensor, "J dim"]:
        """One Adaptor's vectors of stored sentences."""
        made = []
        rows = np.arange(stored.num_rows)
        for _, tokens, valid in iterate_rows(stored, rows, self.spec.batch_size, **adaptor.reading):
            real = torch.ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid
            moved = tokens.to(self.device, torch.float32)
            made.append(
                adaptor.objective.encode_texts(adaptor.adaptor, moved, real.to(self.device))
            )
        return torch.cat(made)


def open_prompt_reader(texts: Path, trained: TrainedAdaptor, *, device: str) -> PromptReader:
    """Load the text encoder that a run's texts were read with.

    Args:
        texts: Folder of the text set that the run was trained on; its shards are not read.
        trained: Carries the fingerprint of that set.
        device: Where encoder and Adaptors run.

    Raises:
        StaleFeatureSetError: The encoder found here is another one.
        WeightsError: Its weights are not here.
        CacheError: An int8 set has lost its channel scale.
    """
    request = read_request(texts)
    (located,) = locate_all([request])
    encoder = cast(FrozenTextEncoder, load_encoder(located, device=device))
    spec = text_spec(encoder, request, trained)
    scale = None
    if spec.dtype == "int8":
        scale = FeatureSetWriter.open(texts).scale_channel()
        if scale is None:
            raise CacheError(
                "the int8 text set that this run was trained on has lost its channel scale, "
                "without which sentences cannot be rounded as its texts were",
                where=texts,
                fix="restore the folder from a copy, or extract the texts and train again",
            )
    return PromptReader(encoder, spec, scale, device)


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
