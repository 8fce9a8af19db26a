"""Lightning's trainer for one rank: set up, resumed, stopped, and its failures in words."""

import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus

from featcache.adaptor.checkpoint import FolderCheckpointIO
from featcache.adaptor.generators import seed_rank, seeded
from featcache.adaptor.memory import remedy, return_freed_blocks
from featcache.adaptor.processes import OneMachine, Workers, undisturbed
from featcache.adaptor.resume import Restored, resume
from featcache.adaptor.run import METRICS_FILE, MetricsLog, RunConfig
from featcache.adaptor.stage import NONFINITE_FILE, Place, Stage
from featcache.cache.reader import Cache, FeatureSet, open_cache
from featcache.config import to_plain
from featcache.console import note, task
from featcache.errors import InterruptedByUserError, TerminatedError, TrainingError, UsageError
from featcache.loader.gather import TokenLoader
from featcache.manifest.table import Manifest

LONGEST_WAIT = timedelta(hours=2)
"""For another rank, which may be measuring an epoch; one that died is noticed at once."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, the same for every rank.

    Attributes:
        images: Image features.
        texts: Text features.
        manifest: Says which pairs there are.
        folder: The run's.
        config: With a batch size that the pairs allow.
        device: `cpu`, `cuda` or `cuda:N`.
    """

    images: FeatureSet
    texts: FeatureSet
    manifest: Manifest
    folder: Path
    config: RunConfig
    device: str

    def to_plain(self) -> dict[str, Any]:
        """For another process, which opens everything itself."""
        return {
            "images": str(self.images.folder.resolve()),
            "texts": str(self.texts.folder.resolve()),
            "manifest": str(self.manifest.folder.resolve()),
            "folder": str(self.folder.resolve()),
            "config": to_plain(self.config),
            "device": self.device,
        }


def make_loader(pairs: Cache, config: RunConfig, device: str, place: Place) -> TokenLoader:
    """The batches of one rank.

    Raises:
        UsageError: The sets do not have the tokens that are asked for, or the batch cannot be
            shared by the ranks.
    """
    return TokenLoader(
        pairs,
        config.batch_size,
        seed=config.seed,
        rank=place.rank,
        world_size=place.world_size,
        threads=config.threads,
        buffer_mb=config.buffer_mb,
        io=config.io,
        tokens=config.tokens,
        text_tokens=config.text_tokens,
        length_window=config.length_window,
        resident=rank_device(device, place) if config.resident else None,
    )


def token_dim(features: FeatureSet, tokens: str) -> int:
    """Width of what a token budget gives of a set.

    Raises:
        UsageError: The set has no pooled vectors, and those are asked for.
    """
    spec = features.spec
    if tokens == "pooled" and not spec.pooled_dim:
        raise UsageError(
            f"the token budget is `pooled`, but {spec.title} has no pooled vectors",
            where=features.folder,
            fix="the budget `all`",
        )
    return spec.pooled_dim or spec.dim if tokens == "pooled" else spec.dim


def rank_device(device: str, place: Place) -> str:
    """The device of one rank: each has a GPU of its own."""
    is_shared = place.world_size > 1 and device.startswith("cuda")
    return f"cuda:{place.rank}" if is_shared else device


def check_means(config: RunConfig, device: str) -> None:
    """See that this machine can do what a config asks for.

    Raises:
        UsageError: It has no such arithmetic, too few GPUs, or no compiler.
    """
    kind, _, number = device.partition(":")
    if config.precision == "16-mixed" and kind != "cuda":
        raise UsageError(
            "precision 16-mixed needs CUDA", where="--set precision", fix="--set precision=auto"
        )
    if config.devices > 1 and kind == "cuda" and (number or _gpus() < config.devices):
        raise UsageError(
            f"devices={config.devices} needs as many GPUs, and --device cuda without a number; "
            f"this machine has {_gpus()}",
            where="--set devices",
            fix=f"--set devices={max(1, _gpus())}",
        )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if config.compile and not any(shutil.which(name) for name in compilers):
        raise UsageError(
            "compile=true needs a C++ compiler, and there is no g++ or clang++ here",
            where="--set compile",
            fix="--set compile=false",
        )


