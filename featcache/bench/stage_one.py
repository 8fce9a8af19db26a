"""Stage one on a manifest, and the same work bare: the network alone, the decoder alone."""

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue

from featcache.bench.case import Setting
from featcache.bench.timing import seconds, without_notes
from featcache.encoders.decode import decode_image, to_input
from featcache.encoders.forward import Pace
from featcache.encoders.interface import ImageEncoder, load_encoder, locate_encoder
from featcache.errors import EncoderError
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.extract.result import PassResult
from featcache.workspace import Workspace


def run_stage_one(
    workspace: Workspace, manifest: str, backbones: Sequence[Path], config: ExtractConfig
) -> PassResult:
    """Extract a manifest from nothing, and remove the features again.

    Raises:
        EncoderError: Rows were unreadable.
    """
    with without_notes():
        result = extract(
            workspace,
            config,
            backbones=[str(one) for one in backbones],
            text_encoders=["none"],
            manifest=manifest,
        )
    if any(made.failed_rows for made in result.sets):
        raise EncoderError("a picture of the bench is unreadable", where=workspace.root)
    forget(workspace)
    return result.passes[0]


def forget(workspace: Workspace) -> None:
    """Remove the features, and what is current."""
    shutil.rmtree(workspace.features)
    (workspace.root / "workspace.json").unlink(missing_ok=True)


def spent_s(done: PassResult) -> float:
    """Seconds from a worker's first picture to its last shard, as its encoding thread spent them.

    A worker's start, its imports and the loading of the network are not in it: they cost the same
    whether a run has ten rows or ten million. Of several workers it is the sum.
    """
    return done.times.elapsed_s


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Bare:
    """A network and the decoder without anything around them, on the same pictures."""

    def __init__(self, folder: Path, files: Sequence[Path], batch_size: int, device: str):
        """Load the network and prepare one batch on the device.

        Args:
            folder: The encoder's.
            files: Pictures; rows go round them.
            batch_size: Rows of a forward pass.
            device: `cpu` or `cuda`.
        """
        encoder = load_encoder(locate_encoder(str(folder), "image"), device=device)
        self._encoder = cast(ImageEncoder, encoder)
        self._files, self._batch_size = files, batch_size
        autocast = "bfloat16" if device.startswith("cuda") else None
        self._pace = Pace(cores(), device, autocast)
        self._preprocessing = encoder.located.preprocessing
        greys = [decode_image(path, self._preprocessing) for path in files[:batch_size]]
        stacked = torch.stack([torch.from_numpy(one) for one in greys])
        whole = stacked.repeat(-(-batch_size // len(stacked)), 1, 1)[:batch_size]
        self._batch = to_input(whole.to(device), self._preprocessing)

    def forward_s(self, rows: int) -> float:
        """Seconds of the forward passes that so many rows need, all threads."""
        torch.set_num_threads(cores())
        self._synchronise()
        started = time.perf_counter()
        with torch.inference_mode(), self._pace.precision():
            for _ in range(-(-rows // self._batch_size)):
                self._encoder(self._batch)
        self._synchronise()
        return time.perf_counter() - started

    def decode_s(self, rows: int) -> float:
        """Seconds of decoding so many rows with a thread for each core."""
        files = [self._files[row % len(self._files)] for row in range(rows)]

        def work() -> None:
            with ThreadPoolExecutor(cores()) as pool:
                for _ in pool.map(lambda path: decode_image(path, self._preprocessing), files):
                    pass

        return seconds(work)

    def _synchronise(self) -> None:
        if self._pace.on_gpu:
            torch.cuda.synchronize()


def share_of_limit(passes: Sequence[PassResult]) -> JsonValue:
    """Which stage held the passes up, and for what share of the time, as stage one says."""
    limits = [one.times.limit() for one in passes]
    return [{"stage": stage, "share": round(share, 3)} for stage, share in limits]


def full_config(setting: Setting, batch_size: int, **changes: object) -> ExtractConfig:
    """One worker on the setting's device, no failures allowed."""
    values = {"batch_size": batch_size, "workers": 1, "device": setting.device, "max_failures": 0}
    return ExtractConfig.model_validate({**values, **changes})
