"""The command line: each command parses, calls one function, and prints what it gave."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from featcache.errors import FeatcacheError
from featcache.options import (
    Again,
    AsJson,
    ConfigFile,
    Device,
    ImageSet,
    ManifestName,
    Quiet,
    Root,
    RunName,
    Seed,
    SetName,
    Settings,
    TextSet,
    emit_result,
    open_workspace,
)

app = typer.Typer(
    name="featcache",
    help="Cache the tokens of frozen encoders once, then train small adaptors at memory speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


@app.command()
def demo(
    unless_trained: Annotated[
        bool, typer.Option("--unless-trained", help="Do nothing if the workspace has a run.")
    ] = False,
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on the embedded radiographs, then say where to look."""
    workspace = open_workspace(root, quiet)
    from featcache.demo import run_demo

    emit_result(run_demo(workspace, unless_trained=unless_trained), as_json)


@app.command()
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
    settings: Settings = None,
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read a data set into a checked manifest and print what was dropped and why."""
    workspace = open_workspace(root, quiet)
    from featcache.datasets.registry import make_manifest
    from featcache.synth.registry import stand_in

    path = stand_in(workspace, dataset) if folder == "synthetic" else Path(folder)
    made = make_manifest(
        workspace, dataset, path, name=name, text_unit=text_unit, overrides=settings or ()
    )
    emit_result(made, as_json)


@app.command()
def synth(
    dataset: Annotated[str, typer.Argument(help="Data set to imitate.")],
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")],
    size: Annotated[str, typer.Option(help="tiny, small or large.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a procedural data set in a real one's exact layout, with its truth beside it."""
    open_workspace(None, quiet)
    from featcache.synth.registry import synthesize

    emit_result(synthesize(dataset, out, size=size, seed=seed), as_json)


@app.command()
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


@app.command()
def info(
    name: SetName = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Say what a workspace, or one feature set, holds."""
    workspace = open_workspace(root, quiet=False)
    from featcache.cache.check import describe

    emit_result(describe(workspace, name), as_json)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command(name="train-adaptor")
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


@app.command()
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


@app.command()
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


@app.command()
def finetune(
    run: RunName = None,
    backbone: ImageSet = None,
    manifest: ManifestName = None,
    again: Again = False,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Linear probes on cached features at 1, 10 and 100 % of the labels."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.heads.classify import ProbeConfig, finetune_workspace

    overrides = [*(settings or ()), *([f"seed={seed}"] if seed is not None else [])]
    result = finetune_workspace(
        workspace,
        load_config(ProbeConfig, path=config, overrides=overrides),
        run=run,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)


@app.command()
def retrieve(
    run: RunName = None,
    manifest: ManifestName = None,
    again: Again = False,
    config: ConfigFile = None,
    settings: Settings = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Image to text and text to image on held-out patients."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.heads.retrieve import RetrieveConfig, retrieve_workspace

    result = retrieve_workspace(
        workspace,
        load_config(RetrieveConfig, path=config, overrides=settings or ()),
        run=run,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benches, see --list; none named: all.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Only say which there are.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, to see that they work; no figures.")
    ] = False,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine's speed against its own limits, each a ratio with a goal."""
    open_workspace(None, quiet)
    from featcache.bench.command import BenchConfig, list_benches, run_benches
    from featcache.config import load_config

    config = load_config(BenchConfig, overrides=settings or ())
    if show_list:
        emit_result(list_benches(names or ()), as_json)
        return
    report = run_benches(names or (), config, device=device, quick=quick)
    emit_result(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


def _complain(error: Exception, code: int) -> int:
    """Print an error's lines on stderr."""
    encoding = sys.stderr.encoding or "ascii"
    text = f"error: {error}\n"
    sys.stderr.write(text.encode(encoding, "replace").decode(encoding))
    return code


def _parse_error(error: TyperException) -> FeatcacheError:
    """A parser's complaint in the shape of ours."""
    from featcache.errors import UsageError

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "featcache"
    message = error.format_message().strip()
    return UsageError(message[:1].lower() + message[1:], where=command, fix=f"{command} --help")


def _guarded(run: Callable[[], object]) -> int:
    """Run a command; every failure of the user's becomes lines and an exit code."""
    try:
        code = run()
    except FeatcacheError as error:
        return _complain(error, error.exit_code)
    except Exit as stop:
        return int(stop.exit_code)
    except TyperException as error:
        return _complain(_parse_error(error), 2)
    except (Abort, KeyboardInterrupt):
        sys.stderr.write(
            "stopped; what was complete is kept, the same command goes on from there\n"
        )
        return 130
    return code if isinstance(code, int) else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `featcache` program.

    Args:
        arguments: What follows the program's name; by default the process's own.

    Returns:
        0, or 1 for a failure, 2 for a wrong command or config, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    return _guarded(lambda: app(args=arguments, prog_name="featcache", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
