"""The two tables that say which images and texts there are, checked before anything is spent.

A manifest is a folder: `images.parquet` has a row for each image, `texts.parquet` one for each pair
of an image and a text, `manifest.json` says where they came from, under which policies, what was
dropped on the way, and the hash of all that. Rows are sorted, so the bytes do not depend on the
order in which a reader found them. Everything downstream joins on `key` and `text_id`.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from featcache import __version__
from featcache.config import (
    Config,
    canonical_json,
    read_json,
    replace_file,
    to_plain,
    validate,
    write_json,
)
from featcache.console import note
from featcache.errors import CacheError, ConfigError, ManifestError
from featcache.manifest.checks import (
    LABEL_PREFIX,
    ROW_COLUMN,
    TextUnit,
    check_images,
    check_texts,
    conflict_sentence,
    conform_images,
    conform_texts,
    distinct_rows,
    take_rows,
    text_id,
    text_ids,
)
from featcache.manifest.units import (
    SENTENCE_POLICY,
    SentenceCounts,
    cut_into_sentences,
)

__all__ = [
    "FunnelStep",
    "Manifest",
    "ManifestMeta",
    "check_funnel",
    "manifest_hash",
    "open_manifest",
    "text_id",
    "text_ids",
    "write_manifest",
]

FORMAT_VERSION = 1
GROUP_ROWS = 1 << 16


class FunnelStep(Config):
    """One step from what a reader found to what a manifest holds."""

    name: str = Field(description="What is counted after this step.")
    count: int = Field(ge=0, description="How many are left.")
    dropped: dict[str, int] = Field(
        default_factory=dict, description="Reason to number; with `count` the step before."
    )


class ManifestMeta(Config):
    """What `manifest.json` says beside the two tables."""

    name: str = Field(description="Name under which the manifest was written.")
    dataset: str = Field(description="Reader that made it.")
    version: int = Field(default=FORMAT_VERSION, description="Version of the tables' layout.")
    hash: str = Field(description="32 hex digits over all rows and policies.")
    made_with: str = Field(default="", description="Version of featcache; not part of the hash.")
    image_root: str = Field(description="Folder that a relative `image_path` starts from.")
    synthetic: bool = Field(default=False, description="Whether a program drew the data.")
    notes: list[str] = Field(
        default_factory=list, description="Sentences that every table of results must carry."
    )
    policies: dict[str, str] = Field(default_factory=dict, description="Choices that were made.")
    funnel: list[FunnelStep] = Field(default_factory=list, description="What was dropped and why.")
    sentences: SentenceCounts | None = Field(
        default=None, description="How reports were cut; none = the texts are whole reports."
    )


@dataclass(frozen=True)
class Manifest:
    """An opened manifest.

    Attributes:
        folder: Where it lies.
        meta: Content of `manifest.json`.
        images: A row for each image, sorted by `key`.
        texts: A row for each image-text pair, sorted by `key` and `text_id`; may be empty.
    """

    folder: Path
    meta: ManifestMeta
    images: pa.Table
    texts: pa.Table

    @property
    def name(self) -> str:
        """Name under which it was written."""
        return self.meta.name

    @property
    def title(self) -> str:
        """The name as lines and tables show it: what a program drew is never called by it alone."""
        return self.name + (" (synthetic stand-in)" if self.meta.synthetic else "")

    @cached_property
    def keys(self) -> list[str]:
        """Key of each image, in row order."""
        keys: list[str] = self.images["key"].to_pylist()
        return keys

    def image_file(self, row: int) -> Path:
        """The file of one image.

        Args:
            row: Row of `images`.
        """
        return Path(self.meta.image_root) / str(self.images["image_path"][row].as_py())

    def splits(self) -> list[str | None]:
        """Split of each image, in row order; None for an image that is in no split."""
        splits: list[str | None] = self.images["split"].to_pylist()
        return splits

    @property
    def label_names(self) -> list[str]:
        """Names of the label columns, without their prefix `label:`."""
        names: list[str] = self.images.column_names
        return [n.removeprefix(LABEL_PREFIX) for n in names if n.startswith(LABEL_PREFIX)]

    @property
    def has_texts(self) -> bool:
        """Whether any image has a text."""
        return bool(self.texts.num_rows > 0)

    def unique_texts(self) -> tuple[list[str], list[str]]:
        """Every text once.

        Returns:
            `text_id`s and texts, in the order in which they first appear in `texts`.
        """
        encoded = self.texts["text_id"].combine_chunks().dictionary_encode()
        first = np.unique(encoded.indices.to_numpy(), return_index=True)[1]
        return encoded.dictionary.to_pylist(), self.texts["text"].take(first).to_pylist()

    def split_counts(self) -> dict[str, int]:
        """Images of each split, under `none` those that are in no split."""
        counts = Counter(split or "none" for split in self.splits())
        return {
            name: counts[name] for name in ("train", "validate", "test", "none") if counts[name]
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values: what it is and what was dropped; no row of it."""
        return {
            **to_plain(self.meta),
            "folder": str(self.folder),
            "images": self.images.num_rows,
            "pairs": self.texts.num_rows,
            "splits": self.split_counts(),
            "labels": self.label_names,
        }

    def to_text(self) -> str:
        """The funnel and the totals, for a person."""
        lines = [f"manifest {self.title}, read as {self.meta.dataset}"]
        for step in self.meta.funnel:
            lines.append(f"  {step.count:>9,}  {step.name}")
            lines += [f"  {-lost:>9,}    {why}" for why, lost in step.dropped.items() if lost]
        splits = ", ".join(f"{name} {count:,}" for name, count in self.split_counts().items())
        lines.append(f"images {self.images.num_rows:,} ({splits}); pairs {self.texts.num_rows:,}")
        if self.meta.sentences is not None:
            lines.append(self.meta.sentences.to_text())
        lines += [f"! {sentence}" for sentence in self.meta.notes]
        return "\n".join(
            [*lines, f"wrote {self.folder}", "next: featcache extract --backbone NAME"]
        )


