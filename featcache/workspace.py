"""Where things lie, and which of them are current.

    <root>/workspace.json        the current manifest, image set, text set and run, by name
    <root>/manifests/<name>/     images.parquet, texts.parquet, manifest.json
    <root>/features/image/<encoder>/, <root>/features/text/<encoder>/
    <root>/runs/<name>/          config.yaml, run.json, metrics.jsonl, adaptor/, results

The root is `--root`, else the environment variable `FEATCACHE_ROOT`, else `featcache-data` in the
current folder. Nothing is ever chosen by its age.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from featcache.config import read_json, write_json
from featcache.errors import UsageError, WorkspaceError, nearest

Kind = Literal["manifest", "image", "text", "run"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WORDS: dict[Kind, str] = {
    "manifest": "manifest",
    "image": "image feature set",
    "text": "text feature set",
    "run": "run",
}
_MAKE: dict[Kind, str] = {
    "manifest": "featcache demo, or featcache manifest spreadsheet TABLE.csv",
    "image": "featcache extract --backbone NAME",
    "text": "featcache extract --text-encoder NAME",
    "run": "featcache train-adaptor",
}


@dataclass(frozen=True)
class Workspace:
    """One folder with everything a project made.

    Attributes:
        root: The folder; it need not exist yet.
    """

    root: Path

    @classmethod
    def open(cls, root: Path | None = None) -> "Workspace":
        """Find the workspace: `root`, else `FEATCACHE_ROOT`, else `featcache-data` here."""
        if root is None:
            root = Path(os.environ.get("FEATCACHE_ROOT") or "featcache-data")
        if root.exists() and not root.is_dir():
            raise UsageError("the workspace is a file, a folder is needed", where=root)
        return cls(root)

    @property
    def manifests(self) -> Path:
        """Folder of manifests."""
        return self.root / "manifests"

    @property
    def features(self) -> Path:
        """Folder of feature sets, split into `image` and `text`."""
        return self.root / "features"

    @property
    def runs(self) -> Path:
        """Folder of runs."""
        return self.root / "runs"

    def folder(self, kind: Kind) -> Path:
        """Where things of one kind lie."""
        if kind == "manifest":
            return self.manifests
        return self.runs if kind == "run" else self.features / kind

    def names(self, kind: Kind) -> list[str]:
        """What there is of one kind, sorted."""
        folder = self.folder(kind)
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def current(self, kind: Kind) -> str | None:
        """Name of the current manifest, image set, text set or run; None when there is none."""
        path = self.root / "workspace.json"
        name = read_json(path).get(kind) if path.is_file() else None
        return str(name) if name is not None else None

    def use(self, **names: str) -> None:
        """Make things current, e.g. `use(image="vit-b")`.

        Raises:
            WorkspaceError: There is nothing of that name.
        """
        path = self.root / "workspace.json"
        state: dict[str, str] = read_json(path) if path.is_file() else {}
        for kind in KINDS:
            if kind in names:
                self._require(kind, names[kind])
                state[kind] = names[kind]
        write_json(path, state)

    def _require(self, kind: Kind, name: str) -> Path:
        folder = self.folder(kind) / name
        if not folder.is_dir():
            raise WorkspaceError(
                f"there is no {_WORDS[kind]} `{name}`; {nearest(name, self.names(kind))}",
                where=self.folder(kind),
                fix=_MAKE[kind],
            )
        return folder

    def resolve(self, kind: Kind, name: str | None = None) -> Path:
        """The folder of a thing: by path, by name, or the current one.

        Args:
            kind: `manifest`, `image`, `text` or `run`.
            name: A folder's path (it holds a separator, or exists), a name, or None: the current.

        Raises:
            WorkspaceError: Nothing is current, or the name is not there.
        """
        if name is not None:
            path = Path(name)
            if (os.sep in name or path.is_absolute()) and path.is_dir():
                return path
            return self._require(kind, name)
        current = self.current(kind)
        if current is None:
            known = self.names(kind)
            what = f"no {_WORDS[kind]} is current"
            if known:
                raise WorkspaceError(
                    f"{what}, and there are several: {', '.join(known)}"
                    if len(known) > 1
                    else f"{what}; there is one: {known[0]}",
                    where=self.root,
                    fix=f"featcache use --{kind} {known[0]}",
                )
            raise WorkspaceError(f"{what}: there is none", where=self.root, fix=_MAKE[kind])
        return self._require(kind, current)

    def manifest(self, name: str | None = None) -> Path:
        """Folder of a manifest; see `resolve`."""
        return self.resolve("manifest", name)

    def feature_set(self, modality: Literal["image", "text"], name: str | None = None) -> Path:
        """Folder of a feature set; see `resolve`."""
        return self.resolve(modality, name)

    def run(self, name: str | None = None) -> Path:
        """Folder of a run; see `resolve`. A workspace's root stands for its current run."""
        if name is not None and (Path(name) / "workspace.json").is_file():
            return Workspace(Path(name)).resolve("run")
        return self.resolve("run", name)
