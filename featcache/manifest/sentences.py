"""The sentences of a report, by rules that know how radiologists write.

A report is first cut where a line says so: at blank lines, before the items of a list, before a
line that starts with a heading and a colon. Every other line break is a blank. What is left is cut
at full stops, question and exclamation marks, unless one of these rules knows better:

    1.5 cm, T12.5, www.a.b      no blank behind the full stop, and no capital: it goes on
    clear.No effusion           a missing blank: two letters before, a capital behind: it ends
    Dr. vs. e.g. i.e.           goes on whatever follows
    No. 3, Fig. 2, Jan. 5       goes on before a number
    max. 5 cm, lat. 8th rib     goes on before a number or a small letter
    a.m. cm. pt. etc.           goes on before a small letter
    J. Smith, C. difficile      an initial goes on unless a word that starts sentences follows
    ... and …                   goes on before a small letter or a number
    ? pneumonia                 a question mark behind a blank asks about what follows: it goes on

In doubt two sentences stay together, since half a sentence can say the opposite of the whole. The
mark of an item (`1.`, `(2)`, `-`) is a piece of its own, so that a finding reads the same in a list
and out of it. Positions, paragraphs and the order of lines are not kept.
"""

import re
from collections.abc import Iterator

RULES_VERSION = 1
"""Goes up whenever a rule changes; a manifest records it, and its hash covers it."""


def _words(text: str) -> frozenset[str]:
    """A set of words from a line of them."""
    return frozenset(text.split())


