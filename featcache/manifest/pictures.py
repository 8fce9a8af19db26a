"""Checks that need decoded pictures, or a second data set: checks 6, 8 and 9.

Without a full decode they say so, and sizes are those of the files' headers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32, Int64

from featcache.config import read_json
from featcache.errors import CacheError
from featcache.manifest.checks import MASK_COLUMN
from featcache.manifest.decoded import Decoded, read_decoded, read_stated_sizes
from featcache.manifest.finding import NUM_EXAMPLES, Finding, finding
from featcache.manifest.masks import mask_size
from featcache.manifest.similar import alike_elsewhere, near_pairs
from featcache.manifest.table import Manifest


def decode_findings(manifest: Manifest, decoded: Decoded | None) -> Iterator[Finding]:
    """Checks 6 and 8: files that cannot be decoded, and pictures that look alike.

    Args:
        manifest: That was decoded.
        decoded: What was found; None without a decode.
    """
    if decoded is None:
        yield finding(6, 0, "pictures were not decoded (--decode)", warn=False)
        yield finding(8, 0, "pictures were not compared by their looks (--decode)", warn=False)
        return
    bad = np.flatnonzero(~decoded.is_readable)
    reasons = Counter(decoded.reasons[row] for row in bad.tolist())
    said = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    text = f"{len(bad):,} of {len(decoded.keys):,} pictures cannot be decoded"
    examples = [decoded.keys[row] for row in bad[:NUM_EXAMPLES].tolist()]
    yield finding(6, len(bad), text + (f": {said}" if said else ""), examples)
    yield from _alike(manifest, decoded)


def size_findings(manifest: Manifest, shape: Int32[np.ndarray, "N 2"]) -> Iterator[Finding]:
    """Check 6: pictures of another size than the data set's table, or their mask, says.

    Args:
        manifest: Of any reader.
        shape: Height and width of each row's picture; -1 where unknown.
    """
    stated = read_stated_sizes(manifest)
    if stated is not None:
        yield _size_finding(manifest, shape, stated, "`Rows` and `Columns` of their table")
    if MASK_COLUMN in manifest.images.column_names:
        sizes = [mask_size(text or "") for text in manifest.images[MASK_COLUMN].to_pylist()]
        yield _size_finding(manifest, shape, np.array(sizes, dtype=np.int64), "their masks")


def _size_finding(
    manifest: Manifest,
    shape: Int32[np.ndarray, "N 2"],
    stated: Int64[np.ndarray, "N 2"],
    whose: str,
) -> Finding:
    """How many pictures have another size than stated, of those for which both are known."""
    is_known = (shape > 0).all(axis=1) & (stated > 0).all(axis=1)
    differs = np.flatnonzero(is_known & (shape != stated).any(axis=1))
    text = f"{len(differs):,} of {int(is_known.sum()):,} pictures have another size than {whose}"
    return finding(6, len(differs), text, [manifest.keys[row] for row in differs.tolist()])


def _codes(column: pa.ChunkedArray) -> Int64[np.ndarray, " N"]:
    """Values as numbers; -1 for null."""
    indices = column.combine_chunks().dictionary_encode().indices
    codes: Int64[np.ndarray, " N"] = pc.fill_null(indices, -1).to_numpy().astype(np.int64)
    return codes


def _alike(manifest: Manifest, decoded: Decoded) -> Iterator[Finding]:
    """Check 8: pictures that look like another one, of another patient, in another split."""
    once, node = decoded.nodes()
    pairs = near_pairs(once)
    each = np.arange(len(node))
    for words, group in (
        ("look like another one", each),
        ("look like one of another patient", _codes(manifest.images["subject_id"])),
        ("look like one in another split", _codes(manifest.images["split"])),
    ):
        is_alike = alike_elsewhere(node, pairs, group)
        number = int(np.count_nonzero(is_alike))
        examples = _example_pairs(decoded, node, pairs, group, is_alike)
        yield finding(8, number, f"{number:,} pictures {words} (equal files included)", examples)
    flat = int(np.count_nonzero((node < 0) & decoded.is_readable))
    yield finding(8, flat, f"{flat:,} pictures are of one grey level, and look like none")


def _example_pairs(
    decoded: Decoded,
    node: Int64[np.ndarray, " N"],
    pairs: Int64[np.ndarray, "P 2"],
    group: Int64[np.ndarray, " N"],
    is_alike: Bool[np.ndarray, " N"],
) -> list[str]:
    """A few keys with the key of a picture in another group that looks like theirs."""
    examples: dict[str, None] = {}
    for row in np.flatnonzero(is_alike)[: 2 * NUM_EXAMPLES].tolist():
        beside = pairs[(pairs == node[row]).any(axis=1)].ravel()
        around = np.isin(node, np.append(beside, node[row]))
        other = np.flatnonzero(around & (group >= 0) & (group != group[row]))[0]
        one, two = sorted((decoded.keys[row], decoded.keys[int(other)]))
        examples[f"{one} and {two}"] = None
    return list(examples)


def overlap_findings(
    manifest: Manifest, others: Mapping[str, Path], decoded: Decoded | None
) -> Iterator[Finding]:
    """Check 9: names of image files, and pictures, that other data sets have too.

    Args:
        manifest: Of this data set.
        others: Folders of the manifests of other data sets, by name; damaged ones are skipped.
        decoded: The pictures of this one; None compares by name alone.
    """
    mine = _stems(manifest.images["image_path"])
    for name, folder in sorted(others.items()):
        try:
            values = read_json(folder / "manifest.json")
            theirs = values["hash"]
            paths = pq.read_table(folder / "images.parquet", columns=["image_path"])["image_path"]
        except (pa.ArrowException, OSError, CacheError, LookupError, TypeError):
            text = f"the manifest {name} cannot be read and was not compared with"
            yield finding(9, 1, text)
            continue
        shared = mine & _stems(paths)
        text = f"{len(shared):,} images have the name of an image of the manifest {name}"
        yield finding(9, len(shared), text, shared)
        if decoded is not None:
            yield _shared_pictures(decoded, name, read_decoded(folder, str(theirs)))
    if not others:
        yield finding(9, 0, "no manifest of another data set to compare with", warn=False)


def _shared_pictures(mine: Decoded, name: str, theirs: Decoded | None) -> Finding:
    """Pictures that look like one of another manifest."""
    if theirs is None:
        text = f"the pictures of the manifest {name} were not decoded, so not compared with"
        return finding(9, 0, text, warn=False)
    both = Decoded(
        [*mine.keys, *theirs.keys],
        [*mine.reasons, *theirs.reasons],
        np.concatenate([mine.shape, theirs.shape]),
        np.concatenate([mine.signatures, theirs.signatures]),
    )
    once, node = both.nodes()
    group = np.repeat([0, 1], [len(mine.keys), len(theirs.keys)])
    pairs = near_pairs(once)
    is_alike = alike_elsewhere(node, pairs, group) & (group == 0)
    number = int(np.count_nonzero(is_alike))
    text = f"{number:,} pictures look like one of the manifest {name}"
    return finding(9, number, text, _example_pairs(both, node, pairs, group, is_alike))


def _stems(paths: pa.ChunkedArray) -> set[str]:
    """Names of files without folder and ending."""
    names = pc.replace_substring_regex(paths, r"^.*/", "")
    return set(pc.replace_substring_regex(names, r"\.[A-Za-z.]+$", "").to_pylist())
