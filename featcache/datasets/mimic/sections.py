"""What a MIMIC-CXR report says: its sections by the published rules, then the text made of them.

A report is text whose lines start with one space. A header is a line's first words in capitals up
to a colon, and a section runs to the next header. The published rules have habits that a reader
would not expect, and all of them are kept, because labels and splits of the field rest on them:

- the white space after a header's colon may be its line end, which the next header then lacks: an
  empty `FINDINGS:` directly above ` IMPRESSION: x` swallows the impression;
- a header with a digit, a lower-case letter or a dot is no header;
- the last section of a name wins, so an addendum's impression replaces the first;
- 54 studies have a rule of their own, listed below.

Source: `section_parser.py` and `create_section_files.py` of MIT-LCP/mimic-cxr (MIT licence). The
names and the 54 exceptions are its facts; the code is ours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_BLANK_LINE = "\n \n"
_DEIDENTIFIED = re.compile(r"_{3,}")

_SPELLINGS = {
    "impression": (
        "impression; conclusion; findings and impression; findings/impression; "
        "findings/ impression; impresson; imprression; imoression; impressoin; imprssion; "
        "impresion; imperssion; mpression; impession; ndication"
    ),
    "findings": (
        "findings; finding; chest, two views; reference findings; findins; findindgs; findgings; "
        "findngs; findnings; finidngs"
    ),
    "comparison": (
        "comparison; comparisons; reference exam; comparison exam; comparison film; comparision; "
        "comparisions; comparsion; comparrison"
    ),
    "indication": (
        "indication; reason for exam; reason for examination; clinical indication; idication"
    ),
    "history": "history; clinical history; clinical information; patient history; pfi",
    "examination": "examination; exam; type of examination",
    "recommendations": "recommendations; recommendation; recommendation(s)",
    "wet read": "wet read; wetread",
}
_EXACT = {
    spelling.strip(): name
    for name, spellings in _SPELLINGS.items()
    for spelling in spellings.split(";")
}
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")  # in this order
_FINDINGS_TITLE = re.compile(
    r"chest|portable|pa and lat|ap and lateral|lateral and (?:pa|ap)|frontal and|two views"
    r"|(?:frontal|pa|ap|one|lateral) view|bone window|frontal (?:semi-)?upright|ribs"
)

# Studies whose text lies in a section of another name.
_NAMED = {
    "recommendations": "50913680 59768032 59067458 59087630 58157373 56482935 58375018",
    "examination": "59363654 53356173 50743547 59215320 55157853",
    "technique": "59279892 53202765 50808053",
    "indication": "57936451 50058765 51966317 55124749 54365831 54654948",
    "note": "56451190",
    "history": "51491012",
}
SECTION_OF_STUDY = {study: name for name, studies in _NAMED.items() for study in studies.split()}

# Studies whose text is a range of characters, and eight that have no usable text.
_RANGES = (
    "50525523:201:349 57564132:233:554 59982525:313:717 53488209:149:475 54875119:234:988 "
    "50196495:59:399 56579911:59:218 52648681:292:631 59889364:172:453 53514462:73:377 "
    "59505494:59:450 53182247:59:412 51410602:47:320 56412866:522:822 54986978:59:306 "
    "59003148:262:505 57150433:61:394 56760320:219:457 59562049:158:348 52674888:145:296 "
    "55258338:192:568 59330497:140:655 52119491:179:454 "
    "58235663:0:0 50798377:0:0 54168089:0:0 53071062:0:0 56724958:0:0 54231141:0:0 53607029:0:0 "
    "52035334:0:0"
)
RANGE_OF_STUDY = {
    study: (int(start), int(stop))
    for study, start, stop in (entry.split(":") for entry in _RANGES.split())
}


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        name: Its normalised name, in lower case.
        text: What follows the header, with white space as it stands.
        start: Position of the text within the report, in characters.
    """

    name: str
    text: str
    start: int


@dataclass(frozen=True)
class ReportSections:
    """What a report says, by section; None where a section is missing.

    Attributes:
        impression: The last impression, stripped.
        findings: The last findings, stripped.
        last_paragraph: All but the first paragraph of the last section, where neither of the
            two above exists.
        comparison: The last comparison, stripped.
        exception: The text that stands in for all of them in one of the 54 listed studies
            (empty for the eight without usable text).
    """

    impression: str | None = None
    findings: str | None = None
    last_paragraph: str | None = None
    comparison: str | None = None
    exception: str | None = None

    @property
    def label_text(self) -> str:
        """The text that the published labels were made from; empty when there is none."""
        if self.exception is not None:
            return self.exception
        for text in (self.impression, self.findings, self.last_paragraph, self.comparison):
            if text is not None:
                return text
        return ""


def normal_name(header: str) -> str:
    """The name of a section, from the words before its colon.

    Args:
        header: E.g. `IMPRESSOIN`, `PA AND LATERAL CHEST RADIOGRAPH`.

    Returns:
        `impression`, `findings`, ...; the header in lower case where no rule knows it.
    """
    name = header.lower().strip()
    if name in _EXACT:
        return _EXACT[name]
    for part in _CONTAINED:
        if part in name:
            return part
    return "findings" if _FINDINGS_TITLE.search(name) else name


