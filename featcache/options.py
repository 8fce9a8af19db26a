"""What commands share: options with their names and help, the workspace, the output."""

from pathlib import Path
from typing import Annotated, Any

import typer

Root = Annotated[
    Path | None,
    typer.Option(help="Workspace folder; else FEATCACHE_ROOT, else featcache-data.", metavar="DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No notes, no progress.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of this command.", metavar="KEY=VALUE")
]
ConfigFile = Annotated[Path | None, typer.Option(help="A YAML file of settings.", metavar="FILE")]
ManifestName = Annotated[
    str | None, typer.Option(help="Manifest by name or folder; else the current one.")
]
RunName = Annotated[
    str | None,
    typer.Option(help="Run by name or folder, or another workspace; else the current run."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
ImageSet = Annotated[str | None, typer.Option(help="Image feature set; else the current.")]
TextSet = Annotated[str | None, typer.Option(help="Text feature set; else the current.")]
Again = Annotated[bool, typer.Option("--again", help="Read the test split once more.")]
SetName = Annotated[
    str | None, typer.Argument(help="Feature set: image/NAME, text/NAME or a folder.")
]


def open_workspace(root: Path | None, quiet: bool) -> Any:
    """Switch the console, then open the workspace."""
    from featcache.console import set_quiet, set_up_logging
    from featcache.workspace import Workspace

    set_quiet(quiet)
    set_up_logging()
    return Workspace.open(root)


def emit_result(result: Any, as_json: bool) -> None:
    """Print a result that knows how to show itself."""
    from featcache.console import emit

    emit(result.to_json(), as_json=as_json, text=result.to_text())
