"""The paper's tables with our results beside them, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.config import replace_file, to_plain, write_json
from featcache.console import note
from featcache.heads.paper import shipped_defects, shipped_paper
from featcache.heads.reproduction_page import page, plain_section
from featcache.heads.reproduction_results import (
    Measured,
    Section,
    TrainedRun,
    find_results,
    read_run,
)
from featcache.workspace import Workspace

SCHEMA = 1


@dataclass(frozen=True)
class Reproduction:
    """The whole page.

    Attributes:
        folder: Where it is written.
        run: Whose Adaptor it is about.
        sections: In the paper's order.
        notes: Sentences about what was left out.
    """

    folder: Path
    run: TrainedRun
    sections: tuple[Section, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the content of `reproduction.json` and the folder it stands in."""
        return {**self.values(), "folder": str(self.folder)}

    def values(self) -> dict[str, Any]:
        """Plain values, without any path of this machine."""
        run = self.run
        return {
            "schema": SCHEMA,
            "run": run.name,
            "weights_sha256": run.weights,
            "tables": [plain_section(one) for one in self.sections],
            "parameters": {
                "ours": {"trainable": run.trainable, "total": run.total, **run.parameters},
                "paper": to_plain(shipped_paper().parameters),
            },
            "defects": to_plain(shipped_defects())["groups"],
            "notes": [*run.notes, *self.notes],
        }

    def to_markdown(self) -> str:
        """The page."""
        return page(self.run, self.sections, self.notes)

    def to_text(self) -> str:
        """The page itself, then where it was written."""
        written = f"written: {self.folder / 'reproduction.md'}, reproduction.json"
        return f"{self.to_markdown()}\n{written}"


def reproduce(workspace: Workspace, *, run: str | None = None) -> Reproduction:
    """Put the results of a workspace beside the paper's tables; nothing is trained or measured.

    Writes `reproduction.md` and `reproduction.json` into `reproduction/` of the run's folder (of
    `results/`, when the run lies in another workspace).

    Args:
        workspace: Its own results and those that recipes made in folders below it are read.
        run: Name or folder of the run whose Adaptor was measured; None is the current one.

    Raises:
        WorkspaceError: There is no run, or it is not finished.
    """
    trained = read_run(workspace.run(run))
    note(f"reproduce: run {trained.name}; results of {workspace.root} and below")
    found, left_out = find_results(workspace, trained)
    sections = [
        Section(table, tuple(_shown([one for one in found if one.is_about(table)])))
        for table in shipped_paper().tables
    ]
    result = Reproduction(_out(workspace, trained), trained, tuple(sections), tuple(left_out))
    result.folder.mkdir(parents=True, exist_ok=True)
    replace_file(result.folder / "reproduction.md", result.to_markdown().encode())
    write_json(result.folder / "reproduction.json", result.values())
    return result


def _shown(found: Sequence[Measured]) -> Sequence[Measured]:
    """Results on real pictures; only where there are none, those on stand-ins."""
    return [one for one in found if not one.meta.synthetic] or found


def _out(workspace: Workspace, run: TrainedRun) -> Path:
    """Folder of the page; see `inputs.results_folder`."""
    folder = run.folder.resolve()
    is_own = folder.parent == workspace.runs.resolve()
    return (run.folder if is_own else workspace.root / "results" / folder.name) / "reproduction"
