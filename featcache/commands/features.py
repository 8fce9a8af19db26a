"""The commands from a data set to its cache: `manifest` to `use`."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.options import (
    AsJson,
    ConfigFile,
    Device,
    ManifestName,
    Quiet,
    Root,
    SetName,
    Settings,
    emit_result,
    open_workspace,
)


def manifest(
    dataset: Annotated[str, typer.Argument(help="Data set, e.g. spreadsheet or mimic-cxr-jpg.")],
    folder: Annotated[
        str, typer.Argument(help="Its folder (or table); `synthetic` makes a stand-in first.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the manifest; else the data set.")
    ] = None,
    text_unit: Annotated[
        str | None,
        typer.Option(help="What a text is: report (default) or sentence.", metavar="UNIT"),
    ] = None,
    no_checks: Annotated[
        bool, typer.Option("--no-checks", help="Do not open the files or look for repeats.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every picture for the checks that need it.")
    ] = False,
    show_ids: Annotated[
        bool, typer.Option("--show-ids", help="Name a few keys or paths for each check.")
    ] = False,
    settings: Settings = None,
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read a data set into a checked manifest and print what was dropped and why."""
    workspace = open_workspace(root, quiet)
    from featcache.datasets.registry import check_manifest, make_manifest
    from featcache.errors import UsageError
    from featcache.synth.registry import stand_in

    if decode and no_checks:
        raise UsageError("--decode is for the checks, and --no-checks leaves them out")

    path = stand_in(workspace, dataset) if folder == "synthetic" else Path(folder)
    made = make_manifest(
        workspace, dataset, path, name=name, text_unit=text_unit, overrides=settings or ()
    )
    if no_checks:
        emit_result(made, as_json)
        return
    decoded = None
    if decode:
        from featcache.encoders.look import look_at_pictures

        decoded = look_at_pictures(made)
    emit_result(check_manifest(workspace, made, decoded=decoded, show_ids=show_ids), as_json)


def synth(
    dataset: Annotated[str, typer.Argument(help="Data set to imitate.")],
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")],
    size: Annotated[str, typer.Option(help="tiny, small or large.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    switch: Annotated[
        list[str] | None,
        typer.Option(help="An odd case that is off by itself; repeat.", metavar="NAME"),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a procedural data set in a real one's exact layout, with its truth beside it."""
    open_workspace(None, quiet)
    from featcache.synth.registry import synthesize

    result = synthesize(dataset, out, size=size, seed=seed, switches=switch or ())
    emit_result(result, as_json)


def extract(
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="Image encoder: a short name, timm:NAME, hf:NAME or a folder; repeat."),
    ] = None,
    text_encoder: Annotated[
        list[str] | None,
        typer.Option(help="Text encoder: a short name, hf:NAME or a folder; repeat."),
    ] = None,
    manifest: ManifestName = None,
    run: Annotated[
        str | None, typer.Option(help="Take the encoders of this run (or of a workspace's run).")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="FILE or NAME=FILE, safetensors.", metavar="FILE")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, float32 or int8.")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Input side in pixels, or HxW.", metavar="N")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest text in tokens.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks to store, e.g. 6,12; -1 is the last.", metavar="N,N")
    ] = None,
    pool_grid: Annotated[
        int | None, typer.Option(help="Average the grid over N x N windows.", metavar="N")
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="First N views: identity, flip, five crops.", metavar="N")
    ] = None,
    decode: Annotated[str | None, typer.Option(help="Decode JPEGs on the cpu or gpu.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes on this machine.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Make shards with failed rows again.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Add the manifest's new rows to finished sets.")
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    device: Device = "auto",
    root: Root = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stage one: run the frozen encoders once and write their tokens to shards."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.encoders.request import split_weights
    from featcache.extract.command import extract
    from featcache.extract.config import ExtractConfig

    typed = {
        "dtype": dtype,
        "image_size": image_size,
        "layers": layers,
        "pool_grid": pool_grid,
        "views": views,
        "max_tokens": max_tokens,
        "decode": decode,
        "workers": workers,
        "scheduler": scheduler,
        "device": device,
        "retry_failed": retry_failed or None,
        "append": append or None,
        "dry_run": dry_run or None,
    }
    overrides = [f"{key}={value}" for key, value in typed.items() if value is not None]
    result = extract(
        workspace,
        load_config(ExtractConfig, path=config, overrides=[*overrides, *(settings or ())]),
        backbones=backbone or (),
        text_encoders=text_encoder or (),
        manifest=manifest,
        run=run,
        weights=split_weights(weights or []),
    )
    emit_result(result, as_json)


def info(
    name: SetName = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Say what a workspace, or one feature set, holds."""
    workspace = open_workspace(root, quiet=False)
    from featcache.cache.check import describe

    emit_result(describe(workspace, name), as_json)


def verify(
    name: SetName = None,
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every row against the checksum written with it."""
    workspace = open_workspace(root, quiet)
    from featcache.cache.check import verify

    report = verify(workspace, name)
    emit_result(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


def repair(
    name: SetName = None,
    rows_changed: Annotated[
        bool, typer.Option("--rows-changed", help="Also the shards of rows whose files changed.")
    ] = False,
    settings: Settings = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make exactly the damaged shards again, and prove it by their checksums."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.extract.config import ExtractConfig
    from featcache.extract.repair import repair

    config = load_config(ExtractConfig, overrides=[f"device={device}", *(settings or ())])
    result = repair(workspace, name, rows_changed=rows_changed, config=config)
    emit_result(result, as_json)
    if not result.ok:
        raise typer.Exit(1)


def use(
    manifest: Annotated[str | None, typer.Option(help="Manifest to make current.")] = None,
    image: Annotated[str | None, typer.Option(help="Image feature set to make current.")] = None,
    text: Annotated[str | None, typer.Option(help="Text feature set to make current.")] = None,
    run: Annotated[str | None, typer.Option(help="Run to make current.")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Show or change what is current."""
    workspace = open_workspace(root, quiet=False)
    from featcache.console import emit

    asked = {"manifest": manifest, "image": image, "text": text, "run": run}
    chosen = {kind: name for kind, name in asked.items() if name is not None}
    if chosen:
        workspace.use(**chosen)
    current = {kind: workspace.current(kind) for kind in asked}
    lines = [f"{kind:9s} {name or '-'}" for kind, name in current.items()]
    emit(current, as_json=as_json, text="\n".join([f"current in {workspace.root}", *lines]))
