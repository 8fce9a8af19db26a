"""Training from the cache against the same training with the encoders running along."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from featcache.adaptor.model import AdaptorConfig
from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import make_jpegs, save_random_vit
from featcache.bench.sets import BERT_BASE, join_rows, write_random_set, write_random_texts
from featcache.bench.stage_one import cores
from featcache.bench.steps import Training, mixed_precision, random_batch, synchronise
from featcache.bench.timing import in_turn, paired, rounded, seconds
from featcache.encoders.decode import decode_image, to_input
from featcache.encoders.interface import ImageEncoder, load_encoder, locate_encoder
from featcache.loader.batch import Batch
from featcache.loader.gather import TokenLoader

GRID = (14, 14)
PATCHES = 49
"""Patch tokens under the budget; with the class token they make 50."""


class _Encoders:
    """A ViT-B and a BERT-base with random weights, which encode each batch of training anew."""

    def __init__(self, setting: Setting, batch: int):
        self._batch, self._device = batch, setting.device
        setting.say("enlarging radiographs to the size of MIMIC-CXR-JPG")
        made = make_jpegs(setting.folder / "pictures", setting.choose(16, 4))
        self.files = [made[row % len(made)] for row in range(batch)]
        network = "vit_tiny_patch16_224" if setting.quick else "vit_base_patch16_224"
        folder = save_random_vit(setting.folder / "vit", network)
        encoder = load_encoder(locate_encoder(str(folder), "image"), device=setting.device)
        self._vit = cast(ImageEncoder, encoder)
        self._preprocessing = encoder.located.preprocessing
        self.dim = encoder.dim
        self._bert = _random_bert(2 if setting.quick else 12).eval().to(setting.device)
        self._words = np.random.default_rng(0).integers(1000, 30_000, (batch, BERT_BASE[0]))

    def decode(self, path: Path) -> UInt8[np.ndarray, "H W"]:
        """One picture as grey levels of the encoder's size."""
        return decode_image(path, self._preprocessing)

    def encode(
        self, greys: list[UInt8[np.ndarray, "H W"]]
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B T E"]]:
        """All tokens of a batch's pictures and texts, under autocast on a GPU."""
        with torch.inference_mode(), mixed_precision(self._device):
            stacked = torch.stack([torch.from_numpy(one) for one in greys]).to(self._device)
            images = self._vit(to_input(stacked, self._preprocessing)).tokens
            words = torch.from_numpy(self._words).to(self._device)
            texts = self._bert(input_ids=words).last_hidden_state
        return images, texts

    def decode_s(self) -> float:
        """Seconds of decoding a batch with a thread for each core."""

        def work() -> None:
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(self.decode, self.files))

        return seconds(work)

    def batches(self, count: int) -> Iterator[Batch]:
        """Batches of an epoch under the token budget; pictures are decoded one batch ahead."""
        generator = np.random.default_rng(0)
        like = random_batch(self._batch, (1, 1), (BERT_BASE[0], 1))
        files = self.files
        with ThreadPoolExecutor(cores()) as pool:
            ahead = [pool.submit(self.decode, path) for path in files]
            for number in range(count):
                greys = [one.result() for one in ahead]
                ahead = [pool.submit(self.decode, path) for path in files if number + 1 < count]
                images, texts = self.encode(greys)
                columns = torch.from_numpy(_budget(generator)).to(images.device)
                # A tensor of inference mode may not take part in training: hence the clone.
                yield replace(
                    like, image_tokens=images[:, columns].clone(), text_tokens=texts.clone()
                )


def _random_bert(layers: int) -> torch.nn.Module:
    """BERT-base's shape with random weights, for timing only."""
    torch.manual_seed(0)
    made: torch.nn.Module = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
    return made


def _budget(generator: np.random.Generator) -> Int64[np.ndarray, " K"]:
    """The class token and some patch tokens."""
    drawn = 1 + np.sort(generator.permutation(GRID[0] * GRID[1])[:PATCHES])
    return np.concatenate([[0], drawn])


def _flops(work: Callable[[], object]) -> int:
    """Floating-point operations of a call, attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def online_vs_cached(setting: Setting) -> Measured:
    """The speed-up of the cache as a share of what the operations allow.

    The speed-up is the time of an epoch with the encoders over that of the same from the cache; its
    ceiling the operations of encoders and step over those of the step. Decoding is no part of the
    ceiling, but of the time.
    """
    batch = setting.choose(64 if setting.on_gpu else 16, 4)
    steps = setting.choose(32 if setting.on_gpu else 2, 1)
    encoders = _Encoders(setting, batch)
    tokens = 1 + GRID[0] * GRID[1]
    write_random_set(
        setting.folder / "images",
        rows=batch * steps,
        num_tokens=tokens,
        dim=encoders.dim,
        shard_rows=1024,
        grid=GRID,
    )
    write_random_texts(setting.folder / "texts", lengths=[BERT_BASE[0]] * batch, dim=BERT_BASE[1])
    cache = join_rows(setting.folder / "images", setting.folder / "texts")
    loader = TokenLoader(cache, batch, threads=cores(), tokens=f"random:{PATCHES}")
    config = AdaptorConfig(dim=96) if setting.quick else AdaptorConfig()
    training = Training(config, encoders.dim, BERT_BASE[1], setting.device)
    one = random_batch(batch, (1 + PATCHES, encoders.dim), BERT_BASE)
    greys = [encoders.decode(path) for path in encoders.files]
    step_flops = _flops(lambda: training.step(one))
    encode_flops = _flops(lambda: encoders.encode(greys))
    ceiling = (encode_flops + step_flops) / step_flops

    def bare_encode() -> float:
        def work() -> None:
            encoders.encode(greys)
            synchronise(setting.device)

        return seconds(work)

    training.run(loader)
    bare_encode()
    taken = in_turn(
        setting,
        {
            "online": lambda: training.run(encoders.batches(steps)),
            "cached": lambda: training.run(loader),
            "bare_encode_of_a_batch": bare_encode,
            "bare_decode_of_a_batch": encoders.decode_s,
            "bare_step": lambda: training.run([one]),
        },
    )
    speed_ups = paired(taken["online"], taken["cached"])
    return Measured(
        [one / ceiling for one in speed_ups],
        detail={
            "encoders": "ViT-B/16 and BERT-base with random weights, for timing only",
            "device": setting.device,
            "tokens": {"image": 1 + PATCHES, "text": BERT_BASE[0]},
            "batch_size": batch,
            "steps": steps,
            "speed_up": round(median(speed_ups), 3),
            "ceiling": round(ceiling, 3),
            "gigaflops_per_pair": {
                "encoders": round(encode_flops / batch / 1e9, 3),
                "step": round(step_flops / batch / 1e9, 3),
            },
            "gigaflops_per_s": {
                "encoders": round(encode_flops / 1e9 / median(taken["bare_encode_of_a_batch"]), 1),
                "step": round(step_flops / 1e9 / median(taken["bare_step"]), 1),
            },
            "seconds": rounded(taken),
        },
    )


BENCHES = (
    Bench(
        name="online_vs_cached",
        goal=0.8,
        better="larger",
        unit="x",
        what="speed-up of the cache over encoders that run along, as a share of its FLOP ceiling",
        measure=online_vs_cached,
        repeats=3,
        disk_mb=700,
    ),
)
