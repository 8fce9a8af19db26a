"""Going on from a checkpoint, and refusing one that does not lead back to where it was taken."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from featcache.adaptor.checkpoint import (
    REMEDY,
    STATE,
    check_fit,
    latest_checkpoint,
    read_checkpoint,
)
from featcache.adaptor.run import differences
from featcache.adaptor.stage import OWN, Stage
from featcache.errors import TrainingError
from featcache.loader.gather import TokenLoader

OWN_KEYS = {"identity": Mapping, "step": int, "history": Mapping, "generators": Mapping}
LIGHTNING_KEYS = {
    "state_dict": Mapping,
    "loops": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "global_step": int,
}
MISREAD = (
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    MisconfigurationException,
    TypeError,
    ValueError,
)
"""What a trainer raises that looks for something in a state and finds something else."""
MOVING = {"lr", "weight_decay"}


def resume(stage: Stage) -> Path | None:
    """Let a stage go on from the last checkpoint in its folder.

    Returns:
        The checkpoint; None when there is none.

    Raises:
        TrainingError: It is damaged, or belongs to something else.
    """
    path = latest_checkpoint(stage.place.folder)
    if path is None:
        return None
    state = read_checkpoint(path)
    own = _own_part(state, path)
    others = differences(own["identity"], stage.place.identity)
    if others:
        raise TrainingError(
            "the checkpoint belongs to another run:\n  " + "\n  ".join(others),
            where=path / STATE,
            fix=REMEDY,
        )
    check_fit(stage.state_dict(), state["state_dict"], path, "weights")
    stage.resumed = own
    stage.history.go_on(own["history"])
    stage.saved = path
    return path


def _own_part(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What is ours in a checkpoint, known to have all its parts.

    Raises:
        TrainingError: A part is missing, ours or Lightning's, or is of another kind.
    """
    found = state.get(OWN)
    own: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    wrong = [name for name, kind in LIGHTNING_KEYS.items() if not isinstance(state.get(name), kind)]
    wrong += [name for name, kind in OWN_KEYS.items() if not isinstance(own.get(name), kind)]
    if not wrong and not isinstance(own["generators"].get("torch"), list):
        wrong = ["generators"]
    if wrong:
        raise TrainingError(
            f"this is no checkpoint of a training: it has no `{wrong[0]}`",
            where=path / STATE,
            fix=REMEDY,
        )
    return own


class Restored(lightning.Callback):
    """Sees, before the first step, that everything stands where the checkpoint was taken.

    A file that was written by hand can carry the right checksums. What it then lacks would be
    missed in silence: a trainer that finds no moments starts with zeros.

    Attributes:
        done: Whether the trainer has read all it wanted.
    """

    def __init__(self) -> None:
        self.done = False

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare counters and shapes.

        Raises:
            TrainingError: One of them is not what the checkpoint's step demands.
        """
        if isinstance(pl_module, Stage) and pl_module.resumed is not None:
            wrong = next(_wrong_parts(trainer, pl_module), None)
            if wrong is not None:
                raise _misfit(pl_module, wrong)
        self.done = True

    @contextmanager
    def explained(self, stage: Stage) -> Iterator[None]:
        """Turn what a trainer raises over a state that it cannot read into a sentence.

        Raises:
            TrainingError: The checkpoint cannot be read by the trainer.
        """
        try:
            yield
        except MISREAD as error:
            if self.done or stage.resumed is None:
                raise
            raise _misfit(stage, type(error).__name__) from error


def _wrong_parts(trainer: lightning.Trainer, stage: Stage) -> Iterator[str]:
    """Names of what does not stand where the checkpoint was taken."""
    resumed: Mapping[str, Any] = {} if stage.resumed is None else stage.resumed
    step = resumed["step"]
    if not trainer.global_step == step <= stage.total_steps:
        yield "step"
    if step == 0:
        return
    # In float16 a step may be skipped, and the rate with it.
    known = None if stage.config.precision == "16-mixed" else step
    rates = [one.scheduler.last_epoch for one in trainer.lr_scheduler_configs]
    if known is not None and rates != [known]:
        yield "lr_schedulers"
    if not all(_is_whole(optimizer, known) for optimizer in trainer.optimizers):
        yield "optimizer_states"
    if not _counts(trainer.fit_loop.state_dict()):
        yield "loops"
    loader = trainer.train_dataloader
    # With other ranks the batch may have another size, where it had to be cut to the pairs.
    if (
        isinstance(loader, TokenLoader)
        and len(resumed["generators"]["torch"]) == stage.place.world_size
    ):
        stands = loader.state_dict()
        handed_out = int(stands["epoch"]) * int(stands["num_pairs"]) + int(stands["position"])
        if handed_out != step * loader.order.global_batch:
            yield "loops"


def _is_whole(optimizer: Optimizer, steps: int | None) -> bool:
    """Whether AdamW has its settings, and moments of the weights' own shapes after `steps`."""
    for group in optimizer.param_groups:
        # The rate moves, and the groups differ in their decay alone.
        kept = {name: group.get(name) for name in optimizer.defaults.keys() - MOVING}
        if kept != {name: optimizer.defaults[name] for name in kept}:
            return False
        if not all(isinstance(group.get(name), float) for name in MOVING):
            return False
    return (
        bool(optimizer.state)
        and all(
            isinstance(state.get(name), Tensor) and state[name].shape == shape
            for weight, state in optimizer.state.items()
            for name, shape in (
                ("exp_avg", weight.shape),
                ("exp_avg_sq", weight.shape),
                ("step", ()),
            )
        )
        and (steps is None or all(state["step"] == steps for state in optimizer.state.values()))
    )


def _counts(values: Mapping[str, Any]) -> bool:
    """Whether nested counters are whole numbers, but for what the loader says of itself."""
    return all(
        _counts(value) if isinstance(value, Mapping) else isinstance(value, int)
        for name, value in values.items()
        if name != "combined_loader"
    )


def _misfit(stage: Stage, what: str) -> TrainingError:
    """What to say about a checkpoint from which the trainer cannot go on."""
    where = stage.place.folder if stage.saved is None else stage.saved / STATE
    return TrainingError(
        f"the training cannot go on from this checkpoint: its content does not fit ({what})",
        where=where,
        fix=REMEDY,
    )
