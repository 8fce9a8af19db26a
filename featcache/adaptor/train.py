"""Stage two: training an Adaptor on cached tokens. The only module that imports Lightning."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerStatus
from pydantic import JsonValue
from torch import Tensor

from featcache.adaptor.candidates import Candidates
from featcache.adaptor.model import count_parameters
from featcache.adaptor.optimizer import learning_rate_factor, parameter_groups
from featcache.adaptor.run import (
    METRICS_FILE,
    MetricsLog,
    RunConfig,
    RunResult,
    finished_facts,
    free_folder,
    load_run_config,
    run_identity,
    start_folder,
    write_facts,
)
from featcache.adaptor.saved import FeaturesRead, build_adaptor, save_adaptor
from featcache.cache.reader import Cache, FeatureSet, open_cache
from featcache.console import Progress, duration, note, task
from featcache.device import resolve_device
from featcache.errors import CacheError, InterruptedByUserError, TrainingError, UsageError
from featcache.loader.gather import Batch, TokenLoader
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

__all__ = ["load_run_config", "train", "train_adaptor"]


class _Stage(lightning.LightningModule):
    """The training loop's body, as Lightning wants it."""

    metrics_log: MetricsLog
    progress: Progress

    def __init__(self, config: RunConfig, image_dim: int, text_dim: int, steps_per_epoch: int):
        super().__init__()
        self.adaptor, self.objective = build_adaptor(config.adaptor, image_dim, text_dim)
        self.config = config
        self.total_steps = config.epochs * steps_per_epoch
        self.candidates: Candidates | None = None
        self.started = time.monotonic()
        self.last_loss = 0.0
        self.step_values: dict[str, float] = {}
        self.validations: list[dict[str, float]] = []
        self.finished_epochs = 0

    def configure_optimizers(self) -> Any:
        groups = parameter_groups((self.adaptor, self.objective), self.config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.config.lr)
        factor = partial(
            learning_rate_factor,
            total=self.total_steps,
            warmup=self.config.warmup,
            schedule=self.config.schedule,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _: int) -> Batch:
        return batch.to(device)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss: Tensor = self.objective(self.adaptor, batch).loss
        self.last_loss = loss.item()
        self._must_be_finite("loss", self.last_loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self._must_be_finite("norm of the gradient", norm)
        self.step_values = {
            "loss": self.last_loss,
            "logit_scale": self.adaptor.logit_scale.item(),
            "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
        }

    def on_train_batch_end(self, *_: Any) -> None:
        self.adaptor.clamp_logit_scale()
        done = self.global_step
        self.metrics_log.write(
            "step",
            step=done,
            epoch=self.current_epoch,
            **self.step_values,
            elapsed_s=round(self.elapsed_s, 4),
        )
        self.progress.update(done, note=f"loss {self.last_loss:.3f}")
        if self.logger is not None:
            self.logger.log_metrics(self.step_values, step=done)

    def on_train_epoch_end(self) -> None:
        self.finished_epochs += 1
        if self.candidates is None:
            return
        self.eval()
        found = self.candidates.metrics(self.objective, self.adaptor, str(self.device))
        self.train()
        self.validations.append(found)
        self.metrics_log.write("validate", epoch=self.current_epoch, **found)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def best_epoch(self) -> int | None:
        """Epoch, from 0, with the highest mean reciprocal rank; the first of equals."""
        ranked = [found["mrr"] for found in self.validations]
        return ranked.index(max(ranked)) if ranked else None

    def outcome(self) -> dict[str, JsonValue]:
        """What `run.json` says about the training itself."""
        return {
            "steps": self.global_step,
            "epochs": self.finished_epochs,
            "final_loss": self.last_loss,
            "best_epoch": self.best_epoch,
            "validation": dict(self.validations[-1]) if self.validations else None,
            "elapsed_s": round(self.elapsed_s, 2),
        }

    def last_words(self) -> str:
        """The outcome in a line."""
        line = f"{self.finished_epochs} epochs in {duration(self.elapsed_s)}"
        if not self.validations:
            return line
        last, best = self.validations[-1], self.best_epoch
        return (
            f"{line}; validation MRR {last['mrr']:.3f}, image to text R@5 "
            f"{100 * last['image_to_text_recall_at_5']:.1f} % (chance "
            f"{100 * last['image_to_text_chance_recall_at_5']:.1f} %); best epoch "
            f"{'none' if best is None else best + 1}, the last one is saved"
        )

    def _must_be_finite(self, name: str, value: float) -> None:
        if not np.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} at step {self.global_step + 1} (epoch "
                f"{self.current_epoch}, lr up to {self.config.lr:g}); nothing was saved",
                fix="--set lr=... with a tenth of it; featcache verify checks the features",
            )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
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


