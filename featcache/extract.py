"""Stage one: both frozen encoders run once over a manifest, one task per shard."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from featcache.cache.format import RAGGED_SHARD_ROWS, FeatureSetSpec, plan_shards, row_hash
from featcache.cache.writer import FeatureSetWriter
from featcache.cluster import (
    ShardJob,
    connect,
    local_workers,
    run_jobs,
    worker_threads,
)
from featcache.config import Config
from featcache.console import duration, note, size, task
from featcache.device import resolve_device
from featcache.encoders.interface import LocatedEncoder, load_encoder
from featcache.encoders.request import (
    EncoderRequest,
    assign_weights,
    choose_request,
    locate_all,
    save_request,
)
from featcache.encoders.shard import Pace, ShardStats
from featcache.errors import EncoderError, InterruptedByUserError, UsageError
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace


class ExtractConfig(Config):
    """How stage one runs; the first four settings shape the rows, the fifth the shards."""

    dtype: Literal["float16", "float32"] | None = Field(None, description="Stored type of tokens.")
    image_size: int | None = Field(None, gt=0, description="Input side in pixels; None: its own.")
    max_tokens: int | None = Field(None, gt=2, description="Longest text; None: its own.")
    batch_size: int | None = Field(None, ge=1, description="Rows of every forward pass.")
    shard_mb: int | None = Field(
        None, ge=1, description="MiB of tokens in a shard (512): the unit of work and of resuming."
    )
    workers: int | None = Field(None, ge=1, description="Local workers; None: one per GPU, or one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; None: its share.")
    max_failures: float = Field(
        0.01, ge=0, description="Unreadable rows that are no failure: a share below 1, or a count."
    )
    device: str = Field("auto", description="auto, cpu or cuda.")
    scheduler: str | None = Field(None, description="Address of a running Dask scheduler.")
    retry_failed: bool = Field(False, description="Make shards with unreadable rows again.")
    dry_run: bool = Field(False, description="Check and plan only.")


@dataclass
class SetResult:
    """What happened to one feature set."""

    name: str
    dataset: str
    folder: Path
    rows: int
    shards: int
    missing_shards: int
    missing_rows: int
    row_bytes: int | None
    failed_rows: int = 0
    elapsed_s: float = 0.0
    stats: ShardStats = field(default_factory=ShardStats)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "dataset": self.dataset,
            "folder": str(self.folder),
            "rows": self.rows,
            "rows_made": self.missing_rows,
            "shards": self.shards,
            "shards_made": self.missing_shards,
            "failed_rows": self.failed_rows,
            "truncated_texts": self.stats.truncated,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def to_text(self, dry_run: bool) -> str:
        """One or two lines for a person."""
        line = (
            f"{self.name} of {self.dataset}: {self.rows:,} rows in {_count(self.shards, 'shard')}"
        )
        if dry_run:
            return f"{line}, {self.shards - self.missing_shards} complete already"
        if not self.missing_shards:
            line += ", complete already: nothing to do"
        else:
            rate = self.missing_rows / max(self.elapsed_s, 1e-9)
            line += f", made in {duration(self.elapsed_s)} ({rate:.1f} rows/s); {self._limit()}"
        if self.stats.truncated:
            line += f"\n  {_count(self.stats.truncated, 'text')} cut to the encoder's length"
        if self.failed_rows:
            line += f"\n  {_count(self.failed_rows, 'unreadable row')}: "
            line += f"{self.folder / 'failures.parquet'}"
        return line

    def _limit(self) -> str:
        """Which stage was the bottleneck, for what share of the time."""
        spent = {
            "decoding": self.stats.decode_wait_s,
            "encoding": self.stats.encode_s,
            "writing": self.stats.write_wait_s,
        }
        slowest = max(spent, key=lambda stage: spent[stage])
        return f"the limit was {slowest}, {spent[slowest] / (sum(spent.values()) or 1):.0%} of it"


@dataclass
class ExtractResult:
    """What `extract` did, set by set."""

    sets: list[SetResult]
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"sets": [made.to_json() for made in self.sets], "dry_run": self.dry_run}

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [made.to_text(self.dry_run) for made in self.sets]
        if self.dry_run:
            return "\n".join([*lines, "next: the same command without --dry-run"])
        lines += [f"wrote {made.folder}" for made in self.sets if made.missing_shards]
        return "\n".join([*lines, "next: featcache train-adaptor"])


@dataclass
class _Prepared:
    """One feature set that is planned, and everything its tasks need."""

    located: LocatedEncoder
    spec: FeatureSetSpec
    writer: FeatureSetWriter
    missing: list[int]
    parameters: int


def _count(number: int, noun: str) -> str:
    """A number with its noun, e.g. `1 shard`, `2 shards`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def extract(
    workspace: Workspace,
    config: ExtractConfig,
    *,
    backbone: str | None = None,
    text_encoder: str | None = None,
    manifest: str | None = None,
    run: str | None = None,
    weights: Mapping[str, Path] | None = None,
) -> ExtractResult:
    """Encode a manifest's images and texts; complete shards are kept, missing ones are made.

    Args:
        workspace: Where the manifest is found and the feature sets go; both become current.
        config: How to run.
        backbone: Image encoder; None: the run's, else the current set's; `none`: no images.
        text_encoder: Text encoder; None: the run's, else the current set's, else `cxr-bert`;
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
    requests = _requests(workspace, config, (backbone, text_encoder), run, tables)
    requests = assign_weights(requests, weights or {})
    device = resolve_device(config.device)
    prepared = [
        _prepare(workspace, tables, request, located, config)
        for request, located in zip(requests, locate_all(requests), strict=True)
    ]
    results = [_planned(one, tables) for one in prepared]
    if not config.dry_run:
        _make(prepared, results, tables, config, device)
        workspace.use(**{one.spec.modality: one.writer.folder.name for one in prepared})
        _check_failures(results, config.max_failures)
    return ExtractResult(results, config.dry_run)


def _requests(
    workspace: Workspace,
    config: ExtractConfig,
    names: tuple[str | None, str | None],
    run: str | None,
    tables: Manifest,
) -> list[EncoderRequest]:
    """The encoders of this command, with the sizes typed in it."""
    images = choose_request(workspace, "image", names[0], run)
    texts = choose_request(workspace, "text", names[1], run)
    if texts is not None and not tables.has_texts:
        note("the manifest has no texts: images only")
        texts = None
    if images is None and names[0] is None and names[1] is None:
        raise UsageError(
            "no image encoder is named, and no image feature set is current",
            where="--backbone",
            fix="featcache extract --backbone lite0-demo (or vit-b, rad-dino, ...)",
        )
    requests = [request for request in (images, texts) if request is not None]
    if not requests:
        raise UsageError("there is nothing to encode: both sides are none", where="--backbone")
    typed = config.model_dump(include={"dtype", "batch_size", "shard_mb"})
    sizes = {"image": {"image_size": config.image_size}, "text": {"max_tokens": config.max_tokens}}
    return [
        request.model_copy(
            update={k: v for k, v in (typed | sizes[request.modality]).items() if v is not None}
        )
        for request in requests
    ]


def _prepare(
    workspace: Workspace,
    tables: Manifest,
    request: EncoderRequest,
    located: LocatedEncoder,
    config: ExtractConfig,
) -> _Prepared:
    """Build the encoder once to learn its layout, and lay out the set's folder."""
    autocast = "bfloat16" if resolve_device(config.device).startswith("cuda") else None
    encoder = load_encoder(located)
    spec = encoder.spec(dtype=request.dtype, batch_size=request.batch_size, autocast=autocast)
    if request.modality == "image":
        ids: Sequence[str] = tables.keys
        files = [tables.image_file(row) for row in range(len(ids))]
        hashes: Sequence[str] = [
            _file_hash(key, file) for key, file in zip(ids, files, strict=True)
        ]
    else:
        ids = hashes = tables.unique_texts()[0]
    folder = workspace.folder(request.modality) / located.name
    plan = plan_shards(
        spec,
        ids,
        hashes,
        shard_bytes=request.shard_mb << 20,
        ragged_rows=RAGGED_SHARD_ROWS * request.shard_mb // 512,
    )
    writer = FeatureSetWriter.create(folder, spec, plan, tables.name)
    save_request(folder, request)
    writer.remove_dead_partials()
    if config.retry_failed:
        failed = set(writer.read_failures())
        writer.discard([s.number for s in writer.shards if failed.intersection(s.keys)])
    return _Prepared(located, spec, writer, writer.missing(), encoder.num_parameters)


