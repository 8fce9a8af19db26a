"""The published section rules, habit by habit; expectations were worked out by hand."""

import pytest

from featcache.datasets.mimic.fixed import split_fixed
from featcache.datasets.mimic.sections import (
    RANGE_OF_STUDY,
    SECTION_OF_STUDY,
    ReportSections,
    default_text,
    mgca_text,
    normal_name,
    read_sections,
    split_sections,
)

HEAD = " " * 33 + "FINAL REPORT\n"
STUDY = "59000001"


def names(text: str) -> list[str]:
    return [section.name for section in split_sections(text)]


def test_standard_report_gives_both_sections_stripped():
    text = HEAD + " FINDINGS: \n \n Clear lungs.\n \n IMPRESSION: \n \n Normal.\n"
    assert names(text) == ["preamble", "findings", "impression"]
    assert read_sections(text, STUDY) == ReportSections(
        findings="Clear lungs.", impression="Normal."
    )


def test_section_text_and_start_are_kept_to_the_character():
    text = HEAD + " FINDINGS:  Clear.\n IMPRESSION: Ok"
    preamble, findings, impression = split_sections(text)
    assert preamble.text == HEAD + " "
    assert findings.text == " Clear."
    assert text[findings.start :].startswith(" Clear.")
    assert (impression.text, impression.start) == ("Ok", len(text) - 2)


def test_report_without_header_is_one_section():
    assert names(" Clear lungs.\n") == ["full report"]
    assert read_sections(" Clear lungs.\n", STUDY).label_text == ""


def test_empty_findings_directly_above_swallows_the_impression():
    swallowed = HEAD + " FINDINGS:\n IMPRESSION: Normal.\n"
    assert read_sections(swallowed, STUDY) == ReportSections(findings="IMPRESSION: Normal.")
    apart = HEAD + " FINDINGS:\n \n IMPRESSION: Normal.\n"
    assert read_sections(apart, STUDY) == ReportSections(impression="Normal.")


def test_two_headers_on_one_line_are_not_split():
    text = HEAD + " FINDINGS: Clear. IMPRESSION: Normal.\n"
    assert read_sections(text, STUDY).findings == "Clear. IMPRESSION: Normal."


@pytest.mark.parametrize(
    "line",
    [
        "Findings: x",
        "CHEST, 2 VIEWS: x",
        "PATIENT'S FINDINGS: x",
        "A&P: x",
        "NO. FINDINGS: x",
        "IMPRESSION:x",
    ],
)
def test_lines_that_are_no_headers(line):
    assert names(f"{HEAD} {line}\n") == ["full report"]


def test_header_needs_its_leading_space():
    assert names("\nFINDINGS: x\n") == ["full report"]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("CONCLUSION", "impression"),
        ("FINDINGS/ IMPRESSION", "impression"),
        ("IMPRESSOIN", "impression"),
        ("NDICATION", "impression"),  # a slip of the published table
        ("IDICATION", "indication"),
        ("CHEST, TWO VIEWS", "findings"),
        ("REFERENCE FINDINGS", "findings"),
        ("COMPARISIONS", "comparison"),
        ("COMPARISION(S)", "comparision(s)"),  # the published table does not know it
        ("REASON FOR EXAMINATION", "indication"),
        ("PFI", "history"),
        ("TYPE OF EXAMINATION", "examination"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("WETREAD", "wet read"),
        ("CORRECTED IMPRESSION AND FINDINGS", "impression"),  # the first in the order
        ("PRIOR FINDINGS AND HISTORY", "findings"),
        ("COMPARISON CHEST", "comparison"),
        ("ADDENDUM TO CHEST", "addendum"),
        ("INDICATION FOR CHEST EXAM", "findings"),
        ("PA AND LAT", "findings"),
        ("AP AND LATERAL", "findings"),
        ("AP AND LAT", "ap and lat"),  # the published rules do not know it
        ("SUPINE FRONTAL VIEW", "findings"),
        ("AP VIEWS", "findings"),
        ("FRONTAL SEMI-UPRIGHT", "findings"),
        ("DEDICATED RIBS", "findings"),
        ("OBLIQUE VIEW", "oblique view"),
        (" TECHNIQUE ", "technique"),
    ],
)
def test_header_names(header, name):
    assert normal_name(header) == name


