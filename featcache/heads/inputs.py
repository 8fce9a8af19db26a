"""What a head reads: which features and which Adaptor, and what must be said about them."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.adaptor.source import feature_folder, refuse_foreign, run_folder, run_name
from featcache.cache.format import hash_keys, read_spec
from featcache.cache.reader import FeatureSet
from featcache.config import read_json
from featcache.console import note
from featcache.heads.segment_masks import refuse_without_grid
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

__all__ = [
    "Found",
    "adaptor_notes",
    "feature_folder",
    "look_up",
    "refuse_foreign",
    "results_folder",
    "run_folder",
    "run_if_any",
    "run_name",
    "source_facts",
]


@dataclass(frozen=True)
class Found:
    """What a head reads, looked up in a workspace.

    Attributes:
        run: Folder of the run, None without one.
        trained: Its Adaptor, on the CPU.
        manifest: Labels, masks, texts, splits.
        images: The image set.
        results: Folder that the results of all heads go into.
    """

    run: Path | None
    trained: TrainedAdaptor | None
    manifest: Manifest
    images: FeatureSet
    results: Path

    def announce(self, head: str, more: str = "") -> None:
        """Say on the console what is about to be measured."""
        run = self.run.name if self.run is not None else "-"
        note(f"{head}: {self.images.spec.title}, run {run}, {self.manifest.title}{more}")


def run_if_any(workspace: Workspace, name: str | None) -> Path | None:
    """The run asked for, else the current one, else none.

    Args:
        workspace: Where to look.
        name: Name or folder, as the user gave it.
    """
    asked = name is not None or workspace.current("run") is not None
    return workspace.run(name) if asked else None


def look_up(
    workspace: Workspace,
    run: Path | None,
    *,
    backbone: str | None = None,
    manifest: str | None = None,
    needs_grid: bool = False,
) -> Found:
    """Find what a head reads: Adaptor, image set, manifest.

    Args:
        workspace: Where names are looked up.
        run: Folder of the run, None without one.
        backbone: Name or folder of an image set; None is the one the run's Adaptor reads, else the
            current one.
        manifest: Name or folder of a manifest; None is the current one.
        needs_grid: Refuse a set without a grid before anything else is read.

    Raises:
        CacheError: A grid is needed, and the set has none.
        WorkspaceError: A name is unknown, or nothing is current.
    """
    trained = load_adaptor(run) if run is not None else None
    reads = trained.image_fingerprint if trained is not None else None
    folder = feature_folder(workspace, "image", backbone, reads, run)
    if needs_grid:
        refuse_without_grid(read_spec(folder), folder)
    table = open_manifest(workspace.manifest(manifest))
    images = FeatureSet.open(folder)
    return Found(run, trained, table, images, results_folder(workspace, run))


def source_facts(
    manifest: Manifest, trained: TrainedAdaptor | None, **features: FeatureSet
) -> dict[str, JsonValue]:
    """What a result was made of, by content and without paths.

    Args:
        manifest: Labels, splits or texts.
        trained: The Adaptor, None without one.
        features: Feature sets by the name they get in the result.
    """
    return {
        "dataset": manifest.title,
        "manifest": {"name": manifest.name, "hash": manifest.meta.hash},
        "adaptor": None if trained is None else _adaptor_facts(trained),
        "features": {name: _feature_facts(one) for name, one in features.items()},
    }


def _feature_facts(features: FeatureSet) -> dict[str, JsonValue]:
    """How a set's rows were made, and which there are."""
    usable = [key for key, valid in zip(features.keys, features.valid, strict=True) if valid]
    return {
        "encoder": features.spec.encoder,
        "fingerprint": features.fingerprint,
        "rows": hash_keys(usable),
    }


def _adaptor_facts(trained: TrainedAdaptor) -> dict[str, JsonValue]:
    """Which Adaptor it is, by its weights."""
    return {
        "run": run_name(trained),
        "objective": trained.config.objective,
        "weights_sha256": trained.facts.weights_sha256,
    }


def adaptor_notes(trained: TrainedAdaptor | None, manifest: Manifest) -> list[str]:
    """Sentences about an Adaptor that a table must carry.

    Among them whether it was trained on the very manifest it is tested on: only then is it known
    that it has not seen the test patients.
    """
    if trained is None:
        return []
    notes = [
        f"Adaptor: run `{run_name(trained)}`, objective {trained.config.objective}.",
        *(one for one in trained.notes if one not in manifest.meta.notes),
    ]
    read = _trained_on(trained)
    if read != manifest.meta.hash:
        which = "another manifest than this one" if read else "a manifest that is not recorded here"
        notes.append(
            f"The Adaptor was trained on {which}: whether it has seen patients of this test split "
            "is not known."
        )
    return notes


def _trained_on(trained: TrainedAdaptor) -> str | None:
    """Hash of the manifest that the run read, None where it is not recorded."""
    path = run_folder(trained) / RUN_FILE
    facts = read_json(path) if path.is_file() else {}
    read = facts.get("identity", {}).get("inputs", {}).get("manifest")
    return str(read) if read is not None else None


def results_folder(workspace: Workspace, run: Path | None) -> Path:
    """Where a head writes: into the run's folder, or `results/` when the run lies elsewhere."""
    if run is not None and run.resolve().parent == workspace.runs.resolve():
        return run
    return workspace.root / "results" / (run.resolve().name if run is not None else "no-adaptor")
