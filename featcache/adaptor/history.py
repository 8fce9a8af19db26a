"""What a training has measured so far."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from featcache.console import duration
from featcache.errors import TrainingError


@dataclass
class History:
    """Validations, the last loss, and the time that training took, over all its starts.

    Attributes:
        steps_per_epoch: Steps of an epoch.
        validations: Metrics after each epoch; an undefined one is None.
        last_loss: Loss of the last step.
        before_s: Seconds of the earlier starts.
    """

    steps_per_epoch: int
    validations: list[dict[str, float | None]] = field(default_factory=list)
    last_loss: float = 0.0
    before_s: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds that training has taken."""
        return self.before_s + time.monotonic() - self._started

    @property
    def best_epoch(self) -> int | None:
        """Epoch, from 0, with the highest mean reciprocal rank; the first of equals.

        Epochs in which it was undefined do not count; None when it always was.
        """
        defined = {at: one["mrr"] for at, one in enumerate(self.validations)}
        ranked = {at: value for at, value in defined.items() if value is not None}
        return max(ranked, key=lambda at: (ranked[at], -at)) if ranked else None

    def add(self, found: Mapping[str, float]) -> dict[str, float | None]:
        """Take the metrics of the next epoch, with None for what is not finite."""
        plain = {name: value if math.isfinite(value) else None for name, value in found.items()}
        self.validations.append(plain)
        return plain

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "validations": self.validations,
            "last_loss": self.last_loss,
            "elapsed_s": self.elapsed_s,
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept.

        Raises:
            TrainingError: It is no such state.
        """
        try:
            self.validations = [dict(one) for one in state["validations"]]
            self.last_loss = float(state["last_loss"])
            self.before_s = float(state["elapsed_s"])
        except (KeyError, TypeError, ValueError):
            raise TrainingError("the checkpoint does not say what was measured before") from None
        self._started = time.monotonic()

    def outcome(self, steps: int) -> dict[str, JsonValue]:
        """What `run.json` says about the training itself."""
        return {
            "steps": steps,
            "epochs": steps // self.steps_per_epoch,
            "final_loss": self.last_loss,
            "best_epoch": self.best_epoch,
            "validation": dict(self.validations[-1]) if self.validations else None,
            "elapsed_s": round(self.elapsed_s, 2),
        }

    def last_words(self, steps: int) -> str:
        """The outcome in a line."""
        line = f"{steps // self.steps_per_epoch} epochs in {duration(self.elapsed_s)}"
        if not self.validations:
            return line
        best = self.best_epoch
        if best is None:
            return f"{line}; validation was undefined in every epoch, so none is the best"
        names = ("mrr", "image_to_text_recall_at_5", "image_to_text_chance_recall_at_5")
        mrr, recall, chance = (self.validations[-1].get(name) for name in names)
        if mrr is None or recall is None or chance is None:
            return f"{line}; validation undefined in the last epoch; best epoch {best + 1}"
        return (
            f"{line}; validation MRR {mrr:.3f}, image to text R@5 {100 * recall:.1f} % (chance "
            f"{100 * chance:.1f} %); best epoch {best + 1}, the last one is saved"
        )