def split_sections(text: str) -> list[Section]:
    """Cut a report into its sections, in the order of the text.

    Args:
        text: The report, with universal newlines already applied.

    Returns:
        At least one section: the words before the first header are `preamble`, a report without
        any header is `full report`. Empty impressions and findings are left out.
    """
    header = _HEADER.search(text)
    if header is None:
        sections = [Section("full report", text, 0)]
    else:
        sections = [Section("preamble", text[: header.start(1)], 0)]
    while header is not None:
        start = header.end()
        following = _HEADER.search(text, start)
        stop = len(text) if following is None else following.start()
        sections.append(Section(normal_name(header.group(1)), text[start:stop], start))
        header = following
    return close_sections(sections)


def is_known_spelling(header: str) -> bool:
    """Whether the words before a colon are one of the published spellings of a section's name."""
    name = header.lower().strip()
    return name in _EXACT or name in ("technique", "addendum")


def close_sections(sections: list[Section]) -> list[Section]:
    """Leave out empty impressions and findings; cut the last paragraph where neither is left."""
    wanted = ("impression", "findings")
    sections = [s for s in sections if s.name not in wanted or s.text.strip()]
    if sections and not any(s.name in wanted for s in sections):
        sections[-1:] = _cut_last_paragraph(sections[-1])
    return sections


def _cut_last_paragraph(section: Section) -> list[Section]:
    """Split a section at its first blank line, where it has one."""
    first, blank, rest = section.text.partition(_BLANK_LINE)
    if not blank:
        return [section]
    return [
        Section(section.name, first, section.start),
        # The published rules leave the blank line out of this position.
        Section("last_paragraph", rest, section.start + len(first)),
    ]


def read_sections(
    text: str, study_id: str, split: Callable[[str], list[Section]] = split_sections
) -> ReportSections:
    """What the published rules make of one report.

    Args:
        text: The report, with universal newlines already applied.
        study_id: Eight digits; 54 of them have a rule of their own.
        split: Cuts a report into its sections.

    Returns:
        The sections that carry text. For one of the 54 studies only `exception` is set: the
        published tables of sections lack these studies.
    """
    if study_id in RANGE_OF_STUDY:
        start, stop = RANGE_OF_STUDY[study_id]
        return ReportSections(exception=text[start:stop])
    last = {section.name: section.text.strip() for section in split(text)}
    if study_id in SECTION_OF_STUDY:
        return ReportSections(exception=last.get(SECTION_OF_STUDY[study_id], ""))
    names = ("impression", "findings", "last_paragraph", "comparison")
    return ReportSections(**{name: last.get(name) for name in names})


class Text(NamedTuple):
    """The text that one report gives.

    Attributes:
        text: In one line; empty when there is none.
        origin: The sections it was made from, or why it is empty.
    """

    text: str
    origin: str


def _origin(sections: ReportSections) -> str:
    """Which of the two main sections carry text."""
    return " and ".join(name for name in ("impression", "findings") if getattr(sections, name))


def default_text(
    sections: ReportSections, *, deidentified: str, last_paragraph: bool, lines: bool = False
) -> Text:
    """Impression, then findings, in one line; case and punctuation as written.

    For the 54 studies with a rule of their own that rule decides. The comparison alone is never a
    text.

    Args:
        sections: What the report says.
        deidentified: Replaces the mark `___` of removed words.
        last_paragraph: Whether it stands in where both sections are missing.
        lines: Whether to keep the lines of the report, with a blank one between the sections, for
            whoever cuts it into sentences.
    """
    parts, origin = [sections.impression or "", sections.findings or ""], _origin(sections)
    if sections.exception is not None:
        parts, origin = [sections.exception], "published exception"
    elif not origin and last_paragraph and sections.last_paragraph:
        parts, origin = [sections.last_paragraph], "last paragraph"
    if not "".join(parts):
        return Text("", "no usable section")
    text = _DEIDENTIFIED.sub(deidentified, "\n\n".join(parts)).strip()
    text = text if lines else " ".join(text.split())
    return Text(text, origin) if re.search(r"[^\W_]", text) else Text("", "no words")


def mgca_text(sections: ReportSections) -> Text:
    """The text as MGCA makes it, from impression and findings alone.

    It cuts at full stops and at numbers with a full stop, lower-cases, keeps runs of letters,
    digits and underscores, drops pieces of one word and characters outside ASCII, and drops the
    report when fewer than three words are left. So `1.5 cm` becomes `5 cm`.

    Source: HKU-MedAI/MGCA, `pretrain_dataset.py`: its rules, our code.
    """
    origin = _origin(sections)
    if not origin:
        return Text("", "no usable section")
    joined = f"{sections.impression or ' '} {sections.findings or ' '}".replace("\n", " ")
    words: list[str] = []
    for piece in re.split(r"[0-9]+\.|\.", joined):
        tokens = re.findall(r"\w+", piece.replace("\ufffd\ufffd", " ").lower())
        if len(tokens) > 1:
            ascii_only = (token.encode("ascii", "ignore").decode() for token in tokens)
            words += [token for token in ascii_only if token]
    return Text(" ".join(words), origin) if len(words) >= 3 else Text("", "fewer than 3 words")
