"""CheXpert: radiographs with 14 labels each, without reports.

    train.csv, valid.csv, perhaps test.csv      a row for each image
    train/patient00001/study1/view1_frontal.jpg

`Path` begins with the folder's own name, `CheXpert-v1.0-small/` or `CheXpert-v1.0/`, which may also
be the folder above. Labels: 1 present, 0 absent, -1 uncertain, null not mentioned; blank is not 0.
The 234 images of valid.csv were read by radiologists and are the test split, as in the literature;
validation images are taken from train.csv, by patient.

Source: CheXpert v1.0 (Irvin and others 2019).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64
from pydantic import Field

from featcache.config import Config, replace_file
from featcache.console import note
from featcache.errors import ManifestError
from featcache.manifest.checks import conflict_sentence, distinct_rows, rows_text
from featcache.manifest.columns import find_columns
from featcache.manifest.funnel import Funnel
from featcache.manifest.sheet import column_names, read_sheet
from featcache.manifest.splits import split_by_subject
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, file_faults, file_sizes, is_synthetic

DESCRIPTION = "CheXpert: radiographs with 14 labels, blank and uncertain kept as they are."
LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
PUBLISHED = {"train": 223_414, "valid": 234}
MISSING_LIST = "missing_files.txt"
NOTE_TERMS = (
    "CheXpert may be used under Stanford's research use agreement alone: no redistribution, no "
    "commercial use."
)
NOTE_VALIDATE = "The validation split is ours, by patient, from train.csv."
_PATH = r"^(train|valid|test)/(patient\d{5,})/(study\d+)/[^/]+\.(?:jpg|jpeg|png)$"
_CELLS = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


class Options(Config):
    """How CheXpert is read."""

    views: Literal["frontal", "all"] = Field(
        default="frontal", description="`frontal` keeps what the column Frontal/Lateral calls so."
    )
    split: Literal["held-out", "published"] = Field(
        default="held-out",
        description="`held-out`: valid.csv is the test split and validation comes from train.csv; "
        "`published`: train, valid and test as the files are called.",
    )
    validate_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the patients of train.csv that go to validation.",
    )
    seed: int = Field(default=0, description="Seed of the split into train and validation.")


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of CheXpert.

    Listed files that are not there, or empty, are dropped and named in `missing_files.txt` beside
    the tables.

    Args:
        folder: Holds train.csv and valid.csv, and `train/` and `valid/` with the images.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: A table is missing or cannot be trusted, or none of the images is there.
    """
    funnel = Funnel()
    tables = [_read_table(folder, name) for name in ("train", "valid", "test")]
    rows = pa.concat_tables([table for table in tables if table is not None])
    completeness = _compare_with_published(rows)
    funnel.start("rows in the tables", rows.num_rows)
    images = _distinct(rows, funnel, folder)
    sizes = file_sizes(folder, images["image_path"].to_pylist())
    missing = images["key"].filter(pa.array(sizes <= 0)).to_pylist()
    images = funnel.keep(images, "images with a file", file_faults(sizes))
    if not images.num_rows:
        raise ManifestError(
            f"none of the {len(missing):,} listed images is there",
            where=folder,
            fix="pass the folder that holds train/, valid/ and the tables",
        )
    if options.views == "frontal":
        lateral = pc.equal(images["view_position"], "LATERAL").fill_null(False).to_numpy()
        images = funnel.keep(images, "frontal images", {"another view": lateral})
    images, split_policy = _with_split(images, options)
    synthetic = is_synthetic(folder)
    notes = [SYNTHETIC_NOTE if synthetic else NOTE_TERMS]
    notes += [NOTE_VALIDATE] if options.split == "held-out" else []
    manifest = write_manifest(
        out,
        images.drop_columns("list"),
        dataset="chexpert",
        image_root=folder,
        funnel=funnel.steps,
        notes=notes,
        policies={
            "tables": completeness,
            "views": options.views,
            "split": split_policy,
            "label_values": "1 present, 0 absent, -1 uncertain, null not mentioned",
        },
        synthetic=synthetic,
    )
    (out / MISSING_LIST).unlink(missing_ok=True)
    if missing:
        note(f"chexpert: {len(missing):,} images are missing or empty; named in {MISSING_LIST}")
        names = "".join(f"{name}\n" for name in sorted(missing))
        replace_file(out / MISSING_LIST, names.encode())
    return manifest