def test_mere_title_above_the_sections_is_left_out():
    text = HEAD + " CHEST, PA LATERAL:\n \n INDICATION: Pain.\n \n FINDINGS: Clear.\n"
    assert names(text) == ["preamble", "indication", "findings"]


def test_last_paragraph_only_where_neither_section_is_left():
    text = HEAD + " COMPARISON: None.\n \n Clear lungs.\n \n No effusion.\n"
    assert names(text) == ["preamble", "comparison", "last_paragraph"]
    sections = read_sections(text, STUDY)
    assert sections.last_paragraph == "Clear lungs.\n \n No effusion."
    assert sections.comparison == "None."
    assert sections.label_text == sections.last_paragraph


def test_last_section_of_a_name_wins():
    text = HEAD + " IMPRESSION: First.\n \n ADDENDUM\n \n IMPRESSION: Second.\n"
    assert read_sections(text, STUDY).impression == "Second."


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (ReportSections(impression="a", findings="b"), "a"),
        (ReportSections(findings="b", comparison="d"), "b"),
        (ReportSections(last_paragraph="c", comparison="d"), "c"),
        (ReportSections(comparison="d"), "d"),
        (ReportSections(), ""),
        (ReportSections(impression="a", exception=""), ""),
    ],
)
def test_label_text_order(sections, text):
    assert sections.label_text == text


def test_54_studies_have_a_rule_of_their_own():
    assert len(SECTION_OF_STUDY) == 23
    assert len(RANGE_OF_STUDY) == 31
    assert not set(SECTION_OF_STUDY) & set(RANGE_OF_STUDY)
    assert sum(bounds == (0, 0) for bounds in RANGE_OF_STUDY.values()) == 8
    assert sum(stop - start for start, stop in RANGE_OF_STUDY.values()) == 7261
    assert all(len(s) == 8 and s[0] == "5" for s in [*SECTION_OF_STUDY, *RANGE_OF_STUDY])


def test_exceptions_replace_all_sections():
    text = HEAD + " INDICATION: All of it.\n \n IMPRESSION: No.\n" + "x" * 400
    assert read_sections(text, "57936451") == ReportSections(exception="All of it.")
    assert read_sections(text, "51410602") == ReportSections(exception=text[47:320])
    assert read_sections(text, "52035334") == ReportSections(exception="")


def test_exception_whose_section_is_missing_has_no_text():
    assert read_sections(HEAD, "56451190") == ReportSections(exception="")


@pytest.mark.parametrize(
    ("impression", "findings", "text"),
    [
        ("Stable 1.5 cm nodule.", None, "5 cm nodule"),  # the number is falsified, as in MGCA
        ("Unchanged. No acute process.", None, "no acute process"),
        ("Normal.", None, ""),
        ("Clear lungs.", None, ""),
        ("1. Clear lungs. 2. No effusion.", None, "clear lungs no effusion"),
        ("Seen by ___ today.", None, "seen by ___ today"),
        ("A naïve µ finding.", None, "a nave finding"),
        ("Left\ufffd\ufffdlung is clear.", None, "left lung is clear"),
        ("Heart is big", "lungs are clear.", "heart is big lungs are clear"),
        (None, "The lungs\n are clear.", "the lungs are clear"),
        (None, None, ""),
    ],
)
def test_mgca_text(impression, findings, text):
    assert mgca_text(ReportSections(impression=impression, findings=findings)).text == text


def test_mgca_leaves_out_last_paragraph_and_exceptions():
    assert mgca_text(ReportSections(last_paragraph="The lungs are clear.")).text == ""
    assert mgca_text(ReportSections(exception="The lungs are clear.")).text == ""


