"""Rivals that load one sample at a time, each stored and read as its own pages say.

A rival writes the rows of a set in its own format and gives a torch `DataLoader` over them. None
is a dependency: the extra `bench` has them, and one that cannot be imported is left out by name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float16
from torch.utils.data import DataLoader, Dataset

from featcache.cache.reader import FeatureSet

COLUMN = "tokens"
ROWS_AT_ONCE = 64
SHARDS = 8  # of formats that store many rows in a file

Tokens = Float16[np.ndarray, "L D"]


@dataclass(frozen=True)
class SamplePeer:
    """A rival's format and loader.

    Attributes:
        name: As printed.
        packages: What it needs to import.
        write: Puts all rows of a set into an empty folder.
        load: Its shuffled loader over that folder, for a batch size and a number of workers.
        pick: What the tokens of one of its batches are.
    """

    name: str
    packages: tuple[str, ...]
    write: Callable[[Path, FeatureSet], None]
    load: Callable[[Path, int, int], Iterable[Any]]
    pick: Callable[[Any], torch.Tensor] = field(default=lambda batch: batch)

    def missing(self) -> list[str]:
        """Packages that are not installed here."""
        return missing_packages(self.packages)


def missing_packages(names: Sequence[str]) -> list[str]:
    """Packages that are not installed; a plain folder of such a name is none."""
    found = {name: find_spec(name) for name in names}
    return [name for name, spec in found.items() if spec is None or spec.origin is None]


def iterate_samples(features: FeatureSet) -> Iterator[Tokens]:
    """The rows of a set, one after the other."""
    for start in range(0, features.num_rows, ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, features.num_rows))
        yield from features.read_tokens(rows)


def shape_of(features: FeatureSet) -> tuple[int, int, int]:
    """Rows, tokens, width."""
    return features.num_rows, features.spec.num_tokens or 0, features.spec.dim


class Samples(Dataset[torch.Tensor]):
    """Rows of something that is indexed like an array, opened by the process that reads it.

    Args:
        count: Rows.
        open_array: Gives the array.
    """

    def __init__(self, count: int, open_array: Callable[[], Any]):
        self._count, self._open = count, open_array
        self._array: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> torch.Tensor:
        if self._array is None:
            self._array = self._open()
        return torch.from_numpy(np.array(self._array[row]))


def usual_loader(
    dataset: Any, batch_size: int | None, workers: int, make: Callable[..., Any] = DataLoader
) -> Any:
    """A shuffled DataLoader whose workers stay for the next epoch.

    Args:
        dataset: What it loads; a stream shuffles by itself.
        batch_size: None where the dataset makes the batches.
        workers: Processes; 0: the consumer itself.
        make: A rival's own kind of DataLoader.
    """
    shuffles = isinstance(dataset, torch.utils.data.IterableDataset) or batch_size is None
    options = {} if shuffles else {"shuffle": True}
    return make(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )


def write_npy(folder: Path, features: FeatureSet) -> None:
    """All rows as one array in `rows.npy`."""
    stored = np.lib.format.open_memmap(
        folder / "rows.npy", mode="w+", dtype=np.float16, shape=shape_of(features)
    )
    for row, tokens in enumerate(iterate_samples(features)):
        stored[row] = tokens
    stored.flush()


def _count_of(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


def _load_npy(folder: Path, batch_size: int, workers: int) -> Any:
    path = folder / "rows.npy"
    dataset = Samples(_count_of(path), partial(np.load, path, mmap_mode="r"))
    return usual_loader(dataset, batch_size, workers)


def _open_h5(path: Path) -> Any:
    return h5py.File(path, "r")[COLUMN]


def _write_h5(folder: Path, features: FeatureSet) -> None:
    with h5py.File(folder / "rows.h5", "w") as file:
        stored = file.create_dataset(COLUMN, shape_of(features), dtype=np.float16)
        for row, tokens in enumerate(iterate_samples(features)):
            stored[row] = tokens


def _load_h5(folder: Path, batch_size: int, workers: int) -> Any:
    with h5py.File(folder / "rows.h5", "r") as file:
        count = len(file[COLUMN])
    dataset = Samples(count, partial(_open_h5, folder / "rows.h5"))
    return usual_loader(dataset, batch_size, workers)


def _write_webdataset(folder: Path, features: FeatureSet) -> None:
    wds = import_module("webdataset")
    rows = -(-features.num_rows // SHARDS)
    with wds.ShardWriter(
        str(folder / "rows-%04d.tar"), maxcount=rows, maxsize=2**40, verbose=0
    ) as writer:
        for row, tokens in enumerate(iterate_samples(features)):
            writer.write({"__key__": f"{row:07d}", "npy": tokens})


def _load_webdataset(folder: Path, batch_size: int, workers: int) -> Any:
    wds = import_module("webdataset")
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = wds.WebDataset(files, shardshuffle=len(files)).shuffle(batch_size).decode()
    return usual_loader(stream.to_tuple("npy").batched(batch_size), None, workers, wds.WebLoader)


def _first(batch: Sequence[Any]) -> torch.Tensor:
    return torch.as_tensor(batch[0])


def _column(batch: Any) -> torch.Tensor:
    return torch.as_tensor(batch[COLUMN])


def _row_of(features: FeatureSet, row: int) -> dict[str, Any]:
    return {COLUMN: features.read_tokens(np.array([row]))[0]}


def _write_litdata(folder: Path, features: FeatureSet) -> None:
    import_module("litdata").optimize(
        fn=partial(_row_of, features),
        inputs=list(range(features.num_rows)),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def _load_litdata(folder: Path, batch_size: int, workers: int) -> Any:
    litdata = import_module("litdata")
    stream = litdata.StreamingDataset(str(folder), shuffle=True)
    return usual_loader(stream, batch_size, workers, litdata.StreamingDataLoader)


def _write_mosaicml(folder: Path, features: FeatureSet) -> None:
    columns = {COLUMN: "ndarray:float16:" + ",".join(map(str, shape_of(features)[1:]))}
    with import_module("streaming").MDSWriter(out=str(folder), columns=columns) as writer:
        for tokens in iterate_samples(features):
            writer.write({COLUMN: tokens})


def _load_mosaicml(folder: Path, batch_size: int, workers: int) -> Any:
    streaming = import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()
    stream = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    return usual_loader(stream, batch_size, workers, streaming.StreamingDataLoader)


def _write_zarr(folder: Path, features: FeatureSet) -> None:
    shape = shape_of(features)
    stored = import_module("zarr").create_array(
        store=str(folder / "rows.zarr"),
        shape=shape,
        dtype="float16",
        chunks=(1, *shape[1:]),  # with shards it is slower
        compressors=None,
    )
    for row, tokens in enumerate(iterate_samples(features)):
        stored[row] = tokens


def _load_zarr(folder: Path, batch_size: int, workers: int) -> Any:
    opened = partial(import_module("zarr").open_array, str(folder / "rows.zarr"), mode="r")
    return usual_loader(Samples(opened().shape[0], opened), batch_size, workers)


def _hf_rows(features: FeatureSet) -> Iterator[dict[str, Any]]:
    for tokens in iterate_samples(features):
        yield {COLUMN: tokens}


def _write_hf(folder: Path, features: FeatureSet) -> None:
    hf = import_module("datasets")
    hf.disable_progress_bars()
    column = hf.Array2D(shape=shape_of(features)[1:], dtype="float16")
    made = hf.Dataset.from_generator(
        _hf_rows,
        features=hf.Features({COLUMN: column}),
        gen_kwargs={"features": features},
        cache_dir=str(folder / "cache"),
        writer_batch_size=ROWS_AT_ONCE,
    )
    made.save_to_disk(str(folder / "rows"))


def _load_hf(folder: Path, batch_size: int, workers: int) -> Any:
    stored = import_module("datasets").load_from_disk(str(folder / "rows"))
    return usual_loader(stored.with_format("torch", dtype=torch.float16), batch_size, workers)


SAMPLE_PEERS = (
    SamplePeer("h5py", (), _write_h5, _load_h5),
    SamplePeer("npy memmap", (), write_npy, _load_npy),
    SamplePeer("webdataset", ("webdataset",), _write_webdataset, _load_webdataset, _first),
    SamplePeer("litdata", ("litdata",), _write_litdata, _load_litdata, _column),
    SamplePeer("mosaicml streaming", ("streaming",), _write_mosaicml, _load_mosaicml, _column),
    SamplePeer("zarr", ("zarr",), _write_zarr, _load_zarr),
    SamplePeer("HF datasets", ("datasets",), _write_hf, _load_hf, _column),
)
