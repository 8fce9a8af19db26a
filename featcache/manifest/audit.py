"""Checks of a finished manifest that do not stop it: each a sentence with a count.

What makes a manifest wrong is found earlier and is an error (`checks.py` and the readers). What
stands here is what a person should know before spending anything on it. The numbers of the checks
are those of `docs/datasets.md`. Sentences name no identifier; examples are kept apart from them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from jaxtyping import Int64

from featcache.config import to_plain, write_json
from featcache.manifest.checks import LABEL_PREFIX, MASK_COLUMN, patients_in_two_splits
from featcache.manifest.conformity import conformity_findings
from featcache.manifest.decoded import Decoded
from featcache.manifest.files import EMPTY, IMAGE_SUFFIXES, MISSING, NO_PICTURE, glance_at
from featcache.manifest.finding import Finding, finding
from featcache.manifest.pictures import decode_findings, overlap_findings, size_findings
from featcache.manifest.table import Manifest

FILE_NAME = "checks.json"
_PIECE_ROWS = 20_000
_MAX_CLASSES = 24
_LOWER = bytes(range(256)).lower()
_NO_LETTER = bytes(one for one in range(128) if not chr(one).isalpha())
_FRONTAL = re.compile(r"(AP|PA|FRONTAL)\b(?!.*(AXIAL|LLD|RLD|LAT))", re.IGNORECASE)


def audit(
    manifest: Manifest, others: Mapping[str, Path] | None = None, decoded: Decoded | None = None
) -> list[Finding]:
    """Make all checks.

    Args:
        manifest: As a reader wrote it.
        others: Folders of further manifests that may hold the same images, by name.
        decoded: Its pictures after a full decode; without, what needs one says so.

    Returns:
        A finding for each, in the order of their numbers, also where nothing was found.
    """
    found = [
        *conformity_findings(manifest),
        *_rows(manifest),
        *_files(manifest, decoded),
        *decode_findings(manifest, decoded),
        *_splits(manifest),
        *_reports(manifest),
        *overlap_findings(manifest, others or {}, decoded),
        *_labels(manifest),
        *_views(manifest),
        *_classes(manifest),
    ]
    return sorted(found, key=lambda one: one.check)


@dataclass(frozen=True)
class CheckedManifest:
    """A manifest with what its checks found.

    Attributes:
        manifest: As a reader wrote it.
        findings: Of `audit`.
        show_ids: Whether a person sees the examples.
    """

    manifest: Manifest
    findings: list[Finding]
    show_ids: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; examples only where they may be shown."""
        leave = set() if self.show_ids else {"examples"}
        checks = [
            {name: value for name, value in to_plain(one).items() if name not in leave}
            for one in self.findings
        ]
        return {**self.manifest.to_json(), "checks": checks}

    def to_text(self) -> str:
        """The manifest's summary, then a line for each check."""
        *summary, wrote, following = self.manifest.to_text().split("\n")
        lines = [one.to_text(show_ids=self.show_ids) for one in self.findings]
        return "\n".join([*summary, *lines, wrote, following])


def write_findings(checked: CheckedManifest) -> None:
    """Keep the findings beside the tables, in `checks.json`, with the hash they are about."""
    findings = [to_plain(one) for one in checked.findings]
    values = {"manifest": checked.manifest.meta.hash, "checks": findings}
    write_json(checked.manifest.folder / FILE_NAME, values)


def _rows(manifest: Manifest) -> Iterator[Finding]:
    """Checks 2, 3 and 16: keys, the funnel, the hash."""
    number = manifest.images.num_rows
    yield finding(2, number, f"{number:,} keys, each once", warn=False)
    first = manifest.meta.funnel[0].count
    dropped = first - number
    text = f"of {first:,} rows {dropped:,} were dropped or merged; the funnel closes"
    yield finding(3, dropped, text, warn=False)
    pairs = manifest.texts.num_rows
    text = f"hash {manifest.meta.hash} over {number:,} images and {pairs:,} pairs"
    yield finding(16, number + pairs, text, warn=False)


def _files(manifest: Manifest, decoded: Decoded | None) -> Iterator[Finding]:
    """Checks 6 and 8: files from outside, their sizes, and equal ones."""
    root = Path(manifest.meta.image_root)
    paths = manifest.images["image_path"].to_pylist()
    files = glance_at(root, paths)
    for kind, what in (
        (MISSING, "files are not there"),
        (EMPTY, "files have no byte"),
        (NO_PICTURE, "files are web pages or pointers, not pictures"),
    ):
        count = files.count(kind)
        yield finding(6, count, f"{count:,} {what}")
    misnamed = files.misnamed()
    text = f"{len(misnamed):,} files are of another kind than their names say"
    yield finding(6, len(misnamed), text, misnamed)
    extra = _files_without_row(root, files.paths)
    text = f"{len(extra):,} image files beside them are in no row, dropped ones included"
    yield finding(6, len(extra), text, extra, warn=False)
    if decoded is None:
        place = {path: index for index, path in enumerate(files.paths)}
        shape = files.shape[[place[path] for path in paths]]
    else:
        shape = decoded.shape
    yield from size_findings(manifest, shape)
    yield from _copies(manifest, files.copies(root))


