"""Open-I (Indiana University): reports as XML files, or as the two tables of the Kaggle re-pack.

    ecgen-radiology/1.xml ...            a report with its sections and the names of its images
    CXR1_IM-0001-4001.png                the images anywhere below the folder, as PNG,
    1_IM-0001-4001.dcm                   as DICOM, with a view position in most of them,
    1_IM-0001-4001.dcm.png               or as the re-pack names them
    indiana_reports.csv, indiana_projections.csv      the re-pack

Neither form names patients, and there is no official split. Reports are split whole, and reports
that say the same go to one split together, so that no text of the test split was seen in training.

Source: NLM Open-I, Indiana University chest X-ray collection (Demner-Fushman and others 2016).
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from featcache.config import replace_file
from featcache.console import note
from featcache.datasets.indiana.reports import (
    IMAGE_NAME,
    REMOVED,
    SECTIONS,
    Report,
    Source,
    find_source,
    letters_of,
    plain_name,
    read_reports,
)
from featcache.datasets.mimic.sections import ReportSections, Text, default_text, mgca_text
from featcache.errors import ManifestError
from featcache.manifest.funnel import Funnel
from featcache.manifest.headers import Header, read_headers
from featcache.manifest.splits import split_by_subject
from featcache.manifest.table import Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, file_faults, is_synthetic
from featcache.manifest.units import TextOptions

DESCRIPTION = "Open-I (Indiana University): radiographs with reports, as XML or as the CSV re-pack."
PUBLISHED = {"reports": 3_955, "images": 7_470}
MISSING_LIST, UNREAD_LIST = "missing_files.txt", "unread_reports.txt"
FRONTAL_VIEWS = ("AP", "PA", "FRONTAL")
NOTES = (
    "Open-I is licensed CC BY-NC-ND 4.0: not for commercial use, and no altered version of its "
    "reports or images may be published.",
    "Open-I names no patients: whether a patient is in more than one split is unknown. Reports are "
    "split whole, and equal texts never cross splits.",
)
NOTE_NO_VIEWS = (
    "The views of the images are unknown, so laterals are among them: only the DICOM files and the "
    "CSV re-pack say which they are."
)
NOTE_VIEWS = (
    "View positions are as the DICOM headers have them; of 2,174 published images called PA that "
    "were looked at, 180 show a lateral."
)
_NO_INDEX = "no indexing"


class Options(TextOptions):
    """How Open-I is read."""

    images: Path | None = Field(
        default=None, description="Folder below which the images lie; by default the data set's."
    )
    form: Literal["auto", "xml", "kaggle"] = Field(
        default="auto", description="`xml`: report files; `kaggle`: the two tables of the re-pack."
    )
    text: Literal["default", "mgca"] = Field(
        default="default",
        description="`default`: impression, then findings, as written; `mgca`: as MGCA treats "
        "MIMIC-CXR's reports, falsified decimals included.",
    )
    deidentified: str = Field(
        default="_", description="What replaces the mark `XXXX` of removed words."
    )
    views: Literal["frontal", "all"] = Field(
        default="frontal",
        description="`frontal` keeps AP, PA and Frontal where views are known; PNG files of the "
        "original release have none, and are all kept.",
    )
    fractions: tuple[float, float, float] = Field(
        default=(0.7, 0.1, 0.2), description="Shares of texts for train, validate and test."
    )
    seed: int = Field(default=0, description="Seed of the split.")

    @model_validator(mode="after")
    def _has_sentences(self) -> "Options":
        if self.text == "mgca" and self.text_unit == "sentence":
            raise ValueError("`text: mgca` has no full stops left to cut at; text_unit: report")
        return self


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of Open-I.

    Images without a usable text are left out. Images that a report names but that are not there, or
    empty, are named in `missing_files.txt` beside the tables, report files that cannot be read in
    `unread_reports.txt`.

    Args:
        folder: Where reports (or the tables of the re-pack) and images lie.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: There are no reports, no images, or reports contradict each other.
    """
    source = read_reports(find_source(folder, options.form))
    root = folder if options.images is None else options.images.expanduser()
    funnel = Funnel()
    images, missing = _with_files(source, root, funnel)
    notes = [SYNTHETIC_NOTE, *NOTES[1:]] if is_synthetic(folder) else list(NOTES)
    images, policies = _choose_views(images, source, root, funnel, notes, options)
    images, texts = _with_texts(source.reports, images, options, funnel, policies)
    policies |= _counts(source.reports, options)
    manifest = write_manifest(
        out,
        images,
        texts,
        dataset="openi",
        image_root=root,
        funnel=funnel.steps,
        notes=notes,
        policies=policies,
        synthetic=is_synthetic(folder),
        text_unit=options.text_unit,
    )
    _write_list(out / MISSING_LIST, missing)
    _write_list(out / UNREAD_LIST, source.unread)
    return manifest


