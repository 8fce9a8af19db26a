"""A figure against its goal."""

import pytest

from featcache.bench.case import Bench, Measured, Setting


def bench(**changes) -> Bench:
    values = {"name": "a[b]", "goal": 2.0, "better": "larger", "unit": "x", "what": "a over b"}
    return Bench(**{**values, "measure": lambda setting: Measured([1.0]), **changes})


@pytest.mark.parametrize(
    ("better", "value", "holds"),
    [("larger", 2.0, True), ("larger", 1.99, False), ("smaller", 2.0, True), ("smaller", 3, False)],
)
def test_the_goal_itself_holds_and_the_wrong_side_does_not(better, value, holds):
    assert bench(better=better).holds(value) is holds


def test_a_goal_is_printed_with_its_direction_and_unit():
    assert bench().goal_text == ">= 2 x"
    assert bench(better="smaller", unit="s", goal=0.5).goal_text == "<= 0.5 s"


def test_the_figure_is_the_median_unless_one_is_given():
    assert Measured([9.0, 1.0, 2.0]).figure == 2.0
    assert Measured([9.0, 1.0, 2.0], value=7.0).figure == 7.0


def test_the_variant_is_no_part_of_the_family():
    assert bench().family == "a"


def test_a_quick_setting_takes_the_small_size(tmp_path):
    assert Setting(tmp_path, 1).choose(100, 3) == 100
    assert Setting(tmp_path, 1, quick=True).choose(100, 3) == 3
