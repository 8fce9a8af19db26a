"""Where a sentence ends; each example was read by a person before it was put here."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featcache.manifest.sentences import split_pieces, split_sentences

VOCABULARY = """
    The No lungs clear effusion nodule Dr Mr vs e.g i.e No Fig cm a.m p.m M.D J C ca max rib Smith
    1 2 3 12 1.5 2012 T12 ___ _ 5cm IMPRESSION FINDINGS: Heart: the see ? - * (1) (x
"""
WORDS = VOCABULARY.split()
ENDS = (".", ".", ".", "..", "...", "\u2026", "?", "!", ":", ",", ")", ".)", '."', "", "", "")
GAPS = (" ", " ", " ", "  ", "\n", "\n", "\n \n", "\t", "\r\n", "\x0c", "")
REPORTS = st.lists(
    st.tuples(st.sampled_from(WORDS), st.sampled_from(ENDS), st.sampled_from(GAPS)), max_size=30
).map(lambda parts: "".join("".join(part) for part in parts))
TEXTS = REPORTS | st.text(max_size=80)


def solid(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("No.\n \n1. rib\n2. No\x0c3.")
def test_pieces_join_to_the_same_text(text):
    assert solid("".join(split_pieces(text))) == solid(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_a_sentence_is_one_sentence(text):
    for sentence in split_sentences(text):
        assert split_sentences(sentence) == [sentence]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_a_sentence_is_one_line_with_a_word_and_single_blanks(text):
    for sentence in split_sentences(text):
        assert sentence == " ".join(sentence.split())
        assert sum(character.isalpha() for character in sentence) >= 2


@settings(max_examples=200, deadline=None)
@given(REPORTS)
def test_sentences_are_the_pieces_with_a_word_in_their_order(text):
    pieces = iter(split_pieces(text))
    assert all(sentence in pieces for sentence in split_sentences(text))  # consumes in order


@settings(max_examples=100, deadline=None)
@given(REPORTS, REPORTS)
def test_a_blank_line_separates_whatever_stands_around_it(one, other):
    one, other = one.replace("1", "x"), other.replace("1", "x").replace("2", "x").replace("3", "x")
    assert split_sentences(f"{one}\n\n{other}") == split_sentences(one) + split_sentences(other)


@pytest.mark.parametrize(
    "sentence",
    [
        "A nodule of 1.5 cm is seen.",
        "The nodule measures 5 cm. in diameter.",
        "Dr. Smith was informed.",
        "Discussed with Drs. Smith and Jones.",
        "Read by J. R. Smith.",
        "Findings were told to Dr. ___ by ___ at 9:30 a.m. on ___.",
        "See image No. 3 of the series.",
        "Compared to Jan. 5 there is no change.",
        "Effusion, e.g. Kerley lines, vs. consolidation, i.e. an opacity.",
        "Clostridium difficile (C. difficile) colitis.",
        "Is it approx. 5 cm or max. 6 cm in size?",
        "Fracture of the post. 7th and the lat. 8th rib.",
        "Small effusion ... stable.",
        "Small effusion . . . stable.",
        "? pneumonia ? effusion",
        "Nodule of 1. 5 cm.",
        "The St. Jude valve is in place.",
        "A U.S. study.",
        "IMPRESSION: No acute process.",
        "Tip at T12, lead L1.5 below",
        "Level at 3.1.2012 and 9.30 seen",
        "Unremarkable",
        "no full stop at the end",
    ],
)
def test_these_are_one_sentence(sentence):
    assert split_sentences(sentence) == [sentence]
    halves = sentence.split(" ")
    for at in range(1, len(halves)):
        if halves[at][0] not in "-?" and not halves[at][0].isdigit():
            wrapped = f"{' '.join(halves[:at])}\n {' '.join(halves[at:])}"
            assert split_sentences(wrapped) == [sentence]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Clear lungs. No effusion.", ["Clear lungs.", "No effusion."]),
        ("lungs are clear. no effusion. heart normal", 3),
        ("Lungs are clear.No effusion.The heart is normal.", 3),
        ("Is there one? No. There is none!", ["Is there one?", "No.", "There is none!"]),
        ("Nodule of 1.5 cm. The rest is clear.", 2),
        ("Seen at 9 a.m. The patient was told.", 2),
        ("Fracture of T12. No effusion.", 2),
        ("Carrier of hepatitis C. There is no nodule.", 2),
        ("No change since ___. ___ tube in place.", 2),
        ("(The tube is in place.) The heart is large.", 2),
        ('He said "clear." The rest is normal.', 2),
        ("Stable... The rest is clear.", ["Stable...", "The rest is clear."]),
        ("No acute process. . No effusion.", ["No acute process.", "No effusion."]),
        ("1. No pneumonia. 2. Small effusion.", ["No pneumonia.", "Small effusion."]),
        ("1. No pneumonia\n2. Small effusion", ["No pneumonia", "Small effusion"]),
        ("1. Stable. 2. 8 mm nodule. 3. 1.7 cm mass.", ["Stable.", "8 mm nodule.", "1.7 cm mass."]),
        ("1.No pneumonia\n2.Small effusion", ["No pneumonia", "Small effusion"]),
        ("(1) Clear. (2) Normal.", ["Clear.", "Normal."]),
        ("- Clear lungs\n- Normal heart", ["Clear lungs", "Normal heart"]),
        ("Fracture of rib\n8. No effusion.", ["Fracture of rib 8.", "No effusion."]),
        ("FINDINGS:\n1. Clear.\n\nIMPRESSION: 1. Normal.", ["Clear.", "Normal."]),
        ("LUNGS:\nClear\nHEART: normal size", ["LUNGS: Clear", "HEART: normal size"]),
        ("Clear lungs IMPRESSION: Normal.", ["Clear lungs", "IMPRESSION: Normal."]),
        ("No acute process\n \nThe lungs are clear.", ["No acute process", "The lungs are clear."]),
        ("The right\nlung is\n clear.", ["The right lung is clear."]),
        ("", []),
        (" \n \n ", []),
        (". 1. ___ 3.5 ... -", []),
    ],
)
def test_these_are_several(text, sentences):
    found = split_sentences(text)
    assert (len(found) if isinstance(sentences, int) else found) == sentences


@pytest.mark.parametrize("unit", ["a.", "1. ", "A ", ". ", "x", "AAAA ", "\n- b", "(", "Dr. "])
def test_time_grows_with_the_length_alone(unit):
    def took(count: int) -> float:
        text, best = unit * count, float("inf")
        for _ in range(3):
            started = time.thread_time()
            split_sentences(text)
            best = min(best, time.thread_time() - started)
        return best

    assert took(16_000) < 24 * took(2_000) + 0.02  # 8 times the length; squared would be 64