def _read_table(folder: Path, name: str) -> pa.Table | None:
    """One table as columns of the manifest, and `list`; None for a missing test table.

    Raises:
        ManifestError: The table is missing, lacks a column, or holds what it should not.
    """
    path = folder / f"{name}.csv"
    if not path.is_file():
        if name == "test":
            return None
        raise ManifestError(
            f"the table {name}.csv is missing",
            where=folder,
            fix="pass the folder of CheXpert that holds train.csv and valid.csv",
        )
    cells, numbers = _cells(path, has_views=name != "test")
    problems = _kind_problems(cells, numbers)
    paths = pc.replace_substring_regex(cells["Path"], r"^.*?((?:train|valid|test)/)", r"\1")
    is_wrong = pc.invert(pc.match_substring_regex(paths, _PATH)).to_numpy()
    if is_wrong.any():
        rows = numbers[is_wrong]
        raise ManifestError(
            f"`Path` is not `train/patient00001/study1/view1_frontal.jpg`: {rows_text(rows)}",
            where=path,
        )
    parts = pc.split_pattern(paths, "/").to_pylist()
    columns = {
        "key": paths,
        "subject_id": pa.array([part[1] for part in parts], pa.string()),
        "study_id": pa.array([f"{part[1]}/{part[2]}" for part in parts], pa.string()),
        "view_position": _views(cells, parts),
        "source": pa.array(["chexpert"] * len(parts), pa.string()),
        "image_path": paths,
        "list": pa.array([name] * len(parts), pa.string()),
        "row": pa.array(numbers),
    }
    values = pa.array([*_CELLS.values(), None], pa.int8())
    for label in LABELS:
        place = pc.index_in(cells[label], pa.array([*_CELLS, ""]))
        rows = numbers[pc.is_null(place).to_numpy()]
        if len(rows):
            problems.append(f"`{label}` is none of 1.0, 0.0, -1.0, blank: {rows_text(rows)}")
        columns[f"label:{label}"] = values.take(place.combine_chunks())
    if problems:
        raise ManifestError("\n  ".join(problems), where=path)
    return pa.table(columns)


def _kind_problems(
    cells: dict[str, pa.ChunkedArray], numbers: Int64[np.ndarray, " N"]
) -> list[str]:
    """Rows that are neither frontal nor lateral: they would pass for frontal ones."""
    if "Frontal/Lateral" not in cells:
        return []
    known = pc.is_in(pc.utf8_lower(cells["Frontal/Lateral"]), pa.array(["frontal", "lateral"]))
    rows = numbers[~known.to_numpy()]
    return [f"`Frontal/Lateral` is neither of the two: {rows_text(rows)}"] if len(rows) else []


def _cells(
    path: Path, *, has_views: bool
) -> tuple[dict[str, pa.ChunkedArray], Int64[np.ndarray, " N"]]:
    """The columns that are needed, as stripped text, and the row numbers.

    Raises:
        ManifestError: One is missing, or two have one name.
    """
    wanted = ["Path", *LABELS, *(["Frontal/Lateral", "AP/PA"] if has_views else [])]
    names = find_columns(column_names(path), wanted, path)
    sheet = read_sheet(path, list(names.values()))
    cells = {
        name: pc.utf8_trim_whitespace(sheet.columns[there]).cast(pa.string())
        for name, there in names.items()
    }
    return cells, sheet.numbers


def _views(cells: dict[str, pa.ChunkedArray], parts: Sequence[Sequence[str]]) -> pa.Array:
    """AP, PA, ... for frontal images, LATERAL for the others; null where nothing says."""
    if "AP/PA" not in cells:
        lateral = ["LATERAL" if "_lateral" in part[-1] else None for part in parts]
        return pa.array(lateral, pa.string())
    kinds, views = cells["Frontal/Lateral"].to_pylist(), cells["AP/PA"].to_pylist()
    return pa.array(
        [
            "LATERAL" if kind.casefold() == "lateral" else view or None
            for kind, view in zip(kinds, views, strict=True)
        ],
        pa.string(),
    )


def _distinct(rows: pa.Table, funnel: Funnel, folder: Path) -> pa.Table:
    """Each image once.

    Raises:
        ManifestError: Rows of one image contradict each other.
    """
    same = [name for name in rows.column_names if name not in ("key", "row")]
    kept, conflicts = distinct_rows(rows, ["key"], same=same)
    if len(conflicts):
        numbers = rows["row"].to_numpy()
        raise ManifestError(conflict_sentence("the same `Path`", conflicts, numbers), where=folder)
    merged = {"identical row": rows.num_rows - len(kept)}
    funnel.step("images", len(kept), merged)
    return rows.take(np.sort(kept))


def _compare_with_published(rows: pa.Table) -> str:
    """Say whether the tables are as long as those that were published."""
    counts = Counter(rows["list"].to_pylist())
    have = " + ".join(f"{counts[name]:,}" for name in PUBLISHED)
    if all(counts[name] == number for name, number in PUBLISHED.items()):
        return f"complete, {have} rows as published"
    want = " + ".join(f"{number:,}" for number in PUBLISHED.values())
    verdict = f"a part, or an unknown version: {have} rows of the published {want}"
    note(f"chexpert: {verdict}")
    return verdict


def _with_split(images: pa.Table, options: Options) -> tuple[pa.Table, str]:
    """Add the split, and say how it came about."""
    lists = images["list"].to_pylist()
    if options.split == "published":
        names = {"train": "train", "valid": "validate", "test": "test"}
        splits = [names[one] for one in lists]
        return images.append_column("split", pa.array(splits, pa.string())), "as published"
    share = options.validate_fraction
    subjects = images["subject_id"].to_pylist()
    drawn = split_by_subject(subjects, fractions=(1 - share, share, 0.0), seed=options.seed)
    # A test table replaces valid.csv as what is held out; then valid.csv is validation too.
    held_out = {"valid", "test"} if "test" not in lists else {"test"}
    splits = [
        "test" if one in held_out else "validate" if one == "valid" else ours
        for one, ours in zip(lists, drawn, strict=True)
    ]
    policy = f"{'test' if 'test' in lists else 'valid'}.csv is test; {share:g} of the patients of "
    policy += f"train.csv to validation, seed {options.seed}"
    return images.append_column("split", pa.array(splits, pa.string())), policy
