"""The machine that figures were measured on."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BUSY_LOAD = 0.5
"""Processes that were running before, from which on figures of this machine are doubtful."""
_LIBRARIES = ("torch", "timm", "numpy", "pillow", "h5py", "distributed")


@dataclass(frozen=True)
class Machine:
    """What figures depend on.

    Attributes:
        cpu: Model of the processor.
        cores: Cores that this process may use.
        memory_gb: Memory of the machine, in powers of 1000.
        gpu: Name of the first GPU; None without one.
        load: Processes that ran on average in the minute before.
        versions: Of Python, featcache and what computes.
    """

    cpu: str
    cores: int
    memory_gb: float
    gpu: str | None
    load: float
    versions: dict[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether something else was running."""
        return self.load > BUSY_LOAD

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """One line for a person."""
        gpu = f", {self.gpu}" if self.gpu else ""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gb:.0f} GB{gpu}; "
            f"load {self.load:.2f} at the start\n{versions}"
        )


def describe_machine() -> Machine:
    """Describe this machine as it is now."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(pages / 1e9, 1),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        load=round(os.getloadavg()[0], 2),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("featcache", *_LIBRARIES)},
        },
    )


def _cpu_model() -> str:
    """The processor's name, where the kernel tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
