"""The command line: each command parses, calls one function, and prints what it gave."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from featcache.commands import features, heads, reproduction, training
from featcache.errors import FeatcacheError
from featcache.options import AsJson, Device, Quiet, Root, Settings, emit_result, open_workspace

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


for _command in (
    features.manifest,
    features.synth,
    features.extract,
    features.info,
    features.verify,
    features.repair,
    features.use,
    training.train_adaptor,
    training.compare,
    training.sweep,
    heads.finetune,
    heads.retrieve,
    heads.segment,
    heads.ground,
    heads.zeroshot,
    reproduction.reproduce,
    training.export,
):
    app.command()(_command)


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
    # Threads of a product that spin while they wait take the cores from those that read features.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return _guarded(lambda: app(args=arguments, prog_name="featcache", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
