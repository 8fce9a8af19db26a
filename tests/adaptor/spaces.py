"""Runs from the outside: the command line in a process of its own, hurt at a chosen step."""

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "epochs": 3,
    "batch_size": 8,
    "lr": 3e-3,
    "threads": 1,
    "adaptor.dim": 16,
    "adaptor.layers": 1,
    "adaptor.heads": 2,
    "adaptor.feedforward": 24,
    "adaptor.objective": "dual",
}  # 42 pairs: 5 steps an epoch, 15 in all


def lines(folder: Path, kind: str) -> list[dict]:
    """Lines of one kind in a run's log."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def weights(folder: Path) -> bytes:
    """A run's trained weights."""
    return (folder / "adaptor" / "adaptor.safetensors").read_bytes()


def run(arguments: list[str], errors: Path, hurt: tuple[str, int, int] | None = None) -> None:
    """`featcache` with these arguments, stderr to a file; at a step it gets a signal.

    Args:
        arguments: As typed.
        errors: Where stderr goes.
        hurt: (`during` or `after` a step, its number from 1, the signal).
    """
    _redirect(errors)
    from featcache.cli import main

    if hurt is not None:
        _arm(*hurt)
    code = main(arguments)
    sys.stderr.flush()
    os._exit(code)


def wait_for_ever(folder: Path, errors: Path) -> None:
    """Rank 0 as it hangs on a GPU while another rank, which was told nonsense, is gone."""
    import time

    from featcache.adaptor import processes

    _redirect(errors)
    processes.PATIENCE_S = 0.2
    nowhere = str(folder / "nowhere")
    asked = dict.fromkeys(("images", "texts", "manifest", "folder"), nowhere)
    with processes.Workers(asked, 2):
        time.sleep(100)


def _arm(when: str, step: int, number: int) -> None:
    from featcache.adaptor.stage import Stage

    name = "training_step" if when == "during" else "on_train_batch_end"
    whole = getattr(Stage, name)

    def hurting(self, *arguments):
        if when == "during" and self.global_step == step - 1:
            os.kill(os.getpid(), number)
        result = whole(self, *arguments)
        if when != "during" and self.global_step == step:
            os.kill(os.getpid() if when == "after" else _child(), number)
        return result

    setattr(Stage, name, hurting)


def _redirect(errors: Path) -> None:
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _child() -> int:
    """A process that this one has started."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return int(path.read_text().split()[0])


class Space:
    """A workspace in which commands are typed, each in a process of its own."""

    def __init__(self, root, processes):
        self.root, self.processes = root, processes
        self.errors = root / "errors.txt"

    def train(self, name="run", hurt=None, **settings):
        sets = [f"--set={key}={value}" for key, value in (SETTINGS | settings).items()]
        return self.type(["train-adaptor", "--name", name, *sets], hurt)

    def type(self, arguments, hurt=None):
        """The exit code; a signal that killed it is negative."""
        where = [] if "--root" in arguments else ["--root", str(self.root)]
        process = self.processes.Process(target=run, args=([*arguments, *where], self.errors, hurt))
        process.start()
        process.join(300)
        return process.exitcode

    def said(self):
        return self.errors.read_text()

    def metrics(self, name):
        """Lines of the log without time stamps."""
        path = self.root / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "elapsed_s"} for line in lines]

    def result(self, name):
        """Everything that a run left, without time stamps."""
        folder = self.root / "runs" / name
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        facts = json.loads((folder / "run.json").read_text())
        return {
            "metrics": self.metrics(name),
            "csv": (folder / "csv" / "metrics.csv").read_text(),
            "files": names,
            "last": (folder / "adaptor" / "adaptor.safetensors").read_bytes(),
            "best": (folder / "best" / "adaptor.safetensors").read_bytes(),
            "outcome": [facts[key] for key in ("steps", "epochs", "best_epoch", "validation")],
        }

    def checkpoints(self, name):
        return sorted(p.name for p in (self.root / "runs" / name / "checkpoints").iterdir())
