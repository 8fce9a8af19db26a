"""What commands share: options with their names and help, the workspace, the output."""

from collections.abc import Sequence
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
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts", help="Prompts by name or YAML file; else the data set's.", metavar="NAME"
    ),
]
Phrases = Annotated[
    list[str] | None,
    typer.Option("--phrase", help="What to look for; repeat. Else the data set's prompts."),
]
SaveMaps = Annotated[
    int | None,
    typer.Option(help="Draw N test images with maps: pictures of patients.", metavar="N", min=0),
]
Again = Annotated[bool, typer.Option("--again", help="Read the test split once more.")]
SetName = Annotated[
    str | None, typer.Argument(help="Feature set: image/NAME, text/NAME or a folder.")
]


def load_settings(
    schema: Any, path: Path | None, settings: Sequence[str] | None, seed: int | None = None
) -> Any:
    """The config of a command: its file, then `--set`, then `--seed`.

    Args:
        schema: The `Config` to fill.
        path: Of `--config`.
        settings: Of `--set`.
        seed: Of `--seed`.
    """
    from featcache.config import load_config

    seeded = [f"seed={seed}"] if seed is not None else []
    return load_config(schema, path=path, overrides=[*(settings or ()), *seeded])


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
