"""MIMIC-CXR-JPG with the reports of MIMIC-CXR: two published trees, one manifest.

The JPG project holds pictures, views, splits and labels; the report text is another project. Both
may lie in one folder. Identifiers stay text from the first byte on. Labels belong to studies and
are copied to each picture: 1 present, 0 denied, -1 uncertain, null not mentioned.

Source: file layout of MIMIC-CXR-JPG and MIMIC-CXR, versions 2.0.0 and 2.1.0, on PhysioNet.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64
from pydantic import Field, model_validator

from featcache.console import note, task
from featcache.datasets.mimic.sections import Text, default_text, mgca_text, read_sections
from featcache.datasets.mimic.tables import (
    LABELS,
    check_ids,
    distinct,
    find_table,
    read_labels,
    read_table,
)
from featcache.errors import ManifestError
from featcache.manifest.checks import rows_text
from featcache.manifest.table import FunnelStep, Manifest, write_manifest
from featcache.manifest.tree import SYNTHETIC_NOTE, is_synthetic
from featcache.manifest.units import TextOptions

DESCRIPTION = "MIMIC-CXR-JPG: radiographs, official splits, CheXpert labels; MIMIC-CXR's reports."
FRONTAL_VIEWS = ("AP", "PA")
NUM_IMAGES_PUBLISHED = 377_110
NOTES = (
    "Made from credentialed data: features, manifests, trained weights and tables of retrieved "
    "items count as the data and stay under its terms.",
    "The official test split is no random draw: more of its studies have a finding than of those "
    "in train, so base rates must not be compared across splits.",
)
_THREADS = 16  # what waits is the file system, not the processor
_BLOCK = 4_096
_SLICE = 64

_Result = TypeVar("_Result")


class Options(TextOptions):
    """How MIMIC-CXR-JPG is read."""

    reports: Path | None = Field(
        default=None,
        description="Folder with the reports of MIMIC-CXR; by default the folder of the images.",
    )
    sections: Literal["official"] = Field(
        default="official", description="Section rules: those that MIT-LCP published."
    )
    text: Literal["default", "mgca"] = Field(
        default="default",
        description="`default`: impression, then findings, as written; `mgca`: what MGCA made of "
        "them, falsified decimals included.",
    )
    last_paragraph: bool = Field(
        default=True,
        description="Whether the last paragraph stands in where a report has neither impression "
        "nor findings; `text: mgca` never uses it.",
    )
    deidentified: str = Field(
        default="_", description="What replaces the mark `___` of removed words."
    )
    views: Literal["frontal", "all"] = Field(
        default="frontal", description="`frontal` keeps ViewPosition AP and PA, nothing else."
    )
    labels: Literal["chexpert", "negbio", "none"] = Field(
        default="chexpert", description="Whose table becomes the label columns."
    )

    @model_validator(mode="after")
    def _has_sentences(self) -> "Options":
        if self.text == "mgca" and self.text_unit == "sentence":
            raise ValueError("`text: mgca` has no full stops left to cut at; text_unit: report")
        return self


def read(folder: Path, out: Path, *, options: Options) -> Manifest:
    """Write the manifest of MIMIC-CXR-JPG.

    Pictures without a usable text are left out, so every row can be paired. Files that are there
    but cannot be decoded stay: stage one quarantines them.

    Args:
        folder: The JPG project: its tables, and `files/` with the pictures.
        out: The manifest's folder.
        options: See `Options`.

    Raises:
        ManifestError: A table, all pictures or all reports are missing, tables contradict each
            other, or a patient is in two splits.
    """
    funnel = Funnel()
    images = _read_metadata(folder, funnel)
    images = _with_split(folder, images, funnel)
    labels = read_labels(folder, options.labels)
    images = _with_file(folder, images, funnel)
    if options.views == "frontal":
        view = images["view_position"]
        other = ~pc.is_in(view, pa.array([*FRONTAL_VIEWS, None], pa.string())).to_numpy()
        faults = {"blank view": pc.is_null(view).to_numpy(), "another view": other}
        images = funnel.keep(images, "frontal images", faults)
    if not images.num_rows:
        raise ManifestError("no picture is frontal", where=folder, fix="--set views=all")
    reports = _read_reports(folder, images, options)
    origins = np.array([text.origin if not text.text else "" for text in reports.texts])
    images = images.append_column("study", pa.array(reports.study_of_image))
    is_missing = origins[reports.study_of_image] == _NO_FILE
    images = funnel.keep(images, "images with a report", {_NO_FILE: is_missing})
    reason = origins[images["study"].to_numpy()]
    faults = {str(name): reason == name for name in np.unique(reason) if name}
    images = funnel.keep(images, "images with a text", faults)
    synthetic = is_synthetic(folder)
    return write_manifest(
        out,
        _image_columns(images, labels),
        _text_columns(images, reports.texts),
        dataset="mimic-cxr-jpg",
        image_root=folder,
        funnel=funnel.steps,
        notes=[SYNTHETIC_NOTE] if synthetic else NOTES,
        policies=_policies(options, reports),
        synthetic=synthetic,
        text_unit=options.text_unit,
    )


@dataclass
class Funnel:
    """What was dropped, step by step; its sums close because each step counts what it drops."""

    steps: list[FunnelStep] = field(default_factory=list)

    def keep(
        self, images: pa.Table, name: str, faults: Mapping[str, Bool[np.ndarray, " N"]]
    ) -> pa.Table:
        """Drop the rows with a fault.

        Args:
            images: What is left so far.
            name: What is counted after this step.
            faults: Reason to rows; a row with several counts for the first.
        """
        is_kept = np.ones(images.num_rows, dtype=np.bool_)
        dropped = {}
        for reason, is_faulty in faults.items():
            dropped[reason] = int(np.count_nonzero(is_kept & is_faulty))
            is_kept &= ~is_faulty
        dropped = {reason: number for reason, number in dropped.items() if number}
        self.steps.append(FunnelStep(name=name, count=int(is_kept.sum()), dropped=dropped))
        return images.filter(pa.array(is_kept))


def _read_metadata(folder: Path, funnel: Funnel) -> pa.Table:
    """Identity and view of each picture: `dicom_id subject_id study_id view_position row`."""
    path = find_table(folder, "metadata")
    table = read_table(path, ["dicom_id", "subject_id", "study_id", "ViewPosition"])
    check_ids(table, path)
    total = table.num_rows
    if total == NUM_IMAGES_PUBLISHED:
        note(f"the metadata is complete: {total:,} images, as published")
    elif not is_synthetic(folder):
        note(f"the metadata lists {total:,} of the {NUM_IMAGES_PUBLISHED:,} published images")
    view = table["ViewPosition"]
    view = pc.if_else(pc.equal(view, ""), pa.scalar(None, pa.string()), view)
    table = table.drop_columns("ViewPosition").append_column("view_position", view)
    table = table.append_column("row", pa.array(np.arange(1, total + 1, dtype=np.int64)))
    images = distinct(table, "dicom_id", ["subject_id", "study_id", "view_position"], path)
    distinct(images, "study_id", ["subject_id"], path)
    funnel.steps.append(FunnelStep(name="rows in the metadata table", count=total))
    merged = total - images.num_rows
    dropped = {"identical row": merged} if merged else {}
    step = FunnelStep(name="distinct images", count=images.num_rows, dropped=dropped)
    funnel.steps.append(step)
    return images


def _with_split(folder: Path, images: pa.Table, funnel: Funnel) -> pa.Table:
    """Add the official split; rows without one are dropped."""
    path = find_table(folder, "split")
    table = read_table(path, ["dicom_id", "study_id", "subject_id", "split"])
    check_ids(table, path)
    table = distinct(table, "dicom_id", ["study_id", "subject_id", "split"], path)
    row = pc.index_in(images["dicom_id"], table["dicom_id"].combine_chunks())
    for name in ("study_id", "subject_id"):
        differs = pc.fill_null(pc.not_equal(table[name].take(row), images[name]), False)
        rows = np.flatnonzero(differs.to_numpy())
        if len(rows):
            numbers = images["row"].to_numpy()[rows]
            raise ManifestError(
                f"metadata and split table give a picture another `{name}`: {rows_text(numbers)}",
                where=path,
            )
    images = images.append_column("split", table["split"].take(row))
    without = {"not in the split table": pc.is_null(images["split"]).to_numpy()}
    return funnel.keep(images, "images with a split", without)


def _each_file(
    function: Callable[[str], _Result], paths: Sequence[str], *, title: str, unit: str
) -> Iterator[_Result]:
    """Call a function for each path, in many threads, and yield the results in order."""
    with ThreadPoolExecutor(_THREADS) as pool, task(title, len(paths), unit) as progress:
        for start in range(0, len(paths), _BLOCK):
            block = paths[start : start + _BLOCK]
            # A future for each file would cost more than reading it.
            slices = [block[at : at + _SLICE] for at in range(0, len(block), _SLICE)]
            for results in pool.map(lambda names: [function(name) for name in names], slices):
                yield from results
            progress.update(start + len(block))


def _size_bytes(path: str) -> int:
    """Size of a file, -1 where there is none."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - half a million calls
    except OSError:
        return -1


