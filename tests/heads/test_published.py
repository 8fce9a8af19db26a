"""Published figures: each with its source, never beside a stand-in."""

import pytest
from heads.kit_masks import masked_toy

from featcache.errors import ConfigError
from featcache.heads.published import (
    NOT_BESIDE_STAND_INS,
    published_notes,
    published_rows,
    read_published,
)


def test_shipped_file_fits_and_is_in_percent():
    found = read_published()
    assert {(one.head, one.dataset) for one in found.tables} >= {
        ("segment", "rsna"),
        ("segment", "siim"),
    }
    figures = [figure for table in found.tables for row in table.rows for figure in row.at.values()]
    assert all(1 < figure <= 100 for figure in figures)


def test_rows_of_a_share_name_their_source(tmp_path):
    toy = masked_toy(tmp_path, dataset="rsna", synthetic=False)
    rows = {row.method: row for row in published_rows("segment", toy.manifest, 100.0)}
    assert rows["G2D encoder-decoder"].figures["dice"].mean == pytest.approx(0.769)
    assert "table 1" in rows["G2D encoder-decoder"].remark
    assert rows["G2D encoder-decoder"].setting["labels"] == "100 %"
    assert list(published_rows("segment", toy.manifest, 5.0)) == []
    assert list(published_rows("retrieve", toy.manifest, 100.0)) == []
    [note] = published_notes("segment", toy.manifest, [5.0, 100.0])
    assert "another protocol" in note


def test_where_no_row_stands_nothing_is_said(tmp_path):
    for synthetic in (True, False):
        toy = masked_toy(tmp_path / str(synthetic), dataset="rsna", synthetic=synthetic)
        assert list(published_notes("segment", toy.manifest, [5.0])) == []
        assert list(published_notes("segment", toy.manifest, [])) == []
        assert list(published_notes("classify", toy.manifest, [100.0], label="other")) == []
    other = masked_toy(tmp_path / "other", dataset="spreadsheet", synthetic=True)
    assert list(published_notes("segment", other.manifest, [100.0])) == []


def test_stand_in_gets_a_sentence_instead(tmp_path):
    toy = masked_toy(tmp_path, dataset="rsna", synthetic=True)
    assert list(published_rows("segment", toy.manifest, 100.0)) == []
    assert list(published_notes("segment", toy.manifest, [100.0])) == [NOT_BESIDE_STAND_INS]


def test_no_method_has_the_figures_of_another_data_set():
    """A row that was copied into the wrong table would stand twice; the empty mask may not move."""
    seen: dict[tuple, str] = {}
    for table in read_published().tables:
        for row in table.rows:
            figures = (row.method, *row.at.values())
            assert seen.setdefault(figures, table.dataset) == table.dataset, figures


def test_row_without_a_known_source_is_refused(tmp_path):
    file = tmp_path / "published.yaml"
    file.write_text(
        "sources: {a: b}\ntables:\n- {head: segment, dataset: rsna, figure: dice, protocol: x,"
        " rows: [{method: m, source: c, at: {1: 2.0}}]}\n"
    )
    with pytest.raises(ConfigError, match="no source is called `c`"):
        read_published(file)
