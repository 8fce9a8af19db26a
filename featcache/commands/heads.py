"""The commands that ask what features are worth: heads, each with its table."""

from typing import Annotated

import typer

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
    Settings,
    emit_result,
    open_workspace,
)


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


def segment(
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
    """Masks from cached tokens at 1, 10 and 100 % of the labels; stopped, it goes on."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.heads.segment import SegmentConfig, segment_workspace

    overrides = [*(settings or ()), *([f"seed={seed}"] if seed is not None else [])]
    result = segment_workspace(
        workspace,
        load_config(SegmentConfig, path=config, overrides=overrides),
        run=run,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)


def ground(
    phrase: Annotated[
        list[str] | None,
        typer.Option(help="What to look for; repeat. Else the data set's prompts."),
    ] = None,
    run: RunName = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts by name or YAML file.", metavar="NAME")
    ] = None,
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
    """Look for a phrase in the test images, without training on any mask."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.heads.grounding import GroundConfig, ground_workspace

    overrides = [*(settings or ()), *([f"seed={seed}"] if seed is not None else [])]
    values = load_config(GroundConfig, path=config, overrides=overrides)
    if phrase:
        values = values.model_copy(update={"phrases": tuple(phrase)})
    result = ground_workspace(
        workspace,
        values,
        run=run,
        prompts=prompts,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)


def zeroshot(
    run: RunName = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts by name or YAML file; else the data set's.", metavar="NAME"),
    ] = None,
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
    """Classify the test images by sentences, without training on any label."""
    workspace = open_workspace(root, quiet)
    from featcache.config import load_config
    from featcache.heads.zeroshot import ZeroShotConfig, zeroshot_workspace

    overrides = [*(settings or ()), *([f"seed={seed}"] if seed is not None else [])]
    result = zeroshot_workspace(
        workspace,
        load_config(ZeroShotConfig, path=config, overrides=overrides),
        run=run,
        prompts=prompts,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)
