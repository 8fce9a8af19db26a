"""Stage one against the limits of its machine."""

import os
from pathlib import Path
from typing import Any

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import make_jpegs, save_random_vit, write_repeated
from featcache.bench.stage_one import (
    Bare,
    full_config,
    run_stage_one,
    share_of_limit,
    spent_s,
)
from featcache.bench.timing import in_turn, rounded
from featcache.errors import UsageError
from featcache.extract.config import ExtractConfig
from featcache.extract.result import PassResult
from featcache.workspace import Workspace

WEIGHTS = "random weights, for timing only"


class _Runs:
    """Runs of stage one over the same large pictures, and what they gave."""

    def __init__(self, setting: Setting, files: int, rows: int):
        self.setting = setting
        self.workspace = Workspace(setting.folder / "workspace")
        setting.say(f"enlarging {files} radiographs to the size of MIMIC-CXR-JPG")
        self.files = make_jpegs(setting.folder / "images", files)
        write_repeated(self.workspace, "rows", self.files, rows)
        self.passes: dict[str, list[PassResult]] = {}

    def run(self, label: str, backbones: list[Path], config: ExtractConfig) -> float:
        """One run; the seconds that its workers spent on the rows."""
        made = run_stage_one(self.workspace, "rows", backbones, config)
        self.passes.setdefault(label, []).append(made)
        return spent_s(made)


def _extract_vs_limit(
    setting: Setting, network: str, options: dict[str, Any], size: tuple[int, int]
) -> Measured:
    """The limit's time over stage one's, for so many rows in batches of so many."""
    batch, rows = size
    runs = _Runs(setting, setting.choose(32, 4), rows)
    folder = save_random_vit(setting.folder / "encoder", network, **options)
    bare = Bare(folder, runs.files, batch, setting.device)
    config = full_config(setting, batch)
    bare.forward_s(batch)
    taken = in_turn(
        setting,
        {
            "forward": lambda: bare.forward_s(rows),
            "decode": lambda: bare.decode_s(rows),
            "stage_one": lambda: runs.run("stage_one", [folder], config),
        },
    )
    limits = [
        max(forward, decode) if setting.on_gpu else forward + decode
        for forward, decode in zip(taken["forward"], taken["decode"], strict=True)
    ]
    return Measured(
        [limit / spent for limit, spent in zip(limits, taken["stage_one"], strict=True)],
        detail={
            "encoder": f"{network}, {WEIGHTS}",
            "device": setting.device,
            "batch_size": batch,
            "rows": rows,
            "limit": "the larger of forward and decode" if setting.on_gpu else "forward + decode",
            "seconds": rounded(taken),
            "with_start_s": [round(one.elapsed_s, 3) for one in runs.passes["stage_one"]],
            "stage_one_says": share_of_limit(runs.passes["stage_one"]),
        },
    )


def encoder_bound(setting: Setting) -> Measured:
    """A large network: the decoder should cost nothing beyond its own time."""
    if setting.quick:
        return _extract_vs_limit(setting, "vit_tiny_patch16_224", {}, (8, 16))
    if setting.on_gpu:
        return _extract_vs_limit(setting, "vit_large_patch16_224", {}, (64, 16_384))
    return _extract_vs_limit(setting, "vit_base_patch16_224", {}, (16, 96))


def decode_bound(setting: Setting) -> Measured:
    """A tiny network: the decoders should never wait."""
    options = {"depth": 2, "patch_size": 32}
    size = (8, 32) if setting.quick else (32, 16_384 if setting.on_gpu else 1024)
    return _extract_vs_limit(setting, "vit_tiny_patch16_224", options, size)


def multi_encoder(setting: Setting) -> Measured:
    """Time of two encoders in one pass over that of two bare networks and one decode."""
    batch = setting.choose(32 if setting.on_gpu else 16, 8)
    rows = setting.choose(8192 if setting.on_gpu else 192, 16)
    runs = _Runs(setting, setting.choose(32, 4), rows)
    network = "vit_tiny_patch16_224" if setting.quick else "vit_small_patch16_224"
    folders = [
        save_random_vit(setting.folder / f"encoder-{seed}", network, seed=seed) for seed in (0, 1)
    ]
    first, second = (Bare(one, runs.files, batch, setting.device) for one in folders)
    config = full_config(setting, batch)
    for one in (first, second):
        one.forward_s(batch)
    taken = in_turn(
        setting,
        {
            "forward_1": lambda: first.forward_s(rows),
            "forward_2": lambda: second.forward_s(rows),
            "decode": lambda: first.decode_s(rows),
            "stage_one": lambda: runs.run("stage_one", folders, config),
        },
    )
    parts = zip(taken["forward_1"], taken["forward_2"], taken["decode"], strict=True)
    return Measured(
        [spent / sum(bare) for spent, bare in zip(taken["stage_one"], parts, strict=True)],
        detail={
            "encoders": f"2 x {network}, {WEIGHTS}",
            "device": setting.device,
            "batch_size": batch,
            "rows": rows,
            "seconds": rounded(taken),
            "stage_one_says": share_of_limit(runs.passes["stage_one"]),
        },
    )


def workers_2(setting: Setting) -> Measured:
    """Rate of two workers on two cores over that of one worker on one core."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise UsageError(
            "two workers with a core each need two cores, this machine gives one",
            where="workers_2",
            fix="measure on a machine with more cores",
        )
    batch, shards = setting.choose(32, 8), setting.choose(12, 2)
    runs = _Runs(setting, setting.choose(32, 4), batch * shards)
    folder = save_random_vit(setting.folder / "encoder", "vit_tiny_patch16_224")
    shard_mb = -(-batch * 197 * 192 * 2 // 2**20)  # a shard is one batch

    def run(workers: int) -> float:
        config = full_config(
            setting, batch, threads=1, workers=workers, shard_mb=shard_mb, device="cpu"
        )
        os.sched_setaffinity(0, allowed[:workers])  # worker processes inherit it
        try:
            return runs.run(str(workers), [folder], config) / workers
        finally:
            os.sched_setaffinity(0, allowed)

    taken = in_turn(setting, {"one": lambda: run(1), "two": lambda: run(2)})
    return Measured(
        [one / two for one, two in zip(taken["one"], taken["two"], strict=True)],
        detail={
            "encoder": f"vit_tiny_patch16_224, {WEIGHTS}",
            "device": "cpu",
            "batch_size": batch,
            "rows": batch * shards,
            "seconds_per_worker": rounded(taken),
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
        what="rate of two workers on two cores over that of one worker on one",
        measure=workers_2,
        repeats=3,
        disk_mb=200,
    ),
)
