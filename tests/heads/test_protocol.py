"""Intervals, tables, and the gate before the test split."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from featcache.errors import TrainingError
from featcache.heads import protocol
from featcache.heads.protocol import (
    Column,
    Estimate,
    Interval,
    Row,
    Table,
    TestGate,
    finished,
    interval_of,
    open_gate,
    patient_bootstrap,
    patient_weights,
    request_hash,
    save_results,
    table_from_plain,
)


def weights_of(subject_ids, **options):
    return np.concatenate(list(patient_weights(subject_ids, **options)))


def test_all_rows_of_a_patient_are_drawn_together():
    subjects = ["a", "b", "a", "c", "b", "a"]
    weights = weights_of(subjects, draws=50, seed=0)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] == weights[:, 5]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_draws_depend_neither_on_row_order_nor_on_blocks(monkeypatch):
    subjects = [f"p{i % 7}" for i in range(20)]
    order = np.random.default_rng(0).permutation(20)
    weights = weights_of(subjects, draws=30, seed=4)
    shuffled = weights_of([subjects[i] for i in order], draws=30, seed=4)
    assert (shuffled == weights[:, order]).all()
    monkeypatch.setattr(protocol, "BLOCK_VALUES", 50)
    assert (weights_of(subjects, draws=30, seed=4) == weights).all()


def test_interval_of_a_mean_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(size=400)
    subjects = [str(i) for i in range(400)]

    def mean(weights):
        return (weights @ values / weights.sum(axis=1))[:, None]

    drawn = patient_bootstrap(mean, subjects, draws=1000, seed=1)
    interval = interval_of(drawn[:, 0])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    assert interval.low < values.mean() < interval.high


def test_rows_of_one_patient_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 10)

    def mean(weights):
        return (weights @ values / weights.sum(axis=1))[:, None]

    alone = interval_of(patient_bootstrap(mean, [str(i) for i in range(400)])[:, 0])
    grouped = interval_of(patient_bootstrap(mean, [str(i // 10) for i in range(400)])[:, 0])
    assert (grouped.high - grouped.low) > 2.5 * (alone.high - alone.low)


def test_undefined_draws_are_counted_and_left_out():
    interval = interval_of(np.array([0.5, np.nan, 0.7, np.nan]))
    assert (interval.draws, interval.undefined) == (4, 2)
    assert 0.5 <= interval.low < interval.high <= 0.7
    assert interval_of(np.full(4, np.nan)) is None


def test_estimate_shows_mean_sd_and_interval():
    estimate = Estimate((0.8, 0.9), Interval(0.7, 0.95, 1000, 3))
    assert estimate.text(100.0) == "85.0 ± 7.1 [70.0, 95.0]"
    assert estimate.to_plain()["undefined_draws"] == 3
    assert Estimate((float("nan"),)).text() == "undefined"
    assert Estimate((float("nan"),)).to_plain()["mean"] is None


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(-1, 1))
def test_what_is_read_back_prints_the_same_text(values, low):
    first = Estimate(tuple(values), Interval(low, low + 0.1, 10, 0))
    made = Table("R", (Column("a", "a %"),), (Row("d", "m", {}, {"a": first}),), (), 1)
    (row,) = table_from_plain(json.loads(json.dumps(made.to_plain()))).rows
    assert row.figures["a"].text(100.0) == first.text(100.0)


def table() -> Table:
    figures = {"accuracy": Estimate((0.5, 0.7), Interval(0.4, 0.8, 10, 0))}
    rows = (
        Row("lungs (synthetic stand-in)", "a | b", {"train": "1 %"}, figures, {"runs": 2}),
        Row("lungs (synthetic stand-in)", "random encoder", {"train": "1 %"}, remark="no weights"),
    )
    columns = (Column("accuracy", "accuracy %"),)
    return Table("Results", columns, rows, ("Pictures are drawn, not taken.",), 15)


def test_table_prints_notes_above_and_reasons_in_place_of_figures():
    text = table().to_markdown()
    assert text.index("Pictures are drawn") < text.index("| data set |")
    assert "60.0 ± 14.1 [40.0, 80.0]" in text
    assert "| a / b |" in text
    assert "| random encoder | - | no weights |" in text
    assert "validation: 15." in text
    console = Console(width=200, record=True, file=None, quiet=True)
    console.print(table().to_rich())


def test_results_come_back_as_they_were_written(tmp_path):
    written = save_results(tmp_path, table(), {"request": "abc", "head": "classify"})
    assert written.is_new
    before = (tmp_path / "results.json").read_bytes()
    again = finished(tmp_path, "abc")
    assert not again.is_new
    assert again.table.to_markdown() == written.table.to_markdown()
    assert again.table.to_plain() == written.table.to_plain()
    assert finished(tmp_path, "other") is None
    assert (tmp_path / "results.json").read_bytes() == before


def test_second_question_to_the_test_split_is_refused(tmp_path):
    first = TestGate(tmp_path, "aaaa")
    assert first.read({"targets": 1}) == {"targets": 1}
    assert "read once" in first.note()
    second = TestGate(tmp_path, "bbbb")
    with pytest.raises(TrainingError, match=r"was read before .* by 1 other request") as caught:
        second.check()
    assert "--again" in caught.value.fix
    with pytest.raises(TrainingError, match="was read before"):
        second.read({})
    assert len(first.reads()) == 1


def test_second_question_is_answered_when_asked_again_and_said(tmp_path):
    TestGate(tmp_path, "aaaa").read({})
    gate = TestGate(tmp_path, "bbbb", again=True)
    gate.read({})
    assert "1 other request" in gate.note()
    assert [read["request"] for read in gate.reads()] == ["aaaa", "bbbb"]


def test_same_question_may_repeat_a_read_whose_result_was_lost(tmp_path):
    TestGate(tmp_path, "aaaa").read({})
    gate = TestGate(tmp_path, "aaaa")
    gate.read({})
    assert "read once" in gate.note()


def test_gate_opens_to_a_finished_result_or_to_one_question(tmp_path):
    gate = open_gate(tmp_path, {"seed": 0}, again=False)
    assert isinstance(gate, TestGate)
    gate.read({})
    table = Table("t", (), (), (), 0)
    save_results(tmp_path, table, {"request": gate.request})
    done = open_gate(tmp_path, {"seed": 0}, again=False)
    assert not isinstance(done, TestGate)
    assert done.values["request"] == gate.request
    with pytest.raises(TrainingError, match="was read before"):
        open_gate(tmp_path, {"seed": 1}, again=False)
    assert isinstance(open_gate(tmp_path, {"seed": 1}, again=True), TestGate)
    of_validate = open_gate(tmp_path, {"seed": 1}, again=False, reads_test=False)
    assert isinstance(of_validate, TestGate)


def test_request_depends_on_every_part():
    assert request_hash({"a": 1, "b": 2}) == request_hash({"b": 2, "a": 1})
    assert request_hash({"a": 1}) != request_hash({"a": 2})
