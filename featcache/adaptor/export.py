"""A trained Adaptor, or what it makes of a feature set, as files that others can read."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from featcache.adaptor.card import data_title, model_card
from featcache.adaptor.graph import IMAGE_GRAPH, TEXT_GRAPH, require_onnx, write_graphs
from featcache.adaptor.run import RUN_FILE
from featcache.adaptor.saved import EXPORTED_FACTS, WEIGHTS, TrainedAdaptor, load_adaptor
from featcache.adaptor.source import feature_folder, refuse_foreign, run_folder, run_name
from featcache.adaptor.vector_files import WRITERS, write_vectors
from featcache.cache.reader import FeatureSet
from featcache.config import explained_refusals, read_json, replace_file, to_plain, write_json
from featcache.console import note, size
from featcache.device import resolve_device
from featcache.errors import UsageError, nearest
from featcache.partial import partial_path, remove_dead_partials
from featcache.workspace import Workspace

CARD = "README.md"
WRITTEN = {
    "safetensors": (WEIGHTS,),
    "onnx": (IMAGE_GRAPH, TEXT_GRAPH),
    "parquet": ("images.parquet", "texts.parquet"),
    "numpy": ("images.npy", "images_keys.npy", "texts.npy", "texts_keys.npy"),
}
"""Files of each kind of export; every one has `README.md` and `config.json` beside them."""


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        folder: Where it lies.
        to: Kind of export.
        run: Name of the run.
        weights_sha256: Of the Adaptor that was exported.
        files: Bytes of each file, by name.
        replaced: Whether an earlier export lay there.
        facts: What else there is to say: `vectors` by modality, `errors` of graphs.
    """

    folder: Path
    to: str
    run: str
    weights_sha256: str
    files: dict[str, int]
    replaced: bool
    facts: dict[str, JsonValue]

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "to": self.to,
            "run": self.run,
            "weights_sha256": self.weights_sha256,
            "files": dict(self.files),
            "replaced": self.replaced,
            **self.facts,
        }

    def to_text(self) -> str:
        """What was written, and where to read on."""
        did = "replaced" if self.replaced else "wrote"
        return (
            f"{did} {self.folder}   run {self.run} to {self.to}: {len(self.files)} files, "
            f"{size(sum(self.files.values()))}\n"
            f"next: {self.folder / CARD} says what it is and how it is loaded"
        )


