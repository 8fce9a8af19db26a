"""The reports of Open-I in their two forms, and the names of their images.

Source: the XML files of NLM Open-I, and the CSV re-pack on Kaggle.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from featcache.console import note
from featcache.errors import ManifestError
from featcache.manifest.checks import rows_text
from featcache.manifest.columns import find_columns
from featcache.manifest.sheet import column_names, read_sheet
from featcache.manifest.tree import each_file

REPORT_TABLE, IMAGE_TABLE = "indiana_reports.csv", "indiana_projections.csv"
REMOVED = re.compile(r"X{4,}")
IMAGE_NAME = re.compile(r"(\.dcm)?\.(png|jpe?g|dcm)$", re.IGNORECASE)
SECTIONS = ("comparison", "indication", "findings", "impression")
_MAX_XML_BYTES = 1 << 20
_UID = re.compile(r"[0-9]+")
_NOT_LETTERS = re.compile(r"[\W\d_]+")


def letters_of(text: str) -> str:
    """A text's words in lower case, without digits, marks and the mark of removed words."""
    return _NOT_LETTERS.sub(" ", REMOVED.sub(" ", text).lower()).strip()


class Report(NamedTuple):
    """One report.

    Attributes:
        uid: `CXR1`.
        sections: Text by name; a missing or empty section is left out.
        headings: Its main MeSH headings, in lower case.
        images: Names of its images without ending, `CXR1_IM-0001-4001`.
    """

    uid: str
    sections: dict[str, str]
    headings: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def group(self) -> str:
        """What is split as one: the letters of findings and impression; the report without any."""
        said = " ".join(self.sections.get(name, "") for name in ("findings", "impression"))
        return letters_of(said) or self.uid


@dataclass
class Source:
    """What one of the two forms holds.

    Attributes:
        reports: In the order of their names.
        views: View position by image; empty where the form does not know it.
        unread: Names of report files that cannot be read, or are no report.
    """

    reports: list[Report]
    views: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def has_tables(folder: Path) -> bool:
    """Whether the two tables of the re-pack lie in a folder."""
    return all((folder / name).is_file() for name in (REPORT_TABLE, IMAGE_TABLE))


def find_source(folder: Path, form: str) -> Path:
    """The folder with the report files or the two tables.

    Args:
        folder: The data set's folder.
        form: `auto`, `xml` or `kaggle`; `auto` prefers the report files.

    Raises:
        ManifestError: Neither is there.
    """
    names = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "")
    if form != "kaggle":
        for place in (folder / name for name in names):
            if place.is_dir() and any(place.glob("*.xml")):
                return place
    if form != "xml" and has_tables(folder):
        return folder
    wanted = {
        "xml": "report files ecgen-radiology/*.xml",
        "kaggle": f"{REPORT_TABLE} with {IMAGE_TABLE}",
    }
    raise ManifestError(
        "there are no " + wanted.get(form, " and no ".join(wanted.values())),
        where=folder,
        fix="unpack the reports of Open-I there, or the CSV re-pack",
    )


def plain_name(name: str) -> str:
    """The name of an image in all its forms: `1_IM-0001-4001.dcm.png` is `CXR1_IM-0001-4001`."""
    stem = IMAGE_NAME.sub("", name.rpartition("/")[2])
    return stem if stem.upper().startswith("CXR") else f"CXR{stem}"


def parse_report(content: bytes) -> Report | None:
    """Read one report file; None when it is none."""
    if len(content) > _MAX_XML_BYTES or b"<!ENTITY" in content:
        return None
    try:
        tree = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return None
    uid = tree.find(".//uId")
    if uid is None or not uid.get("id"):
        return None
    sections: dict[str, str] = {}
    for part in tree.iter("AbstractText"):
        name, text = part.get("Label", "").strip().lower(), "".join(part.itertext()).strip()
        if name in SECTIONS and text:
            sections[name] = f"{sections[name]}\n{text}" if name in sections else text
    headings = tuple(
        "".join(one.itertext()).strip().lower() for one in tree.findall(".//MeSH/major")
    )
    images = dict.fromkeys(plain_name(one.get("id", "")) for one in tree.iter("parentImage"))
    return Report(str(uid.get("id")).strip(), sections, headings, tuple(images))