def _with_file(folder: Path, images: pa.Table, funnel: Funnel) -> pa.Table:
    """Add `image_path`, relative to the folder; pictures without a file are dropped."""
    prefix = "files/p" if (folder / "files").is_dir() else "p"
    subject = images["subject_id"]
    parts = [pc.utf8_slice_codeunits(subject, 0, 2), "/p", subject, "/s", images["study_id"]]
    paths = pc.binary_join_element_wise(prefix, *parts, "/", images["dicom_id"], ".jpg", "")
    full = pc.binary_join_element_wise(f"{folder}/", paths, "")
    sizes = _each_file(_size_bytes, full.to_pylist(), title="look for images", unit="images")
    size = np.fromiter(sizes, dtype=np.int64, count=len(full))
    faults = {"missing file": size < 0, "zero bytes": size == 0}
    images = images.append_column("image_path", paths)
    kept = funnel.keep(images, "images with a file", faults)
    if not kept.num_rows:
        raise ManifestError(
            f"0 of {images.num_rows:,} listed images have a file",
            where=folder / prefix.rpartition("/")[0],
            fix="pass the folder of MIMIC-CXR-JPG that holds `files/p10` to `files/p19`",
        )
    return kept


_NO_FILE = "no report file"


@dataclass(frozen=True)
class Reports:
    """The texts of all studies.

    Attributes:
        texts: One for each study, in the order of the first picture.
        study_of_image: Place in `texts` of each picture.
        num_latin_1: Reports that are no UTF-8 and were read as Latin-1.
    """

    texts: list[Text]
    study_of_image: Int64[np.ndarray, " N"]
    num_latin_1: int


