"""Which device computes: `auto`, `cpu`, `cuda` or `cuda:N`."""

import torch

from featcache.errors import UsageError


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`; other names are checked.

    Raises:
        UsageError: This machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    is_number = number.isdecimal() if ":" in device else True
    if kind not in ("cpu", "cuda") or not is_number or int(number or 0) >= count:
        raise UsageError(
            f"there is no device `{device}` here, only cpu and {torch.cuda.device_count()} CUDA "
            "devices",
            where="--device",
            fix="--device auto",
        )
    return device
