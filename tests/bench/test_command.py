"""`featcache bench` from the outside."""

import json
import tempfile
from pathlib import Path

import pytest

from featcache.bench import command
from featcache.bench.case import Bench, Measured
from featcache.bench.command import BenchReport, Result, run_benches
from featcache.bench.machine import describe_machine
from featcache.cli import main
from featcache.errors import FeatcacheError, UsageError

NAMES = ["decode_vs_plain", "verify_vs_memcpy", "help_s"]
KEYS = {"name", "value", "unit", "goal", "better", "holds", "runs", "what", "detail"}


def refuse(setting):
    raise UsageError("two cores are\n  needed", fix="another machine")


def die(setting):
    raise SystemExit(9)


def bench(measure, name="small") -> Bench:
    return Bench(name, 1.0, "larger", "x", "one over another", measure)


BENCHES = (bench(refuse, "refuse"), bench(die, "die"))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What three small benches print, and what they leave in the temporary folder."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        report = run_benches(NAMES, device="cpu", quick=True)
    return report, [one.name for one in folder.glob("featcache-bench-*")]


def test_results_come_with_value_goal_and_verdict(printed):
    values = printed[0].to_json()
    assert set(values) == {"machine", "quick", "results"}
    assert [one["name"] for one in values["results"]] == [
        "decode_vs_plain", "help_s", "verify_vs_memcpy",
    ]  # fmt: skip
    for one in values["results"]:
        assert set(one) == KEYS
        assert one["value"] > 0
        assert len(one["runs"]) == 2
        assert one["detail"]
    json.dumps(values, allow_nan=False)


def test_quick_results_are_marked(printed):
    assert printed[0].to_json()["quick"] is True
    assert "no figures to quote" in printed[0].to_text()


def test_the_table_has_a_line_each_that_says_what_against_what(printed):
    lines = printed[0].to_text().splitlines()[-len(NAMES) :]
    for line, result in zip(lines, printed[0].results, strict=True):
        assert line.startswith(result.bench.name)
        assert line.endswith(result.bench.what)
        assert result.bench.goal_text in line


def test_our_decoding_is_held_against_the_plain_one_in_grey_levels(printed):
    detail = printed[0].to_json()["results"][0]["detail"]
    assert 0 < detail["mean_grey_difference"] < 2
    assert set(detail["seconds"]) == {"plain", "ours"}


def test_nothing_is_left_in_the_temporary_folder(printed):
    assert printed[0].ok
    assert printed[1] == []


def test_the_machine_is_described():
    machine = describe_machine().to_json()
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0
    assert {"python", "torch", "featcache"} <= set(machine["versions"])


def run_one(name):
    (one,) = (one for one in BENCHES if one.name == name)
    return command._run(one, 1, quick=True, device="cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [("refuse", "two cores are needed; try another machine"), ("die", "ended with code 9")],
)
def test_a_bench_that_cannot_be_measured_says_why_and_is_no_success(name, words, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(refuse, "__module__", "test_command")
    monkeypatch.setattr(die, "__module__", "test_command")
    result = run_one(name)
    values = result.to_json()
    assert values["value"] is None
    assert values["holds"] is False
    assert words in values["detail"]["error"]
    assert not BenchReport(describe_machine(), [result], quick=True).ok


def test_a_missed_goal_is_told_and_no_failure():
    report = BenchReport(describe_machine(), [Result(bench(die), Measured([0.5]))], quick=False)
    assert report.ok
    assert "0.5 x  >= 1 x  misses  one over another" in report.to_text()


def test_a_disk_that_is_too_small_is_refused_before_any_work():
    huge = Bench("huge", 1, "larger", "x", "a over b", die, disk_mb=10**9)
    with pytest.raises(FeatcacheError, match=r"write up to 1000\.0 TB, .* are free"):
        command._check_disk([huge], quick=False)


def test_list_names_every_bench_and_measures_nothing(capsys):
    assert main(["bench", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == 1
    assert "extract_vs_limit[encoder]" in [one["name"] for one in listed["benches"]]
    assert main(["bench", "--list", "help_s"]) == 0
    assert capsys.readouterr().out.startswith("help_s  <= 0.5 s")


def test_an_unknown_name_and_an_unknown_setting_end_with_code_2(capsys):
    assert main(["bench", "halp_s"]) == 2
    assert "did you mean `help_s`?" in capsys.readouterr().err
    assert main(["bench", "--set", "repeat=2", "help_s"]) == 2
    assert "repeats" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.weights
def test_every_bench_can_be_measured():
    report = run_benches(quick=True)
    assert report.ok, report.to_text()
