"""What stage one does with what an encoder gives."""

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.cache.format import FeatureSetSpec, plan_shards
from featcache.cache.writer import FeatureSetWriter, ShardWriter
from featcache.encoders.decode import Preprocessing
from featcache.encoders.forward import Pace, Times
from featcache.encoders.interface import Encoded
from featcache.encoders.shard import Lane, _store, encode_images
from featcache.errors import CacheError


@pytest.fixture
def shard(tmp_path):
    spec = FeatureSetSpec(
        modality="image",
        encoder="toy",
        source="toy",
        library="timm",
        library_version="0",
        weights_sha256="0" * 64,
        preprocessing={},
        num_prefix_tokens=0,
        grid=(1, 2),
        num_tokens=2,
        dim=3,
        pooled_dim=3,
        batch_size=2,
    )
    plan = plan_shards(spec, ["a", "b"], ["1", "2"])
    folder = FeatureSetWriter.create(tmp_path / "toy", spec, plan, "m").folder
    with ShardWriter(folder, spec, plan[0]) as writer:
        yield writer


def test_tokens_are_stored_in_half_width():
    tokens, pooled = _store(Encoded(torch.ones(2, 2, 3), torch.ones(2, 3)), "float16").arrays()
    assert tokens.dtype == np.float16
    assert pooled.dtype == np.float32
    for dtype in ("float32", "int8"):  # an int8 set's writer rounds by itself
        assert _store(Encoded(torch.ones(2, 2, 3), None), dtype).arrays()[0].dtype == np.float32


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_a_value_beyond_float16_is_refused_with_its_row_and_size(shard, value):
    tokens = torch.ones(2, 2, 3)
    tokens[1, 0, 2] = value
    stored, pooled = _store(Encoded(tokens, torch.ones(2, 3)), "float16").arrays()
    with pytest.raises(CacheError, match=r"toy.*`b`") as caught:
        shard.write(np.arange(2), stored, pooled)
    if value == 7e4:
        assert "70000" in str(caught.value).replace(",", "")
    assert "float32" in str(caught.value)


class _Rows:
    """A sink that keeps what it is given."""

    def __init__(self, spec):
        self.spec, self.tokens, self.failed = spec, {}, []

    def write(self, rows, tokens, pooled=None):
        self.tokens |= dict(zip(rows.tolist(), tokens, strict=True))

    def quarantine(self, row):
        self.failed.append(row)


class _Picture:
    """An encoder whose only token is the picture itself."""

    name, dim, grid = "picture", 256, (1, 1)
    num_prefix_tokens = num_parameters = 0
    located = pooled_dim = preprocessing = None

    def spec(self, **how):
        raise NotImplementedError

    def __call__(self, images):
        return Encoded(images.flatten(2), None)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
        coarse.resize((90, 60)).save(tmp_path / f"{number}.jpg", quality=95)
    Image.open(tmp_path / "1.jpg").save(tmp_path / "1.png")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:700])
    return [tmp_path / name for name in ("0.jpg", "1.png", "2.jpg", "3.jpg", "4.jpg")]


def _pass(pictures, decoders, batch_size=2):
    """Sinks after one pass over the pictures, a lane for each way of decoding."""
    lanes, sinks = [], []
    for decoder in decoders:
        preprocessing = Preprocessing(image_size=(16, 16), mean=(0.0,), std=(1.0,), decoder=decoder)
        spec = FeatureSetSpec(
            modality="image",
            encoder="picture",
            source="toy",
            library="timm",
            library_version="0",
            weights_sha256="0" * 64,
            num_tokens=1,
            dim=256,
            batch_size=batch_size,
            dtype="float32",
        )
        sinks.append(_Rows(spec))
        lanes.append(
            Lane(
                encoder=_Picture(),
                preprocessing=preprocessing,
                first=0,
                count=len(pictures),
                batch_size=batch_size,
                open=lambda sink=sinks[-1]: sink,
                close=lambda *_: None,
            )
        )
    encode_images(lanes, pictures, Pace(2, "cpu"), lambda count: None)
    return sinks, lanes


def test_what_a_gpu_cannot_decode_falls_back_to_the_cpu_row_by_row(pictures):
    (sink,), (lane,) = _pass(pictures, ["gpu"])
    (plain,), _ = _pass(pictures, ["cpu"])
    assert sorted(sink.tokens) == sorted(plain.tokens) == [0, 1, 2, 4]
    assert sink.failed == plain.failed == [3]
    assert [row for row, _ in lane.stats.failures] == [3]
    np.testing.assert_array_equal(sink.tokens[1], plain.tokens[1])
    for row in (0, 2, 4):
        assert np.abs(sink.tokens[row] - plain.tokens[row]).mean() < 2 / 255


def test_lanes_of_two_batch_sizes_get_the_same_rows(pictures):
    (two,), _ = _pass(pictures, ["cpu"], batch_size=2)
    (four,), _ = _pass(pictures, ["cpu"], batch_size=4)
    for row in two.tokens:
        np.testing.assert_array_equal(two.tokens[row], four.tokens[row])


def test_on_a_cpu_the_limit_is_shared_out_by_what_the_decoders_worked():
    decoding = Times(decode_wait_s=1.0, encode_s=3.0, decode_busy_s=9.0)
    assert decoding.limit() == ("decode", 0.75)
    gpu = Times(decode_wait_s=1.0, encode_s=3.0)
    assert gpu.limit() == ("encode", 0.75)
    assert Times().limit()[1] == 0.0
