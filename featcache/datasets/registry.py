"""Data sets by name: `mimic-cxr-jpg` is the module `mimic_cxr_jpg.py` in this folder."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from featcache.config import load_config, read_json
from featcache.errors import CacheError, UsageError, nearest
from featcache.manifest.audit import CheckedManifest, audit, write_findings
from featcache.manifest.decoded import Decoded
from featcache.manifest.table import Manifest
from featcache.manifest.units import TextOptions
from featcache.workspace import Workspace


def dataset_names() -> list[str]:
    """Every data set with a reader, sorted."""
    here = Path(__file__).parent
    modules = {path.stem for path in here.glob("*.py")} - {"__init__", "registry"}
    return sorted(name.replace("_", "-") for name in modules)


def dataset_module(dataset: str) -> ModuleType:
    """The reader's module: `DESCRIPTION`, `Options` and `read`.

    Raises:
        UsageError: There is no such data set; the nearest names are offered.
    """
    known = dataset_names()
    if dataset not in known:
        raise UsageError(
            f"unknown data set `{dataset}`; {nearest(dataset, known)}",
            where="featcache manifest",
            fix="known data sets: " + ", ".join(known),
        )
    return import_module(f"featcache.datasets.{dataset.replace('-', '_')}")


def make_manifest(
    workspace: Workspace,
    dataset: str,
    folder: Path,
    *,
    name: str | None = None,
    text_unit: str | None = None,
    overrides: Sequence[str] = (),
) -> Manifest:
    """Read a data set's folder into a checked manifest and make it the current one.

    Args:
        workspace: Where the manifest goes.
        dataset: A name of `dataset_names()`.
        folder: The data set as it lies on disk (for `spreadsheet`: the table).
        name: The manifest's name; the data set's by default.
        text_unit: `report` or `sentence`; None is what the reader's `Options` say.
        overrides: `KEY=VALUE` settings of the reader's `Options`.

    Raises:
        UsageError: Unknown data set or option.
        ManifestError: The folder is not what it should be.
    """
    module = dataset_module(dataset)
    if text_unit is not None:
        if not issubclass(module.Options, TextOptions):
            raise UsageError(
                f"{dataset} has no reports, so its texts have no unit",
                where="--text-unit",
                fix="leave --text-unit out",
            )
        overrides = [f"text_unit={text_unit}", *overrides]
    options = load_config(module.Options, overrides=overrides)
    if not folder.exists():
        raise UsageError("there is no such file or folder", where=folder, fix="check the path")
    name = name or dataset
    manifest: Manifest = module.read(folder, workspace.manifests / name, options=options)
    workspace.use(manifest=name)
    return manifest


def check_manifest(
    workspace: Workspace,
    manifest: Manifest,
    *,
    decoded: Decoded | None = None,
    show_ids: bool = False,
) -> CheckedManifest:
    """Make the checks that do not stop a manifest, and keep what they found in `checks.json`.

    Args:
        workspace: Its other data sets are looked through for the same images.
        manifest: Of this workspace.
        decoded: Its pictures after a full decode (`encoders.look`), for the checks that need one.
        show_ids: Whether the result names a few keys or paths for each check.
    """
    others = {
        path.parent.name: path.parent
        for path in sorted(workspace.manifests.glob("*/manifest.json"))
        if _dataset_of(path) != manifest.meta.dataset
    }
    checked = CheckedManifest(manifest, audit(manifest, others, decoded), show_ids)
    write_findings(checked)
    return checked


def _dataset_of(path: Path) -> str | None:
    """Which reader made a manifest; None for a damaged one, which a check names later."""
    try:
        values = read_json(path)
    except CacheError:
        return None
    return str(values.get("dataset")) if isinstance(values, dict) else None
