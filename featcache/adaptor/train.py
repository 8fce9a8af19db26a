"""Stage two: training an Adaptor on cached tokens."""

import shlex
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from featcache.adaptor.candidates import Candidates
from featcache.adaptor.checkpoint import prune_checkpoints
from featcache.adaptor.generators import seeded
from featcache.adaptor.model import count_parameters
from featcache.adaptor.run import (
    CONFIG_FILE,
    RunConfig,
    RunResult,
    finished_facts,
    free_folder,
    load_run_config,
    run_identity,
    start_folder,
    write_facts,
)
from featcache.adaptor.saved import FeaturesRead, save_adaptor
from featcache.adaptor.stage import Place, Stage
from featcache.adaptor.trainer import (
    Job,
    check_means,
    fit,
    make_loader,
    make_stage,
    rank_device,
    token_dim,
)
from featcache.cache.reader import Cache, FeatureSet, open_cache
from featcache.console import note
from featcache.device import resolve_device
from featcache.errors import CacheError, TrainingError, UsageError
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

__all__ = ["load_run_config", "train", "train_adaptor"]


def _count(stage: Stage, images: FeatureSet, texts: FeatureSet) -> dict[str, JsonValue]:
    """Parameters of everything, and the trainable share when the encoders' are known."""
    own, extra = count_parameters(stage.adaptor), count_parameters(stage.objective)
    encoders = [features.quality.get("parameters") for features in (images, texts)]
    known = [number for number in encoders if isinstance(number, int)]
    share = (own + extra) / (own + extra + sum(known)) if len(known) == 2 else None
    return {
        "adaptor": own,
        "objective": extra,
        "trainable": own + extra,
        "image_encoder": encoders[0],
        "text_encoder": encoders[1],
        "trainable_share": share,
    }