@pytest.mark.parametrize(
    ("sections", "text", "origin"),
    [
        (ReportSections("No\n PNA.", "Clear  1.5 cm."), "No PNA. Clear 1.5 cm.", "both"),
        (ReportSections(findings="A ___."), "A _.", "findings"),
        (ReportSections(last_paragraph="L.", comparison="C."), "L.", "last paragraph"),
        (ReportSections("I.", exception="E."), "E.", "published exception"),
        (ReportSections(exception=""), "", "no usable section"),
        (ReportSections(comparison="C."), "", "no usable section"),
        (ReportSections("___."), "", "no words"),
        (ReportSections("A ______ B"), "A _ B", "impression"),
    ],
)
def test_default_text(sections, text, origin):
    origin = "impression and findings" if origin == "both" else origin
    found = default_text(sections, deidentified="_", last_paragraph=True)
    assert found == (text, origin)


def test_default_text_without_last_paragraph():
    sections = ReportSections(last_paragraph="L.")
    found = default_text(sections, deidentified="_", last_paragraph=False)
    assert found == ("", "no usable section")


def test_lines_are_kept_for_whoever_cuts_sentences():
    sections = ReportSections("No\n PNA\n ", "1. Clear  ___.\n 2. Normal.")
    found = default_text(sections, deidentified="_", last_paragraph=True, lines=True)
    assert found == ("No\n PNA\n \n\n1. Clear  _.\n 2. Normal.", "impression and findings")
    missing = ReportSections(findings=" Clear.\n")
    assert default_text(missing, deidentified="_", last_paragraph=True, lines=True)[0] == "Clear."


def fixed(text: str) -> dict[str, str]:
    return {section.name: section.text.strip() for section in split_fixed(text)}


@pytest.mark.parametrize(
    ("text", "official", "ours"),
    [
        (
            " FINDINGS:\n IMPRESSION: Clear.\n",
            {"findings": "IMPRESSION: Clear."},
            {"impression": "Clear."},
        ),
        (
            "\n Findings: \n Clear.\n \n Impression: Normal.",
            {},
            {"findings": "Clear.", "impression": "Normal."},
        ),
        ("\n CHEST, 2 VIEWS: Clear.", {}, {"findings": "Clear."}),
        ("\n IMPRESSION:Clear.", {}, {"impression": "Clear."}),
        ("FINDINGS: Clear.", {}, {"findings": "Clear."}),
        ("\n NDICATION: Cough.", {"impression": "Cough."}, {}),
        (
            "\n FINDINGS: Clear. IMPRESSION: Normal.",
            {"findings": "Clear. IMPRESSION: Normal."},
            {"findings": "Clear.", "impression": "Normal."},
        ),
        # What looks like a header and is none stays text under both.
        (
            "\n FINDINGS: At\n 3:10 p.m.\n T12: fracture.\n Note: seen.",
            {"findings": "At\n 3:10 p.m.\n T12: fracture.\n Note: seen."},
            {"findings": "At\n 3:10 p.m.\n T12: fracture.\n Note: seen."},
        ),
        (
            "\n FINDINGS: Seen.\n CALLED AT 3:10 p.m.",
            {"findings": "Seen.\n CALLED AT 3:10 p.m."},
            {"findings": "Seen.\n CALLED AT 3:10 p.m."},
        ),
        (
            "\n IMPRESSION: One.\n \n ADDENDUM \n \n IMPRESSION: Two.",
            {"impression": "Two."},
            {"impression": "Two."},
        ),
    ],
)
def test_fixed_rules_lose_less_than_the_official_ones(text, official, ours):
    wanted = ("impression", "findings")
    text = text if text.startswith(("\n", "F")) else "\n" + text
    found = {s.name: s.text.strip() for s in split_sections(text) if s.name in wanted}
    assert found == official
    assert {k: v for k, v in fixed(text).items() if k in wanted} == ours
