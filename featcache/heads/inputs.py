"""What a head reads: which features and which Adaptor, and what must be said about them."""

from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import SPEC_FILE, hash_keys, read_spec
from featcache.cache.reader import FeatureSet
from featcache.config import read_json
from featcache.errors import StaleFeatureSetError
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace


def refuse_foreign(features: FeatureSet, trained_on: str, run: Path) -> None:
    """An Adaptor only reads features of the encoder it was trained on.

    Args:
        features: What it is to read.
        trained_on: Fingerprint that the Adaptor carries for this modality.
        run: Folder of the Adaptor's run, for the message.

    Raises:
        StaleFeatureSetError: The fingerprints differ.
    """
    if features.fingerprint != trained_on:
        raise StaleFeatureSetError(
            f"the Adaptor of run `{run.name}` was trained on {features.spec.modality} features "
            f"with fingerprint {trained_on}, those of `{features.spec.title}` have "
            f"{features.fingerprint}",
            where=features.folder,
            fix=f"featcache extract --run {run} makes the features that it reads",
        )


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


def run_folder(trained: TrainedAdaptor) -> Path:
    """The run's folder; an Adaptor that was copied out of its run stands for itself."""
    folder = trained.folder
    return folder.parent if folder.name == "adaptor" else folder


def run_name(trained: TrainedAdaptor) -> str:
    """Name of the run an Adaptor came from."""
    return run_folder(trained).resolve().name


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


def feature_folder(
    workspace: Workspace,
    modality: Literal["image", "text"],
    name: str | None,
    fingerprint: str | None,
    run: Path | None = None,
) -> Path:
    """The feature set a head reads.

    Args:
        workspace: Where to look.
        modality: Of the set.
        name: Name or folder, as the user gave it.
        fingerprint: What an Adaptor reads; without a name the current set is taken if it has it,
            else the first set that has it, else the one that the run read, wherever it lies, else
            the current one (to be refused by name).
        run: Folder of the Adaptor's run.
    """
    if name is not None or fingerprint is None:
        return workspace.feature_set(modality, name)
    current = workspace.current(modality)
    names = sorted(workspace.names(modality), key=lambda one: (one != current, one))
    for one in names:
        folder = workspace.folder(modality) / one
        if (folder / SPEC_FILE).is_file() and read_spec(folder).fingerprint == fingerprint:
            return folder
    read = _read_by(run, modality)
    if read is not None and read_spec(read).fingerprint == fingerprint:
        return read
    return workspace.feature_set(modality)


def _read_by(run: Path | None, modality: Literal["image", "text"]) -> Path | None:
    """The set that a run was trained on, where its `run.json` names it and it is still there."""
    if run is None or not (run / RUN_FILE).is_file():
        return None
    recorded = read_json(run / RUN_FILE).get(f"{modality}s")
    folder = Path(recorded["folder"]) if isinstance(recorded, dict) else None
    return folder if folder is not None and (folder / SPEC_FILE).is_file() else None


def results_folder(workspace: Workspace, run: Path | None) -> Path:
    """Where a head writes: into the run's folder, or `results/` when the run lies elsewhere."""
    if run is not None and run.resolve().parent == workspace.runs.resolve():
        return run
    return workspace.root / "results" / (run.resolve().name if run is not None else "no-adaptor")
