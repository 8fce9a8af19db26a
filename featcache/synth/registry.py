"""Synthetic data sets by name: each in its published layout, with its truth beside it.

A set is a module of this folder with `SWITCHES` and `write`, and its name in `DATASETS`:
`mimic-cxr-jpg` is `mimic_cxr_jpg.py`. Only the module that is asked for is loaded.
"""

import shutil
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast, get_args

from featcache.config import Config, canonical_json, read_json, write_json
from featcache.errors import UsageError, nearest
from featcache.manifest.tree import SYNTHETIC_MARK
from featcache.synth.tree import Summary
from featcache.workspace import Workspace

SizeName = Literal["tiny", "small", "large"]
GENERATOR_VERSION = 2  # raised whenever equal arguments would give other bytes
DATASETS = (
    "chexpert",
    "covidx",
    "mimic-cxr",
    "mimic-cxr-jpg",
    "nih",
    "openi",
    "rsna",
    "siim",
)


def _module(dataset: str) -> ModuleType:
    """The module that draws a data set: `SWITCHES` and `write`."""
    return import_module(f"featcache.synth.{dataset.replace('-', '_')}")


class _Recipe(Config):
    """Everything that the bytes of a tree depend on."""

    dataset: str
    size: SizeName
    seed: int
    switches: tuple[str, ...]
    generator_version: int = GENERATOR_VERSION

    def marker(self) -> str:
        """The text of the file that says what the tree is."""
        return (
            "This folder is synthetic: `featcache synth` drew and wrote it. No patient, picture\n"
            "or report in it is real, and results on it say nothing about real data.\n"
            f"{canonical_json(self.model_dump())}\n"
        )


class SynthResult(NamedTuple):
    """A synthetic tree on disk.

    Attributes:
        dataset: Which data set it imitates.
        path: Its root.
        images: Image files in it.
        studies: Studies, or listed images where a data set has no studies.
        truth: JSON file beside the root: findings, boxes and odd cases of every sample.
        is_new: False when an equal tree was there already and nothing was written.
    """

    dataset: str
    path: Path
    images: int
    studies: int
    truth: Path
    is_new: bool

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        values = self._asdict()
        return values | {"path": str(self.path), "truth": str(self.truth)}

    def to_text(self) -> str:
        """The result for a person, with the next command."""
        what = "wrote" if self.is_new else "kept"
        return (
            f"{what} {self.path}: {self.images:,} image files, synthetic {self.dataset}\n"
            f"truth: {self.truth}\n"
            f"next: featcache manifest {self.dataset} {self.path}"
        )


def synthesize(
    dataset: str,
    out: Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    switches: Collection[str] = (),
) -> SynthResult:
    """Write a synthetic data set; equal arguments give equal bytes.

    The tree appears under its name when it is complete. A tree that is already there is kept when
    it was made with equal arguments.

    Args:
        dataset: A name of `DATASETS`.
        out: The tree's root; a folder that does not exist yet, or is empty.
        size: `tiny` (seconds), `small` (a minute) or `large`.
        seed: Any whole number from 0.
        switches: Odd cases that are off unless named; see the `SWITCHES` of its module.

    Returns:
        Where it lies and how much it is.

    Raises:
        UsageError: An unknown name, or `out` holds something else.
    """
    if dataset not in DATASETS:
        raise UsageError(
            f"no synthetic data set is called `{dataset}`; {nearest(dataset, list(DATASETS))}",
            where="featcache synth",
            fix="featcache synth mimic-cxr-jpg --out DIR",
        )
    if size not in get_args(SizeName):
        hint = nearest(size, get_args(SizeName))
        raise UsageError(f"there is no size `{size}`; {hint}", where="--size", fix="--size tiny")
    if seed < 0:
        raise UsageError(f"a seed is a whole number from 0, got {seed}", where="--seed")
    known: tuple[str, ...] = _module(dataset).SWITCHES
    unknown = sorted(set(switches) - set(known))
    if unknown:
        hint = nearest(unknown[0], known)
        raise UsageError(f"synthetic {dataset} has no switch `{unknown[0]}`; {hint}")
    recipe = _Recipe(
        dataset=dataset,
        size=cast(SizeName, size),
        seed=seed,
        switches=tuple(sorted(set(switches))),
    )
    truth = out.with_name(f"{out.name}.truth.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _existing(out, truth, recipe)
    return _write(out, truth, recipe)


def stand_in(workspace: Workspace, dataset: str) -> Path:
    """A tiny synthetic tree inside a workspace, written when it is not there yet.

    Returns:
        Its root, `<workspace>/synthetic/<dataset>`.
    """
    out = workspace.root / "synthetic" / dataset
    return synthesize(dataset, out).path


def _existing(out: Path, truth: Path, recipe: _Recipe) -> SynthResult:
    """Keep a tree that was made with equal arguments."""
    mark = out / SYNTHETIC_MARK
    if mark.is_file() and truth.is_file() and mark.read_text() == recipe.marker():
        counts = read_json(truth)
        images, studies = counts["num_images"], counts["num_studies"]
        return SynthResult(recipe.dataset, out, images, studies, truth, False)
    what = "a synthetic tree that was made otherwise" if mark.is_file() else "something else"
    raise UsageError(
        f"the folder for the synthetic tree already holds {what}",
        where=out,
        fix="name another folder, or remove this one",
    )


def _write(out: Path, truth: Path, recipe: _Recipe) -> SynthResult:
    """Write into a folder beside the final one, then rename."""
    partial = out.with_name(f"{out.name}.partial")
    if (partial / SYNTHETIC_MARK).is_file():
        shutil.rmtree(partial)  # left by a run that was stopped
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"the folder cannot be made: {error.strerror}", where=partial) from None
    (partial / SYNTHETIC_MARK).write_text(recipe.marker())
    summary: Summary = _module(recipe.dataset).write(
        partial, size=recipe.size, seed=recipe.seed, switches=recipe.switches
    )
    counts = {"num_images": summary.images, "num_studies": summary.studies}
    write_json(truth, {**recipe.model_dump(mode="json"), **counts, **summary.truth})
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return SynthResult(recipe.dataset, out, summary.images, summary.studies, truth, True)
