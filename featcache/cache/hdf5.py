"""The HDF5 skeleton around a shard's arrays.

Files that exist already are never opened here: `libhdf5_child.py` says why, and does it.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5p, h5s, h5t

from featcache.cache.header import ALIGNMENT, ATTRIBUTE, ATTRIBUTE_BYTES, USER_BLOCK, Place
from featcache.errors import ShardError


def write_skeleton(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    make_text: Callable[[int, Mapping[str, Place]], bytes],
) -> tuple[bytes, dict[str, Place]]:
    """Make an HDF5 file whose arrays have their place but no content.

    The attribute holds the file's own size and offsets. So the file is made twice: with a blank
    attribute, to learn them, and with the real one. Its size is fixed, so the layout is the same.

    Args:
        path: File to make, overwritten.
        shapes: Shape and dtype of each array, in the order of the format.
        make_text: Turns file size and places into the header's JSON.

    Returns:
        That JSON, and each array's place.

    Raises:
        ShardError: libhdf5 lays the second file out otherwise than the first.
        OSError: It could not write, with the system's reason.
    """
    blank = _build(path, shapes, b"")
    text = make_text(*blank)
    if _build(path, shapes, text) != blank:
        raise ShardError(
            f"libhdf5 {h5py.version.hdf5_version} lays out equal files differently", where=path
        )
    return text, blank[1]


def _build(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], text: bytes
) -> tuple[int, dict[str, Place]]:
    """Write the whole file once; its size and the arrays' places."""
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_userblock(USER_BLOCK)
    creation.set_obj_track_times(False)  # of the root group, else each second gives other bytes
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    access.set_alignment(1, ALIGNMENT)
    # Closing the file must close the arrays too: a profiler that samples stack frames, as Dask's
    # does, can keep them alive beyond their function, and libhdf5 then goes on in the open file.
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    # Network file systems without locks refuse the call; the partial's name is the lock.
    access.set_file_locking(False, True)
    file = h5f.create(os.fsencode(path), h5f.ACC_TRUNC, creation, access)
    try:
        places = {name: _add(file, name, *shape) for name, shape in shapes.items()}
        kind = _text_type(ATTRIBUTE_BYTES)
        root = h5g.open(file, b"/")
        attribute = h5a.create(root, ATTRIBUTE.encode(), kind, h5s.create(h5s.SCALAR))
        attribute.write(np.array(text, dtype=f"S{ATTRIBUTE_BYTES}"), mtype=kind)
        del attribute, root
    finally:
        try:
            file.close()
        except RuntimeError as error:  # it says there, in its own words, that it could not flush
            raise OSError(_system_reason(error), f"libhdf5: {error}") from None
    return path.stat().st_size, places


def _system_reason(error: Exception) -> int:
    """The system's error number in a message of libhdf5; 0 when there is none."""
    number = re.search(r"errno = (\d+)", str(error))
    return int(number.group(1)) if number else 0


def _add(file: Any, name: str, shape: tuple[int, ...], dtype: str) -> Place:
    """Add one contiguous array, allocated at once and never filled."""
    layout = h5p.create(h5p.DATASET_CREATE)
    layout.set_layout(h5d.CONTIGUOUS)
    layout.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    kind = _hdf5_type(dtype)
    array = h5d.create(file, name.encode(), kind, h5s.create_simple(shape), dcpl=layout)
    # An array without bytes has no storage; the format gives it the first place there is.
    offset = array.get_offset() if 0 not in shape else USER_BLOCK
    return Place(int(offset), shape, dtype)


def _text_type(size: int) -> Any:
    """Fixed-length UTF-8, padded with zeros."""
    kind = h5t.C_S1.copy()
    kind.set_size(size)
    kind.set_cset(h5t.CSET_UTF8)
    kind.set_strpad(h5t.STR_NULLPAD)
    return kind


def _hdf5_type(dtype: str) -> Any:
    """The HDF5 type of a format's dtype; bool is h5py's enumeration of FALSE and TRUE."""
    if dtype.startswith("S"):
        return _text_type(int(dtype[1:]))
    return h5t.py_create(Place(0, (), dtype).numpy_type, logical=True)
