"""`featcache extract`: complete shards are kept, missing ones are made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from featcache.cluster import connect, local_workers, worker_threads
from featcache.console import note
from featcache.device import resolve_device
from featcache.encoders.request import assign_weights, locate_all
from featcache.errors import EncoderError, InterruptedByUserError
from featcache.extract.config import ExtractConfig
from featcache.extract.passes import Missing, Place, group_passes, run_pass
from featcache.extract.prepare import Admission, Prepared, choose_encoders, prepare
from featcache.extract.result import ExtractResult, PassResult, SetResult, count
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace


def extract(
    workspace: Workspace,
    config: ExtractConfig,
    *,
    backbones: Sequence[str] = (),
    text_encoders: Sequence[str] = (),
    manifest: str | None = None,
    run: str | None = None,
    weights: Mapping[str, Path] | None = None,
) -> ExtractResult:
    """Encode a manifest's images and texts; complete shards are kept, missing ones are made.

    Args:
        workspace: Where the manifest is found and the feature sets go; the first of each side
            becomes current.
        config: How to run.
        backbones: Image encoders, which share one decoding pass; empty: the run's, else the
            current set's; `none`: no images.
        text_encoders: Text encoders; empty: the run's, else the current set's, else `cxr-bert`;
            `none`: no texts.
        manifest: Name or folder; None: the current one.
        run: Take encoders and sizes of this run.
        weights: Files by encoder name; the empty name stands for the only one that lacks them.

    Returns:
        What was made.

    Raises:
        UsageError: An encoder is unknown or none is named.
        WeightsError: Weights are missing; raised before any image is opened.
        StaleFeatureSetError: A set of that name was made otherwise.
        EncoderError: More rows are unreadable than `max_failures`.
        InterruptedByUserError: Ctrl-C; complete shards stay.
    """
    tables = open_manifest(workspace.manifest(manifest))
    note(f"manifest {tables.title}: {tables.images.num_rows:,} images in {workspace.root}")
    requests = choose_encoders(workspace, config, (backbones, text_encoders), run, tables)
    requests = assign_weights(requests, weights or {})
    sets: list[Missing] = []
    for request, located in zip(requests, locate_all(requests), strict=True):
        folder = workspace.folder(request.modality) / located.name
        admission = Admission(append=config.append)
        one = prepare(folder, tables, request, located, config.device, admission)
        if config.retry_failed:
            _retry_failed(one)
        sets.append((one, one.planned(tables)))
    results = [result for _, result in sets]
    if config.dry_run:
        return ExtractResult(results, [], dry_run=True)
    passes = make_missing(sets, tables, config)
    for one, _ in reversed(sets):
        workspace.use(**{one.spec.modality: one.writer.folder.name})
    _check_failures(results, config.max_failures)
    return ExtractResult(results, passes, dry_run=False)


def _retry_failed(one: Prepared) -> None:
    """Give up the shards that hold unreadable rows."""
    failed = set(one.writer.read_failures())
    one.writer.discard([s.number for s in one.writer.shards if failed.intersection(s.keys)])
    one.missing = one.writer.missing()


def make_missing(
    sets: Sequence[Missing], tables: Manifest, config: ExtractConfig, *, again: bool = False
) -> list[PassResult]:
    """Make the missing shards of some sets on one cluster.

    Args:
        sets: What to make; their results are filled in.
        tables: The manifest that all rows are of.
        config: How to run.
        again: Whether shards that look complete are made again.

    Returns:
        How fast it was, pass by pass.

    Raises:
        InterruptedByUserError: Ctrl-C; complete shards stay.
        FeatcacheError: What a task raised.
    """
    todo = [one for one in sets if one[0].missing]
    if not todo:
        return []
    device = resolve_device(config.device)
    environments = local_workers(device, config.workers, config.threads)
    threads = config.threads or worker_threads(len(environments))
    try:
        with connect(config.scheduler, environments) as client:
            place = Place(client, tables, threads, device, again)
            return [run_pass(place, group) for group in group_passes(todo)]
    except KeyboardInterrupt:
        kept = sum(len(one.writer.shards) - len(one.writer.missing()) for one, _ in sets)
        raise InterruptedByUserError(
            f"stopped by the user; {count(kept, 'complete shard')} stay",
            where=todo[0][0].writer.folder.parent.parent,
            fix="the same command goes on from there",
        ) from None
    finally:
        for one, _ in todo:
            one.writer.remove_dead_partials()  # of workers that died meanwhile


def _check_failures(results: Sequence[SetResult], allowed: float) -> None:
    """Fail, after everything is stored, when too many rows were unreadable."""
    for result in results:
        limit = allowed * result.rows if allowed < 1 else allowed
        if result.failed_rows > limit:
            raise EncoderError(
                f"{count(result.failed_rows, 'unreadable row')} of {result.rows:,} in "
                f"{result.name}, more than the {limit:g} allowed; all others are stored",
                where=result.folder / "failures.parquet",
                fix="mend the files and run again, or --set max_failures=COUNT",
            )
