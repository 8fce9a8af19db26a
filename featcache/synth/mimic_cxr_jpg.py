"""MIMIC-CXR-JPG as a procedural tree: the real names, columns and odd cases, invented patients.

The tree holds the JPG project at its root and the text project in `mimic-cxr-reports/`. Subjects
are 199xxxxx and studies 599xxxxx; none of the 54 studies with section rules of their own occurs.
"""

import io
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.console import task
from featcache.synth import reports
from featcache.synth.draw import draw_frontal, draw_lateral, equalise, generator
from featcache.synth.mimic_plan import SIZES, SWITCHES, ImagePlan, Picture, StudyPlan, plan
from featcache.synth.tree import Summary, Tree

__all__ = [
    "SWITCHES",
    "encode_picture",
    "report_bytes",
    "truth",
    "write",
    "write_labels",
    "write_lists",
    "write_tables",
]

REPORTS = "mimic-cxr-reports"
BLOCK = 64  # pictures held in memory at once
_METADATA = [
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]
_VIEW_MEANING = {
    "PA": "postero-anterior",
    "AP": "antero-posterior",
    "LATERAL": "lateral",
    "LL": "left lateral",
}
_README = """Synthetic files in the layout of MIMIC-CXR-JPG and MIMIC-CXR.

No patient, picture or report in this folder is real. Identifiers are invented.
"""


def _jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def _rotated(grey: np.ndarray) -> bytes:
    """The picture turned by a quarter, with the EXIF tag that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(Image.fromarray(np.rot90(grey).copy()), exif=exif)


def encode_picture(picture: Picture, seed: int) -> bytes:
    """Draw a picture and make a JPEG file of it, damaged where the plan says so.

    Args:
        picture: What to draw.
        seed: The tree's seed.

    Returns:
        The file's bytes; empty for a file of zero bytes.
    """
    rng = generator(seed, "picture", picture.name)
    if picture.is_frontal:
        grey, _ = draw_frontal(
            picture.patient, picture.lesions, rng, height=picture.height, width=picture.width
        )
    else:
        grey = draw_lateral(picture.patient, rng, height=picture.height, width=picture.width)
    grey = equalise(grey)
    if picture.gain != 1.0:
        grey = np.clip(grey * picture.gain, 0, 255).astype(np.uint8)
    odd = picture.odd
    if odd == "zero byte":
        return b""
    if odd == "HTML instead of JPEG":
        return b"<!DOCTYPE html><html><body>403 Forbidden</body></html>\n"
    if odd == "one pixel wide":
        return _jpeg(Image.fromarray(grey[:, :1].copy()))
    if odd == "constant":
        return _jpeg(Image.fromarray(np.full_like(grey, 128)))
    if odd == "EXIF rotated":
        return _rotated(grey)
    if odd == "border":
        edge = max(min(grey.shape) // 16, 2)
        grey = np.pad(grey[edge:-edge, edge:-edge], edge)
    if odd == "marker":
        side = max(min(grey.shape) // 14, 3)
        grey[side : 2 * side, side : 2 * side] = 255
    image = Image.fromarray(grey)
    content = _jpeg(image.convert("RGB") if odd == "RGB" else image)
    return content[: len(content) * 3 // 5] if odd == "truncated" else content


def report_bytes(study: StudyPlan, seed: int) -> bytes:
    """A study's report as the file holds it.

    Args:
        study: Whose report.
        seed: The tree's seed.
    """
    rng = generator(seed, "report", study.study_id)
    findings = reports.findings_text(study.statements, rng)
    impression = reports.impression_text(study.statements, rng)
    wording = study.wording
    if wording == "identical text":
        findings, impression = reports.IDENTICAL
    elif wording in ("over 112 tokens", "over 512 tokens"):
        said = [reports.sentence(s, rng) for s in study.statements] + list(reports.FILLERS)
        rounds = 10 if wording == "over 512 tokens" else 2
        findings = " ".join(part for _ in range(rounds) for part in rng.permutation(said))
    elif wording == "decimals":
        findings = f"{findings} {reports.DECIMALS}"
    elif wording == "numbered list":
        impression = reports.numbered(f"{impression} {findings}")
    elif wording == "not ASCII":
        findings = f"{findings} {reports.NON_ASCII}"
    elif wording == "Latin-1 bytes":
        impression = f"{impression} {reports.LATIN_1}"
    text = reports.layout_report(study.layout, findings, impression, rng)
    if wording == "CRLF":
        text = text.replace("\n", "\r\n")
    return text.encode("latin-1" if wording == "Latin-1 bytes" else "utf-8")


def _label_values(study: StudyPlan) -> dict[str, int | None]:
    """What a perfect labeller reads in the report, by label; None where nothing is said."""
    values: dict[str, int | None] = dict.fromkeys(reports.LABELS)
    values.update({statement.label: statement.value for statement in study.statements})
    others = [v for label, v in values.items() if label != "Support Devices"]
    if not any(value in (1, -1) for value in others):
        values["No Finding"] = 1
    return values


def _label_cells(values: dict[str, int | None]) -> list[str]:
    """Cells as the published files have them: `1.0`, `0.0`, `-1.0`, or nothing."""
    return ["" if value is None else f"{value:.1f}" for value in values.values()]


def write_labels(tree: Tree, studies: Sequence[StudyPlan], seed: int) -> None:
    """Both labellers' tables, and the hand-labelled one of the test split."""
    head = ["subject_id", "study_id", *reports.LABELS]
    chexpert: list[list[str]] = [head]
    negbio: list[list[str]] = [head]
    by_hand: list[list[str]] = [
        ["study_id", *sorted(name.replace("Lung Op", "Airspace Op") for name in reports.LABELS)]
    ]
    for study in studies:
        values = _label_values(study)
        if study.split == "test":
            renamed = {name.replace("Lung Op", "Airspace Op"): v for name, v in values.items()}
            by_hand.append([study.study_id, *_label_cells(dict(sorted(renamed.items())))])
        row = [study.subject_id, study.study_id]
        rng = generator(seed, "negbio", study.study_id)
        doubts = {n: -1 if v == 1 and rng.random() < 0.03 else v for n, v in values.items()}
        doubts["No Finding"] = values["No Finding"]
        negbio.append([*row, *_label_cells(doubts)])
        if study.label_row == "blank label row":
            values = dict.fromkeys(values)
        if study.label_row != "no label row":
            chexpert.append([*row, *_label_cells(values)])
    tree.write_csv("mimic-cxr-2.0.0-chexpert.csv.gz", chexpert)
    tree.write_csv("mimic-cxr-2.0.0-negbio.csv.gz", negbio)
    tree.write_csv("mimic-cxr-2.1.0-test-set-labeled.csv", by_hand)