def _gpus() -> int:
    return torch.cuda.device_count()


def make_stage(job: Job, pairs: Cache, place: Place, steps_per_epoch: int) -> Stage:
    """A stage with its first weights, drawn from torch's generator, or a checkpoint's history."""
    dims = (token_dim(job.images, job.config.tokens), token_dim(job.texts, job.config.tokens))
    if job.config.gradient_cache is not None:
        return_freed_blocks()
    stage = Stage(job.config, pairs, dims, place, steps_per_epoch)
    seed_rank(job.config.seed, place.rank)
    if job.config.compile:
        for block in stage.adaptor.blocks:
            block.compile()
    return stage


def train_rank(job: Job, asked: Mapping[str, Any]) -> None:
    """The share of a rank above 0.

    Args:
        job: What all ranks do.
        asked: `rank`, `world_size`, `port`; and as rank 0 sees them: `identity`, and `pairs`, their
            fingerprint.

    Raises:
        TrainingError: It sees other pairs than rank 0, or see `fit`.
    """
    pairs = open_cache(job.images, job.texts, job.manifest, split="train")
    if pairs.fingerprint != asked["pairs"]:
        raise TrainingError(
            "the features changed while the training started", where=job.images.folder
        )
    place = Place(job.folder, asked["identity"], asked["rank"], asked["world_size"])
    loader = make_loader(pairs, job.config, job.device, place)
    with seeded(job.config.seed, rank_device(job.device, place)):
        stage = make_stage(job, pairs, place, len(loader))
        environment = OneMachine(place.rank, place.world_size, asked["port"])
        with quiet_lightning(), stage.stop, undisturbed():
            path, restored = resume(stage), Restored()
            trainer = _trainer(stage, job.device, environment, restored)
            with restored.explained(stage):
                trainer.fit(stage, train_dataloaders=loader, ckpt_path=path)


def fit(stage: Stage, loader: TokenLoader, job: Job, go_on: str) -> None:
    """Train as rank 0, with the processes that belong to it.

    Args:
        stage: What is trained.
        loader: Its batches.
        job: What the other ranks are told.
        go_on: What the user types to go on after a stop.

    Raises:
        TrainingError: A loss or a gradient is not finite, memory is too small, or another rank
            failed.
        InterruptedByUserError: Ctrl-C.
        TerminatedError: SIGTERM.
    """
    path = resume(stage)
    (job.folder / NONFINITE_FILE).unlink(missing_ok=True)
    if path is None:
        shutil.rmtree(job.folder / "best", ignore_errors=True)  # of a start that came to nothing
    _say_where_it_goes_on(stage, path)
    asked = {
        **job.to_plain(),
        "identity": dict(stage.place.identity),
        "pairs": stage.cache.fingerprint,
    }
    with quiet_lightning(), stage.stop, undisturbed():
        if stage.place.world_size == 1:
            _fit(stage, loader, job, path)
        else:
            with Workers(asked, stage.place.world_size) as workers:
                try:
                    environment = OneMachine(0, stage.place.world_size, workers.port)
                    _fit(stage, loader, job, path, environment)
                except RuntimeError:
                    failure = workers.failure()
                    if failure is None:
                        raise
                    raise failure from None
    if stage.global_step < stage.total_steps:
        _stopped(stage, go_on)


