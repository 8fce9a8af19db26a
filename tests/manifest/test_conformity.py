"""Checks whose faults are errors have a count all the same, for every reader that makes them."""

from dataclasses import replace

import pytest
from manifest.test_audit import found, made

from featcache.datasets.registry import dataset_names
from featcache.manifest import conformity
from featcache.manifest.conformity import conformity_findings
from featcache.manifest.table import Manifest


def of(manifest: Manifest, **changes) -> Manifest:
    return replace(manifest, meta=manifest.meta.model_copy(update=changes))


@pytest.fixture
def manifest(tmp_path):
    return made(tmp_path, [{"label:a": 1, "mask": ""}, {"label:a": 0, "mask": None}])


def test_what_the_reader_refuses_is_counted_as_none(manifest):
    numbers = {one.check: one.count for one in conformity_findings(manifest)}
    assert numbers == {1: 0, 2: 0, 10: 0, 11: 0}


def test_only_known_readers_are_named():
    named = {*conformity._COMPLETENESS, *conformity._VERSIONS, *conformity._PUBLISHED_SPLITS}
    assert named <= set(dataset_names())
    assert set(dataset_names()) - set(conformity._COMPLETENESS) == {"sample", "spreadsheet"}


@pytest.mark.parametrize(
    ("dataset", "policy", "text", "is_whole"),
    [
        ("nih", "complete, as published", "looks complete: complete, as published", True),
        ("rsna", "3 rows, as published", "looks complete: 3 rows, as published", True),
        ("siim", "3 rows, as in stage 1", "looks complete: 3 rows, as in stage 1", True),
        ("siim", "3 rows; of unknown completeness", "a part, or an unknown version: 3 rows", False),
        ("rsna", "3 rows; published are 4", "a part, or an unknown version: 3 rows; ", False),
        ("covidx", "2 lines as published, but other numbers of each class", "a part, or", False),
        ("nih", "a part, or an unknown version: 3", "a part, or an unknown version: 3", False),
    ],
)
def test_a_part_is_a_warning_unless_it_is_a_stand_in(manifest, dataset, policy, text, is_whole):
    names = conformity._COMPLETENESS
    real = of(manifest, dataset=dataset, policies={names[dataset]: policy}, synthetic=False)
    real.meta.funnel[:] = [real.meta.funnel[0]]
    one = found(list(conformity_findings(real)), 4, "")
    assert one.text.startswith(text)
    assert one.level == ("info" if is_whole else "warning")
    drawn = of(real, synthetic=True)
    assert found(list(conformity_findings(drawn)), 4, "").level == "info"


@pytest.mark.parametrize(
    ("policy", "level", "count"),
    [
        ("ours, by patient", "info", 0),
        ("mgca-cls, recomputed over ids; the published lists, by their hashes", "info", 0),
        ("MGCA's, recomputed, equal to the published one by its hashes: train 1", "info", 0),
        ("mgca-cls, recomputed over ids; not the published lists", "warning", 3),
    ],
)
def test_a_published_split_says_what_it_was_held_against(manifest, policy, level, count):
    real = of(manifest, dataset="rsna", policies={"split": policy}, synthetic=False)
    one = found(list(conformity_findings(real)), 15, "")
    assert (one.level, one.count) == (level, count)


def test_shares_of_sections_stand_among_the_checks(manifest):
    policies = {"text_origins": "findings: 3", "encoding": "UTF-8, else Latin-1 (in 1)"}
    findings = list(conformity_findings(of(manifest, policies=policies)))
    assert found(findings, 13, "text_origins").text == "text_origins: findings: 3"
    assert found(findings, 13, "Latin-1 (in 1)").level == "info"
