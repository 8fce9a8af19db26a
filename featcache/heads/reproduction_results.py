"""Finished results of ours for the tables of the paper, as a workspace holds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.config import read_json, validate
from featcache.errors import WorkspaceError
from featcache.heads.paper import SHARES, PaperTable
from featcache.heads.table import Row, Table, table_from_plain
from featcache.manifest.table import ManifestMeta
from featcache.workspace import Workspace

# As in `adaptor.saved`, `adaptor.run`, `protocol`, `classify` and `segment_study`, which need
# torch: a page should not wait for it.
ADAPTOR_FACTS, RUN_FILE, RESULTS_FILE = "adaptor/adaptor.json", "run.json", "results.json"
RESULTS_SCHEMA = 1
FOLDERS = {"classify": "finetune", "segment": "segment"}
TRIVIAL = {
    "classify": ("majority class", "source only"),
    "segment": ("all empty", "mean training mask"),
}
RAW, ADAPTOR, DIFFERENCE = "raw backbone", "Adaptor", "Adaptor minus raw backbone"


@dataclass(frozen=True)
class TrainedRun:
    """The run whose Adaptor is compared with the paper's.

    Attributes:
        folder: Of the run.
        weights: SHA-256 of its weights.
        parameters: Trainable ones, by part.
        encoders: Parameters of both frozen encoders; None where the run does not tell.
        image_encoder: Its short name.
        text_encoder: Its short name.
        objective: It was trained with.
        notes: Sentences that every table about it must carry.
    """

    folder: Path
    weights: str
    parameters: Mapping[str, int]
    encoders: int | None
    image_encoder: str
    text_encoder: str
    objective: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.resolve().name

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return sum(self.parameters.values())

    @property
    def total(self) -> int | None:
        """All parameters, frozen encoders included; None where the run does not tell."""
        return None if self.encoders is None else self.encoders + self.trainable


@dataclass(frozen=True)
class Measured:
    """A finished result of ours.

    Attributes:
        folder: Where it stands, relative to the workspace.
        head: `classify` or `segment`.
        config: What it was asked.
        meta: Of its manifest.
        table: As it was written.
    """

    folder: str
    head: str
    config: Mapping[str, Any]
    meta: ManifestMeta
    table: Table

    @property
    def split(self) -> str:
        """How the manifest was split, in words."""
        return self.meta.policies.get("split", "not recorded")

    @property
    def methods(self) -> list[str]:
        """The rows that are shown: trivial ones, then ours."""
        there = {row.method for row in self.table.rows}
        return [one for one in (*TRIVIAL[self.head], RAW, ADAPTOR, DIFFERENCE) if one in there]

    def row(self, share: float, method: str) -> Row | None:
        """The line of a method, None where that share was not asked for.

        Args:
            share: Percent of the labels.
            method: One of `methods`.
        """
        for row in self.table.rows:
            if row.method == method and row.details.get("percent") == share:
                return row
        return None

    def is_about(self, table: PaperTable) -> bool:
        """Whether this is our result for a table of the paper.

        Args:
            table: Of the paper.
        """
        if (self.head, self.meta.dataset) != (table.head, table.dataset):
            return False
        asks_more = self.config.get("findings") or self.config.get("shots")
        return not asks_more and table.label in (None, self.config.get("label"))

    @property
    def variant(self) -> str:
        """Which head it is, in words."""
        if self.head == "segment":
            return f"decoder `{self.config.get('decoder')}`"
        return f"head `{self.config.get('head')}`"


@dataclass(frozen=True)
class Section:
    """One table of the paper with what we have for it.

    Attributes:
        paper: What the paper reports.
        ours: Our results; empty when nothing was made yet.
    """

    paper: PaperTable
    ours: tuple[Measured, ...]


def read_run(folder: Path) -> TrainedRun:
    """What a run says of its Adaptor, without loading it.

    Raises:
        WorkspaceError: The run has no Adaptor yet, or its file is not what it should be.
    """
    path = folder / ADAPTOR_FACTS
    if not path.is_file():
        raise WorkspaceError(
            "the run has no trained Adaptor", where=folder, fix="featcache train-adaptor"
        )
    facts = read_json(path)
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    counted = run.get("parameters") or {}
    frozen = [counted.get(f"{kind}_encoder") for kind in ("image", "text")]
    try:
        return TrainedRun(
            folder=folder,
            weights=facts["weights_sha256"],
            parameters={str(name): int(count) for name, count in facts["parameters"].items()},
            encoders=None if None in frozen else sum(int(one) for one in frozen if one),
            image_encoder=facts["image"]["encoder"],
            text_encoder=facts["text"]["encoder"],
            objective=facts["config"]["objective"],
            notes=tuple(facts["notes"]),
        )
    except (KeyError, TypeError, ValueError):
        raise WorkspaceError(
            "the file does not describe an Adaptor", where=path, fix="train the run again"
        ) from None


def find_results(workspace: Workspace, run: TrainedRun) -> tuple[list[Measured], list[str]]:
    """Finished results of a run, in the workspace and in those that recipes made below it.

    Args:
        workspace: Where to look; of other folders only those directly below it that are workspaces.
        run: Results of other Adaptors are left out.

    Returns:
        The results by folder, and sentences about what was left out.
    """
    found: dict[str, Measured] = {}  # by request: the same one is the same result anywhere
    others, stale = 0, 0
    own = {place: _manifests(place) for place in _workspaces(workspace.root)}
    everywhere = {hash_: meta for some in own.values() for hash_, meta in some.items()}
    for place, some in own.items():
        manifests = everywhere | some  # a head may have read a manifest of another workspace
        for path in _result_files(place):
            values = read_json(path)
            if values.get("schema") != RESULTS_SCHEMA or values.get("split") != "test":
                continue
            if (values.get("adaptor") or {}).get("weights_sha256") != run.weights:
                others += 1
                continue
            meta = manifests.get(values["manifest"]["hash"])
            if meta is None:
                stale += 1
                continue
            folder = path.parent.relative_to(workspace.root).as_posix()
            table = table_from_plain(values)
            measured = Measured(folder, values["head"], values["config"], meta, table)
            found.setdefault(values["request"], measured)
    left_out = []
    if others:
        left_out.append(f"{others} result(s) of other Adaptors are not shown.")
    if stale:
        left_out.append(f"{stale} result(s) are not shown: their manifest is gone, or made anew.")
    return list(found.values()), left_out


def _workspaces(root: Path) -> Iterator[Path]:
    """The workspace, then those directly below it."""
    yield root
    below = (path.parent for path in root.glob("*/workspace.json"))
    yield from sorted(below)


def _manifests(root: Path) -> dict[str, ManifestMeta]:
    """What the manifests of a workspace say of themselves, by their hash."""
    files = sorted((root / "manifests").glob("*/manifest.json"))
    found = [validate(ManifestMeta, read_json(file), where=file) for file in files]
    return {one.hash: one for one in found}


def _result_files(root: Path) -> Iterator[Path]:
    """Results of both heads, those of the workspace's own runs and those of others' runs."""
    for head in FOLDERS.values():
        for runs in ("runs", "results"):
            yield from sorted((root / runs).glob(f"*/{head}/*/{RESULTS_FILE}"))


def missing_shares(measured: Measured) -> list[float]:
    """Shares of the paper that a result was not asked for.

    Args:
        measured: Our result.
    """
    return [share for share in SHARES if measured.row(share, ADAPTOR) is None]
