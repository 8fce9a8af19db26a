"""What a feature set holds, and whether every byte of it is still what was written."""

import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache.cache.feature_set import FeatureSet, open_planned
from featcache.cache.folder import read_failures, read_quality
from featcache.cache.format import FeatureSetSpec, ShardPlan, read_plan, read_spec, shard_name
from featcache.cache.libhdf5 import ask_libhdf5, started_child
from featcache.cache.shard import Spread
from featcache.config import to_plain
from featcache.console import size, task
from featcache.errors import ShardError, WorkspaceError
from featcache.workspace import Workspace

_NEEDED = (None, "checksums", "offsets")  # without these no row can be compared


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a feature set.

    Attributes:
        shard: Number of the shard.
        array: Array it is about; `rest` for bytes between arrays, None for the file or its header.
        key: `key` or `text_id` of the damaged row, where it is about one.
        what: A sentence.
    """

    shard: int
    array: str | None
    key: str | None
    what: str


@dataclass
class VerifyReport:
    """What `verify` found in one feature set.

    Attributes:
        folder: The set's folder.
        shards: Shards that were looked at.
        rows: Rows whose tokens were compared with their checksum.
        problems: All that is wrong, in the order of the shards.
    """

    folder: Path
    shards: int
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def damaged_shards(self) -> list[int]:
        """Numbers of the shards that have to be made again."""
        return sorted({problem.shard for problem in self.problems})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "shards": self.shards,
            "rows": self.rows,
            "damaged_shards": self.damaged_shards,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def to_text(self) -> str:
        """A few lines for a person."""
        line = f"{self.folder}: {self.rows:,} rows in {self.shards} shards"
        if self.ok:
            return f"{line}, every checksum is right"
        shown = [f"  {_sentence(problem)}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            shown.append(f"  and {len(self.problems) - 20} more")
        bad = len(self.damaged_shards)
        fix = f"next: {_repair_command(self.folder)} makes exactly these again"
        return "\n".join([f"{line}, {bad} of them damaged:", *shown, fix])


def _sentence(problem: Problem) -> str:
    """A problem in one line."""
    place = [shard_name(problem.shard)]
    place += [f"`{problem.array}`"] if problem.array else []
    place += [f"row `{problem.key}`"] if problem.key else []
    return f"{', '.join(place)}: {problem.what}"


def _repair_command(folder: Path) -> str:
    """What a shell needs to make a set's damaged shards again."""
    if folder.parts[-3:-2] != ("features",):
        return f"featcache repair {shlex.quote(str(folder))}"
    root = folder.parents[2]
    where = "" if root == Path("featcache-data") else f" --root {shlex.quote(str(root))}"
    return f"featcache repair {shlex.quote('/'.join(folder.parts[-2:]))}{where}"


def verify_feature_set(
    folder: Path, *, deep: bool = False, only: Sequence[int] | None = None
) -> VerifyReport:
    """Compare every byte of a set with its checksums, then let libhdf5 open every shard.

    All cores read and compare, also where there is but one shard. libhdf5 comes last, in a child
    process with bounded time and memory, and only sees shards whose checksums are right.

    Args:
        folder: The set's folder.
        deep: Whether libhdf5 reads all arrays too, and not the structure alone.
        only: Numbers of the shards to look at; None for all.

    Raises:
        CacheError: The folder is no feature set, or its two JSON files are damaged.
    """
    spec, plans = read_spec(folder), read_plan(folder).shards
    plans = plans if only is None else [plans[number] for number in only]
    report = VerifyReport(folder, len(plans))
    sound: dict[Path, int] = {}
    rows, cores = sum(plan.num_rows for plan in plans), os.cpu_count() or 1
    with (
        started_child() as child,  # it starts while we read
        ThreadPoolExecutor(cores) as readers,
        ThreadPoolExecutor(cores) as leaders,  # each waits for the readers of one shard
        task(f"verify {spec.title}", rows, unit="rows") as progress,
    ):
        checked = leaders.map(lambda plan: check_shard(folder, spec, plan, readers.map), plans)
        for plan, found in zip(plans, checked, strict=True):
            report.problems += found
            unread = any(problem.array in _NEEDED for problem in found)
            report.rows += 0 if unread else plan.num_rows
            if not found:
                sound[folder / plan.file_name] = plan.number
            progress.update(report.rows)
        for path, what in ask_libhdf5(list(sound), deep=deep, child=child):
            report.problems.append(Problem(sound[path], None, None, what))
    report.problems.sort(key=lambda problem: problem.shard)
    return report


def check_shard(
    folder: Path, spec: FeatureSetSpec, plan: ShardPlan, spread: Spread
) -> list[Problem]:
    """All that is wrong with one shard, as far as its checksums tell.

    Args:
        folder: The set's folder.
        spec: How its rows were made.
        plan: The shard.
        spread: Compares ranges of rows; see `Shard.damage`.
    """
    try:
        shard = open_planned(folder / plan.file_name, spec, plan)
        found = list(shard.damage(spread))
    except ShardError as error:
        return [Problem(plan.number, None, None, error.what)]
    return [
        Problem(
            plan.number, item.array, None if item.row is None else plan.keys[item.row], item.what
        )
        for item in found
    ]


