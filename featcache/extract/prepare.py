"""Before anything is encoded: which encoders, which rows, and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import RAGGED_SHARD_ROWS, FeatureSetSpec, plan_shards, row_hash
from featcache.console import note
from featcache.device import resolve_device
from featcache.encoders.decode import VIEWS
from featcache.encoders.interface import LocatedEncoder, Modality, load_encoder
from featcache.encoders.request import EncoderRequest, choose_request, save_request
from featcache.errors import UsageError
from featcache.extract.config import ExtractConfig
from featcache.extract.result import SetResult
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace


@dataclass
class Prepared:
    """One feature set that is planned, and everything its tasks need.

    Attributes:
        located: Its encoder.
        spec: How its rows are made.
        writer: Its folder.
        missing: Numbers of the shards to make.
        parameters: Of the encoder.
    """

    located: LocatedEncoder
    spec: FeatureSetSpec
    writer: FeatureSetWriter
    missing: list[int]
    parameters: int

    def planned(self, tables: Manifest) -> SetResult:
        """The set's result before anything is made."""
        shards = self.writer.shards
        return SetResult(
            name=self.spec.title,
            dataset=tables.title,
            folder=self.writer.folder,
            rows=sum(shard.num_rows for shard in shards),
            shards=len(shards),
            missing_shards=len(self.missing),
            missing_rows=sum(shards[number].num_rows for number in self.missing),
            row_bytes=self.spec.row_bytes,
            failed_rows=len(self.writer.read_failures()),
        )


@dataclass(frozen=True)
class Admission:
    """Which differences between a manifest and a set are taken in; see `FeatureSetWriter`."""

    append: bool = False
    rows_changed: bool = False


def choose_encoders(
    workspace: Workspace,
    config: ExtractConfig,
    names: tuple[Sequence[str], Sequence[str]],
    run: str | None,
    tables: Manifest,
) -> list[EncoderRequest]:
    """The encoders of a command, with the sizes typed in it.

    Args:
        workspace: Gives the current sets and what was asked for earlier.
        config: The sizes.
        names: Image and text encoders as typed; empty: the run's, else the current one.
        run: A run whose encoders to take.
        tables: The manifest.

    Raises:
        UsageError: None is named, or there is nothing to encode.
    """
    images = _chosen(workspace, "image", _with_views(names[0], config.views), run)
    texts = _chosen(workspace, "text", names[1], run)
    if texts and not tables.has_texts:
        note("the manifest has no texts: images only")
        texts = []
    if not images and not names[0] and not names[1]:
        raise UsageError(
            "no image encoder is named, and no image feature set is current",
            where="--backbone",
            fix="featcache extract --backbone lite0-demo (or vit-b, rad-dino, ...)",
        )
    if not images and not texts:
        raise UsageError("there is nothing to encode: both sides are none", where="--backbone")
    return [_sized(request, config) for request in [*images, *texts]]


def _with_views(names: Sequence[str], views: int) -> list[str]:
    """Each name with the first views of the list."""
    extra = [f"@{view}" for view in VIEWS[1:views]]
    return [name + suffix for name in names for suffix in ["", *extra]]


def _chosen(
    workspace: Workspace, modality: Modality, names: Sequence[str], run: str | None
) -> list[EncoderRequest]:
    """The requests of one side, each name once."""
    asked: list[str | None] = [*dict.fromkeys(names)]
    found = [choose_request(workspace, modality, one, run) for one in asked or [None]]
    return [request for request in found if request is not None]


def _sized(request: EncoderRequest, config: ExtractConfig) -> EncoderRequest:
    """A request with the sizes that were typed for its side laid over it."""
    typed = {"dtype", "batch_size", "shard_mb", "layers"}
    typed |= {"image_size", "pool_grid", "decode"} if request.modality == "image" else set()
    typed |= {"max_tokens"} if request.modality == "text" else set()
    values = {name: getattr(config, name) for name in typed}
    return request.model_copy(update={k: v for k, v in values.items() if v is not None})


def prepare(
    folder: Path,
    tables: Manifest,
    request: EncoderRequest,
    located: LocatedEncoder,
    device: str,
    admission: Admission,
) -> Prepared:
    """Build the encoder once to learn its layout, and lay out the set's folder.

    Args:
        folder: The set's folder.
        tables: The manifest.
        request: What was asked for.
        located: Its encoder.
        device: As typed.
        admission: Which differences from an existing set are taken in.

    Raises:
        UsageError: A GPU is to decode, and there is none.
        StaleFeatureSetError: A set of that name was made otherwise.
        CacheError: It holds other rows.
    """
    on_gpu = resolve_device(device).startswith("cuda")
    if request.decode == "gpu" and not on_gpu:
        raise UsageError(
            "JPEGs can be decoded on a GPU only where the encoder runs on one",
            where="--decode gpu",
            fix="leave out --decode, or use a machine with a CUDA device",
        )
    autocast = "bfloat16" if on_gpu else None
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
    plan = plan_shards(
        spec,
        ids,
        hashes,
        shard_bytes=request.shard_mb << 20,
        ragged_rows=RAGGED_SHARD_ROWS * request.shard_mb // 512,
    )
    writer = FeatureSetWriter.create(
        folder,
        spec,
        plan,
        tables.name,
        append=admission.append,
        rows_changed=admission.rows_changed,
    )
    save_request(folder, request)
    writer.remove_dead_partials()
    return Prepared(located, spec, writer, writer.missing(), encoder.num_parameters)


def _file_hash(key: str, file: Path) -> str:
    """The identity of a row's input: its key, path, size and time of change."""
    try:
        stat = file.stat()
    except OSError:
        return row_hash(key, str(file), -1, -1)
    return row_hash(key, str(file), stat.st_size, stat.st_mtime_ns)