def _report_folder(roots: Sequence[Path], reports: Sequence[str]) -> Path:
    """The folder in which the reports lie, whichever way their archive was unpacked.

    Raises:
        ManifestError: None of the folders holds any of them.
    """
    below = ("files", "mimic-cxr-reports/files", "mimic-cxr-reports", "")
    candidates = [root / name for root in roots for name in below]
    for candidate in candidates:
        if candidate.is_dir() and any((candidate / report).is_file() for report in reports):
            return candidate
    raise ManifestError(
        f"0 of {len(reports):,} studies have a report",
        where=", ".join(str(candidate) for candidate in candidates),
        fix="MIMIC-CXR-JPG has no report text: unpack mimic-cxr-reports.zip of MIMIC-CXR and "
        "name its folder with --set reports=FOLDER",
    )


def _read_bytes(path: str) -> bytes | None:
    """Content of a file, None where there is none."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _read_reports(folder: Path, images: pa.Table, options: Options) -> Reports:
    """Read the report of every study and make its text."""
    encoded = images["study_id"].combine_chunks().dictionary_encode()
    study_of_image = encoded.indices.to_numpy().astype(np.int64)
    first = np.unique(study_of_image, return_index=True)[1]
    subjects, studies = images["subject_id"].take(first).to_pylist(), encoded.dictionary.to_pylist()
    names = [f"p{u[:2]}/p{u}/s{s}.txt" for u, s in zip(subjects, studies, strict=True)]
    root = folder if options.reports is None else options.reports.expanduser()
    base = _report_folder([root], names)
    texts: list[Text] = []
    num_latin_1 = 0
    paths = [f"{base}/{name}" for name in names]
    contents = _each_file(_read_bytes, paths, title="read reports", unit="reports")
    for study, content in zip(studies, contents, strict=True):
        text, is_latin_1 = _make_text(content, study, options)
        texts.append(text)
        num_latin_1 += is_latin_1
    return Reports(texts, study_of_image, num_latin_1)


def _make_text(content: bytes | None, study_id: str, options: Options) -> tuple[Text, bool]:
    """The text of one report, and whether its bytes had to be read as Latin-1."""
    if content is None:
        return Text("", _NO_FILE), False
    try:
        report, is_latin_1 = content.decode("utf-8"), False
    except UnicodeDecodeError:
        report, is_latin_1 = content.decode("latin-1"), True
    sections = read_sections(report.replace("\r\n", "\n").replace("\r", "\n"), study_id)
    if options.text == "mgca":
        return mgca_text(sections), is_latin_1
    text = default_text(
        sections,
        deidentified=options.deidentified,
        last_paragraph=options.last_paragraph,
        lines=options.text_unit == "sentence",
    )
    return text, is_latin_1


def _image_columns(images: pa.Table, labels: pa.Table | None) -> pa.Table:
    """Columns of `images.parquet`, with each study's labels copied to its pictures."""
    columns = {"key": images["dicom_id"]}
    copied = ("subject_id", "study_id", "view_position", "split", "image_path", "row")
    columns |= {name: images[name] for name in copied}
    columns["source"] = pa.array(["mimic-cxr-jpg"] * images.num_rows, pa.string())
    if labels is not None:
        row = pc.index_in(images["study_id"], labels["study_id"].combine_chunks())
        columns |= {f"label:{name}": labels[name].take(row) for name in LABELS}
        without = pc.count_distinct(images["study_id"].filter(pc.is_null(row))).as_py()
        if without:
            note(f"studies without a row in the label table: {without:,}; their labels are null")
    return pa.table(columns)