def read_reports(folder: Path) -> Source:
    """Read the reports of a folder that `find_source` gave, report files before tables.

    Raises:
        ManifestError: The reports contradict each other, or none is there.
    """
    return read_files(folder) if any(folder.glob("*.xml")) else read_tables(folder)


def read_files(folder: Path) -> Source:
    """Read the report files of a folder.

    Raises:
        ManifestError: Two files have one identity, or none is a report.
    """
    paths = sorted(folder.glob("*.xml"), key=lambda path: (len(path.name), path.name))
    contents = each_file(_read_file, list(map(str, paths)), title="reports", unit="files")
    source = Source([])
    for path, content in zip(paths, contents, strict=True):
        report = None if content is None else parse_report(content)
        if report is None:
            source.unread.append(path.name)
        else:
            source.reports.append(report)
    if source.unread:
        note(f"openi: {len(source.unread):,} report files cannot be read and were left out")
    return _checked(source, folder)


def _read_file(path: str) -> bytes | None:
    """A file's bytes; None where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _checked(source: Source, where: Path) -> Source:
    """See that reports and images have one meaning each.

    Raises:
        ManifestError: A report or an image stands there twice, or there is no report.
    """
    problems = []
    for what, names in (
        ("reports", [report.uid for report in source.reports]),
        ("images", [name for report in source.reports for name in report.images]),
    ):
        twice = sum(count > 1 for count in Counter(names).values())
        if twice:
            problems.append(f"{twice:,} {what} stand there twice")
    if not source.reports:
        problems.append("none of the files is a report")
    if problems:
        raise ManifestError("\n  ".join(problems), where=where)
    return source


def read_tables(folder: Path) -> Source:
    """Read the two tables of the re-pack.

    Raises:
        ManifestError: A column is missing, an id is no whole number, an image belongs to no
            report, or rows contradict.
    """
    table, pictures = folder / REPORT_TABLE, folder / IMAGE_TABLE
    reports, rows = _columns(table, ("uid", "MeSH", *SECTIONS))
    images, image_rows = _columns(pictures, ("uid", "filename", "projection"))
    uids = zip(rows, reports["uid"], strict=True)
    strange = [row for row, uid in uids if not _UID.fullmatch(uid)]
    if strange:
        raise ManifestError(
            f"`uid` is no whole number: {rows_text(strange)}",
            where=table,
            fix="use the table as published: a number with a decimal point was read and written "
            "by some program",
        )
    of_report: dict[str, list[str]] = {uid: [] for uid in reports["uid"]}
    uids = zip(image_rows, images["uid"], strict=True)
    lost = [row for row, uid in uids if uid not in of_report]
    if lost:
        raise ManifestError(f"images of no report in {REPORT_TABLE}: {rows_text(lost)}",
                            where=pictures)  # fmt: skip
    views = {}
    for uid, file, view in zip(*images.values(), strict=True):
        name = plain_name(file)
        of_report[uid].append(name)
        views[name] = view
    found = []
    for row, uid in enumerate(reports["uid"]):
        sections = {name: reports[name][row] for name in SECTIONS if reports[name][row]}
        headings = tuple(part.strip().lower() for part in reports["MeSH"][row].split(";"))
        found.append(Report(f"CXR{uid}", sections, headings, tuple(of_report[uid])))
    return _checked(Source(found, views), folder)


def _columns(path: Path, wanted: Sequence[str]) -> tuple[dict[str, list[str]], list[int]]:
    """Some columns of a table as stripped text, and the number of each row.

    Raises:
        ManifestError: One of them is missing, or two have one name.
    """
    names = find_columns(column_names(path), wanted, path)
    sheet = read_sheet(path, list(names.values()))
    cells = {
        name: [(cell or "").strip() for cell in sheet.columns[there].to_pylist()]
        for name, there in names.items()
    }
    return cells, sheet.numbers.tolist()
