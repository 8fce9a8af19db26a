"""CheXpert as a procedural tree: train.csv, valid.csv and the folders that their paths name."""

from collections.abc import Collection, Sequence
from pathlib import Path

from featcache.console import task
from featcache.synth.draw import GEOMETRY, LESIONS, generator
from featcache.synth.labelled import SIZES, Exposure, picture_bytes, plan_exposures
from featcache.synth.tree import Summary, Tree

SWITCHES = ("duplicate-row", "test-table")
# The order of the published columns, which is not that of MIMIC-CXR-JPG.
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
_DRAWN = {name: name for name in LABELS if name in LESIONS or name in GEOMETRY}
_HEADER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS)
_FIRST = 90_000  # the published patients end at patient64740


def _file(exposure: Exposure, split: str) -> str:
    """Path of an image below the root."""
    kind = "lateral" if exposure.view == "LATERAL" else "frontal"
    place = f"{split}/patient{_FIRST + exposure.patient:05d}/study{exposure.study}"
    return f"{place}/view{exposure.order}_{kind}.jpg"


def _values(exposure: Exposure, seed: int) -> dict[str, int | None]:
    """What the labeller read in the study's report: present, absent, uncertain or nothing."""
    rng = generator(seed, "chexpert", "labels", exposure.patient, exposure.study)
    values: dict[str, int | None] = {}
    for label in LABELS[1:]:
        is_there, luck = label in exposure.findings, float(rng.random())
        if is_there:
            values[label] = -1 if luck < 0.15 else 1
        else:
            values[label] = 0 if luck < 0.25 else -1 if luck < 0.29 else None
    said = [value for name, value in values.items() if name != "Support Devices"]
    nothing = not any(value in (1, -1) for value in said)
    return {"No Finding": 1 if nothing else None, **values}


def _row(exposure: Exposure, split: str, seed: int) -> list[object]:
    """One row of a table, with numbers as the published files have them."""
    rng = generator(seed, "chexpert", "person", exposure.patient)
    sex, age = ("Female", "Male")[int(rng.integers(2))], int(rng.integers(18, 91))
    if exposure.patient == 1:
        sex, age = "Unknown", 0
    is_lateral = exposure.view == "LATERAL"
    values = _values(exposure, seed).values()
    return [
        f"CheXpert-v1.0-small/{_file(exposure, split)}",
        sex,
        age,
        "Lateral" if is_lateral else "Frontal",
        "" if is_lateral else exposure.view,
        *("" if value is None else f"{value:.1f}" for value in values),
    ]


def _give_odd_cases(exposures: Sequence[Exposure]) -> None:
    """One missing file, and the two rare views."""
    frontal = [one for one in exposures if one.view != "LATERAL"]
    frontal[3].odd.append("missing")
    for one, view in ((frontal[5], "LL"), (frontal[7], "RL")):
        one.view = view
        one.odd.append(f"frontal called {view}")


def _split_of(exposure: Exposure, last: int, switches: Collection[str]) -> str:
    """Which table an image is in; the last fifth of the patients is held out."""
    if exposure.patient > last - last // 5:
        return "valid"
    is_test = "test-table" in switches and exposure.patient > last - 2 * (last // 5)
    return "test" if is_test else "train"


def write(root: Path, *, size: str, seed: int, switches: Collection[str] = ()) -> Summary:
    """Write the tree.

    Args:
        root: Empty folder that exists.
        size: A key of `SIZES`.
        seed: Equal seeds give equal bytes.
        switches: Which of `SWITCHES` are on.

    Returns:
        Counts and the truth.
    """
    tree, chosen = Tree(root), SIZES[size]
    exposures = plan_exposures("chexpert", chosen, seed, LABELS[1:], laterals=True)
    _give_odd_cases(exposures)
    tables: dict[str, list[list[object]]] = {"train": [], "valid": [], "test": []}
    truth: dict[str, object] = {}
    images = 0
    with task("synth chexpert", len(exposures)) as progress:
        for done, one in enumerate(exposures, start=1):
            split = _split_of(one, chosen.patients, switches)
            tables[split].append(_row(one, split, seed))
            truth[_file(one, split)] = {
                "present": list(one.findings),
                "labels": _values(one, seed),
                "view": one.view,
                "odd": one.odd,
            }
            if "missing" not in one.odd:
                content = picture_bytes("chexpert", one, _DRAWN, chosen, seed, kind="JPEG")
                tree.write(_file(one, split), content)
                images += 1
            progress.update(done)
    if "duplicate-row" in switches:
        tables["train"].append(tables["train"][0])
    for split, rows in tables.items():
        if split == "test" and rows:
            tree.write_csv("test.csv", [(_HEADER[0], *LABELS), *((r[0], *r[5:]) for r in rows)])
        elif rows:
            tree.write_csv(f"{split}.csv", [_HEADER, *rows])
    return Summary(images, len({(one.patient, one.study) for one in exposures}), {"images": truth})
