"""A small BERT with its texts cached in any stored type, and Adaptors that read them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from encoders.conftest import save_bert
from heads.conftest import Toy

from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.saved import FeaturesRead, build_adaptor, save_adaptor
from featcache.cache.folder import FeatureSetWriter
from featcache.cache.format import make_channel_scale, plan_shards
from featcache.cache.reader import FeatureSet
from featcache.cache.writer import ShardWriter
from featcache.encoders.forward import Pace, PartStats
from featcache.encoders.interface import load_encoder
from featcache.encoders.request import EncoderRequest, locate_all, save_request
from featcache.encoders.shard import encode_texts
from featcache.encoders.text import FrozenTextEncoder
from featcache.manifest.table import Manifest, text_id, write_manifest

SAID = {
    "effusion": ["left pleural effusion", "small pleural effusion", "right effusion"],
    "normal": ["lungs are clear", "heart size is normal", "no acute abnormality"],
    "pneumonia": ["opacity in left base", "mild edema and opacity", "opacity in the base"],
}


def open_bert(folder: Path, **asked) -> tuple[FrozenTextEncoder, EncoderRequest]:
    """A small BERT with fixed random weights, made where it is not there yet."""
    name = folder if folder.is_dir() else save_bert(folder)
    values = {"modality": "text", "name": str(name), "batch_size": 4, "max_tokens": 16}
    request = EncoderRequest(**(values | asked))
    (located,) = locate_all([request])
    return load_encoder(located), request


def write_texts(
    folder: Path, encoder: FrozenTextEncoder, request: EncoderRequest, texts: list[str]
) -> FeatureSet:
    """Different texts as the feature set that `extract` would make of them."""
    spec = encoder.spec(dtype=request.dtype, batch_size=request.batch_size)
    keys = [text_id(text) for text in texts]
    made = FeatureSetWriter.create(folder, spec, plan_shards(spec, keys, keys), "toy")
    save_request(folder, request)
    ids = encoder.tokenize(texts).ids
    if spec.dtype == "int8":
        tokens = [encoder(*encoder.pad_batch([one])).tokens[0].numpy() for one in ids]
        made.write_scale_channel(make_channel_scale(np.concatenate(tokens)))
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    [shard] = made.shards
    with ShardWriter(folder, spec, shard, lengths, made.scale_channel()) as out:
        pace = Pace(1, "cpu")
        encode_texts(encoder, out, ids, spec.batch_size, pace, PartStats(), lambda _: None)
        out.finish()
    return FeatureSet.open(folder)


def said_manifest(root: Path, toy: Toy, **labels: list[int | None]) -> Manifest:
    """The toy's images, each with a text that names its class, and columns of findings."""
    kinds = toy.manifest.images.column("label:class").to_pylist()
    texts = [SAID[kind][number % 3] for number, kind in enumerate(kinds)]
    images = toy.manifest.images
    for name, values in labels.items():
        images = images.append_column(f"label:{name}", pa.array(values, pa.int8()))
    table = {
        "key": toy.manifest.keys,
        "text_id": [text_id(text) for text in texts],
        "text": texts,
        "unit": ["report"] * len(texts),
    }
    return write_manifest(
        root / "manifests" / "toy",
        images,
        pa.table(table),
        dataset="spreadsheet",
        image_root=root,
        synthetic=True,
    )


@dataclass(frozen=True)
class Reads:
    """How an Adaptor of `plain_run` reads its texts."""

    tokens: str = "all"
    text_tokens: int | None = None


def plain_run(
    folder: Path, images: FeatureSet, texts: FeatureSet, *, reads: Reads | None = None, seed=0
) -> Path:
    """An Adaptor with fresh weights for these two sets, saved as a run's."""
    torch.manual_seed(seed)
    reads = reads or Reads()
    dim = texts.spec.pooled_dim if reads.tokens == "pooled" else texts.spec.dim
    config = AdaptorConfig(dim=16, layers=1, heads=2, feedforward=32)
    adaptor, objective = build_adaptor(config, images.spec.dim, dim)
    image = FeaturesRead(
        encoder="toy", fingerprint=images.fingerprint, dim=images.spec.dim, tokens=reads.tokens
    )
    text = FeaturesRead(
        encoder="bert",
        fingerprint=texts.fingerprint,
        dim=dim,
        tokens=reads.tokens,
        text_tokens=reads.text_tokens,
    )
    save_adaptor(folder / "adaptor", adaptor, objective, config, image=image, text=text, notes=[])
    return folder
