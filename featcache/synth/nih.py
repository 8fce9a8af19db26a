"""NIH ChestX-ray14 as a procedural tree: tables with odd headers, the lists, square pictures."""

from collections.abc import Collection, Sequence
from pathlib import Path

from featcache.console import task
from featcache.synth.draw import Box, generator
from featcache.synth.labelled import SIZES, Exposure, picture_with_boxes, plan_exposures
from featcache.synth.tree import Summary, Tree

SWITCHES = ("table-2017", "one-folder", "no-lists", "no-boxes")
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
_DRAWN = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
# Commas inside brackets are not quoted: eleven columns with names such as `Height]`.
_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
# Pixels of the published pictures; the table of boxes calls one finding otherwise.
_BOX_SIDE = 1_024
_BOXED = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Effusion",
    "Infiltration": "Infiltrate",
    "Mass": "Mass",
    "Nodule": "Nodule",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
_FIRST = 90_000  # the published patients end at 00030805


def _name(exposure: Exposure) -> str:
    """Name of an image."""
    return f"{_FIRST + exposure.patient:08d}_{exposure.study - 1:03d}.png"


def _line(exposure: Exposure, seed: int) -> str:
    """One line of the table."""
    rng = generator(seed, "nih", "person", exposure.patient)
    age, sex = int(rng.integers(20, 90)), "MF"[int(rng.integers(2))]
    labels = "|".join(exposure.findings) or "No Finding"
    cells = [_name(exposure), labels, exposure.study - 1, _FIRST + exposure.patient, age, sex,
             exposure.view, 2_500, 2_048, 0.168, 0.168]  # fmt: skip
    return ",".join(map(str, cells))


def _write_table(
    tree: Tree, exposures: Sequence[Exposure], seed: int, switches: Collection[str]
) -> None:
    """The table; the one of 2017 has a comma too many and calls the sex otherwise."""
    lines = [_HEADER, *(_line(one, seed) for one in exposures)]
    name = "Data_Entry_2017_v2020.csv"
    if "table-2017" in switches:
        lines = [f"{line}," for line in lines]
        lines[0] = lines[0].replace("Patient Sex", "Patient Gender")
        name = "Data_Entry_2017.csv"
    tree.write(name, "".join(f"{line}\n" for line in lines).encode())


def _pixels(box: Box) -> list[float]:
    """Left, top, width, height in pixels of the published size."""
    left, top, right, bottom = (share * _BOX_SIDE for share in box)
    return [round(number, 6) for number in (left, top, right - left, bottom - top)]


def _write_boxes(tree: Tree, boxes: dict[str, dict[str, list[float]]]) -> None:
    """The table of boxes, with the header as published, sorted by finding."""
    rows = [
        (list(_BOXED).index(finding), name, finding, box)
        for name, found in boxes.items()
        for finding, box in found.items()
    ]
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    lines += [
        ",".join([name, _BOXED[finding], *map(str, box)]) for _, name, finding, box in sorted(rows)
    ]
    tree.write("BBox_List_2017.csv", "".join(f"{line}\n" for line in lines).encode())


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
    exposures = plan_exposures("nih", chosen, seed, LABELS, laterals=False)
    exposures[3].odd.append("missing")
    held_out = chosen.patients - chosen.patients // 4
    lists: dict[str, list[str]] = {"train_val": [], "test": []}
    truth: dict[str, object] = {}
    boxes: dict[str, dict[str, list[float]]] = {}
    images = 0
    with task("synth nih", len(exposures)) as progress:
        for done, one in enumerate(exposures, start=1):
            is_test = one.patient > held_out
            lists["test" if is_test else "train_val"].append(_name(one))
            truth[_name(one)] = {
                "findings": list(one.findings),
                "view": one.view,
                "is_test": is_test,
                "odd": one.odd,
            }
            content, places = picture_with_boxes(
                "nih", one, _DRAWN, chosen, seed, kind="PNG", square=True
            )
            if one.patient % 4:  # not every image was looked at for its places
                boxes[_name(one)] = {f: _pixels(places[f]) for f in _BOXED if f in places}
            if "missing" not in one.odd:
                folder = (
                    "images" if "one-folder" in switches else f"images_{1 + done % 2:03d}/images"
                )
                tree.write(f"{folder}/{_name(one)}", content)
                images += 1
            progress.update(done)
    _write_table(tree, exposures, seed, switches)
    if "no-lists" not in switches:
        for name, names in lists.items():
            tree.write(
                f"{name}_list.txt", "\n".join(names).encode()
            )  # no end of line, as published
    if "no-boxes" not in switches:
        _write_boxes(tree, boxes)
    return Summary(images, len(exposures), {"images": truth, "boxes": boxes})