_ALWAYS = _words("dr drs mr mrs ms mx prof st messrs vs cf viz eg ie e.g i.e al incl")
_NUMBERED = _words(
    "no nos fig figs im img ser seq ref vol pp p ch "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_QUANTITY = _words("approx max min est avg ca circa lat post ant inf sup")
_SHORTENED = _words(
    "cm mm m ml cc mg kg g in ft lb lbs hr hrs h sec wk wks yr yrs yo mo mos med etc pt pts dept "
    "hosp inc ltd co jr sr dx hx tx rx fx sx bx exam bilat resp prob poss abd temp w wo re ap pa "
    "ph.d"
)
# A capital letter and a full stop are no initial before one of these.
_STARTERS = _words(
    "the a an there this that these those no not in on at of it its if is are as with without to "
    "mild moderate severe small large new stable unchanged normal again also however compared "
    "since otherwise findings impression comparison heart lung lungs cardiac pleural bilateral "
    "left right mediastinal pulmonary patient she he they we"
)

_ITEM = re.compile(r"\(?(\d{1,2})[.)](?= [^\s\d]|[A-Z][a-z])")
_NEXT_ITEM = re.compile(r"\(?(\d{1,2})[.)](?= |[A-Z][a-z])")
_BULLET = re.compile(r"[-*\u2022\u00b7\u2013](?= [^\W\d_])")
_HEADING = re.compile(r"[A-Z][A-Za-z ,/()&-]{1,40}:(?= |$)")
# Within a line: before `IMPRESSION: ` without a full stop, and between `Impression:` and `1. `.
_BREAK = re.compile(r"(?<=[^\s:.]) (?=[A-Z]{4,}(?: [A-Z]{2,}){0,3}: )|(?<=:) (?=\(?1[.)] [^\s\d])")
_STOP = re.compile(r"(?:\.(?: \.){2,}|[.!?…]+)[\"')\]\u201d\u2019\u00bb]*")
_STARTS_GLUED = re.compile(r"[A-Z](?:[A-Z]|[a-z])|A ")
_LETTERS_WITH_STOPS = re.compile(r"[A-Za-z](?:\.[A-Za-z])+")
_OPENING = "\"'([\u201c\u2018\u00ab"
_REACH = 24  # characters of a word that any rule looks at


def split_sentences(text: str) -> list[str]:
    """The sentences of a report, each in one line.

    Fragments without a word (`.`, `1.`, `___`) and headings with nothing behind them are dropped.
    Nothing else is changed: case, punctuation and the marks of removed words stay as written.

    Args:
        text: A report, with its line breaks if it still has them.

    Returns:
        The sentences in the order of the text; empty when it has no word.
    """
    return [piece for piece in split_pieces(text) if is_sentence(piece)]


def split_pieces(text: str) -> list[str]:
    """All that `split_sentences` cuts a report into, dropped fragments included.

    Args:
        text: A report.

    Returns:
        Pieces without blanks around them and without line breaks. Joined, they are the text: not
        one character that is no white space is lost, added or moved.
    """
    return [piece for block, item in _blocks(text) for piece in _cut(block, item)]


def is_sentence(piece: str) -> bool:
    """Whether a piece has two letters at least, and is more than a heading.

    Args:
        piece: One of `split_pieces`.
    """
    letters = 0
    for character in piece:
        letters += character.isalpha()
        if letters == 2:
            return not (piece.endswith(":") and piece.count(" ") < 5)
    return False


def _blocks(text: str) -> Iterator[tuple[str, int]]:
    """Lines that belong together, joined by single blanks, and the number of their item or 0."""
    lines: list[str] = []
    item = 0  # number of the last item of the list that we are in
    for raw in text.splitlines():
        line = " ".join(raw.split())
        mark = _NEXT_ITEM.match(line)
        if mark is not None and not _is_item(line, mark, item, lines):
            mark = None
        if not line or mark is not None or _BULLET.match(line) or _HEADING.match(line):
            yield from ((block, item) for block in _BREAK.split(" ".join(lines)))
            lines = []
        if mark is not None:
            item = int(mark[1])
            yield mark[0], 0
            line = line[mark.end() :].lstrip()
        if line:
            lines.append(line)
    yield from ((block, item) for block in _BREAK.split(" ".join(lines)))


def _is_item(line: str, mark: re.Match[str], item: int, before: list[str]) -> bool:
    """Whether a line starts an item: the number may end a wrapped sentence, as in `rib` / `8. No`.

    Args:
        line: The line.
        mark: The number at its start.
        item: Number of the list's last item, 0 outside a list.
        before: The lines before, back to the last cut.
    """
    if item > 0 and int(mark[1]) == item + 1:
        return True
    return _ITEM.match(line) is not None and (not before or before[-1][-1] in ".!?:;")


def _cut(block: str, item: int) -> Iterator[str]:
    """Cut a block at the ends of its sentences, and marks of items off their starts.

    Args:
        block: One line of text.
        item: Number of the item of a list that it belongs to, 0 outside a list.
    """
    start = 0
    stops = _STOP.finditer(block)
    stop = next(stops, None)
    while start < len(block):
        mark = _ITEM.match(block, start) or _BULLET.match(block, start)
        following = _NEXT_ITEM.match(block, start)
        if mark is None and following is not None and item > 0 and int(following[1]) == item + 1:
            mark = following  # `1. Stable. 2. 8 mm nodule.`
        if mark is not None:
            end = mark.end()
            item = int(mark[1]) if mark.lastindex else item
        else:
            while stop is not None and (
                stop.end() <= start or not _ends_sentence(block, start, stop)
            ):
                stop = next(stops, None)
            end = len(block) if stop is None else stop.end()
        yield block[start:end].strip()
        start = end + (block[end : end + 1] == " ")


def _ends_sentence(block: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence that began at `start` ends with this mark."""
    at, end = stop.span()
    low = max(start, at - _REACH)
    low = max(low, block.rfind(" ", low, at) + 1)
    word = block[low:at].lstrip(_OPENING)
    after = block[end : end + _REACH]
    if not after:
        return True
    is_glued = after[0] != " "
    following = after.lstrip(" ").lstrip(_OPENING)
    if is_glued and not (_STARTS_GLUED.match(after) and _may_be_glued(word)):
        return False
    mark = stop[0]
    if "?" in mark or "!" in mark:
        return low < at  # a blank before it: `? pneumonia`
    if "..." in mark or ". ." in mark or "…" in mark:
        return not (following[:1].islower() or following[:1].isdigit())
    return not _goes_on(word, following)


def _may_be_glued(word: str) -> bool:
    """Whether a full stop behind this word may lack its blank, and is not part of a name."""
    return len(word) > 1 and (word[-1].isalnum() or word[-1] in "_)%")


def _goes_on(word: str, following: str) -> bool:
    """Whether a single full stop behind a word is no end, given what comes after the blank."""
    lower = word.lower()
    first = following[:1]
    if lower in _ALWAYS:
        return True
    if lower.isdigit() and len(lower) < 4 and first.isdigit():
        return _ITEM.match(following) is None  # `1. 5 cm`, but not `in 12. 3. No effusion`
    if lower in _NUMBERED:
        return first.isdigit() or first in ("#", "_") or (len(first) == 1 and first.islower())
    if lower in _QUANTITY:
        return first.isdigit() or first.islower()
    if len(word) == 1 and word.isalpha():
        return first.islower() or (word.isupper() and not _starts_a_sentence(following))
    if _LETTERS_WITH_STOPS.fullmatch(word):
        is_name = word.isupper() and first.isupper() and not _starts_a_sentence(following)
        return first.islower() or first.isdigit() or first == "_" or is_name
    return lower in _SHORTENED and first.islower()


def _starts_a_sentence(following: str) -> bool:
    """Whether the next word is one that often begins a sentence."""
    word = following.split(" ", 1)[0].rstrip(".,;:")
    return word.lower() in _STARTERS and word[:1].isupper()