@dataclass(frozen=True)
class SetInfo:
    """What one feature set holds.

    Attributes:
        folder: The set's folder.
        spec: How its rows were made.
        manifest: Name of the manifest they come from.
        rows: Rows that were planned.
        stored_rows: Rows of complete shards.
        failed_rows: Rows among these that are quarantined.
        failures: Number of failed rows by reason, where it was noted.
        shards: Shards that were planned.
        complete_shards: Shards that are there.
        size_bytes: Bytes of these.
        quality: Figures that were learnt about the set.
    """

    folder: Path
    spec: FeatureSetSpec
    manifest: str
    rows: int
    stored_rows: int
    failed_rows: int
    failures: dict[str, int]
    shards: int
    complete_shards: int
    size_bytes: int
    quality: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {**self.__dict__, "folder": str(self.folder), "spec": to_plain(self.spec)}
        return {**values, "fingerprint": self.spec.fingerprint}

    def to_text(self) -> str:
        """A few lines for a person."""
        spec = self.spec
        tokens = f"up to {spec.max_tokens}" if spec.is_ragged else f"{spec.num_tokens}"
        if spec.grid is not None:
            tokens += f" = {spec.num_prefix_tokens} prefix + {spec.grid[0]} x {spec.grid[1]} grid"
        pooled = f", pooled {spec.pooled_dim}" if spec.pooled_dim else ""
        state = f"{self.complete_shards} of {self.shards} shards, {size(self.size_bytes)}"
        reasons = "".join(f"\n    {count:,} x {why}" for why, count in self.failures.items())
        return (
            f"{spec.title}  {spec.fingerprint[:12]}  from manifest {self.manifest}\n"
            f"  rows    {self.stored_rows:,} of {self.rows:,} in {state}\n"
            f"  tokens  {tokens}, width {spec.dim}, {spec.dtype}{pooled}\n"
            f"{_made_from(spec)}"
            f"  failed  {self.failed_rows:,}{reasons}"
        )


def _made_from(spec: FeatureSetSpec) -> str:
    """A line on the pictures' size and view, the layers and the pooling; empty for others' sets."""
    said, words = spec.preprocessing, []
    sides = said.get("image_size")
    if isinstance(sides, list):
        words.append(f"{' x '.join(map(str, sides))} pixels")
    if "view" in said:
        words.append(f"view {said['view']}")
    layers = said.get("layers")
    if isinstance(layers, list):
        words.append(f"layers {', '.join(map(str, layers))} side by side")
    if "pool_grid" in said:
        words.append(f"grid averaged over {said['pool_grid']} x {said['pool_grid']}")
    return f"  made    {', '.join(words)}\n" if words else ""


def read_info(folder: Path) -> SetInfo:
    """What a feature set holds; reads headers and `valid`, no tokens.

    Raises:
        CacheError: The folder is no feature set, or is damaged.
    """
    plan = read_plan(folder)
    features = FeatureSet.open(folder, allow_partial=True)
    failures: dict[str, int] = {}
    for row in read_failures(folder):
        failures[row["reason"]] = failures.get(row["reason"], 0) + 1
    return SetInfo(
        folder=folder,
        spec=features.spec,
        manifest=plan.manifest_name,
        rows=sum(shard.num_rows for shard in plan.shards),
        stored_rows=features.num_rows,
        failed_rows=int((~features.valid).sum()),
        failures=dict(sorted(failures.items(), key=lambda item: -item[1])),
        shards=len(plan.shards),
        complete_shards=features.num_shards,
        size_bytes=sum(shard.header.file_size for shard in features.shards),
        quality=read_quality(folder),
    )


def info(folder: Path) -> dict[str, Any]:
    """`read_info` as plain values."""
    return read_info(folder).to_json()


@dataclass(frozen=True)
class Several:
    """Answers about several feature sets, as a command prints them."""

    title: str
    parts: Sequence[SetInfo | VerifyReport]

    @property
    def ok(self) -> bool:
        """Whether no part has a problem."""
        return all(part.ok for part in self.parts if isinstance(part, VerifyReport))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": self.ok, "sets": [part.to_json() for part in self.parts]}

    def to_text(self) -> str:
        """One part below the other."""
        return "\n".join([self.title, *(part.to_text() for part in self.parts)])


def describe(workspace: Workspace, name: str | None = None) -> Several:
    """What a workspace's feature sets hold.

    Args:
        workspace: Where they are.
        name: `image/NAME`, `text/NAME`, or a folder; None for all.

    Raises:
        WorkspaceError: There is no such set, or none at all.
        CacheError: A set is damaged.
    """
    folders = set_folders(workspace, name)
    return Several(f"feature sets of {workspace.root}", [read_info(folder) for folder in folders])


def verify(workspace: Workspace, name: str | None = None, *, deep: bool = False) -> Several:
    """`verify_feature_set` for one or all sets of a workspace.

    Args:
        workspace: Where they are.
        name: `image/NAME`, `text/NAME`, or a folder; None for all.
        deep: Whether libhdf5 reads all arrays too.

    Raises:
        WorkspaceError: There is no such set, or none at all.
        CacheError: A folder is no feature set.
    """
    reports = [verify_feature_set(folder, deep=deep) for folder in set_folders(workspace, name)]
    return Several(f"checksums in {workspace.root}", reports)


def set_folders(workspace: Workspace, name: str | None) -> list[Path]:
    """Folders of the sets that a command is about.

    Args:
        workspace: Where they are.
        name: `image/NAME`, `text/NAME`, or a folder; None for all.

    Raises:
        WorkspaceError: There is no such set, or none at all.
    """
    if name is None:
        found = [workspace.folder("image") / one for one in workspace.names("image")]
        found += [workspace.folder("text") / one for one in workspace.names("text")]
        if not found:
            raise WorkspaceError(
                "there are no feature sets", where=workspace.root, fix="featcache extract"
            )
        return found
    modality, _, short = name.partition("/")
    if modality == "image" and short:
        return [workspace.feature_set("image", short)]
    if modality == "text" and short:
        return [workspace.feature_set("text", short)]
    if Path(name).is_dir():
        return [Path(name)]
    raise WorkspaceError(
        f"`{name}` is neither image/NAME, text/NAME nor a folder",
        where=workspace.root,
        fix="featcache info lists what there is",
    )