def _fit(
    stage: Stage,
    loader: TokenLoader,
    job: Job,
    path: Path | None,
    environment: OneMachine | None = None,
) -> None:
    """Run the trainer with everything that is written and shown."""
    done = 0 if stage.resumed is None else int(stage.resumed["step"])
    restored = Restored()
    trainer = _trainer(stage, job.device, environment, restored)
    title = f"train-adaptor {stage.place.folder.name}"
    log = MetricsLog(
        stage.place.folder / METRICS_FILE,
        keep_steps=done,
        keep_validations=len(stage.history.validations),
    )
    try:
        with (
            log as stage.metrics_log,
            task(title, stage.total_steps, unit="steps", done=done) as stage.progress,
            restored.explained(stage),
        ):
            stage.replay = [one for one in log.kept if one["kind"] == "step"]
            trainer.fit(stage, train_dataloaders=loader, ckpt_path=path)
    except SystemExit:
        # A second Ctrl-C, which Lightning turns into an exit with code 1, or SIGTERM before the
        # first step.
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
    except (torch.OutOfMemoryError, MemoryError):
        raise _too_large(stage, job.device) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise _too_large(stage, job.device) from None


def _too_large(stage: Stage, device: str) -> TrainingError:
    """What to say when a step does not fit into memory."""
    config = stage.config
    share = config.batch_size // stage.place.world_size
    return TrainingError(
        f"a batch of {share:,} pairs does not fit into the memory of {device}",
        where=stage.place.folder,
        fix=remedy(config.batch_size, share, config.gradient_cache),
    )


def _stopped(stage: Stage, go_on: str) -> None:
    """End a training that was asked to stop.

    Raises:
        InterruptedByUserError: Ctrl-C.
        TerminatedError: SIGTERM.
        TrainingError: Nobody asked: the checkpoint that it went on from counts wrongly.
    """
    if stage.stop.received is None:
        raise TrainingError(
            f"training ended by itself after step {stage.global_step} of {stage.total_steps}",
            where=stage.place.folder,
            fix="delete this run's folder and train anew",
        )
    by_user = stage.stop.received == signal.SIGINT
    kind = InterruptedByUserError if by_user else TerminatedError
    saved = stage.saved
    where = stage.place.folder if saved is None else saved
    left = "nothing is saved yet" if saved is None else f"checkpoint {saved.name} is saved"
    raise kind(
        f"training stopped after step {stage.global_step} of {stage.total_steps}; {left}",
        where=where,
        fix=go_on,
    )


def _say_where_it_goes_on(stage: Stage, path: Path | None) -> None:
    """A line about the checkpoint that is used, and about ranks that became more or fewer."""
    if path is None or stage.resumed is None:
        return
    folder = stage.place.folder
    note(f"train-adaptor {folder.name}  goes on after step {stage.resumed['step']} ({path.name})")
    before = len(stage.resumed["generators"]["torch"])
    if before != stage.place.world_size:
        note(
            f"train-adaptor {folder.name}  trained by {before} processes before, now by "
            f"{stage.place.world_size}: the same pairs in the same order, but other dropout"
        )


def _trainer(
    stage: Stage, device: str, environment: OneMachine | None, restored: Restored
) -> lightning.Trainer:
    """Lightning's loop without anything that it would leave lying about."""
    config, place = stage.config, stage.place
    kind, _, number = device.partition(":")
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if kind == "cuda" else "32-true"
    shared: dict[str, Any] = {"devices": [int(number)] if number else 1, "strategy": "auto"}
    # One process, even inside a Slurm job, unless others were started here.
    plugins: list[Any] = [FolderCheckpointIO(), environment or LightningEnvironment()]
    if place.world_size > 1:
        strategy = DDPStrategy(broadcast_buffers=False, timeout=LONGEST_WAIT)
        shared = {"devices": place.world_size, "strategy": strategy}
    writes_csv = config.logger == "csv" and stage.leads
    return lightning.Trainer(
        accelerator=kind,
        **shared,
        precision=precision,
        plugins=plugins,
        callbacks=[restored],
        max_epochs=config.epochs,
        gradient_clip_val=config.gradient_clip,
        logger=CSVLogger(place.folder, name="", version="csv") if writes_csv else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=place.folder,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hold back what Lightning says about itself; errors still come through."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