def _files_without_row(root: Path, paths: Sequence[str]) -> list[str]:
    """Image files in the folders of the rows that no row names."""
    by_folder: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder[folder].add(name)
    extra = []
    for folder, known in by_folder.items():
        try:
            names = [one.name for one in (root / folder).iterdir()]
        except OSError:  # not there, or not to be listed: its rows are counted as such
            continue
        prefix = f"{folder}/" if folder else ""
        extra += [
            prefix + name
            for name in names
            if name not in known and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return extra


def _copies(manifest: Manifest, groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """Check 8: equal files, within a patient, across patients and across splits."""
    wanted = {path for group in groups for path in group}
    people: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    if wanted:
        columns = (manifest.images[name] for name in ("image_path", "subject_id", "split"))
        for path, subject, split in zip(*(one.to_pylist() for one in columns), strict=True):
            if path in wanted:
                people[path].add(subject)
                splits[path] |= {split} - {None}
    copies = sum(len(group) - 1 for group in groups)
    yield finding(
        8,
        copies,
        f"{copies:,} files repeat another byte for byte, in {len(groups):,} groups",
        [group[0] for group in groups],
    )
    for what, known in (("patients", people), ("splits", splits)):
        crossing = [g for g in groups if len(set().union(*(known[path] for path in g))) > 1]
        text = f"{len(crossing):,} groups of equal files are in more than one of the {what}"
        yield finding(8, len(crossing), text, [group[0] for group in crossing])


def _splits(manifest: Manifest) -> Iterator[Finding]:
    """Check 7: patients in two splits, and how many images a patient has."""
    shared = patients_in_two_splits(manifest.images)
    yield finding(7, shared, f"{shared:,} patients are in more than one split")
    counts = manifest.images.group_by("subject_id").aggregate([("key", "count")])["key_count"]
    largest, number = int(pc.max(counts).as_py()), len(counts)
    text = f"{number:,} patients (or what stands for them), with up to {largest:,} images each"
    yield finding(7, number, text, warn=False)
    unassigned = manifest.images["split"].null_count
    yield finding(7, unassigned, f"{unassigned:,} images are in no split", warn=False)


def _text_facts(
    manifest: Manifest,
) -> tuple[Int64[np.ndarray, " T"], Int64[np.ndarray, " T"], Counter[str], Int64[np.ndarray, " P"]]:
    """Of each different text the words and a hash of its letters; marks; the text of each pair."""
    encoded = manifest.texts["text_id"].combine_chunks().dictionary_encode()
    of_pair = encoded.indices.to_numpy().astype(np.int64)
    first = np.unique(of_pair, return_index=True)[1]
    words = np.zeros(len(first), dtype=np.int64)
    letters = np.zeros(len(first), dtype=np.int64)
    marks: Counter[str] = Counter()
    for start in range(0, len(first), _PIECE_ROWS):  # never all reports as Python objects
        piece = manifest.texts["text"].take(first[start : start + _PIECE_ROWS])
        stop = start + len(piece)
        for mark in ("___", "XXXX"):
            marks[mark] += int(pc.sum(pc.match_substring(piece, mark)).as_py() or 0)
        texts = piece.cast(pa.large_binary()).to_pylist()
        words[start:stop] = [len(text.split()) for text in texts]
        letters[start:stop] = [xxhash.xxh3_64_intdigest(_letters(text)) >> 1 for text in texts]
    return words, letters, marks, of_pair


def _letters(text: bytes) -> bytes:
    """A text's letters without case. A million texts: no regular expression."""
    if text.isascii():
        return text.translate(_LOWER, _NO_LETTER)
    return "".join(filter(str.isalpha, text.decode().lower())).encode()


def _reports(manifest: Manifest) -> Iterator[Finding]:
    """Checks 8 and 13: texts that repeat across splits, their lengths, and marks in them."""
    without = manifest.images.num_rows - int(pc.count_distinct(manifest.texts["key"]).as_py())
    yield finding(13, without, f"{without:,} images have no text", warn=False)
    if not manifest.has_texts:
        return
    words, letters, marks, of_pair = _text_facts(manifest)
    images = np.bincount(of_pair)
    text = f"a text belongs to {images.mean():.1f} images on average, {images.max():,} at most"
    yield finding(8, int(images.max()), text, warn=False)
    image = pc.index_in(manifest.texts["key"], manifest.images["key"].combine_chunks())
    split = manifest.images["split"].combine_chunks().dictionary_encode()
    code = split.indices.fill_null(-1).to_numpy()[image.to_numpy()]
    pairs = np.stack([letters[of_pair], code.astype(np.int64)], axis=1)
    pairs = np.unique(pairs[code >= 0], axis=0)  # no split is not a split
    crossing = int(np.count_nonzero(np.unique(pairs[:, 0], return_counts=True)[1] > 1))
    unit = manifest.texts["unit"][0].as_py()
    sentence = f"{crossing:,} {unit} texts with the same letters are in more than one split"
    yield finding(8, crossing, sentence, warn=unit == "report")
    median, most, largest = (int(np.quantile(words, q)) for q in (0.5, 0.95, 1.0))
    text = f"{len(words):,} different texts, words: median {median}, 95 % {most}, most {largest:,}"
    yield finding(13, len(words), text, warn=False)
    for mark, count in marks.items():
        yield finding(13, count, f"{count:,} texts hold the mark {mark}", warn=False)


def _labels(manifest: Manifest) -> Iterator[Finding]:
    """Checks 10 and 11: masks, and the values of each label."""
    if MASK_COLUMN in manifest.images.column_names:
        masks = manifest.images[MASK_COLUMN]
        annotated = len(masks) - masks.null_count
        empty = int(pc.sum(pc.equal(masks, "")).as_py() or 0)
        text = f"{annotated:,} images are annotated, {empty:,} of them with nothing"
        yield finding(10, annotated, text, warn=False)
    for name in manifest.label_names:
        column = manifest.images[LABEL_PREFIX + name]
        if pa.types.is_int8(column.type):
            counts = Counter(column.to_pylist())
            said = ", ".join(
                f"{word} {counts[value]:,}"
                for word, value in (("1", 1), ("0", 0), ("-1", -1), ("blank", None))
            )
            yield finding(11, counts[1], f"label {name}: {said}", warn=False)
        else:
            blank, number = column.null_count, len(column.unique().drop_null())
            text = f"label {name}: {number:,} classes, {blank:,} blank"
            yield finding(11, number, text, warn=False)


def _views(manifest: Manifest) -> Iterator[Finding]:
    """Check 12: blank and other views."""
    views = Counter(manifest.images["view_position"].to_pylist())
    blank = views.pop(None, 0)
    number = manifest.images.num_rows
    text = f"{blank:,} of {number:,} images have no view ({blank / number:.1%})"
    yield finding(12, blank, text)
    other = sum(count for view, count in views.items() if not _FRONTAL.match(view))
    text = f"{other:,} images are called neither AP nor PA nor frontal"
    yield finding(12, other, text)


def _classes(manifest: Manifest) -> Iterator[Finding]:
    """Check 14: each class by split and by source, and what the source alone tells."""
    for name in manifest.label_names:
        column = LABEL_PREFIX + name
        if pa.types.is_int8(manifest.images[column].type):
            continue
        known = manifest.images.filter(pc.is_valid(manifest.images[column]))
        classes = known[column].to_pylist()
        if not 0 < len(set(classes)) <= _MAX_CLASSES:
            continue
        for by in ("split", "source"):
            yield finding(14, len(classes), _cross(name, by, classes, known[by]), warn=False)
        if len(set(known["source"].to_pylist())) > 1:
            yield _source_alone(name, classes, known)


def _cross(name: str, by: str, classes: Sequence[str], column: pa.ChunkedArray) -> str:
    """A class table in one line."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for one, group in zip(classes, column.to_pylist(), strict=True):
        table[str(group)][one] += 1
    if len(table) > _MAX_CLASSES:  # a column that may name anything, even patients
        return f"{name} by {by}: {len(table):,} different values, too many to list"
    rows = [
        f"{group} ({', '.join(f'{one} {count:,}' for one, count in sorted(counts.items()))})"
        for group, counts in sorted(table.items())
    ]
    return f"{name} by {by}: " + "; ".join(rows)


def _source_alone(name: str, classes: Sequence[str], known: pa.Table) -> Finding:
    """How often the commonest class of an image's source in train is right in test."""
    by_source: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    rows = list(zip(classes, known["source"].to_pylist(), known["split"].to_pylist(), strict=True))
    for one, source, split in rows:
        if split == "train":
            by_source[source][one] += 1
            overall[one] += 1
    tests = [(one, source) for one, source, split in rows if split == "test"]
    if not tests or not overall:
        return finding(14, 0, f"{name}: the source alone cannot be tried", warn=False)
    right = sum(one == _commonest(by_source.get(source, overall)) for one, source in tests)
    base = sum(one == _commonest(overall) for one, _ in tests) / len(tests)
    text = f"{name}: guessed from the source alone {right / len(tests):.1%} of the test images "
    text += f"are right, {base:.1%} by the commonest class"
    return finding(14, right, text, warn=right / len(tests) > base + 0.05)


def _commonest(counts: Counter[str]) -> str:
    """The commonest class, the first by name among equals."""
    return min(counts, key=lambda one: (-counts[one], one))
