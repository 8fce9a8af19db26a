"""Finished runs side by side, from what each measured on the validation split while training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.config import canonical_json, read_json
from featcache.errors import TrainingError, WorkspaceError
from featcache.workspace import Workspace

RUN_FILE = "run.json"  # as in `run`, which needs torch: a table should not wait for it
FIGURES = {
    "mrr": "MRR %",
    "image_to_text_recall_at_5": "image to text R@5 %",
    "text_to_image_recall_at_5": "text to image R@5 %",
}
CHANCES = ("image_to_text_chance_recall_at_5", "text_to_image_chance_recall_at_5")
NOT_COMPARABLE = (
    "These runs were not measured on the same pairs of one manifest: their figures cannot be "
    "compared."
)


@dataclass(frozen=True)
class ComparedRun:
    """One finished run.

    Attributes:
        name: Of its folder.
        images: Name of the image set it read.
        texts: Name of the text set it read.
        manifest: Title of the manifest.
        measured_on: What decides whether figures may be compared: the manifest's hash, and how
            many images and texts of the split `validate` were candidates.
        pairs: Training pairs.
        settings: All settings that shape the result, by their dotted names.
        figures: Of the last epoch, by the names in `FIGURES` and `CHANCES`; None where undefined.
        notes: Sentences that every table about it must carry.
    """

    name: str
    images: str
    texts: str
    manifest: str
    measured_on: tuple[str, int, int]
    pairs: int
    settings: dict[str, str]
    figures: dict[str, float | None]
    notes: tuple[str, ...]

    def sort_key(self) -> tuple[float, str]:
        """The best first, the undefined last."""
        mrr = self.figures["mrr"]
        return (1.0 if mrr is None else -mrr, self.name)


@dataclass(frozen=True)
class Comparison:
    """Runs in one table.

    Attributes:
        runs: The best first.
        unfinished: Names of runs that are not finished and stand in no row.
    """

    runs: tuple[ComparedRun, ...]
    unfinished: tuple[str, ...]

    @property
    def differing(self) -> list[str]:
        """Settings in which the runs differ."""
        names = sorted({name for run in self.runs for name in run.settings})
        return [n for n in names if len({run.settings.get(n) for run in self.runs}) > 1]

    @property
    def notes(self) -> list[str]:
        """What must be said with the table."""
        notes = [self._basis()]
        notes += dict.fromkeys(note for run in self.runs for note in run.notes)
        if self.unfinished:
            notes.append(f"Not finished: {', '.join(self.unfinished)}.")
        return notes

    @property
    def is_fair(self) -> bool:
        """Whether all runs were measured on the same pairs."""
        return len({run.measured_on for run in self.runs}) == 1

    def _basis(self) -> str:
        """What the figures were measured on."""
        if not self.is_fair:
            return NOT_COMPARABLE
        _, images, texts = self.runs[0].measured_on
        if not images:
            return "The manifest has no pairs in the split validate: nothing was measured."
        chances = (self.runs[0].figures[name] for name in CHANCES)
        return (
            f"{images:,} images and {texts:,} texts of the split validate, after the last epoch; "
            f"R@5 of chance {' and '.join(map(_percent, chances))} %."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "runs": [
                {
                    "run": run.name,
                    "images": run.images,
                    "texts": run.texts,
                    "manifest": run.manifest,
                    "candidates": {"images": run.measured_on[1], "texts": run.measured_on[2]},
                    "pairs": run.pairs,
                    "settings": {name: run.settings.get(name) for name in self.differing},
                    "figures": dict(run.figures),
                }
                for run in self.runs
            ],
            "comparable": self.is_fair,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """The table in Markdown, its notes above it, and what comes next."""
        shown = self.differing
        head = ["image set", "text set", *shown, *FIGURES.values(), "run"]
        lines = [head]
        for run in self.runs:
            figures = (_percent(run.figures.get(name)) for name in FIGURES)
            own = (run.settings.get(name, "-") for name in shown)
            lines.append([run.images, run.texts, *own, *figures, run.name])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        first = len(head) - 1 - len(FIGURES)  # numbers stand to the right
        table = []
        for line in lines:
            cells = [
                cell.rjust(width) if first <= at < len(head) - 1 else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            table.append(f"| {' | '.join(cells)} |")
        table.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
        manifests = ", ".join(dict.fromkeys(run.manifest for run in self.runs))
        return "\n".join(
            [
                f"{len(self.runs)} runs on manifest {manifests}",
                *(f"- {note}" for note in self.notes),
                "",
                *table,
                "",
                "next: featcache retrieve --run NAME measures a run on the split test",
            ]
        )


def compare_runs(workspace: Workspace, names: Sequence[str] = ()) -> Comparison:
    """Put finished runs side by side, without training or measuring anything.

    Args:
        workspace: Where names are looked up.
        names: Runs by name or folder; none: all of the workspace.

    Raises:
        WorkspaceError: A run is not there, or none is finished.
        TrainingError: A `run.json` is not what it should be.
    """
    folders = [workspace.run(name) for name in names or workspace.names("run")]
    facts = {folder: _facts(folder) for folder in dict.fromkeys(folders)}
    runs = [_run(folder, one) for folder, one in facts.items() if one["status"] == "finished"]
    unfinished = [folder.name for folder, one in facts.items() if one["status"] != "finished"]
    if not runs:
        started = f"; {len(unfinished)} were started" if unfinished else ""
        raise WorkspaceError(
            f"there is no finished run to compare{started}",
            where=workspace.runs,
            fix="featcache train-adaptor",
        )
    return Comparison(tuple(sorted(runs, key=ComparedRun.sort_key)), tuple(unfinished))


def _facts(folder: Path) -> dict[str, Any]:
    """What `run.json` says; `status` is there in any case."""
    path = folder / RUN_FILE
    if not path.is_file():
        return {"status": "empty"}
    facts = read_json(path)
    if not isinstance(facts, dict) or "status" not in facts:
        raise TrainingError(
            "the file does not describe a run", where=path, fix="name the runs to compare"
        )
    return facts


def _run(folder: Path, facts: Mapping[str, Any]) -> ComparedRun:
    """A row of the table."""
    try:
        identity, measured = facts["identity"], facts["validation"] or {}
        manifest = facts["manifest"]
        drawn = " (synthetic stand-in)" if manifest["synthetic"] else ""
        return ComparedRun(
            name=folder.resolve().name,
            images=Path(facts["images"]["folder"]).name,
            texts=Path(facts["texts"]["folder"]).name,
            manifest=manifest["name"] + drawn,
            measured_on=(
                identity["inputs"]["manifest"],
                int(measured.get("images") or 0),
                int(measured.get("texts") or 0),
            ),
            pairs=int(facts["pairs"]["train"]),
            settings=_flat(identity["config"]),
            figures={name: measured.get(name) for name in (*FIGURES, *CHANCES)},
            notes=tuple(facts["notes"]),
        )
    except (KeyError, TypeError, ValueError):
        raise TrainingError(
            "the file lacks what this version writes into it",
            where=folder / RUN_FILE,
            fix="train the run again, or name the runs to compare",
        ) from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names, as words."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else canonical_json(value)
    return flat


def _percent(share: float | None) -> str:
    """A share as a cell."""
    return "undefined" if share is None else f"{100 * share:.1f}"