@_quiet_lightning()
def _fit(stage: _Stage, loader: TokenLoader, folder: Path, device: str) -> None:
    """Run Lightning's loop without anything that it would leave lying about."""
    config = stage.config
    kind, _, number = device.partition(":")
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if kind == "cuda" else "32-true"
    csv = CSVLogger(folder, name="", version="csv") if config.logger == "csv" else False
    trainer = lightning.Trainer(
        accelerator=kind,
        devices=[int(number)] if number else 1,
        precision=precision,
        plugins=[LightningEnvironment()],  # one process, even inside a Slurm job
        max_epochs=config.epochs,
        gradient_clip_val=config.gradient_clip,
        logger=csv,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    title = f"train-adaptor {folder.name}"
    try:
        with (
            MetricsLog(folder / METRICS_FILE) as stage.metrics_log,
            task(title, stage.total_steps, unit="steps") as stage.progress,
        ):
            trainer.fit(stage, train_dataloaders=loader)
    except SystemExit:
        # Lightning turns Ctrl-C into an exit with code 1.
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        raise InterruptedByUserError(
            f"training stopped after step {stage.global_step} of {stage.total_steps}; "
            "no weights were saved",
            where=folder,
            fix="the same command starts it anew",
        ) from None
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"a batch does not fit into the memory of {device}",
            where=folder,
            fix="--set batch_size=... with half of it",
        ) from None


def _count(stage: _Stage, images: FeatureSet, texts: FeatureSet) -> dict[str, JsonValue]:
    """Parameters of everything, and the trainable share when the encoders' are known."""
    own, extra = count_parameters(stage.adaptor), count_parameters(stage.objective)
    encoders = [features.quality.get("parameters") for features in (images, texts)]
    known = [number for number in encoders if isinstance(number, int)]
    share = (own + extra) / (own + extra + sum(known)) if len(known) == 2 else None
    return {
        "adaptor": own,
        "objective": extra,
        "trainable": own + extra,
        "image_encoder": encoders[0],
        "text_encoder": encoders[1],
        "trainable_share": share,
    }


def _batch_size(config: RunConfig, num_pairs: int, manifest: Manifest) -> int:
    """The batch size that the pairs allow.

    Raises:
        TrainingError: There are fewer than two pairs.
    """
    if num_pairs < 2:
        raise TrainingError(
            f"the split `train` of manifest `{manifest.name}` has {num_pairs} image-text pairs "
            "with valid features; at least 2 are needed, a pair is contrasted with others",
            where=manifest.folder,
            fix="featcache info shows what the feature sets hold; splits stand in images.parquet",
        )
    if config.batch_size > num_pairs:
        note(
            f"batch size {config.batch_size} is more than the {num_pairs} training pairs: "
            f"using {num_pairs}"
        )
    return min(config.batch_size, num_pairs)


def _introduce(
    name: str, stage: _Stage, counts: dict[str, JsonValue], num_pairs: int, notes: list[str]
) -> None:
    """Say what is about to happen."""
    share, config = counts["trainable_share"], stage.config
    of_all = f", {100 * share:.2g} % of all with the encoders" if isinstance(share, float) else ""
    note(
        f"train-adaptor {name}  objective {config.adaptor.objective}, {counts['trainable']:,} "
        f"trainable parameters{of_all}; {num_pairs:,} pairs, {stage.total_steps:,} steps in "
        f"{config.epochs} epochs"
    )
    for sentence in notes:
        note(sentence)