def _batch_size(config: RunConfig, num_pairs: int, manifest: Manifest) -> int:
    """The batch size that the pairs allow.

    Raises:
        TrainingError: There are fewer than two pairs, or fewer than processes.
    """
    if num_pairs < 2:
        raise TrainingError(
            f"the split `train` of manifest `{manifest.name}` has {num_pairs} image-text pairs "
            "with valid features; at least 2 are needed, a pair is contrasted with others",
            where=manifest.folder,
            fix="featcache info shows what the feature sets hold; splits stand in images.parquet",
        )
    if num_pairs < config.devices:
        raise TrainingError(
            f"{num_pairs} training pairs cannot be shared by {config.devices} processes",
            where=manifest.folder,
            fix="--set devices=1",
        )
    fitting = min(config.batch_size, num_pairs // config.devices * config.devices)
    if fitting < config.batch_size:
        note(
            f"batch size {config.batch_size} is more than the {num_pairs} training pairs: "
            f"using {fitting}"
        )
    return fitting


def _introduce(
    name: str, stage: Stage, counts: dict[str, JsonValue], num_pairs: int, notes: list[str]
) -> None:
    """Say what is about to happen."""
    share, config = counts["trainable_share"], stage.config
    of_all = f", {100 * share:.2g} % of all with the encoders" if isinstance(share, float) else ""
    note(
        f"train-adaptor {name}  objective {config.adaptor.objective}, {counts['trainable']:,} "
        f"trainable parameters{of_all}; {num_pairs:,} pairs, {stage.total_steps:,} steps in "
        f"{config.epochs} epochs"
    )
    for sentence in notes:
        note(sentence)


def train_adaptor(
    images: FeatureSet,
    texts: FeatureSet,
    manifest: Manifest,
    folder: Path,
    config: RunConfig,
    *,
    device: str = "auto",
    go_on: str = "the same call goes on from there",
) -> RunResult:
    """Train an Adaptor on the pairs of the split `train`, and save the last epoch's weights.

    After each epoch the split `validate` is scored unpaired; the best epoch's weights are kept
    beside, in the folder `best`. The split `test` is never read. The same config on the same
    features gives the same weights, on a CPU bit for bit (with equal threads and library
    versions), and so does a training that was stopped or killed and goes on from its last
    checkpoint.

    Args:
        images: Image features.
        texts: Text features.
        manifest: Says which pairs there are, in which split.
        folder: The run's folder; made when missing.
        config: What to do.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        go_on: What a message about a stop says on how to go on.

    Returns:
        `unchanged` when the very same training was finished in the folder before.

    Raises:
        TrainingError: Another run lies in the folder, there are too few pairs, the loss or its
            gradient is not finite, or a checkpoint is damaged.
        UsageError: The machine or the features do not have what the config asks for.
        InterruptedByUserError: Ctrl-C.
        TerminatedError: SIGTERM.
    """
    device = resolve_device(device)
    check_means(config, device)
    pairs = open_cache(images, texts, manifest, split="train")
    identity = _identity(pairs, manifest, config)
    before = finished_facts(folder, identity)
    if before is not None:
        note(f"train-adaptor {folder.name}  finished before; nothing to do")
        return RunResult(folder, "unchanged", before)
    size = _batch_size(config, pairs.num_pairs, manifest)
    job = Job(
        images, texts, manifest, folder, config.model_copy(update={"batch_size": size}), device
    )
    place = Place(folder, identity, 0, config.devices)
    loader = make_loader(pairs, job.config, device, place)
    with seeded(config.seed, rank_device(device, place)):
        stage = make_stage(job, pairs, place, len(loader))
        counts = _count(stage, images, texts)
        notes = [*manifest.meta.notes, *filter(None, [stage.objective.notice])]
        stage.candidates = _held_out(job)
        stage.keep_best = lambda: _save(folder / "best", stage, notes)
        _introduce(folder.name, stage, counts, pairs.num_pairs, notes)
        facts = _facts(job, pairs, counts, notes)
        start_folder(folder, config, identity, facts)
        fit(stage, loader, job, go_on)
    _save(folder / "adaptor", stage, notes)
    facts |= {"status": "finished", "identity": identity}
    written = write_facts(folder, facts | stage.history.outcome(stage.total_steps))
    prune_checkpoints(folder, keep=0)
    note(f"train-adaptor {folder.name}  {stage.history.last_words(stage.total_steps)}")
    return RunResult(folder, "trained", written)


def _facts(
    job: Job, pairs: Cache, counts: dict[str, JsonValue], notes: list[str]
) -> dict[str, JsonValue]:
    """What `run.json` says from the start."""
    images, texts, manifest = job.images, job.texts, job.manifest
    return {
        "manifest": {"name": manifest.name, "synthetic": manifest.meta.synthetic},
        "images": {"folder": str(images.folder.resolve()), "encoder": images.spec.encoder},
        "texts": {"folder": str(texts.folder.resolve()), "encoder": texts.spec.encoder},
        "pairs": {"train": pairs.num_pairs, "dropped": dict(pairs.dropped)},
        "batch_size": job.config.batch_size,
        "device": job.device,
        "parameters": counts,
        "notes": list(notes),
    }


def _save(folder: Path, stage: Stage, notes: list[str]) -> None:
    """Write the Adaptor with what it read."""
    tokens = stage.config.tokens
    image, text = (
        FeaturesRead(
            encoder=one.spec.encoder,
            fingerprint=one.fingerprint,
            dim=token_dim(one, tokens),
            tokens=budget,
            text_tokens=limit,
        )
        for one, budget, limit in (
            (stage.cache.images, tokens, None),
            (
                stage.cache.texts,
                tokens if tokens == "pooled" else "all",
                stage.config.text_tokens,
            ),
        )
    )
    save_adaptor(
        folder,
        stage.adaptor,
        stage.objective,
        stage.config.adaptor,
        image=image,
        text=text,
        notes=notes,
    )


def _held_out(job: Job) -> Candidates | None:
    """The candidates of the split `validate`.

    Returns:
        None, with the reason said, when it has no pairs, or none that could be told apart.
    """
    config = job.config
    tokens = "all" if config.tokens.startswith("random") else config.tokens
    try:
        held_out = open_cache(job.images, job.texts, job.manifest, split="validate")
    except CacheError as error:
        note(f"nothing is measured while training: {error.what}")
        return None
    candidates = Candidates.of(held_out, tokens=tokens, text_tokens=config.text_tokens)
    if candidates.positives.all():  # every epoch would be the best
        note(
            "nothing is measured while training, and no epoch is called the best: every text of "
            f"the {held_out.num_pairs} validation pairs belongs to every image"
        )
        return None
    return candidates


def _identity(pairs: Cache, manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    return run_identity(
        config,
        images=pairs.images.fingerprint,
        texts=pairs.texts.fingerprint,
        manifest=manifest.meta.hash,
        pairs=pairs.fingerprint,
    )


def train(
    workspace: Workspace,
    config: RunConfig,
    *,
    backbone: str | None = None,
    text_encoder: str | None = None,
    manifest: str | None = None,
    name: str | None = None,
    device: str = "auto",
) -> RunResult:
    """Train on what a workspace holds, and make the run current.

    Args:
        workspace: Where everything is found, and the run's folder is made.
        config: What to do.
        backbone: Image feature set; None: the config's, else the current one.
        text_encoder: Text feature set; None: the config's, else the current one.
        manifest: Manifest; None: the config's, else the current one.
        name: Of the run; None: made of the encoders and the objective.
        device: See `train_adaptor`.

    Raises:
        UsageError: The name is no plain folder name.
        WorkspaceError: Something is not there, or nothing is current.
        TrainingError: See `train_adaptor`.
    """
    if name is not None and (Path(name).name != name or name[:1] in ("", ".", "-")):
        raise UsageError(f"`{name}` is no plain folder name", where="--name", fix="--name my-run")
    table = open_manifest(workspace.manifest(manifest or config.manifest))
    images = FeatureSet.open(workspace.feature_set("image", backbone or config.images))
    texts = FeatureSet.open(workspace.feature_set("text", text_encoder or config.texts))
    note(f"manifest {table.title}, {images.spec.title}, {texts.spec.title}")
    names = {"images": images.folder.name, "texts": texts.folder.name, "manifest": table.name}
    config = config.model_copy(update=names)
    if name is None:
        pairs = open_cache(images, texts, table, split="train")
        parts = f"{images.folder.name}-{texts.folder.name}-{config.adaptor.objective}"
        folder = free_folder(workspace.runs, parts, _identity(pairs, table, config))
    else:
        folder = workspace.runs / name
    words = ["--config", str(folder / CONFIG_FILE), "--name", folder.name]
    words += ["--root", str(workspace.root)]
    given = {"--backbone": backbone, "--text-encoder": text_encoder, "--manifest": manifest}
    words += [word for option, one in given.items() if one is not None for word in (option, one)]
    words += [] if device == "auto" else ["--device", device]
    result = train_adaptor(
        images,
        texts,
        table,
        folder,
        config,
        device=device,
        go_on=shlex.join(["featcache", "train-adaptor", *words]),
    )
    workspace.use(run=folder.name)
    return result
