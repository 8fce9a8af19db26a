"""The commands of stage two: `train-adaptor`, and what is done with its runs."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.options import (
    AsJson,
    ConfigFile,
    Device,
    ImageSet,
    ManifestName,
    Quiet,
    Root,
    Seed,
    Settings,
    TextSet,
    emit_result,
    open_workspace,
)


def train_adaptor(
    backbone: ImageSet = None,
    text_encoder: TextSet = None,
    manifest: ManifestName = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; else from its parts.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens read of each row: all, prefix, grid, pooled or random:N.", metavar="BUDGET"
        ),
    ] = None,
    io: Annotated[
        str | None, typer.Option(help="How tokens are read: auto, mmap or pread.")
    ] = None,
    resident: Annotated[
        bool, typer.Option("--resident", help="Hold the tokens in memory, the GPU's if they fit.")
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stage two: train the Adaptor on cached tokens; stopped, the same command goes on."""
    workspace = open_workspace(root, quiet)
    from featcache.adaptor.train import load_run_config, train

    typed = {"seed": seed, "tokens": tokens, "io": io, "resident": resident or None}
    overrides = [
        *(settings or ()),
        *(f"{key}={value}" for key, value in typed.items() if value is not None),
    ]
    result = train(
        workspace,
        load_run_config(config, overrides),
        backbone=backbone,
        text_encoder=text_encoder,
        manifest=manifest,
        name=name,
        device=device,
    )
    emit_result(result, as_json)


def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs by name or folder; none named: all.")
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Finished runs in one table, by what they measured on validate while training."""
    workspace = open_workspace(root, quiet=False)
    from featcache.adaptor.comparison import compare_runs

    emit_result(compare_runs(workspace, runs or ()), as_json)


def sweep(
    config: Annotated[str, typer.Argument(help="YAML file, or a name in configs/sweeps.")],
    backbone: ImageSet = None,
    text_encoder: TextSet = None,
    manifest: ManifestName = None,
    settings: Settings = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Variants of one training, each at its best learning rate, over several seeds, in a table."""
    workspace = open_workspace(root, quiet)
    from featcache.heads.sweep import load_sweep_config, sweep

    name, values = load_sweep_config(config, settings or ())
    result = sweep(
        workspace,
        values,
        name,
        backbone=backbone,
        text_encoder=text_encoder,
        manifest=manifest,
        device=device,
    )
    emit_result(result, as_json)


def export(
    out: Annotated[Path, typer.Option(help="Folder to make.", metavar="DIR")],
    run: Annotated[
        str | None,
        typer.Argument(help="Run by name or folder, also RUN/best; else the current run."),
    ] = None,
    to: Annotated[
        str, typer.Option(help="safetensors or onnx: the Adaptor; parquet or numpy: its vectors.")
    ] = "safetensors",
    backbone: ImageSet = None,
    text_encoder: TextSet = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in DIR.")
    ] = False,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an Adaptor, or its vectors of whole feature sets, for others to read, with a card."""
    workspace = open_workspace(root, quiet)
    from featcache.adaptor.export import export

    result = export(
        workspace,
        out,
        to=to,
        run=run,
        backbone=backbone,
        text_encoder=text_encoder,
        overwrite=overwrite,
        device=device,
    )
    emit_result(result, as_json)
