"""Decoding one large JPEG to an encoder's size."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import LARGE, QUALITY, make_jpegs
from featcache.bench.timing import in_turn, rounded, seconds
from featcache.encoders.decode import Preprocessing, decode_image

SIDE = 224


def _plain(path: Path) -> UInt8[np.ndarray, "H W"]:
    """What a data loader without further thought does."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small)[..., 0]


def decode_vs_plain(setting: Setting) -> Measured:
    """Time of the plain way over ours, one thread, the file in the page cache."""
    (path,) = make_jpegs(setting.folder, 1)
    ours = Preprocessing(image_size=(SIDE, SIDE), fit="squash", mean=(0.5,), std=(0.5,))
    calls = range(setting.choose(10, 2))
    difference = np.abs(_plain(path).astype(int) - decode_image(path, ours).astype(int))
    taken = in_turn(
        setting,
        {
            "plain": lambda: seconds(lambda: [_plain(path) for _ in calls]),
            "ours": lambda: seconds(lambda: [decode_image(path, ours) for _ in calls]),
        },
    )
    return Measured(
        [plain / own for plain, own in zip(taken["plain"], taken["ours"], strict=True)],
        detail={
            "picture": f"radiograph enlarged to {LARGE[0]} x {LARGE[1]}, JPEG {QUALITY}, grey",
            "file_bytes": path.stat().st_size,
            "calls_per_run": len(calls),
            "seconds": rounded(taken),
            "largest_grey_difference": int(difference.max()),
            "mean_grey_difference": round(float(difference.mean()), 4),
        },
    )


BENCHES = (
    Bench(
        name="decode_vs_plain",
        goal=3.3,
        better="larger",
        unit="x",
        what="time of Image.open, convert RGB, resize over that of decode_image, one thread",
        measure=decode_vs_plain,
        repeats=7,
        disk_mb=10,
    ),
)