def check_funnel(funnel: Sequence[FunnelStep], num_images: int) -> list[str]:
    """See that a funnel closes: what a step keeps and drops is what the step before kept.

    Args:
        funnel: Steps in order; the first drops nothing. Steps after the one that counts the
            images may go on to count those with a text.
        num_images: Images that the reader hands over.

    Returns:
        A sentence for each gap.
    """
    problems = []
    for before, step in zip([None, *funnel], funnel, strict=False):
        arrived = step.count + sum(step.dropped.values())
        expected = step.count if before is None else before.count
        if arrived != expected or any(number < 0 for number in step.dropped.values()):
            problems.append(
                f"the funnel does not close at `{step.name}`: {expected:,} came in, "
                f"{arrived:,} are accounted for"
            )
    if funnel and num_images not in [step.count for step in funnel]:
        problems.append(f"no step of the funnel counts the {num_images:,} images handed over")
    return problems


def write_manifest(  # noqa: PLR0913 - the one place where a reader hands over all it knows
    folder: Path,
    images: pa.Table,
    texts: pa.Table | None = None,
    *,
    dataset: str,
    image_root: Path,
    funnel: Sequence[FunnelStep] = (),
    notes: Sequence[str] = (),
    policies: Mapping[str, str] | None = None,
    synthetic: bool = False,
    text_unit: TextUnit = "report",
) -> Manifest:
    """Check two tables and write them as a manifest.

    Identical rows are merged and counted in the funnel. An existing manifest of the same folder is
    replaced; equal input, in whatever order, gives equal bytes.

    Args:
        folder: The manifest's folder; its name becomes the manifest's.
        images: Columns of `images.parquet`. A column `row` (int64) may say which row of the source
            each came from; it is used in messages and not stored.
        texts: Columns of `texts.parquet`, of which `text_id` may be left out; None for no texts.
        dataset: Name of the reader.
        image_root: Folder that relative image paths start from.
        funnel: What the reader dropped on the way, see `check_funnel`.
        notes: Sentences that every table of results must carry.
        policies: Choices that shaped the rows; part of the hash.
        synthetic: Whether a program drew the data.
        text_unit: `sentence` cuts each text into its sentences, each a text of its own.

    Raises:
        ManifestError: The tables cannot be trusted; all problems are named at once.
    """
    numbers = np.arange(1, images.num_rows + 1, dtype=np.int64)
    if ROW_COLUMN in images.column_names:
        numbers = images[ROW_COLUMN].to_numpy().astype(np.int64)
    images = conform_images(images, folder)
    texts = conform_texts(texts, folder)
    rest = [name for name in images.column_names if name != "key"]
    kept, conflicts = distinct_rows(images, ["key"], same=rest)
    kept_texts, text_conflicts = distinct_rows(texts, ["key", "text_id"], same=["unit"])
    problems = check_images(images, numbers)
    if len(conflicts):
        problems.append(conflict_sentence("the same `key`", conflicts, numbers))
    problems += check_texts(texts, images)
    if len(text_conflicts):
        problems.append(f"{len(text_conflicts):,} texts of an image stand there in two units")
    problems += check_funnel(funnel, images.num_rows)
    if text_unit == "sentence" and not texts.num_rows:
        problems.append("there is no text to cut into sentences")
    if problems:
        raise ManifestError("\n  ".join(problems), where=f"{dataset} -> {folder}")
    steps, policies = _with_merge_step(funnel, images.num_rows, len(kept)), dict(policies or {})
    sentences = None
    if text_unit == "sentence":
        texts, sentences = _cut(texts, steps)
        policies["text_unit"] = SENTENCE_POLICY
        kept_texts, _ = distinct_rows(texts, ["key", "text_id"], same=[])
    if len(kept_texts) < texts.num_rows:
        note(f"{texts.num_rows - len(kept_texts):,} identical image-text pairs were merged")
    images, texts = take_rows(images, kept), take_rows(texts, kept_texts)
    meta = ManifestMeta(
        name=folder.resolve().name,
        dataset=dataset,
        hash=manifest_hash(images, texts, policies),
        made_with=__version__,
        image_root=str(image_root.resolve()),
        synthetic=synthetic,
        notes=list(notes),
        policies=policies,
        funnel=steps,
        sentences=sentences,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("images", images), ("texts", texts)):
        replace_file(folder / f"{name}.parquet", _parquet_bytes(table))
    write_json(folder / "manifest.json", to_plain(meta))
    return Manifest(folder, meta, images, texts)