def _text_columns(images: pa.Table, texts: Sequence[Text]) -> pa.Table:
    """Columns of `texts.parquet`: the report of its study for each picture."""
    of_study = pa.array([text.text for text in texts], pa.large_string())
    return pa.table(
        {
            "key": images["dicom_id"],
            "text": of_study.take(images["study"].combine_chunks()),
            "unit": pa.array(["report"] * images.num_rows, pa.string()),
        }
    )


def _policies(options: Options, reports: Reports) -> dict[str, str]:
    """The choices that shaped the rows, and what they came to, in words."""
    origins = Counter(text.origin for text in reports.texts if text.text)
    if reports.num_latin_1:
        note(f"reports that are no UTF-8 and were read as Latin-1: {reports.num_latin_1:,}")
    is_mgca = options.text == "mgca"
    return {
        "sections": options.sections,
        "text": options.text,
        "last_paragraph": "unused" if is_mgca or not options.last_paragraph else "stands in",
        "deidentified": "kept" if is_mgca else options.deidentified,
        "encoding": f"UTF-8, else Latin-1 (in {reports.num_latin_1})",
        "text_origins": ", ".join(f"{name}: {n}" for name, n in sorted(origins.items())),
        "views": options.views,
        "labels": options.labels,
        "label_values": "1 present, 0 denied, -1 uncertain, null not mentioned",
    }
