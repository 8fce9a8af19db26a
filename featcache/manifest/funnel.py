"""What a reader drops on the way from a table to a manifest, counted step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from featcache.manifest.table import FunnelStep


@dataclass
class Funnel:
    """What was dropped, step by step; its sums close because each step counts what it drops.

    Attributes:
        steps: So far.
    """

    steps: list[FunnelStep] = field(default_factory=list)

    def start(self, name: str, count: int) -> None:
        """Open it.

        Args:
            name: What is counted at first.
            count: How many there are.
        """
        self.steps.append(FunnelStep(name=name, count=count))

    def step(self, name: str, count: int, dropped: Mapping[str, int]) -> None:
        """Count what is left and what was dropped; reasons that never occurred are left out.

        Args:
            name: What is counted after this step.
            count: How many are left.
            dropped: Reason to number.
        """
        dropped = {reason: number for reason, number in dropped.items() if number}
        self.steps.append(FunnelStep(name=name, count=count, dropped=dropped))

    def keep(
        self, images: pa.Table, name: str, faults: Mapping[str, Bool[np.ndarray, " N"]]
    ) -> pa.Table:
        """Drop the rows with a fault.

        Args:
            images: What is left so far.
            name: What is counted after this step.
            faults: Reason to rows; a row with several counts for the first.

        Returns:
            The rows without a fault, in their order.
        """
        is_kept = np.ones(images.num_rows, dtype=np.bool_)
        dropped = {}
        for reason, is_faulty in faults.items():
            dropped[reason] = int(np.count_nonzero(is_kept & is_faulty))
            is_kept &= ~is_faulty
        self.step(name, int(is_kept.sum()), dropped)
        return images.filter(pa.array(is_kept))