def train_adaptor(
    images: FeatureSet,
    texts: FeatureSet,
    manifest: Manifest,
    folder: Path,
    config: RunConfig,
    *,
    device: str = "auto",
) -> RunResult:
    """Train an Adaptor on the pairs of the split `train`, and save the last epoch's weights.

    After each epoch the split `validate` is scored unpaired; the best epoch is only recorded. The
    split `test` is never read. The same config on the same features gives the same weights, on a
    CPU bit for bit (with equal threads and library versions). An unfinished run starts anew.

    Args:
        images: Image features.
        texts: Text features.
        manifest: Says which pairs there are, in which split.
        folder: The run's folder; made when missing.
        config: What to do.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        `unchanged` when the very same training was finished in the folder before.

    Raises:
        TrainingError: Another run lies in the folder, there are too few pairs, or the loss or its
            gradient is not finite.
        InterruptedByUserError: Ctrl-C.
    """
    device = resolve_device(device)
    pairs = open_cache(images, texts, manifest, split="train")
    identity = _identity(pairs, manifest, config)
    before = finished_facts(folder, identity)
    if before is not None:
        note(f"train-adaptor {folder.name}  finished before; nothing to do")
        return RunResult(folder, "unchanged", before)
    size = _batch_size(config, pairs.num_pairs, manifest)
    loader = TokenLoader(
        pairs,
        size,
        seed=config.seed,
        threads=config.threads,
        buffer_mb=config.buffer_mb,
        io=config.io,
    )
    with _seeded(config.seed, device):
        stage = _Stage(config, images.spec.dim, texts.spec.dim, len(loader))
        stage.candidates = _held_out(images, texts, manifest)
        counts = _count(stage, images, texts)
        notes = [*manifest.meta.notes, *filter(None, [stage.objective.notice])]
        _introduce(folder.name, stage, counts, pairs.num_pairs, notes)
        facts: dict[str, JsonValue] = {
            "manifest": {"name": manifest.name, "synthetic": manifest.meta.synthetic},
            "images": {"folder": str(images.folder.resolve()), "encoder": images.spec.encoder},
            "texts": {"folder": str(texts.folder.resolve()), "encoder": texts.spec.encoder},
            "pairs": {"train": pairs.num_pairs, "dropped": dict(pairs.dropped)},
            "batch_size": size,
            "device": device,
            "parameters": counts,
            "notes": list(notes),
        }
        start_folder(folder, config, identity, facts)
        _fit(stage, loader, folder, device)
    _save(folder, stage, pairs, notes)
    facts |= {"status": "finished", "identity": identity, **stage.outcome()}
    written = write_facts(folder, facts)
    note(f"train-adaptor {folder.name}  {stage.last_words()}")
    return RunResult(folder, "trained", written)


def _save(folder: Path, stage: _Stage, pairs: Cache, notes: list[str]) -> None:
    """Write the Adaptor with what it read."""
    image, text = (
        FeaturesRead(encoder=one.spec.encoder, fingerprint=one.fingerprint, dim=one.spec.dim)
        for one in (pairs.images, pairs.texts)
    )
    save_adaptor(
        folder / "adaptor",
        stage.adaptor,
        stage.objective,
        stage.config.adaptor,
        image=image,
        text=text,
        notes=notes,
    )


def _held_out(images: FeatureSet, texts: FeatureSet, manifest: Manifest) -> Candidates | None:
    """The candidates of the split `validate`; None, with the reason said, when it has no pairs."""
    try:
        return Candidates.of(open_cache(images, texts, manifest, split="validate"))
    except CacheError as error:
        note(f"nothing is measured while training: {error.what}")
        return None


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Draw from a seed inside, and leave torch's global generators as they were."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _identity(pairs: Cache, manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    return run_identity(
        config,
        images=pairs.images.fingerprint,
        texts=pairs.texts.fingerprint,
        manifest=manifest.meta.hash,
        pairs=pairs.fingerprint,
    )


def train(
    workspace: Workspace,
    config: RunConfig,
    *,
    backbone: str | None = None,
    text_encoder: str | None = None,
    manifest: str | None = None,
    name: str | None = None,
    device: str = "auto",
) -> RunResult:
    """Train on what a workspace holds, and make the run current.

    Args:
        workspace: Where everything is found, and the run's folder is made.
        config: What to do.
        backbone: Image feature set; None: the config's, else the current one.
        text_encoder: Text feature set; None: the config's, else the current one.
        manifest: Manifest; None: the config's, else the current one.
        name: Of the run; None: made of the encoders and the objective.
        device: See `train_adaptor`.

    Raises:
        UsageError: The name is no plain folder name.
        WorkspaceError: Something is not there, or nothing is current.
        TrainingError: See `train_adaptor`.
    """
    if name is not None and (Path(name).name != name or name[:1] in ("", ".", "-")):
        raise UsageError(f"`{name}` is no plain folder name", where="--name", fix="--name my-run")
    table = open_manifest(workspace.manifest(manifest or config.manifest))
    images = FeatureSet.open(workspace.feature_set("image", backbone or config.images))
    texts = FeatureSet.open(workspace.feature_set("text", text_encoder or config.texts))
    note(f"manifest {table.title}, {images.spec.title}, {texts.spec.title}")
    names = {"images": images.folder.name, "texts": texts.folder.name, "manifest": table.name}
    config = config.model_copy(update=names)
    if name is None:
        pairs = open_cache(images, texts, table, split="train")
        parts = f"{images.folder.name}-{texts.folder.name}-{config.adaptor.objective}"
        folder = free_folder(workspace.runs, parts, _identity(pairs, table, config))
    else:
        folder = workspace.runs / name
    result = train_adaptor(images, texts, table, folder, config, device=device)
    workspace.use(run=folder.name)
    return result
