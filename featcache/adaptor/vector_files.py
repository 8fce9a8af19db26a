"""Adapted vectors of a whole feature set as files, written batch by batch.

Shapes: `B` batch, `F` the vector's width.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32
from numpy.lib import format as npy

from featcache.adaptor.saved import TrainedAdaptor
from featcache.adaptor.side import ImageSide, TextSide
from featcache.cache.reader import FeatureSet
from featcache.config import explained_refusals
from featcache.console import task
from featcache.errors import CacheError
from featcache.loader.gather import iterate_rows

BATCH_SIZE = 64
GROUP_BYTES = 2**24
"""Vectors that are held before a Parquet row group is written."""

Batches = Iterator[tuple[list[str], Float32[np.ndarray, "B F"]]]


@torch.inference_mode()
def adapted_vectors(features: FeatureSet, trained: TrainedAdaptor, device: str) -> Batches:
    """Keys and vectors of all valid rows of a set, in its order, a batch at a time.

    Args:
        features: Images or texts that the Adaptor may read.
        trained: On `device`.
        device: Where it runs.
    """
    keys, rows = features.keys, np.flatnonzero(features.valid)
    side = ImageSide(trained) if features.spec.modality == "image" else TextSide(trained)
    title, unit = f"adapt {features.spec.title}", f"{features.spec.modality}s"
    done = 0
    with task(title, len(rows), unit=unit) as progress:
        for some, tokens, valid in iterate_rows(features, rows, BATCH_SIZE, **trained.reading):
            given = [tokens.to(device, torch.float32)]
            given += [] if valid is None else [valid.to(device)]
            yield [keys[row] for row in some], side(*given).float().cpu().numpy()
            done += len(some)
            progress.update(done)


def write_vectors(
    folder: Path,
    features: FeatureSet,
    trained: TrainedAdaptor,
    *,
    to: str,
    device: str,
    about: Mapping[str, str],
) -> tuple[int, int]:
    """Write the vectors of a set's valid rows; holds one batch of tokens and one row group.

    Args:
        folder: Where to; the files are `images.*` or `texts.*`.
        features: Images or texts that the Adaptor may read.
        trained: On `device`.
        to: `parquet` or `numpy`.
        device: Where it runs.
        about: Facts that a table carries in its metadata.

    Returns:
        Number of vectors, and their width.

    Raises:
        CacheError: No row is valid, or the disk is full.
    """
    num_rows = int(features.valid.sum())
    if not num_rows:
        raise CacheError(f"no row of {features.spec.title} could be read", where=features.folder)
    batches = adapted_vectors(features, trained, device)
    first = next(batches)
    shape = num_rows, first[1].shape[1]
    place = folder / f"{features.spec.modality}s"
    with explained_refusals(place):
        WRITERS[to](place, chain([first], batches), shape, about)
    return shape


def _write_parquet(
    place: Path, batches: Batches, shape: tuple[int, int], about: Mapping[str, str]
) -> None:
    """One table: `key`, and `vector`, a list of float32 of fixed length."""
    fields = [("key", pa.string()), ("vector", pa.list_(pa.float32(), shape[1]))]
    schema = pa.schema(fields, metadata={"featcache": json.dumps(dict(about))})
    enough = max(1, GROUP_BYTES // (4 * shape[1]))
    with pq.ParquetWriter(f"{place}.parquet", schema) as writer:
        held: list[pa.RecordBatch] = []
        for keys, vectors in batches:
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            columns = [pa.array(keys), pa.FixedSizeListArray.from_arrays(flat, shape[1])]
            held.append(pa.record_batch(columns, schema=schema))
            if sum(batch.num_rows for batch in held) >= enough:
                writer.write_table(pa.Table.from_batches(held))
                held = []
        if held:
            writer.write_table(pa.Table.from_batches(held))


def _write_numpy(
    place: Path, batches: Batches, shape: tuple[int, int], about: Mapping[str, str]
) -> None:
    """The vectors in one file, a text for each in another; no pickles."""
    names: list[str] = []
    # A memory map would be shorter, but a full disk kills a process that writes through one.
    with Path(f"{place}.npy").open("wb") as file:
        head = {"descr": "<f4", "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, head)
        for keys, vectors in batches:
            file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
            names += keys
    np.save(f"{place}_keys.npy", np.array(names), allow_pickle=False)


WRITERS: dict[str, Callable[[Path, Batches, tuple[int, int], Mapping[str, str]], None]] = {
    "parquet": _write_parquet,
    "numpy": _write_numpy,
}
