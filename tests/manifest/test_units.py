"""Manifests whose texts are sentences."""

import json
import tracemalloc

import pyarrow as pa
import pytest

from featcache.config import read_json
from featcache.errors import ManifestError
from featcache.manifest import checks, units
from featcache.manifest.sentences import split_sentences
from featcache.manifest.table import FunnelStep, open_manifest, text_id, write_manifest
from featcache.manifest.units import SENTENCE_POLICY, cut_into_sentences

REPORTS = [
    "Lungs are clear. No effusion. Tube of 1.5 cm.",
    "1. No effusion.\n2. Edema.",
    "Lungs are clear. No effusion. Tube of 1.5 cm.",
    "Edema. Edema. Edema.",
]


def images(count: int) -> pa.Table:
    numbers = range(count)
    names = ("key", "subject_id", "image_path")
    columns = {name: [f"{name}-{n}" for n in numbers] for name in names}
    nothing = dict.fromkeys(("study_id", "view_position"), pa.nulls(count, pa.string()))
    return pa.table({**columns, **nothing, "split": ["train"] * count, "source": ["x"] * count})


def write(folder, reports=REPORTS, *, count=None, unit="sentence", **more):
    texts = pa.table(
        {
            "key": [f"key-{n}" for n in range(len(reports))],
            "text": reports,
            "unit": ["report"] * len(reports),
        }
    )
    return write_manifest(
        folder,
        images(count or len(reports)),
        texts,
        dataset="toy",
        image_root=folder,
        text_unit=unit,
        **more,
    )


def texts_of(manifest, key):
    rows = manifest.texts.to_pylist()
    return {row["text"] for row in rows if row["key"] == key}


def test_an_image_has_a_row_for_each_sentence_of_its_report(tmp_path):
    manifest = write(tmp_path / "m")
    for number, report in enumerate(REPORTS):
        assert texts_of(manifest, f"key-{number}") == set(split_sentences(report))
    assert set(manifest.texts["unit"].to_pylist()) == {"sentence"}
    assert open_manifest(tmp_path / "m").texts.equals(manifest.texts)


def test_a_sentence_has_one_id_in_whatever_report_it_stands(tmp_path):
    manifest = write(tmp_path / "m")
    rows = manifest.texts.to_pylist()
    assert all(row["text_id"] == text_id(row["text"]) for row in rows)
    shared = {row["key"] for row in rows if row["text"] == "No effusion."}
    assert shared == {"key-0", "key-1", "key-2"}
    ids, unique = manifest.unique_texts()
    assert len(ids) == len(set(ids)) == len(set(unique)) == 4


def test_a_sentence_that_a_report_repeats_stands_there_once(tmp_path, capsys):
    manifest = write(tmp_path / "m")
    assert [row["key"] for row in manifest.texts.to_pylist()].count("key-3") == 1
    assert "2 identical image-text pairs were merged" in capsys.readouterr().err


def test_the_unit_is_recorded_and_part_of_the_hash(tmp_path):
    whole = write(tmp_path / "whole", ["Clear."], unit="report")
    cut = write(tmp_path / "cut", ["Clear."])
    assert whole.texts["text_id"].equals(cut.texts["text_id"])
    assert whole.meta.hash != cut.meta.hash
    assert cut.meta.policies["text_unit"] == SENTENCE_POLICY
    assert "text_unit" not in whole.meta.policies
    assert whole.meta.sentences is None
    assert whole.to_json()["sentences"] is None


def test_the_summary_counts_sentences_per_report(tmp_path):
    manifest = write(tmp_path / "m")
    counts = manifest.to_json()["sentences"]
    assert counts == {"reports": 3, "sentences": 8, "fewest": 2, "most": 3, "fragments": 2}
    line = "sentences 8 of 3 different reports, 2.7 each (2 to 3); 2 fragments dropped"
    assert line in manifest.to_text()
    assert read_json(tmp_path / "m" / "manifest.json")["sentences"] == counts


def test_the_file_beside_the_tables_holds_no_text(tmp_path):
    write(tmp_path / "m")
    written = json.dumps(read_json(tmp_path / "m" / "manifest.json"))
    assert "effusion" not in written
    assert "key-0" not in written


def test_bytes_do_not_depend_on_how_many_reports_are_cut_at_once(tmp_path, monkeypatch):
    first = write(tmp_path / "one")
    monkeypatch.setattr(units, "REPORTS_AT_ONCE", 1)
    second = write(tmp_path / "two")
    assert first.texts.equals(second.texts)
    assert first.meta.hash == second.meta.hash
    assert first.meta.sentences == second.meta.sentences


def test_an_image_whose_report_has_no_sentence_is_kept_and_counted(tmp_path):
    manifest = write(tmp_path / "m", ["Clear. Normal.", "___.", "1. 2."], count=4)
    assert len(manifest.keys) == 4
    assert set(manifest.texts["key"].to_pylist()) == {"key-0"}
    last = manifest.meta.funnel[-1]
    assert last.name == "images with a sentence"
    assert last.count == 1
    assert last.dropped == {"no sentence in its report (kept without text)": 2, "no report": 1}


def test_a_funnel_that_ends_with_the_reports_goes_on_from_there(tmp_path):
    funnel = [
        FunnelStep(name="images", count=3),
        FunnelStep(name="images with a report", count=2, dropped={"no report": 1}),
    ]
    manifest = write(tmp_path / "m", ["Clear.", "."], count=3, funnel=funnel)
    assert manifest.meta.funnel[-1].dropped == {"no sentence in its report (kept without text)": 1}


def test_no_text_at_all_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="no text to cut into sentences"):
        write(tmp_path / "m", [], count=2)
    with pytest.raises(ManifestError, match="`text` is blank: row 2") as caught:
        write(tmp_path / "m", ["Clear.", "  "])
    assert "Clear" not in str(caught.value)


def test_texts_that_are_sentences_already_stay_as_they_are(tmp_path):
    texts = pa.table({"key": ["key-0"], "text": ["No effusion."], "unit": ["sentence"]})
    kwargs = {"dataset": "toy", "image_root": tmp_path}
    manifest = write_manifest(tmp_path / "m", images(1), texts, text_unit="sentence", **kwargs)
    assert manifest.texts["text"].to_pylist() == ["No effusion."]


def test_reports_are_never_all_python_objects_at_once(monkeypatch):
    """The Python objects of a part are gone before the next part."""
    monkeypatch.setattr(units, "REPORTS_AT_ONCE", 10)
    monkeypatch.setattr(checks, "_PIECE_ROWS", 10)

    def peak(count: int) -> int:
        reports = [(f"Finding {n} of the lung" + " again" * 80 + ". ") * 40 for n in range(count)]
        table = pa.table(
            {
                "key": [str(n) for n in range(count)],
                "text_id": [text_id(one) for one in reports],
                "text": pa.array(reports, pa.large_string()),
                "unit": ["report"] * count,
            }
        )
        del reports
        tracemalloc.start()
        cut_into_sentences(table)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(40) < 2 * peak(10)
