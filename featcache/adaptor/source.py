"""Where a trained Adaptor came from, and the features that it may read."""

from pathlib import Path
from typing import Literal

from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import SPEC_FILE, read_spec
from featcache.cache.reader import FeatureSet
from featcache.config import read_json
from featcache.errors import StaleFeatureSetError
from featcache.workspace import Workspace

BEST = "best"
OF_A_RUN = ("adaptor", BEST)
"""Folders of a run that hold an Adaptor."""


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


def run_folder(trained: TrainedAdaptor) -> Path:
    """The run's folder; an Adaptor that was copied out of its run stands for itself."""
    folder = trained.folder
    return folder.parent if folder.name in OF_A_RUN else folder


def run_name(trained: TrainedAdaptor) -> str:
    """Name of the run an Adaptor came from."""
    return run_folder(trained).resolve().name


def feature_folder(
    workspace: Workspace,
    modality: Literal["image", "text"],
    name: str | None,
    fingerprint: str | None,
    run: Path | None = None,
) -> Path:
    """The feature set that is read.

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