def _metadata_row(study: StudyPlan, image: ImagePlan, seed: int) -> list[object]:
    """One row of the metadata table; the time is a number that lost its leading zeros."""
    rng = generator(seed, "time", study.study_id)
    first_year = 2110 + int(generator(seed, "year", study.subject_id).integers(0, 80))
    month, day = int(rng.integers(1, 13)), int(rng.integers(1, 29))
    hour, minute = int(rng.integers(0, 24)), int(rng.integers(0, 60))
    time = hour * 10_000 + minute * 100 + int(rng.integers(0, 6000)) / 100
    portable = image.view in ("AP", "AP LLD", "AP AXIAL", "")
    procedure = "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)"
    size = (image.picture.height, image.picture.width)
    if image.picture.odd == "one pixel wide":
        size = (size[0], 1)
    elif image.picture.odd == "EXIF rotated":
        size = (size[1], size[0])
    return [
        image.dicom_id,
        study.subject_id,
        study.study_id,
        procedure,
        image.view,
        *size,
        f"{first_year + study.order}{month:02d}{day:02d}",
        float(time),
        procedure,
        _VIEW_MEANING.get(image.view, ""),
        ("Erect", "Recumbent", "")[int(rng.integers(3))],
    ]


def write_tables(
    tree: Tree, studies: Sequence[StudyPlan], seed: int, switches: Collection[str]
) -> None:
    """The tables of the JPG project but the labels."""
    metadata: list[Sequence[object]] = [_METADATA]
    splits: list[Sequence[object]] = [("dicom_id", "study_id", "subject_id", "split")]
    names = []
    for study in studies:
        for image in sorted(study.images, key=lambda image: image.dicom_id):
            metadata.append(_metadata_row(study, image, seed))
            splits.append((image.dicom_id, study.study_id, study.subject_id, study.split))
            names.append(f"{study.image_folder}/{image.dicom_id}.jpg\n")
    if "duplicate-metadata-row" in switches:
        metadata.insert(2, metadata[1])
    if "row-without-split" in switches:
        splits.pop()
    tree.write_csv("mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    tree.write_csv("mimic-cxr-2.0.0-split.csv.gz", splits)
    tree.write("IMAGE_FILENAMES", "".join(names).encode())
    tree.write("README", _README.encode())
    tree.write("LICENSE.txt", b"Synthetic files, free for any use.\n")


def write_lists(tree: Tree, studies: Sequence[StudyPlan], *, below: str) -> None:
    """The two lists of the text project.

    Args:
        tree: Where to write.
        studies: What to list.
        below: Folder of the lists, with a slash at its end; empty for the root.
    """
    records: list[Sequence[object]] = [("subject_id", "study_id", "dicom_id", "path")]
    reports_list: list[Sequence[object]] = [("subject_id", "study_id", "path")]
    for study in studies:
        ids = (study.subject_id, study.study_id)
        if study.layout != "no report file":
            reports_list.append((*ids, f"{study.image_folder}.txt"))
        for image in sorted(study.images, key=lambda image: image.dicom_id):
            path = f"{study.image_folder}/{image.dicom_id}.dcm"
            records.append((*ids, image.dicom_id, path))
    tree.write_csv(f"{below}cxr-record-list.csv.gz", records)
    tree.write_csv(f"{below}cxr-study-list.csv.gz", reports_list)


def _write_images(tree: Tree, studies: Sequence[StudyPlan], seed: int) -> int:
    """All image files; returns how many there are."""
    wanted = [
        (f"{study.image_folder}/{image.dicom_id}.jpg", image.picture)
        for study in studies
        for image in study.images
        if image.picture.odd != "missing"
    ]
    with (
        ThreadPoolExecutor() as pool,
        task("synth mimic-cxr-jpg", len(wanted)) as progress,
    ):
        for start in range(0, len(wanted), BLOCK):
            block = wanted[start : start + BLOCK]
            contents = pool.map(lambda item: encode_picture(item[1], seed), block)
            for (path, _), content in zip(block, contents, strict=True):
                tree.write(path, content)
            progress.update(start + len(block))
    return len(wanted)


def truth(studies: Sequence[StudyPlan], seed: int) -> dict[str, object]:
    """What is hidden in the tree, by study and by image."""
    of_studies, of_images = {}, {}
    for study in studies:
        of_studies[study.study_id] = {
            "subject_id": study.subject_id,
            "split": study.split,
            "present": {x.kind: {"side": x.side, "size": round(x.size, 4)} for x in study.lesions},
            "said": {s.label: s.value for s in study.statements},
            "odd": study.odd,
        }
        for image in study.images:
            of_images[image.dicom_id] = {
                "study_id": study.study_id,
                "view": image.view,
                "boxes": _boxes(image.picture, seed),
                "odd": image.odd,
            }
    return {"studies": of_studies, "images": of_images}


def _boxes(picture: Picture, seed: int) -> list[list[object]]:
    """Label, left, top, right and bottom of each lesion, found in a small copy of the picture."""
    if not picture.is_frontal:
        return []
    rng = generator(seed, "picture", picture.name)
    scale = min(1.0, 128 / max(picture.height, picture.width))
    height, width = max(round(picture.height * scale), 1), max(round(picture.width * scale), 1)
    _, boxes = draw_frontal(picture.patient, picture.lesions, rng, height=height, width=width)
    return [[label, *box] for label, box in boxes]


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
    tree = Tree(root)
    studies = plan(SIZES[size], seed, switches)
    images = _write_images(tree, studies, seed)
    for study in studies:
        if study.layout != "no report file":
            content = report_bytes(study, seed)
            tree.write(f"{REPORTS}/{study.image_folder}.txt", content)
    write_tables(tree, studies, seed, switches)
    write_lists(tree, studies, below=f"{REPORTS}/")
    write_labels(tree, studies, seed)
    tree.write_sums("SHA256SUMS.txt")
    return Summary(images, len(studies), truth(studies, seed))
