"""Stage one from a thousand rows to a hundred thousand."""

import time

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import make_jpegs, save_random_vit, write_repeated
from featcache.bench.stage_one import forget, full_config, spent_s
from featcache.bench.timing import Memory, in_turn, rounded, watch_memory, without_notes
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.extract.result import PassResult
from featcache.workspace import Workspace

SIDE, PATCH, WIDTH = 64, 32, 64  # 1 + 2 x 2 tokens of width 64
NETWORK = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
BATCH = 32


class _Extraction:
    """Whole commands over manifests of several lengths, with their time and memory."""

    def __init__(self, setting: Setting, lengths: tuple[int, ...]):
        self.workspace = Workspace(setting.folder / "workspace")
        files = make_jpegs(setting.folder / "images", 32, (SIDE, SIDE))
        for rows in lengths:
            write_repeated(self.workspace, f"rows-{rows}", files, rows)
        self.encoder = save_random_vit(
            setting.folder / "encoder", "vit_tiny_patch16_224", **NETWORK
        )
        self.config = full_config(setting, BATCH)
        self.memory: dict[int, Memory] = {rows: Memory() for rows in lengths}
        self.passes: dict[int, list[PassResult]] = {rows: [] for rows in lengths}

    def _extract(self, rows: int, config: ExtractConfig) -> float:
        started = time.perf_counter()
        with without_notes():
            done = extract(
                self.workspace,
                config,
                backbones=[str(self.encoder)],
                text_encoders=["none"],
                manifest=f"rows-{rows}",
            )
        elapsed_s = time.perf_counter() - started
        self.passes[rows] += done.passes
        forget(self.workspace)
        return elapsed_s

    def run(self, rows: int) -> float:
        """Seconds of the whole command: planning, workers, network, rows."""
        with watch_memory() as memory:
            elapsed_s = self._extract(rows, self.config)
        most = self.memory[rows]
        most.own_bytes = max(most.own_bytes, memory.own_bytes)
        most.child_bytes = max(most.child_bytes, memory.child_bytes)
        return elapsed_s

    def plan(self, rows: int) -> float:
        """Seconds of the command without making anything."""
        return self._extract(rows, self.config.model_copy(update={"dry_run": True}))

    def spent_s(self, rows: int) -> list[float]:
        """Seconds of the pass itself, as the worker measured them."""
        return [spent_s(one) for one in self.passes[rows]]


def extract_scaling(setting: Setting) -> Measured:
    """The worse of two ratios: time per row, and peak memory.

    Time per row of the many rows is that of whole commands: many minus few, over the difference in
    rows, so that what every command needs once (workers, imports, the network) drops out. Time per
    row of the few is planning (without what an almost empty manifest needs) and the pass itself as
    the worker measured it, because there the start would drown it. Memory is the larger growth of
    the peaks of the two processes, from few rows to many.
    """
    few, many = setting.choose(1_000, 200), setting.choose(100_000, 2_000)
    made = _Extraction(setting, (BATCH, few, many))
    made.run(BATCH)  # imports and first allocations of this process
    made.passes[few].clear()
    taken = in_turn(
        setting,
        {
            "plan_none": lambda: made.plan(BATCH),
            "plan_few": lambda: made.plan(few),
            "few": lambda: made.run(few),
            "many": lambda: made.run(many),
        },
    )
    per_row_few = [
        (spent + plan - none) / few
        for spent, plan, none in zip(
            made.spent_s(few), taken["plan_few"], taken["plan_none"], strict=True
        )
    ]
    per_row_many = [
        (long - short) / (many - few)
        for long, short in zip(taken["many"], taken["few"], strict=True)
    ]
    ratios = [more / less for more, less in zip(per_row_many, per_row_few, strict=True)]
    before, after = made.memory[few], made.memory[many]
    growth = {
        "client": after.own_bytes / before.own_bytes,
        "worker": after.child_bytes / before.child_bytes,
    }
    time_ratio = sorted(ratios)[len(ratios) // 2]
    return Measured(
        ratios,
        value=max(time_ratio, *growth.values()),
        detail={
            "rows": {"few": few, "many": many},
            "time_ratio": round(time_ratio, 4),
            "memory_ratio": {name: round(one, 4) for name, one in growth.items()},
            "value_is": "the worst of time_ratio and both of memory_ratio",
            "seconds_per_row": {
                "few": [round(one, 7) for one in per_row_few],
                "many": [round(one, 7) for one in per_row_many],
            },
            "peak_bytes": {
                "client": {"few": before.own_bytes, "many": after.own_bytes},
                "worker": {"few": before.child_bytes, "many": after.child_bytes},
            },
            "client_bytes_per_row": round((after.own_bytes - before.own_bytes) / (many - few)),
            "worker_bytes_per_row": round((after.child_bytes - before.child_bytes) / (many - few)),
            "seconds": rounded(taken),
        },
    )


BENCHES = (
    Bench(
        name="extract_scaling",
        goal=1.15,
        better="smaller",
        unit="x",
        what="time per row (and peak memory) at 100,000 small pictures over that at 1,000",
        measure=extract_scaling,
        repeats=3,
        disk_mb=200,
    ),
)
