import json

import pytest

from featcache import console


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (12.4, "12 s"), (516, "8 min 36 s"), (3725, "1 h 02 min")],
)
def test_durations_are_words(seconds, words):
    assert console.duration(seconds) == words


def test_sizes_are_decimal():
    assert console.size(999) == "999 B"
    assert console.size(114.1e9) == "114.1 GB"
    assert console.size(2.5e12) == "2.5 TB"


def test_without_a_terminal_a_line_comes_every_thirty_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.task("extract image/x", total=100) as progress:
        progress.update(1)
        clock[0] = 31.0
        progress.update(31, note="3 unreadable")
        clock[0] = 40.0
        progress.update(40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["extract image/x  31/100 images  1.0/s  1 min 09 s left  3 unreadable"]


def test_quiet_says_nothing(capsys):
    console.set_quiet(True)
    try:
        console.note("hello")
        with console.task("t", total=1) as progress:
            progress.update(1)
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_json_is_one_object_with_its_schema(capsys):
    console.emit({"b": 1, "a": [2]}, as_json=True, text="for people")
    out = capsys.readouterr().out
    assert json.loads(out) == {"schema": 1, "a": [2], "b": 1}
    assert out.count("\n") == 1