def _write_list(path: Path, names: Sequence[str]) -> None:
    """Write names beside the tables; remove an older list when there are none."""
    path.unlink(missing_ok=True)
    if names:
        replace_file(path, "".join(f"{name}\n" for name in sorted(names)).encode())
        note(f"openi: {len(names):,} names in {path.name}")


def _image_files(root: Path) -> dict[str, str]:
    """Path below the root of each image, by its plain name; of several forms the first by path."""
    found: dict[str, str] = {}
    above = set(root.resolve().parents)
    seen = {root.resolve()}  # where links have led: none is followed in a circle
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new(Path(place) / name, above, seen)]
        for file in sorted(files):
            if IMAGE_NAME.search(file):
                path = (Path(place) / file).relative_to(root).as_posix()
                found.setdefault(plain_name(file), path)
    return found


def _is_new(folder: Path, above: set[Path], seen: set[Path]) -> bool:
    """Whether a folder is no link, or one that leads to where nothing was looked at yet."""
    if not folder.is_symlink():
        return True
    target = folder.resolve()
    is_new = target not in above and seen.isdisjoint((target, *target.parents))
    seen.add(target)
    return is_new


def _with_files(source: Source, root: Path, funnel: Funnel) -> tuple[pa.Table, list[str]]:
    """The images of all reports that are there, and the names of those that are not, or empty.

    Raises:
        ManifestError: None is there.
    """
    pairs = [(name, number) for number, one in enumerate(source.reports) for name in one.images]
    files = _image_files(root)
    names = [name for name, _ in pairs]
    images = pa.table(
        {
            "key": pa.array(names, pa.string()),
            "report": pa.array([number for _, number in pairs], pa.int64()),
            "image_path": pa.array([files.get(name) for name in names], pa.string()),
        }
    )
    funnel.start("images that the reports name", len(names))
    sizes = np.array([_size_of(root, files.get(name)) for name in names], dtype=np.int64)
    images = funnel.keep(images, "images with a file", file_faults(sizes))
    if not images.num_rows:
        raise ManifestError(
            f"0 of {len(names):,} images have a file",
            where=root,
            fix="unpack the archive of PNG or of DICOM images there, or --set images=FOLDER",
        )
    extra = len(files.keys() - set(names))
    if extra:
        note(f"openi: {extra:,} image files belong to no report")
    return images, [name for name, size in zip(names, sizes.tolist(), strict=True) if size <= 0]


def _size_of(root: Path, path: str | None) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return -1 if path is None else (root / path).stat().st_size
    except OSError:  # a link to nowhere
        return -1


def _choose_views(
    images: pa.Table,
    source: Source,
    root: Path,
    funnel: Funnel,
    notes: list[str],
    options: Options,
) -> tuple[pa.Table, dict[str, str]]:
    """Add `view_position`; keep the frontal images where views are known."""
    paths = images["image_path"].to_pylist()
    views = [source.views.get(name, "") for name in images["key"].to_pylist()]
    policies = {"views": str(options.views)}
    if source.views:
        policies["view_position"] = "projection of the re-pack"
    elif any(path.lower().endswith(".dcm") for path in paths):
        found = read_headers(root, paths, title="read DICOM headers")
        headers = [header if isinstance(header, Header) else None for header in found]
        views = [header.view if header else "" for header in headers]
        kinds = Counter(header.photometric if header else "unreadable" for header in headers)
        policies["view_position"] = "from the DICOM headers"
        policies["photometric"] = ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items()))
        notes.append(NOTE_VIEWS)
    else:
        policies["view_position"] = "unknown"
        notes.append(NOTE_NO_VIEWS)
    column = pa.array([view or None for view in views], pa.string())
    images = images.append_column("view_position", column)
    if options.views == "frontal" and any(views):
        upper = [view.upper() for view in views]
        faults = {
            "blank view": np.array([not view for view in upper]),
            "another view": np.array([view not in FRONTAL_VIEWS for view in upper]),
        }
        images = funnel.keep(images, "frontal images", faults)
        if not images.num_rows:
            raise ManifestError("no image is frontal", where=root, fix="--set views=all")
    return images, policies


