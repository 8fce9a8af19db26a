"""A file while it is being written, beside the place that it will have."""

import os
import re
import shutil
import socket
import time
from pathlib import Path

FOREIGN_PARTIAL_S = 3_600.0
"""After this long without growth a half-written file of another host counts as dead."""


def partial_path(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`."""
    pid = os.getpid()
    return path.with_name(f"{path.name}.partial-{host_name()}-{pid}-{start_time(pid) or 0}")


def remove_dead_partials(folder: Path, name: str = "*") -> int:
    """Remove half-written files and folders whose writer is gone.

    Args:
        folder: Where to look; not in folders within it.
        name: Name of the finished file; by default every one.

    Returns:
        How many were removed. A partial of this host is dead when its process is; one of another
        host when it has not grown for an hour.
    """
    dead = [path for path in folder.glob(f"{name}.partial-*") if _is_dead(path)]
    for path in dead:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(dead)


def host_name() -> str:
    """This machine's name, as file names can hold it."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "unknown"


def start_time(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot.

    Returns:
        None when there is no such process (or it is a zombie); 0 when the system does not tell.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        fields = ""
    if fields:
        state, *rest = fields.rpartition(")")[2].split()
        return None if state == "Z" else int(rest[18])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def _is_dead(path: Path) -> bool:
    """Whether nobody writes a partial any more."""
    owner = path.name.partition(".partial-")[2].rsplit("-", 2)
    if len(owner) == 3 and owner[0] == host_name() and owner[1].isdigit() and owner[2].isdigit():
        return start_time(int(owner[1])) != int(owner[2])
    try:
        return time.time() - path.stat().st_mtime > FOREIGN_PARTIAL_S
    except FileNotFoundError:
        return False