def _file_hash(key: str, file: Path) -> str:
    """The identity of a row's input: its key, path, size and time of change."""
    try:
        stat = file.stat()
    except OSError:
        return row_hash(key, str(file), -1, -1)
    return row_hash(key, str(file), stat.st_size, stat.st_mtime_ns)


def _planned(one: _Prepared, tables: Manifest) -> SetResult:
    """A set's result before anything is made."""
    shards = one.writer.shards
    return SetResult(
        name=one.spec.title,
        dataset=tables.title,
        folder=one.writer.folder,
        rows=sum(shard.num_rows for shard in shards),
        shards=len(shards),
        missing_shards=len(one.missing),
        missing_rows=sum(shards[number].num_rows for number in one.missing),
        row_bytes=one.spec.row_bytes,
        failed_rows=len(one.writer.read_failures()),
    )


def _make(
    prepared: Sequence[_Prepared],
    results: Sequence[SetResult],
    tables: Manifest,
    config: ExtractConfig,
    device: str,
) -> None:
    """Make all missing shards of all sets on one cluster."""
    if not any(one.missing for one in prepared):
        return
    environments = local_workers(device, config.workers, config.threads)
    threads = config.threads or worker_threads(len(environments))
    try:
        with connect(config.scheduler, environments) as client:
            for one, result in zip(prepared, results, strict=True):
                if one.missing:
                    _make_set(client, one, result, tables, (threads, device))
    except KeyboardInterrupt:
        kept = sum(len(one.writer.shards) - len(one.writer.missing()) for one in prepared)
        raise InterruptedByUserError(
            f"stopped by the user; {_count(kept, 'complete shard')} stay",
            where=prepared[0].writer.folder.parent.parent,
            fix="the same command goes on from there",
        ) from None