def _text(report: Report, options: Options) -> Text:
    """The text of one report."""
    marked = {name: REMOVED.sub("___", text) for name, text in report.sections.items()}
    chosen = report.sections if options.text == "mgca" else marked
    sections = ReportSections(impression=chosen.get("impression"), findings=chosen.get("findings"))
    if options.text == "mgca":
        return mgca_text(sections)
    lines = options.text_unit == "sentence"
    return default_text(
        sections, deidentified=options.deidentified, last_paragraph=False, lines=lines
    )


def _with_texts(
    reports: Sequence[Report],
    images: pa.Table,
    options: Options,
    funnel: Funnel,
    policies: dict[str, str],
) -> tuple[pa.Table, pa.Table]:
    """Both tables of the manifest: images with a text, split by report and text."""
    texts = [_text(report, options) for report in reports]
    number = images["report"].to_numpy()
    reason = np.array([text.origin if not text.text else "" for text in texts])[number]
    faults = {str(name): reason == name for name in np.unique(reason) if name}
    images = funnel.keep(images, "images with a text", faults)
    number = images["report"].to_pylist()
    used = sorted(set(number))
    # Over all reports: a missing image must not move others to another split.
    groups = group_texts([one.group for one in reports], [text.text for text in texts])
    splits = split_by_subject(
        [groups[one] for one in used], fractions=options.fractions, seed=options.seed
    )
    split = dict(zip(used, splits, strict=True))
    shares = "/".join(f"{share:g}" for share in options.fractions)
    policies["split"] = f"by report and text, {shares} of the texts, seed {options.seed}"
    policies["subject_id"] = "the report: patients are not named"
    origins = Counter(texts[one].origin for one in used)
    policies["text"] = str(options.text)
    policies["text_origins"] = ", ".join(f"{name}: {n:,}" for name, n in sorted(origins.items()))
    uids = [reports[one].uid for one in number]
    columns = {
        "key": images["key"],
        "subject_id": pa.array(uids, pa.string()),
        "study_id": pa.array(uids, pa.string()),
        "view_position": images["view_position"],
        "split": pa.array([split[one] for one in number], pa.string()),
        "source": pa.array(["openi"] * len(number), pa.string()),
        "image_path": images["image_path"],
        "label:normal": pa.array([_normal(reports[one].headings) for one in number], pa.int8()),
    }
    said = {
        "key": images["key"],
        "text": pa.array([texts[one].text for one in number], pa.large_string()),
        "unit": pa.array(["report"] * len(number), pa.string()),
    }
    return pa.table(columns), pa.table(said)


def group_texts(written: Sequence[str], cleaned: Sequence[str]) -> list[str]:
    """What has to be in one split: texts that are equal as written, or once they are cleaned.

    Args:
        written: The letters of each report.
        cleaned: The text that is made of each.

    Returns:
        A name for each report, equal for those that belong together.
    """
    parent = {name: name for name in written}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for name, text in zip(written, cleaned, strict=True):
        one, other = sorted((root(name), root(first.setdefault(letters_of(text) or name, name))))
        parent[other] = one  # the smaller name leads, whatever the order of reports
    return [root(name) for name in written]


def _normal(headings: Iterable[str]) -> int | None:
    """1 for a report indexed as normal, 0 for one with findings, None where nobody indexed it."""
    named = {heading for heading in headings if heading and heading != _NO_INDEX}
    return int(named == {"normal"}) if named else None


def _counts(reports: Sequence[Report], options: Options) -> dict[str, str]:
    """How many reports and images there are, and how odd they are, in words."""
    have = {"reports": len(reports), "images": sum(len(one.images) for one in reports)}
    parts = [f"{have[what]:,} of {number:,} {what}" for what, number in PUBLISHED.items()]
    whole = "complete, as published" if have == PUBLISHED else "a part or a re-pack: "
    numbers = Counter(len(report.images) for report in reports)
    groups = Counter(report.group for report in reports)
    empty = {name: sum(name not in one.sections for one in reports) for name in SECTIONS[2:]}
    mark = "kept" if options.text == "mgca" else options.deidentified
    removed = sum(
        any(REMOVED.search(one.sections.get(name, "")) for name in SECTIONS[2:]) for one in reports
    )
    return {
        "release": whole + ("" if have == PUBLISHED else ", ".join(parts)),
        "images_per_report": ", ".join(f"{k}: {numbers[k]:,}" for k in sorted(numbers)),
        "empty_sections": ", ".join(f"{name} {count:,}" for name, count in empty.items()),
        "deidentified": f"{mark} (in {removed:,} reports)",
        "equal_texts": f"{len(reports) - len(groups):,} reports repeat the text of another",
    }
