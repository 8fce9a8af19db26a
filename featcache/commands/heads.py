"""The commands that ask what features are worth: heads, each with its table."""

from featcache.options import (
    Again,
    AsJson,
    ConfigFile,
    Device,
    ImageSet,
    ManifestName,
    Phrases,
    PromptFile,
    Quiet,
    Root,
    RunName,
    SaveMaps,
    Seed,
    Settings,
    emit_result,
    load_settings,
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
    from featcache.heads.classify import ProbeConfig, finetune_workspace

    result = finetune_workspace(
        workspace,
        load_settings(ProbeConfig, config, settings, seed),
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
    from featcache.heads.retrieve import RetrieveConfig, retrieve_workspace

    result = retrieve_workspace(
        workspace,
        load_settings(RetrieveConfig, config, settings),
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
    from featcache.heads.segment import SegmentConfig, segment_workspace

    result = segment_workspace(
        workspace,
        load_settings(SegmentConfig, config, settings, seed),
        run=run,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)


def ground(
    phrase: Phrases = None,
    run: RunName = None,
    prompts: PromptFile = None,
    save_maps: SaveMaps = None,
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
    from featcache.heads.grounding import GroundConfig, ground_workspace

    values = load_settings(GroundConfig, config, settings, seed)
    if phrase:
        values = values.model_copy(update={"phrases": tuple(phrase)})
    if save_maps is not None:
        values = values.model_copy(update={"save_maps": save_maps})
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
    prompts: PromptFile = None,
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
    from featcache.heads.zeroshot import ZeroShotConfig, zeroshot_workspace

    result = zeroshot_workspace(
        workspace,
        load_settings(ZeroShotConfig, config, settings, seed),
        run=run,
        prompts=prompts,
        backbone=backbone,
        manifest=manifest,
        device=device,
        again=again,
    )
    emit_result(result, as_json)
