"""What a user waits for before anything happens."""

import subprocess
import sys

import numpy as np

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.sets import write_random_set
from featcache.bench.timing import in_turn, seconds
from featcache.cache.feature_set import FeatureSet


def help_s(setting: Setting) -> Measured:
    """Seconds of `featcache --help`, Python's own start included."""

    def ask() -> None:
        command = [sys.executable, "-m", "featcache.cli", "--help"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    def start_python() -> None:
        subprocess.run([sys.executable, "-c", ""], check=True)

    ask()  # the first one may compile
    taken = in_turn(
        setting, {"help": lambda: seconds(ask), "python": lambda: seconds(start_python)}
    )
    return Measured(
        taken["help"], detail={"python_start_s": round(float(np.median(taken["python"])), 4)}
    )


def open_1000_shards_s(setting: Setting) -> Measured:
    """Seconds of `FeatureSet.open` on many small shards whose headers are in the page cache."""
    shards = setting.choose(1000, 50)
    folder = setting.folder / "set"
    setting.say(f"writing {shards} shards")
    write_random_set(folder, rows=8 * shards, num_tokens=4, dim=16, shard_rows=8)
    taken = in_turn(setting, {"open": lambda: seconds(lambda: FeatureSet.open(folder))})
    opened = FeatureSet.open(folder)
    return Measured(taken["open"], detail={"shards": opened.num_shards, "rows": opened.num_rows})


BENCHES = (
    Bench(
        name="help_s",
        goal=0.5,
        better="smaller",
        unit="s",
        what="seconds of `featcache --help`, Python's start included",
        measure=help_s,
        repeats=9,
    ),
    Bench(
        name="open_1000_shards_s",
        goal=1.0,
        better="smaller",
        unit="s",
        what="seconds of opening a feature set of 1,000 shards",
        measure=open_1000_shards_s,
        repeats=7,
        disk_mb=20,
    ),
)
