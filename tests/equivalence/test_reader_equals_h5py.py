"""Our reader, which never calls libhdf5, gives the very rows that h5py gives."""

import tempfile
from pathlib import Path

import h5py
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.cache.feature_set import FeatureSet

layouts = st.fixed_dictionaries(
    {
        "modality": st.sampled_from(["image", "text"]),
        "dtype": st.sampled_from(["float16", "float32", "int8"]),
        "dim": st.integers(1, 9),
        "pooled_dim": st.none() | st.integers(1, 5),
    }
)


@st.composite
def batches(draw, num_rows):
    """The rows 0 to `num_rows`, each once, in any order, cut into calls of any size."""
    order = draw(st.permutations(range(num_rows)))
    cuts = sorted(draw(st.sets(st.integers(1, num_rows), max_size=4)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, num_rows], strict=True) if a < b]


def from_h5py(path, row):
    """Tokens, flag and pooled vector of a row, the way of docs/format.md."""
    with h5py.File(path, "r") as shard:
        if "offsets" in shard:
            first, last = shard["offsets"][row : row + 2]
            tokens = shard["tokens"][first:last]
            scale = shard["scale_token"][first:last] if "scale_token" in shard else None
        else:
            tokens = shard["tokens"][row]
            scale = shard["scale_token"][row] if "scale_token" in shard else None
        if scale is not None:
            tokens = tokens.astype(np.float32) * scale.astype(np.float32)[:, None]
            tokens = tokens * shard["scale_channel"][:]
        pooled = shard["pooled"][row] if "pooled" in shard else None
        return shard["keys"][row].decode(), tokens, bool(shard["valid"][row]), pooled


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_reader_equals_h5py_for_any_layout_and_order_of_writes(build, data):
    spec = build.make_spec(**data.draw(layouts))
    num_rows = data.draw(st.integers(1, 9), "rows")
    content = build.make_content(
        spec,
        num_rows,
        seed=data.draw(st.integers(0, 100)),
        failed=data.draw(st.sets(st.integers(0, num_rows - 1), max_size=2)),
        prefix=data.draw(st.sampled_from(["key", "Größe", "k" * 120])),
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = build.start_set(Path(folder) / "set", spec, content, rows_per_shard=16)
        order = data.draw(batches(num_rows), "batches")
        path = build.write_shard(writer.folder, spec, content, writer.shards[0], batches=order)
        features = FeatureSet.open(writer.folder)
        for row in range(num_rows):
            key, tokens, valid, pooled = from_h5py(path, row)
            asked = np.array([row])
            ours = features.read_tokens(asked, verify=True)
            assert features.keys[row] == key == content.keys[row]
            assert features.valid[row] == valid == (row not in content.failed)
            assert ours.reshape(-1, spec.dim).tobytes() == tokens.tobytes()
            assert ours.dtype == tokens.dtype
            if spec.dtype != "int8":
                assert tokens.tobytes() == build.expected_tokens(spec, content, [row]).tobytes()
            if pooled is not None:
                assert features.pooled(asked)[0].tobytes() == pooled.tobytes()