def _make_set(
    client: Any, one: _Prepared, result: SetResult, tables: Manifest, place: tuple[int, str]
) -> None:
    """Make the missing shards of one set, with progress."""
    threads, device = place
    pace = Pace(one.spec.batch_size, threads, device, one.spec.autocast)
    jobs = [
        ShardJob(one.located, one.writer.folder, tables.folder, tables.meta.hash, number, pace)
        for number in one.missing
    ]
    _announce(result, one)
    started = time.monotonic()
    unit = "images" if one.spec.modality == "image" else "texts"
    done = result.rows - result.missing_rows
    seen = [done]
    with task(f"extract {result.name}", result.rows, unit, done) as progress:

        def on_rows(count: int) -> None:
            seen[0] += count
            failed = len(result.stats.failures)
            progress.update(seen[0], note=f"{failed} unreadable" if failed else "")

        for stats in run_jobs(client, jobs, on_rows):
            result.stats.add(stats)
    result.elapsed_s = time.monotonic() - started
    result.failed_rows = len(one.writer.read_failures())
    one.writer.write_quality(
        {
            "parameters": one.parameters,
            "rows_per_s": round(result.missing_rows / max(result.elapsed_s, 1e-9), 2),
            "truncated_texts": result.stats.truncated,
            "device": device,
            "threads": threads,
        }
    )


def _announce(result: SetResult, one: _Prepared) -> None:
    """The first line of a long job: what, how much, from where on."""
    stored = f", {size(result.rows * result.row_bytes)}" if result.row_bytes else ""
    line = (
        f"extract {result.name} of {result.dataset}  {result.rows:,} rows -> "
        f"{_count(result.shards, 'shard')}{stored}, {one.spec.dtype}"
    )
    kept = result.shards - result.missing_shards
    note(line + (f"   {kept} complete already, going on" if kept else ""))


def _check_failures(results: Sequence[SetResult], allowed: float) -> None:
    """Fail, after everything is stored, when too many rows were unreadable."""
    for result in results:
        limit = allowed * result.rows if allowed < 1 else allowed
        if result.failed_rows > limit:
            raise EncoderError(
                f"{_count(result.failed_rows, 'unreadable row')} of {result.rows:,} in "
                f"{result.name}, more than the {limit:g} allowed; all others are stored",
                where=result.folder / "failures.parquet",
                fix="mend the files and run again, or --set max_failures=COUNT",
            )
