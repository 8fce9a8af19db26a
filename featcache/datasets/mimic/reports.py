"""The reports of MIMIC-CXR: where they lie, and the text of each study."""

import re
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pydantic import Field, model_validator

from featcache.console import note
from featcache.datasets.mimic.fixed import split_fixed
from featcache.datasets.mimic.sections import (
    ReportSections,
    Text,
    default_text,
    mgca_text,
    read_sections,
)
from featcache.errors import ManifestError
from featcache.manifest.tree import each_file
from featcache.manifest.units import TextOptions

# What zipfile raises for members that are damaged, locked or packed otherwise; it names the member.
_BAD_MEMBER = (OSError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError)
NO_FILE = "no report file"
ARCHIVE = "mimic-cxr-reports.zip"
_DECIMAL = re.compile(r"[0-9]\.[0-9]")
_REMOVED = re.compile(r"_{3,}")


class ReportOptions(TextOptions):
    """How the reports of MIMIC-CXR become texts."""

    reports: Path | None = Field(
        default=None,
        description="Folder with the reports of MIMIC-CXR, or mimic-cxr-reports.zip itself; by "
        "default the folder of the images.",
    )
    sections: Literal["official", "fixed"] = Field(
        default="official",
        description="Section rules: `official` as MIT-LCP published them; `fixed`: the same "
        "without four habits that lose text (swallowed impressions, unseen headers).",
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

    @model_validator(mode="after")
    def _has_sentences(self) -> "ReportOptions":
        if self.text == "mgca" and self.text_unit == "sentence":
            raise ValueError("`text: mgca` has no full stops left to cut at; text_unit: report")
        return self


@dataclass(frozen=True)
class Reports:
    """The texts of all studies.

    Attributes:
        texts: One for each study, in the order of the first picture.
        study_of_image: Place in `texts` of each picture.
        counts: How many reports met what: `latin-1`, `removed words`, `decimals`, `other sections`.
    """

    texts: list[Text]
    study_of_image: Int64[np.ndarray, " N"]
    counts: Counter[str]


def _read_bytes(path: str) -> bytes | None:
    """Content of a file, None where there is none."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _archive_reader(path: Path, names: Sequence[str]) -> Callable[[str], bytes | None] | None:
    """Reads members of a zip archive; None where it holds none of the reports.

    Raises:
        ManifestError: It is no readable archive.
    """
    damaged = ManifestError(
        "the archive of reports cannot be read: it is cut off or damaged",
        where=path,
        fix="fetch it again, or name a folder with --set reports=FOLDER",
    )
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        raise damaged from None
    members = set(archive.namelist())
    prefixes = ("files/", "mimic-cxr-reports/files/", "mimic-cxr-reports/", "")
    prefix = next((p for p in prefixes if any(p + name in members for name in names)), None)
    if prefix is None:
        archive.close()
        return None
    lock = threading.Lock()

    def read(name: str) -> bytes | None:
        if prefix + name not in members:
            return None
        try:
            with lock:
                return archive.read(prefix + name)
        except _BAD_MEMBER:
            raise damaged from None

    return read


def _report_reader(root: Path, names: Sequence[str]) -> Callable[[str], bytes | None]:
    """Reads a report by its name, whichever way the reports are packed.

    Args:
        root: A folder, unpacked or with the archive in it, or the archive itself.
        names: `p19/p19900000/s59900000.txt`, ...

    Raises:
        ManifestError: None of the reports is there.
    """
    below = ("files", "mimic-cxr-reports/files", "mimic-cxr-reports", "")
    folders = [root / name for name in below]
    for folder in folders:
        if folder.is_dir() and any((folder / name).is_file() for name in names):
            base = str(folder)
            return lambda name: _read_bytes(f"{base}/{name}")
    archive = root if root.is_file() else root / ARCHIVE
    reader = _archive_reader(archive, names) if archive.is_file() else None
    if reader is not None:
        return reader
    raise ManifestError(
        f"0 of {len(names):,} studies have a report",
        where=", ".join(str(place) for place in [*folders, archive]),
        fix="MIMIC-CXR-JPG has no report text: fetch mimic-cxr-reports.zip of MIMIC-CXR and "
        "name it or its folder with --set reports=FOLDER",
    )


def read_reports(root: Path, images: pa.Table, options: ReportOptions) -> Reports:
    """Read the report of every study and make its text.

    Args:
        root: Where the reports lie unless the options say otherwise.
        images: With `study_id` and `subject_id`.
        options: How a report becomes a text.

    Raises:
        ManifestError: There is no report at all, or the archive is damaged.
    """
    encoded = images["study_id"].combine_chunks().dictionary_encode()
    study_of_image = encoded.indices.to_numpy().astype(np.int64)
    first = np.unique(study_of_image, return_index=True)[1]
    subjects, studies = images["subject_id"].take(first).to_pylist(), encoded.dictionary.to_pylist()
    names = [f"p{u[:2]}/p{u}/s{s}.txt" for u, s in zip(subjects, studies, strict=True)]
    place = root if options.reports is None else options.reports.expanduser()
    read = _report_reader(place, names)
    texts: list[Text] = []
    counts: Counter[str] = Counter()
    contents = each_file(read, names, title="read reports", unit="reports")
    for study, content in zip(studies, contents, strict=True):
        texts.append(make_text(content, study, options, counts))
    return Reports(texts, study_of_image, counts)


def make_text(
    content: bytes | None, study_id: str, options: ReportOptions, counts: Counter[str]
) -> Text:
    """The text of one report.

    Args:
        content: The file's bytes, None where there is no file.
        study_id: Eight digits.
        options: How a report becomes a text.
        counts: Is raised by what was met.
    """
    if content is None:
        return Text("", NO_FILE)
    try:
        report = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        report = content.decode("latin-1")
        counts["latin-1"] += 1
    report = report.replace("\r\n", "\n").replace("\r", "\n")
    sections = read_sections(report, study_id)
    if options.sections == "fixed":
        official, sections = sections, read_sections(report, study_id, split_fixed)
        counts["other sections"] += sections != official
    text = _text_of(sections, options)
    _count(text, sections, counts)
    return text


def _text_of(sections: ReportSections, options: ReportOptions) -> Text:
    if options.text == "mgca":
        return mgca_text(sections)
    return default_text(
        sections,
        deidentified=options.deidentified,
        last_paragraph=options.last_paragraph,
        lines=options.text_unit == "sentence",
    )


def _count(text: Text, sections: ReportSections, counts: Counter[str]) -> None:
    """Count what a rule of the text changes: removed words, numbers with a decimal point."""
    if text.text:
        said = f"{sections.impression or ''} {sections.findings or ''}"
        said = sections.exception or sections.last_paragraph or "" if not said.strip() else said
        counts["removed words"] += bool(_REMOVED.search(said))
        counts["decimals"] += bool(_DECIMAL.search(said))


def text_columns(images: pa.Table, texts: Sequence[Text]) -> pa.Table:
    """Columns of `texts.parquet`: the report of its study for each picture.

    Args:
        images: With `dicom_id` and `study`, the place of its study in `texts`.
        texts: One for each study.
    """
    of_study = pa.array([text.text for text in texts], pa.large_string())
    return pa.table(
        {
            "key": images["dicom_id"],
            "text": of_study.take(images["study"].combine_chunks()),
            "unit": pa.array(["report"] * images.num_rows, pa.string()),
        }
    )


def text_policies(options: ReportOptions, reports: Reports) -> dict[str, str]:
    """The choices that shaped the texts, and what they came to, in words."""
    origins = Counter(text.origin for text in reports.texts if text.text)
    counts = reports.counts
    if counts["latin-1"]:
        note(f"reports that are no UTF-8 and were read as Latin-1: {counts['latin-1']:,}")
    is_mgca, sections = options.text == "mgca", str(options.sections)
    if options.sections == "fixed":
        sections += f" (other than the official ones in {counts['other sections']:,} reports)"
    removed = "kept" if is_mgca else options.deidentified
    return {
        "sections": sections,
        "text": options.text
        + (f" (decimals falsified in {counts['decimals']:,} reports)" if is_mgca else ""),
        "last_paragraph": "unused" if is_mgca or not options.last_paragraph else "stands in",
        "deidentified": f"{removed} (in {counts['removed words']:,} reports)",
        "encoding": f"UTF-8, else Latin-1 (in {counts['latin-1']})",
        "text_origins": ", ".join(f"{name}: {n}" for name, n in sorted(origins.items())),
        "views": options.views,
    }
