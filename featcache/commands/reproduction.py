"""The command that puts finished results beside the paper's."""

from featcache.options import AsJson, Quiet, Root, RunName, emit_result, open_workspace


def reproduce(
    run: RunName = None,
    root: Root = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The paper's tables beside our finished results, and what is wrong with its protocol."""
    workspace = open_workspace(root, quiet)
    from featcache.heads.reproduction import reproduce

    emit_result(reproduce(workspace, run=run), as_json)
