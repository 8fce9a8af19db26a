"""MIMIC-CXR as a procedural tree: DICOM files and reports in one tree, the lists, no other table.

The studies are those of the synthetic MIMIC-CXR-JPG of the same seed, so that its tables fit. The
reports lie in the archive `mimic-cxr-reports.zip`, beside the unpacked tree with the switch
`unpacked-reports`.
"""

import io
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from featcache.console import task
from featcache.synth import mimic_cxr_jpg
from featcache.synth.dicom import dicom_bytes
from featcache.synth.draw import draw_frontal, draw_lateral, generator
from featcache.synth.mimic_plan import SIZES, Picture, StudyPlan, plan
from featcache.synth.tree import Summary, Tree

SWITCHES = ("unpacked-reports", "with-tables")
_ODD_BYTES = ("zero byte", "HTML instead of JPEG")
_SMALLER = 2  # DICOM files are not compressed: half the side keeps trees small


def _stored(picture: Picture, seed: int) -> UInt16[np.ndarray, "H W"]:
    """Twelve bits of grey, as a detector gives them: not equalised."""
    rng = generator(seed, "picture", picture.name)
    height, width = picture.height // _SMALLER, picture.width // _SMALLER
    if picture.is_frontal:
        grey, _ = draw_frontal(picture.patient, picture.lesions, rng, height=height, width=width)
    else:
        grey = draw_lateral(picture.patient, rng, height=height, width=width)
    if picture.odd == "one pixel wide":
        grey = grey[:, :1]
    elif picture.odd == "constant":
        grey = np.full_like(grey, 128)
    levels = np.minimum(grey.astype(np.float64) * 16 * picture.gain, 4_095)
    return np.asarray(levels, dtype=np.uint16)


def encode_picture(picture: Picture, view: str, seed: int) -> bytes:
    """Draw a picture and make a DICOM file of it, damaged where the plan says so.

    Args:
        picture: What to draw.
        view: ViewPosition; empty for a blank one.
        seed: The tree's seed.

    Returns:
        The file's bytes; every other file is MONOCHROME1.
    """
    if picture.odd == "zero byte":
        return b""
    if picture.odd == "HTML instead of JPEG":
        return b"<!DOCTYPE html><html><body>403 Forbidden</body></html>\n"
    is_inverted = bool(generator(seed, "photometric", picture.name).random() < 0.5)
    content = dicom_bytes(
        _stored(picture, seed), view=view, bits=12, uid=picture.name, inverted=is_inverted
    )
    return content[: len(content) * 3 // 5] if picture.odd == "truncated" else content


def _write_images(tree: Tree, studies: Sequence[StudyPlan], seed: int) -> int:
    """All image files; returns how many there are."""
    wanted = [
        (f"{study.image_folder}/{image.dicom_id}.dcm", image)
        for study in studies
        for image in study.images
        if image.picture.odd != "missing"
    ]
    block = mimic_cxr_jpg.BLOCK
    with ThreadPoolExecutor() as pool, task("synth mimic-cxr", len(wanted)) as progress:
        for start in range(0, len(wanted), block):
            part = wanted[start : start + block]
            contents = pool.map(
                lambda item: encode_picture(item[1].picture, item[1].view, seed), part
            )
            for (path, _), content in zip(part, contents, strict=True):
                tree.write(path, content)
            progress.update(start + len(part))
    return len(wanted)


def _zip_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """An archive without times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return file.getvalue()


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
    studies = plan(SIZES[size], seed, ())
    images = _write_images(tree, studies, seed)
    reports = [
        (f"{study.image_folder}.txt", mimic_cxr_jpg.report_bytes(study, seed))
        for study in studies
        if study.layout != "no report file"
    ]
    if "unpacked-reports" in switches:
        for path, content in reports:
            tree.write(path, content)
    else:
        tree.write("mimic-cxr-reports.zip", _zip_bytes(reports))
    mimic_cxr_jpg.write_lists(tree, studies, below="")
    if "with-tables" in switches:
        mimic_cxr_jpg.write_tables(tree, studies, seed, ())
        mimic_cxr_jpg.write_labels(tree, studies, seed)
    return Summary(images, len(studies), mimic_cxr_jpg.truth(studies, seed))
