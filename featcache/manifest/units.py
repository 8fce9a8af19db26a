"""The unit of a manifest's texts: whole reports, or their sentences."""

import numpy as np
import pyarrow as pa
from pydantic import Field

from featcache.config import Config
from featcache.manifest.checks import TextUnit, text_ids
from featcache.manifest.sentences import RULES_VERSION, is_sentence, split_pieces

SENTENCE_POLICY = f"sentence, rules {RULES_VERSION}"
REPORTS_AT_ONCE = 20_000


class TextOptions(Config):
    """What the options of every reader with reports begin with."""

    text_unit: TextUnit = Field(
        default="report",
        description="`sentence`: a text for each sentence, so an image has several positives.",
    )


class SentenceCounts(Config):
    """What became of a manifest's reports."""

    reports: int = Field(ge=0, description="Different reports.")
    sentences: int = Field(ge=0, description="Sentences of these reports, repeated ones included.")
    fewest: int = Field(ge=0, description="Sentences of the report that has fewest.")
    most: int = Field(ge=0, description="Sentences of the report that has most.")
    fragments: int = Field(ge=0, description="Pieces without a word that were dropped.")

    def to_text(self) -> str:
        """One line for a person."""
        mean = self.sentences / max(self.reports, 1)
        words = f"sentences {self.sentences:,} of {self.reports:,} different reports, {mean:.1f} "
        words += f"each ({self.fewest:,} to {self.most:,})"
        return words + (f"; {self.fragments:,} fragments dropped" if self.fragments else "")


def cut_into_sentences(texts: pa.Table) -> tuple[pa.Table, SentenceCounts]:
    """Put a row for each sentence in the place of each row of a report.

    A sentence is a text like any other: equal ones have equal ids, whatever reports they are from.
    Each report is cut once, however many images it belongs to, and only a part of them are Python
    objects at a time.

    Args:
        texts: With the columns and types of `texts.parquet`, no value null.

    Returns:
        The same columns with `unit` `sentence`, still with a row for each repeated sentence; and
        the counts.
    """
    encoded = texts["text_id"].combine_chunks().dictionary_encode()
    report_of_row = encoded.indices.to_numpy()
    first = np.unique(report_of_row, return_index=True)[1]
    cut, lengths, fragments = [], np.zeros(len(first), dtype=np.int64), 0
    for start in range(0, len(first), REPORTS_AT_ONCE):
        part = slice(start, start + REPORTS_AT_ONCE)
        sentences: list[str] = []
        for report, text in enumerate(texts["text"].take(first[part]).to_pylist(), start):
            pieces = split_pieces(text)
            found = [piece for piece in pieces if is_sentence(piece)]
            lengths[report] = len(found)
            fragments += len(pieces) - len(found)
            sentences += found
        cut.append(pa.array(sentences, pa.large_string()))
    # One piece: arrow would glue the pieces together again each time rows are taken from them.
    whole = pa.chunked_array([pa.concat_arrays(cut)], pa.large_string())
    ends = np.cumsum(lengths)
    counts = lengths[report_of_row]  # sentences of each row
    rows = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (ends - lengths)[report_of_row][rows] + within
    columns = {
        "key": texts["key"].take(rows),
        "text_id": text_ids(whole).combine_chunks().take(place),
        "text": whole.take(place),
        "unit": pa.array(["sentence"]).take(np.zeros(len(rows), dtype=np.int64)),
    }
    table = pa.table(columns).cast(texts.schema)
    return table, SentenceCounts(
        reports=len(lengths),
        sentences=len(whole),
        fewest=int(lengths.min()),
        most=int(lengths.max()),
        fragments=fragments,
    )
