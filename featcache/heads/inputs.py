"""What a head reads: which features and which Adaptor, and what must be said about them."""

from pathlib import Path

from pydantic import JsonValue

from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import TrainedAdaptor
from featcache.adaptor.source import feature_folder, refuse_foreign, run_folder, run_name
from featcache.cache.format import hash_keys
from featcache.cache.reader import FeatureSet
from featcache.config import read_json
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

__all__ = [
    "adaptor_notes",
    "feature_folder",
    "refuse_foreign",
    "results_folder",
    "run_folder",
    "run_name",
    "source_facts",
]


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