def _with_merge_step(funnel: Sequence[FunnelStep], given: int, kept: int) -> list[FunnelStep]:
    """Complete a funnel by what was merged, so that it ends with the rows that are stored.

    Raises:
        ManifestError: Rows were merged after the reader had gone on to count texts.
    """
    steps = list(funnel) or [FunnelStep(name="images", count=given)]
    if kept < given:
        if steps[-1].count != given:
            raise ManifestError(
                f"{given - kept:,} identical image rows, while the funnel ends with "
                f"`{steps[-1].name}`: merge them before texts are counted",
                where="write_manifest",
            )
        dropped = {"identical row": given - kept}
        steps.append(FunnelStep(name="distinct images", count=kept, dropped=dropped))
    return steps


def _cut(texts: pa.Table, steps: list[FunnelStep]) -> tuple[pa.Table, SentenceCounts]:
    """Texts by sentence; a step is appended when images lose their text by it."""
    before = int(pc.count_distinct(texts["key"]).as_py())
    texts, counts = cut_into_sentences(texts)
    left = int(pc.count_distinct(texts["key"]).as_py())
    if left < before:
        dropped = {"no sentence in its report (kept without text)": before - left}
        if steps[-1].count > before:
            dropped["no report"] = steps[-1].count - before
        steps.append(FunnelStep(name="images with a sentence", count=left, dropped=dropped))
    return texts, counts


def _parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet, without anything that depends on time, place or how it was cut up."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        for start in range(0, max(table.num_rows, 1), GROUP_ROWS):
            writer.write_table(table.slice(start, GROUP_ROWS).combine_chunks())
    return sink.getvalue()


def manifest_hash(images: pa.Table, texts: pa.Table, policies: Mapping[str, str]) -> str:
    """The identity of what a manifest holds: its rows in their stored order, and its policies.

    Where the images lie, the notes, the funnel and the version of featcache are not covered.

    Returns:
        32 hex digits of SHA-256.
    """
    digest = hashlib.sha256(f"manifest {FORMAT_VERSION}\n".encode())
    digest.update(canonical_json(dict(policies)).encode())
    for table in (images, texts):
        digest.update(canonical_json([table.column_names, table.num_rows]).encode())
        for column in table.columns:
            for piece in _column_bytes(column):
                digest.update(piece)
    return digest.hexdigest()[:32]


def _column_bytes(column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """Which values of a column are null, how long each is, and all of them, as plain bytes."""
    yield pc.is_valid(column).to_numpy().tobytes()
    if pa.types.is_int8(column.type):
        yield column.fill_null(0).to_numpy().tobytes()
        return
    filled = column.fill_null("") if column.null_count else column  # a copy of every report
    yield pc.binary_length(filled).to_numpy().astype("<i8").tobytes()
    for chunk in filled.chunks:
        kind = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
        _, offsets, content = chunk.buffers()
        bounds = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1]
        if content is not None and len(chunk):
            yield memoryview(content)[bounds[0] : bounds[-1]]


def open_manifest(folder: Path | str) -> Manifest:
    """Open a manifest and see that its tables are those that were checked.

    Raises:
        ManifestError: It is missing, damaged, of another version, or was changed by hand.
    """
    remake = "make it again: featcache manifest DATASET FOLDER"
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ManifestError("there is no manifest in this folder", where=folder, fix=remake)
    try:
        values = read_json(path)
        version = values.get("version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"the manifest has version {version}, this featcache reads {FORMAT_VERSION}",
                where=path,
                fix=remake,
            )
        meta = validate(ManifestMeta, values, where=path)
    except (CacheError, ConfigError) as error:
        raise ManifestError(error.what, where=path, fix=remake) from None
    images, texts = (_read_parquet(folder / f"{name}.parquet") for name in ("images", "texts"))
    images, texts = conform_images(images, folder), conform_texts(texts, folder)
    have = manifest_hash(images, texts, meta.policies)
    if have != meta.hash:
        raise ManifestError(
            f"the tables are not those that were checked: manifest.json says {meta.hash}, "
            f"they hash to {have}",
            where=folder,
            fix="change the source and make the manifest again, "
            "or pass changed tables to featcache.write_manifest",
        )
    return Manifest(folder, meta, images, texts)


def _read_parquet(path: Path) -> pa.Table:
    """Read one of the two tables."""
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise ManifestError("a table of the manifest is missing", where=path) from None
    except (pa.ArrowException, OSError):
        raise ManifestError("a table of the manifest is damaged", where=path) from None
