"""What a manifest of very many rows costs, checks included."""

import gzip
import hashlib
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.timing import watch_memory
from featcache.datasets.mimic.tables import LABELS
from featcache.errors import ManifestError

ROWS, FILES = 1_000_000, 1_000
"""Rows of the table, and the picture files that they name in turn."""
MIMIC_ROWS = 377_110
"""As many pictures as MIMIC-CXR-JPG has, each a file of its own."""
_WORDS = """the lungs are clear without effusion or pneumothorax heart size is normal mild moderate
bibasilar atelectasis left right lower lobe opacity unchanged stable edema no acute process"""


@dataclass(frozen=True)
class _Cost:
    """What one command took.

    Attributes:
        seconds: From start to end.
        cpu_s: Of all its threads, the system's share included.
        gb: Its highest resident memory, 10^9 bytes.
    """

    seconds: float
    cpu_s: float
    gb: float


def write_table(folder: Path, rows: int) -> Path:
    """Write a table of pictures with reports, in an order that is not that of its keys.

    Args:
        folder: Gets `table.csv` and `images/`.
        rows: Of the table; four a patient, reports of 40 to 160 words that are all different.
    """
    draw = random.Random(0)
    pictures = folder / "images"
    pictures.mkdir(parents=True)
    for number in range(min(FILES, rows)):
        (pictures / f"{number}.jpg").write_bytes(_picture(number))
    parts = [" ".join(draw.choices(_WORDS.split(), k=draw.randrange(20, 81))) for _ in range(997)]
    places = list(range(rows))
    draw.shuffle(places)
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("key,subject_id,view_position,split,image_path,report,label:Edema,label:class\n")
        for number in places:
            patient = number // 4
            split = "test" if patient % 10 == 0 else "validate" if patient % 10 == 1 else "train"
            report = f"{parts[number % 997]} {parts[number // 997 % 997]} {number}."
            file.write(
                f"k{number:07d},p{patient:06d},{('AP', 'PA', '')[number % 3]},{split},"
                f"images/{number % FILES}.jpg,{report},{('1', '0', '-1', '')[number % 4]},"
                f"{('normal', 'edema', 'other')[number % 3]}\n"
            )
    return path


def _picture(number: int) -> bytes:
    """A file that begins as a JPEG does, and is not equal to another."""
    return b"\xff\xd8\xff" + number.to_bytes(4, "big") * 25


def write_mimic(folder: Path, rows: int) -> Path:
    """Write what the reader of MIMIC-CXR-JPG looks at: tables, small files, an archive of reports.

    Args:
        folder: The project's.
        rows: Pictures; three in five have a study of their own, two studies in seven a patient.
    """
    folder.mkdir(parents=True)
    prefix = "mimic-cxr-2.0.0-"
    metadata = ["dicom_id,subject_id,study_id,ViewPosition,Rows,Columns\n"]
    split = ["dicom_id,study_id,subject_id,split\n"]
    chexpert = [f"subject_id,study_id,{','.join(LABELS)}\n"]
    before = -1
    with zipfile.ZipFile(folder / "mimic-cxr-reports.zip", "w") as reports:
        for number in range(rows):
            study = number * 3 // 5
            subject, name = 10_000_000 + 140 * (study * 2 // 7), 50_000_000 + study * 37
            place = f"files/p{subject // 1_000_000}/p{subject}/s{name}"
            if study != before:
                (folder / place).mkdir(parents=True)
                said = (
                    f"The lungs are clear. Study {study}.\n \n IMPRESSION:\n \n Stable, {study}.\n"
                )
                reports.writestr(f"{place}.txt", f"FINAL REPORT\n FINDINGS:\n \n {said}")
                chexpert.append(f"{subject},{name},1.0,0.0,-1.0{',' * (len(LABELS) - 3)}\n")
                before = study
            digits = hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()
            dicom = "-".join(digits[at : at + 8] for at in range(0, 40, 8))
            (folder / place / f"{dicom}.jpg").write_bytes(_picture(number))
            view = ("AP", "PA", "LATERAL")[number % 3]
            metadata.append(f"{dicom},{subject},{name},{view},3056,2544\n")
            part = ("train", "validate", "test")[min(subject // 140 % 50, 2)]
            split.append(f"{dicom},{name},{subject},{part}\n")
    for kind, lines in (("metadata", metadata), ("split", split), ("chexpert", chexpert)):
        content = gzip.compress("".join(lines).encode(), compresslevel=1, mtime=0)
        (folder / f"{prefix}{kind}.csv.gz").write_bytes(content)
    return folder


def _make(dataset: str, source: Path, root: Path) -> _Cost:
    """Run `featcache manifest` in a process of its own.

    Raises:
        ManifestError: It failed.
    """
    command = [sys.executable, "-m", "featcache.cli", "manifest", dataset, str(source)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--root", str(root), "--quiet"], stdout=subprocess.DEVNULL
    )
    # Watched from outside: what the system counts for a child begins with its parent's memory.
    with watch_memory(process.pid) as memory:
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    taken = time.perf_counter() - started
    if process.returncode:
        raise ManifestError("the manifest of the bench could not be made", where=source)
    return _Cost(taken, used.ru_utime + used.ru_stime, memory.child_bytes / 1e9)


def _measure(
    setting: Setting,
    *,
    dataset: str,
    write: Callable[[Path, int], Path],
    full: int,
    figure: Literal["seconds", "gb"],
) -> Measured:
    """Write a source of many rows and make its manifest."""
    rows = setting.choose(full, 500)
    setting.say(f"writing {rows:,} rows")
    source = write(setting.folder / "source", rows)
    costs = [
        _make(dataset, source, setting.folder / f"workspace-{repeat}")
        for repeat in range(setting.repeats)
    ]
    return Measured(
        [getattr(cost, figure) for cost in costs],
        detail={
            "rows": rows,
            "seconds": [round(cost.seconds, 2) for cost in costs],
            "cpu_s": [round(cost.cpu_s, 2) for cost in costs],
            "peak_gb": [round(cost.gb, 3) for cost in costs],
        },
    )


_table = partial(_measure, dataset="spreadsheet", write=write_table, full=ROWS)
_mimic = partial(_measure, dataset="mimic-cxr-jpg", write=write_mimic, full=MIMIC_ROWS)

BENCHES = tuple(
    Bench(
        name=f"{name}[{figure}]",
        goal=goal,
        better="smaller",
        unit="s" if figure == "seconds" else "GB",
        what=f"{what} of `featcache manifest`, checks included, on {source}",
        measure=partial(measure, figure=figure),
        repeats=1,
        disk_mb=disk_mb,
    )
    for name, measure, source, disk_mb in (
        ("manifest_million", _table, "a table of 1,000,000 rows with reports", 2000),
        ("manifest_mimic", _mimic, "377,110 pictures in the layout of MIMIC-CXR-JPG", 4000),
    )
    for figure, goal, what in (("seconds", 120, "seconds"), ("gb", 2, "highest memory"))
)