def export(
    workspace: Workspace,
    out: Path,
    *,
    to: str = "safetensors",
    run: str | None = None,
    backbone: str | None = None,
    text_encoder: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> ExportResult:
    """Write a run's Adaptor, or its vectors of whole feature sets, with a card.

    All is written beside `out` and renamed at the end: it is there as a whole or not at all.

    Args:
        workspace: Where runs and feature sets are found.
        out: Folder to make.
        to: `safetensors` or `onnx`, the Adaptor itself; `parquet` or `numpy`, its vectors.
        run: Run by name or folder (also the folder `best` in it); None: the current one.
        backbone: Image set whose vectors are written; None: the one that the Adaptor reads.
        text_encoder: The same of texts.
        overwrite: Replace an earlier export in `out`; never anything else.
        device: Where vectors are computed.

    Raises:
        UsageError: There is no such kind, `out` is taken, or a package is missing.
        WorkspaceError: The run or a set is not there.
        TrainingError: The Adaptor is damaged, or a graph differs from it.
        StaleFeatureSetError: The Adaptor was trained on other features.
        CacheError: No row of a set could be read, or the disk is full.
    """
    if to not in WRITTEN:
        raise UsageError(
            f"unknown kind of export `{to}`; {nearest(to, list(WRITTEN))}",
            where="--to",
            fix="--to " + ", ".join(WRITTEN),
        )
    replaces = _check_place(out, overwrite)
    if to == "onnx":
        require_onnx()
    with_vectors = to in WRITERS
    device = resolve_device(device) if with_vectors else "cpu"
    trained = load_adaptor(workspace.run(run), device)
    sets = _feature_sets(workspace, trained, backbone, text_encoder) if with_vectors else []
    recorded = _recorded(trained)
    about = _about(trained, recorded)
    with _beside(out) as folder:
        if to == "safetensors":
            facts, outcome = _write_weights(folder, trained)
        elif to == "onnx":
            facts, outcome = _write_graphs(folder, trained, about)
        else:
            facts, outcome = _write_vectors(folder, trained, sets, to, device, about)
        write_json(folder / EXPORTED_FACTS, to_plain(trained.facts))
        card = model_card(run_name(trained), trained, recorded, to, outcome)
        replace_file(folder / CARD, card.encode())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return ExportResult(
        out, to, run_name(trained), trained.facts.weights_sha256, files, replaces, facts
    )


def _write_weights(folder: Path, trained: TrainedAdaptor) -> tuple[dict[str, JsonValue], list[str]]:
    """The very bytes of the run: their hash is known to be right."""
    replace_file(folder / WEIGHTS, (trained.folder / WEIGHTS).read_bytes())
    return {}, []


def _write_graphs(
    folder: Path, trained: TrainedAdaptor, about: Mapping[str, str]
) -> tuple[dict[str, JsonValue], list[str]]:
    errors = write_graphs(folder, trained, about)
    if errors is None:
        note("onnxruntime is not installed: the graphs were not checked against torch")
        return {"errors": None}, ["The graphs were not checked against torch."]
    worst = max(errors.values())
    sentence = f"Checked with onnxruntime against torch: they differ by {worst:.1g} at most."
    return {"errors": dict(errors)}, [sentence]


def _write_vectors(
    folder: Path,
    trained: TrainedAdaptor,
    sets: list[FeatureSet],
    to: str,
    device: str,
    about: Mapping[str, str],
) -> tuple[dict[str, JsonValue], list[str]]:
    counts: dict[str, JsonValue] = {}
    sentences = []
    for features in sets:
        own = {**about, "features": features.spec.title, "fingerprint": features.fingerprint}
        num_rows, dim = write_vectors(folder, features, trained, to=to, device=device, about=own)
        left = features.num_rows - num_rows
        name = f"{features.spec.modality}s"
        counts[name] = num_rows
        out = f"; {left:,} that could not be read are left out" if left else ""
        sentences.append(f"{name}: {num_rows:,} vectors of width {dim}{out}.")
    return {"vectors": counts}, ["\n".join(f"- {one}" for one in sentences)]


def _feature_sets(
    workspace: Workspace, trained: TrainedAdaptor, backbone: str | None, text_encoder: str | None
) -> list[FeatureSet]:
    """The image set and the text set, known to be what the Adaptor reads."""
    run, found = run_folder(trained), []
    asked: tuple[tuple[Literal["image", "text"], str | None, str], ...] = (
        ("image", backbone, trained.image_fingerprint),
        ("text", text_encoder, trained.text_fingerprint),
    )
    for modality, name, fingerprint in asked:
        features = FeatureSet.open(feature_folder(workspace, modality, name, fingerprint, run))
        refuse_foreign(features, fingerprint, run)
        found.append(features)
    return found


def _recorded(trained: TrainedAdaptor) -> dict[str, Any]:
    """Content of the run's `run.json`; empty for an Adaptor that was copied out of its run."""
    path = run_folder(trained) / RUN_FILE
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _about(trained: TrainedAdaptor, recorded: Mapping[str, Any]) -> dict[str, str]:
    """What graphs and tables say of themselves."""
    return {
        "run": run_name(trained),
        "objective": trained.config.objective,
        "weights_sha256": trained.facts.weights_sha256,
        "image_fingerprint": trained.image_fingerprint,
        "text_fingerprint": trained.text_fingerprint,
        "data": data_title(recorded),
        "made_with": trained.facts.made_with,
    }


def _check_place(out: Path, overwrite: bool) -> bool:
    """See that the folder is free.

    Returns:
        Whether an earlier export lies there, which may be replaced.

    Raises:
        UsageError: Something lies there that may not.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError("a folder is needed, this is none", where=out, fix="--out NEW_FOLDER")
    have = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not have:
        return False
    known = {CARD, EXPORTED_FACTS, *(name for names in WRITTEN.values() for name in names)}
    if not (overwrite and have <= known):
        others = sorted(have - known)
        what = f"things that no export wrote, e.g. `{others[0]}`" if others else "an export"
        raise UsageError(
            f"the folder holds {what}; nothing is overwritten",
            where=out,
            fix="--out NEW_FOLDER" + ("" if others else ", or --overwrite"),
        )
    return True


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all went well, and vanishes when not."""
    out = out.absolute()
    with explained_refusals(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_partials(out.parent, out.name)
    partial = partial_path(out)
    try:
        with explained_refusals(out):
            partial.mkdir()
        yield partial
        with explained_refusals(out):
            _take_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(folder: Path, out: Path) -> None:
    """Rename a folder; what lay there is removed when the new one is in its place."""
    old = partial_path(out.with_name(f"{out.name}.old"))
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
