"""The training loop's body, as Lightning wants it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor

from featcache.adaptor.candidates import Candidates
from featcache.adaptor.checkpoint import checkpoint_folder, prune_checkpoints
from featcache.adaptor.generators import generator_states, seed_rank, set_generator_states
from featcache.adaptor.history import History
from featcache.adaptor.known import KnownPairs
from featcache.adaptor.memory import StepMemory
from featcache.adaptor.optimizer import learning_rate_factor, parameter_groups
from featcache.adaptor.queue import Queue
from featcache.adaptor.ranks import Ranks
from featcache.adaptor.run import MetricsLog, RunConfig
from featcache.adaptor.saved import build_adaptor
from featcache.adaptor.signals import StopSignals
from featcache.cache.reader import Cache
from featcache.config import write_json
from featcache.console import Progress, note
from featcache.errors import TrainingError
from featcache.loader.batch import Batch

OWN = "featcache"
"""Under this name a checkpoint holds what is ours and not Lightning's."""
NONFINITE_FILE = "nonfinite.json"
CHECKPOINT_S = 60.0
"""Seconds between checkpoints at epochs' ends, where no number of steps is set."""
CSV_VALUES = ("loss", "logit_scale", "grad_norm", "lr")
SKIPPED_IN_A_ROW = 20
"""Steps that float16 may skip one after the other while it looks for a loss scale."""


@dataclass(frozen=True)
class Place:
    """Where a process stands in a training.

    Attributes:
        folder: The run's.
        identity: See `run_identity`.
        rank: Of this process.
        world_size: Number of processes.
    """

    folder: Path
    identity: Mapping[str, Any]
    rank: int = 0
    world_size: int = 1


