"""Stage one against the limits of its machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import make_jpegs, save_random_vit, write_repeated
from featcache.bench.stage_one import (
    Bare,
    cores,
    full_config,
    run_stage_one,
    share_of_limit,
    without_start,
)
from featcache.bench.timing import in_turn, rounded
from featcache.errors import UsageError
from featcache.extract.result import PassResult
from featcache.workspace import Workspace

SHORT, LONG = "short", "long"
WEIGHTS = "random weights, for timing only"


class _Runs:
    """Short and long runs of stage one over the same pictures, and what they gave."""

    def __init__(self, setting: Setting, files: int, rows: tuple[int, int]):
        self.setting = setting
        self.workspace = Workspace(setting.folder / "workspace")
        setting.say(f"enlarging {files} radiographs to the size of MIMIC-CXR-JPG")
        self.files = make_jpegs(setting.folder / "images", files)
        for name, count in zip((SHORT, LONG), rows, strict=True):
            write_repeated(self.workspace, name, self.files, count)
        self.passes: dict[str, list[PassResult]] = {}

    def run(self, label: str, manifest: str, backbones: list[Path], config: Any) -> float:
        """One run; its seconds."""
        made = run_stage_one(self.workspace, manifest, backbones, config)
        self.passes.setdefault(label, []).append(made)
        return made.elapsed_s

    def contestants(
        self, name: str, backbones: list[Path], config: Any
    ) -> dict[str, Callable[[], float]]:
        """The short and the long run, as contestants."""
        return {
            f"{name}_{size}": lambda size=size: self.run(  # type: ignore[misc]
                f"{name}_{size}", size, backbones, config
            )
            for size in (SHORT, LONG)
        }

    def long(self, name: str) -> list[PassResult]:
        """The long runs."""
        return self.passes[f"{name}_{LONG}"]

    def spent_s(self, name: str) -> list[float]:
        """Seconds of the long runs without their start."""
        return without_start(self.long(name), self.passes[f"{name}_{SHORT}"])


def _extract_vs_limit(
    setting: Setting, network: str, options: dict[str, Any], rows: tuple[int, int]
) -> Measured:
    """The limit's time over stage one's, for the rows that the long run has more."""
    batch = rows[0]
    runs = _Runs(setting, setting.choose(32, 4), rows)
    folder = save_random_vit(setting.folder / "encoder", network, **options)
    bare = Bare(folder, runs.files, batch, setting.device)
    more = rows[1] - rows[0]
    bare.forward_s(batch)
    taken = in_turn(
        setting,
        {
            "forward": lambda: bare.forward_s(more),
            "decode": lambda: bare.decode_s(more),
            **runs.contestants("stage_one", [folder], full_config(setting, batch)),
        },
    )
    limits = [
        max(forward, decode) if setting.on_gpu else forward + decode
        for forward, decode in zip(taken["forward"], taken["decode"], strict=True)
    ]
    long = runs.long("stage_one")
    return Measured(
        [limit / spent for limit, spent in zip(limits, runs.spent_s("stage_one"), strict=True)],
        detail={
            "encoder": f"{network}, {WEIGHTS}",
            "device": setting.device,
            "batch_size": batch,
            "rows": {"short": rows[0], "long": rows[1], "measured": more},
            "limit": "the larger of forward and decode" if setting.on_gpu else "forward + decode",
            "seconds": rounded(taken),
            "with_start": [
                round(limit * rows[1] / more / one.elapsed_s, 3)
                for limit, one in zip(limits, long, strict=True)
            ],
            "stage_one_says": share_of_limit(long),
        },
    )


def encoder_bound(setting: Setting) -> Measured:
    """A large network: the decoder should cost nothing beyond its own time."""
    if setting.quick:
        return _extract_vs_limit(setting, "vit_tiny_patch16_224", {}, (8, 24))
    rows = (32, 32 + 2048) if setting.on_gpu else (16, 16 + 96)
    return _extract_vs_limit(setting, "vit_base_patch16_224", {}, rows)


def decode_bound(setting: Setting) -> Measured:
    """A tiny network: the decoders should never wait."""
    options = {"depth": 2, "patch_size": 32}
    if setting.quick:
        return _extract_vs_limit(setting, "vit_tiny_patch16_224", options, (8, 40))
    rows = (32, 32 + 4096) if setting.on_gpu else (32, 32 + 2048)
    return _extract_vs_limit(setting, "vit_tiny_patch16_224", options, rows)


def multi_encoder(setting: Setting) -> Measured:
    """Time of two encoders in one pass over that of two bare networks and one decode."""
    batch = setting.choose(32 if setting.on_gpu else 16, 8)
    more = setting.choose(2048 if setting.on_gpu else 256, 16)
    runs = _Runs(setting, setting.choose(32, 4), (batch, batch + more))
    network = "vit_tiny_patch16_224" if setting.quick else "vit_small_patch16_224"
    folders = [
        save_random_vit(setting.folder / f"encoder-{seed}", network, seed=seed) for seed in (0, 1)
    ]
    first, second = (Bare(one, runs.files, batch, setting.device) for one in folders)
    for one in (first, second):
        one.forward_s(batch)
    taken = in_turn(
        setting,
        {
            "forward_1": lambda: first.forward_s(more),
            "forward_2": lambda: second.forward_s(more),
            "decode": lambda: first.decode_s(more),
            **runs.contestants("stage_one", folders, full_config(setting, batch)),
        },
    )
    parts = zip(taken["forward_1"], taken["forward_2"], taken["decode"], strict=True)
    spent = runs.spent_s("stage_one")
    return Measured(
        [taken_s / sum(bare) for taken_s, bare in zip(spent, parts, strict=True)],
        detail={
            "encoders": f"2 x {network}, {WEIGHTS}",
            "device": setting.device,
            "batch_size": batch,
            "rows": {"short": batch, "long": batch + more, "measured": more},
            "seconds": rounded(taken),
            "stage_one_says": share_of_limit(runs.long("stage_one")),
        },
    )


def workers_2(setting: Setting) -> Measured:
    """Time of one worker with one thread over that of two of them, without their start."""
    if cores() < 2:
        raise UsageError(
            "two workers with a core each need two cores, this machine gives one",
            where="workers_2",
            fix="measure on a machine with more cores",
        )
    batch = setting.choose(32, 8)
    per_worker = setting.choose(384, 16)
    # The short run gives each of two workers a shard, so that both have started.
    runs = _Runs(setting, setting.choose(32, 4), (2 * batch, 2 * batch + 2 * per_worker))
    folder = save_random_vit(setting.folder / "encoder", "vit_tiny_patch16_224")
    shard_mb = -(-batch * 197 * 192 * 2 // 2**20)  # a shard is one batch
    changes = {"threads": 1, "shard_mb": shard_mb, "device": "cpu"}
    taken = in_turn(
        setting,
        {
            **runs.contestants("one", [folder], full_config(setting, batch, **changes)),
            **runs.contestants("two", [folder], full_config(setting, batch, workers=2, **changes)),
        },
    )
    pairs = zip(runs.spent_s("one"), runs.spent_s("two"), strict=True)
    return Measured(
        [one / two for one, two in pairs],
        detail={
            "encoder": f"vit_tiny_patch16_224, {WEIGHTS}",
            "device": "cpu",
            "batch_size": batch,
            "rows": {"short": 2 * batch, "long": 2 * (batch + per_worker)},
            "seconds": rounded(taken),
        },
    )


BENCHES = (
    Bench(
        name="extract_vs_limit[encoder]",
        goal=0.95,
        better="larger",
        unit="x",
        what="bare forward and decode over stage one, ViT-B on large JPEGs",
        measure=encoder_bound,
        repeats=3,
        disk_mb=1500,
    ),
    Bench(
        name="extract_vs_limit[decode]",
        goal=0.95,
        better="larger",
        unit="x",
        what="bare forward and decode over stage one, tiny ViT on large JPEGs",
        measure=decode_bound,
        repeats=3,
        disk_mb=500,
    ),
    Bench(
        name="multi_encoder",
        goal=1.05,
        better="smaller",
        unit="x",
        what="two encoders in one pass over two bare forwards and one decode",
        measure=multi_encoder,
        repeats=3,
        disk_mb=1500,
    ),
    Bench(
        name="workers_2",
        goal=1.8,
        better="larger",
        unit="x",
        what="time of one worker over that of two, a thread each",
        measure=workers_2,
        repeats=3,
        disk_mb=200,
    ),
)
