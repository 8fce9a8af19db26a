"""Our own section rules for MIMIC-CXR reports: the published ones without four of their habits.

1.  An empty section ends where the next header begins, also without a blank line between them: an
    empty `FINDINGS:` does not swallow the impression below it.
2.  A header may hold digits (`CHEST, 2 VIEWS:`), dots, `&` and apostrophes, may start without a
    space or with several, and may have no white space behind its colon.
3.  A header in mixed or lower case counts when it is one of the known spellings (`Findings:`).
    `FINDINGS:`, `IMPRESSION:` and `CONCLUSION:` also count in the middle of a line.
4.  `NDICATION` is an indication.

All else is as published: the names, the last section of a name wins, the last paragraph, and the
54 studies with a rule of their own.
"""

import re

from featcache.datasets.mimic.sections import (
    Section,
    close_sections,
    is_known_spelling,
    normal_name,
)

_AT_LINE_START = re.compile(r"(?:^|\n)[ \t]*([A-Za-z][A-Za-z0-9 ()/,.&'-]{0,60}):(?!\d)")
_IN_A_LINE = re.compile(r"(?<=[\s.])(FINDINGS|IMPRESSION|CONCLUSION):(?!\d)")
_WORD = re.compile(r"[A-Z]{4}")


def _is_header(name: str) -> bool:
    """Whether the words before a colon at a line's start are a header."""
    if name.upper() != name:
        return is_known_spelling(name)
    return bool(_WORD.search(name)) or not re.search(r"[0-9.&']", name)


def fixed_name(header: str) -> str:
    """The name of a section, from the words before its colon."""
    return "indication" if header.strip().upper() == "NDICATION" else normal_name(header)


def split_fixed(text: str) -> list[Section]:
    """Cut a report into its sections, in the order of the text.

    Args:
        text: The report, with universal newlines already applied.

    Returns:
        As `split_sections` gives them.
    """
    found = {m.start(1): m for m in _AT_LINE_START.finditer(text) if _is_header(m[1])}
    found |= {m.start(1): m for m in _IN_A_LINE.finditer(text)}
    headers = [found[start] for start in sorted(found)]
    if not headers:
        return close_sections([Section("full report", text, 0)])
    sections = [Section("preamble", text[: headers[0].start(1)], 0)]
    stops = [header.start(1) for header in headers[1:]] + [len(text)]
    for header, stop in zip(headers, stops, strict=True):
        sections.append(Section(fixed_name(header[1]), text[header.end() : stop], header.end()))
    return close_sections(sections)