class Stage(lightning.LightningModule):
    """Adaptor, objective, and what happens at each step.

    Everything that belongs to a step or ends an epoch happens in `on_train_batch_end`, and a
    checkpoint is taken at its very end: so it stands between two steps, at an epoch's edge too.

    Args:
        config: What to do.
        cache: The pairs.
        dims: Width of the image tokens and of the text tokens.
        place: Where this process stands.
        steps_per_epoch: Batches of an epoch.

    Attributes:
        candidates: What is measured after each epoch, None for nothing.
        keep_best: Called when an epoch is the best so far.
        resumed: What a checkpoint says that this training goes on from.
        saved: The last checkpoint.
        replay: Lines of earlier steps, for Lightning's logger, which starts anew.
    """

    metrics_log: MetricsLog
    progress: Progress

    def __init__(
        self,
        config: RunConfig,
        cache: Cache,
        dims: tuple[int, int],
        place: Place,
        steps_per_epoch: int,
    ):
        super().__init__()
        self.adaptor, self.objective = build_adaptor(config.adaptor, *dims)
        self.queue = Queue(config.queue, config.adaptor.dim) if config.queue else None
        self.known = KnownPairs.of(cache.image_rows, cache.text_rows)
        self.config, self.cache, self.place = config, cache, place
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.history = History(steps_per_epoch)
        self.candidates: Candidates | None = None
        self.keep_best: Callable[[], None] | None = None
        self.resumed: Mapping[str, Any] | None = None
        self.stop = StopSignals()
        self.saved: Path | None = None
        self.replay: list[dict[str, Any]] = []
        self._saved_s = 0.0
        self._memory: StepMemory | None = StepMemory(
            config.batch_size // place.world_size, place.world_size, self
        )
        self._skipped = 0
        self._stops = self._saves = False
        self._loss = torch.zeros(())
        self._values: dict[str, float | None] = {}

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.place.rank == 0

    def configure_optimizers(self) -> Any:
        """AdamW, with a rate that moves at each step."""
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
        """The loader's own way, which dequantises what is stored as int8."""
        return batch.to(device)

    def on_train_start(self) -> None:
        """Take the signals back from the trainer, then let the generators go on.

        They come last, when nothing draws from them any more.
        """
        self.stop.take_over()
        self._saved_s = self.history.elapsed_s
        for line in self.replay:
            self.log_to_csv({name: line[name] for name in CSV_VALUES}, line["step"])
        if self.resumed is None:
            return
        states = self.resumed["generators"]
        if len(states["torch"]) == self.place.world_size:
            set_generator_states(states, self.device, self.place.rank)
        else:
            seed_rank(self.config.seed, self.place.rank, self.global_step)
        if len(self.history.validations) < self.global_step // self.steps_per_epoch:
            self._validate()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of the whole batch, over all ranks."""
        self._batch = batch
        if self._memory is not None and self.global_step == self._first_step:
            with self._memory.measured(self.device):
                loss = self._loss_of(batch)
        else:
            loss = self._loss_of(batch)
        self._loss = loss.detach()
        return loss

    @property
    def _first_step(self) -> int:
        return 0 if self.resumed is None else int(self.resumed["step"])

    def _loss_of(self, batch: Batch) -> Tensor:
        loss: Tensor = self.objective(
            self.adaptor,
            batch,
            chunk=self.config.gradient_cache,
            ranks=Ranks.current(),
            queue=self.queue,
            known=self.known,
        ).loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at loss and gradient while the weights are still good, and ask all ranks."""
        loss = self.trainer.strategy.reduce(self._loss, reduce_op="mean").item()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        stops = self.leads and self.stop.received is not None
        waited = self.history.elapsed_s - self._saved_s >= CHECKPOINT_S
        self._stops, self._saves, lost, bad = self._any_rank(
            stops, self.leads and waited, not math.isfinite(loss), not math.isfinite(norm)
        )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self._skipped = self._skipped + 1 if bad else 0
        if lost:
            self._give_up("loss", loss)
        if bad and (scaler is None or self._skipped > SKIPPED_IN_A_ROW):
            self._give_up("norm of the gradient", norm)
        self.history.last_loss = loss
        self._values = {
            "loss": loss,
            "logit_scale": self.adaptor.logit_scale.item(),
            "grad_norm": None if bad else norm,
            "lr": optimizer.param_groups[0]["lr"],
        }

    def on_train_batch_end(self, *_: Any) -> None:
        """Log, measure at an epoch's end, and save, in this order."""
        self.adaptor.clamp_logit_scale()
        done = self.global_step
        self._log_step(done)
        is_edge, is_last = done % self.steps_per_epoch == 0, done == self.total_steps
        stops = self._stops and not is_last
        if is_edge and not stops:
            self._validate()
        if stops or (not is_last and self._is_due(done, is_edge)):
            self._save()
        if stops:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is ours."""
        checkpoint[OWN] = {
            "identity": dict(self.place.identity),
            "step": self.global_step,
            "history": self.history.state(),
            "generators": generator_states(self.device),
        }

    def _log_step(self, done: int) -> None:
        """Write down what the step did; after the first one, how large a batch could be."""
        if not self.leads:
            return
        self.metrics_log.write(
            "step",
            step=done,
            epoch=(done - 1) // self.steps_per_epoch,
            **self._values,
            elapsed_s=round(self.history.elapsed_s, 4),
        )
        self.progress.update(done, note=f"loss {self.history.last_loss:.3f}")
        self.log_to_csv(self._values, done)
        if self._memory is not None:
            largest = self._memory.largest_batch(self.device)
            if largest is not None:
                note(
                    f"train-adaptor {self.place.folder.name}  largest batch for this memory: about "
                    f"{largest:,} pairs"
                )
            self._memory = None

    def log_to_csv(self, values: Mapping[str, JsonValue], step: int) -> None:
        """Give a step's numbers to Lightning's logger, if there is one."""
        if self.logger is not None:
            numbers = {
                name: float(value) for name, value in values.items() if isinstance(value, float)
            }
            self.logger.log_metrics(numbers, step=step)

    def _validate(self) -> None:
        """Measure the epoch that ended."""
        if self.candidates is None:
            return
        self.eval()
        with torch.compiler.set_stance("force_eager"):
            found = self.candidates.metrics(self.objective, self.adaptor, str(self.device))
        self.train()
        epoch = len(self.history.validations)
        plain = self.history.add(found)
        self.metrics_log.write("validate", epoch=epoch, **plain)
        if plain["mrr"] is None:
            note(f"validation of epoch {epoch + 1} is undefined: it cannot be the best")
        elif self.history.best_epoch == epoch and self.keep_best is not None:
            self.keep_best()

    def _is_due(self, done: int, is_edge: bool) -> bool:
        every = self.config.checkpoint_every
        return is_edge and self._saves if every is None else done % every == 0

    def _save(self) -> None:
        """Write a checkpoint; all ranks take part."""
        path = checkpoint_folder(self.place.folder, self.global_step)
        self.trainer.save_checkpoint(path, weights_only=False)
        self.saved, self._saved_s = path, self.history.elapsed_s
        if self.leads:
            prune_checkpoints(self.place.folder)

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Whether any rank raised each flag."""
        if self.place.world_size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def _give_up(self, name: str, value: float) -> None:
        """Record the pairs of this batch, and stop.

        Raises:
            TrainingError: Always.
        """
        step, epoch = self.global_step + 1, self.current_epoch
        path = self.place.folder / NONFINITE_FILE
        pairs = self._pairs_of_batch()
        if self.leads:
            write_json(path, {"what": name, "step": step, "epoch": epoch, "pairs": pairs})
        last = (
            f"the last good checkpoint is {self.saved.name}" if self.saved else "nothing is saved"
        )
        raise TrainingError(
            f"the {name} is {value} at step {step} (epoch {epoch}, lr up to "
            f"{self.config.lr:g}); {last}, the keys of the batch are in {path.name}",
            where=path,
            fix="--set lr=... with a tenth of it and another --name; featcache verify checks the "
            "features",
        )

    def _pairs_of_batch(self) -> list[dict[str, JsonValue]]:
        """Keys of the whole batch's pairs, and whether their tokens are finite."""
        batch = self._batch
        finite = [
            tokens.isfinite().flatten(1).all(dim=1)
            for tokens in (batch.image_tokens, batch.text_tokens)
        ]
        table = torch.stack([batch.pairs, *(one.to(batch.pairs) for one in finite)])  # (3, B)
        if self.place.world_size > 1:
            tables = [torch.empty_like(table) for _ in range(self.place.world_size)]
            dist.all_gather(tables, table)
            table = torch.cat(tables, dim=1)
        images, texts = self.cache.images.keys, self.cache.texts.keys
        return [
            {
                "key": images[self.cache.image_rows[pair]],
                "text_id": texts[self.cache.text_rows[pair]],
                "image_is_finite": bool(image),
                "text_is_finite": bool(text),
            }
            for pair, image, text in table.T.tolist()
        ]
