"""Prompt files: what they may hold, and what is said about names that fit nothing."""

import dataclasses

import pytest

from featcache.config import ConfigError, list_configs, validate
from featcache.datasets.registry import dataset_module, dataset_names
from featcache.errors import UsageError
from featcache.heads.findings import finding_names
from featcache.heads.prompts import (
    Prompts,
    find_prompts,
    prompted_findings,
    refuse_other_label,
)

FEWEST = 5
BOTH = {"present": ["It is there."], "absent": ["It is not there."]}


@pytest.mark.parametrize("name", list_configs("prompts"))
def test_shipped_prompts_are_ensembles_that_say_a_thing_once(name, toy):
    found, prompts = find_prompts(name, toy.manifest)
    assert found == name
    groups = prompts.groups([*prompts.classes, *prompts.findings])
    assert groups
    for some in groups:
        assert len(some) >= FEWEST
        assert all(one[0].isupper() and one.endswith(".") for one in some)
    spoken = [one for some in groups for one in some]
    own = [one.present + one.absent for one in prompts.findings.values()] or [spoken]
    for some in own:  # within a finding; lungs that are clear speak against several
        assert len({one.casefold() for one in some}) == len(some)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"classes": {"a": ["x"]}},
        {"classes": {"a": ["x"], "b": []}},
        {"classes": {"a": ["x"], "b": [" "]}},
        {"findings": {"a": {"present": ["x"], "absent": [""]}}},
        {"findings": {"a": {"present": ["x"]}}},
        {"classes": {"a": ["x"], "b": ["y"]}, "findings": {"c": {"present": ["x"], "absent": []}}},
    ],
)
def test_prompts_that_cannot_tell_anything_are_refused(values):
    with pytest.raises(ConfigError):
        validate(Prompts, values)


def findings(*names):
    return Prompts(findings=dict.fromkeys(names, BOTH))


def test_findings_without_labels_are_left_out(toy):
    asked = findings("Fracture", "Edema", "Pleural Effusion")
    assert prompted_findings(asked, toy.manifest, ["Edema", "Effusion", "Fracture"]) == (
        "Edema",
        "Fracture",
    )


@pytest.mark.parametrize("name", ["Edma", "edema", "EDEMA", "Edemas"])
def test_misspelt_finding_is_refused_with_the_closest_name(toy, name):
    with pytest.raises(UsageError, match=f"have `{name}`, the manifest does not; did you mean `E"):
        prompted_findings(findings(name, "Fracture"), toy.manifest, ["Edema", "Fracture"])


def test_findings_of_another_data_set_are_refused_by_name(toy):
    with pytest.raises(UsageError, match="no labels of: pneumothorax") as caught:
        prompted_findings(findings("pneumothorax"), toy.manifest, ["pneumonia"])
    assert "findings here: pneumonia" in caught.value.fix


def test_prompts_for_a_label_that_is_not_there_are_refused(toy):
    other = Prompts(label="klass", classes={"a": ("x",), "b": ("y",)})
    with pytest.raises(UsageError, match=r"label `klass`, which .* did you mean `class`"):
        refuse_other_label(other, toy.manifest)
    assert finding_names(toy.manifest) == ()


@pytest.mark.parametrize("name", sorted({*dataset_names()} - {"spreadsheet"}))
def test_each_data_set_has_prompts_for_labels_that_its_reader_gives(name, toy):
    """A table of one's own has labels that nobody knows beforehand."""
    meta = toy.manifest.meta.model_copy(update={"dataset": name})
    found, prompts = find_prompts(None, dataclasses.replace(toy.manifest, meta=meta))
    assert found == name
    reader = dataset_module(name)
    labels = getattr(reader, "LABELS", None)
    if labels is not None:
        assert {*labels} <= {*prompts.findings}


def test_unknown_name_is_refused_with_the_closest_ones(toy):
    with pytest.raises(UsageError, match="no prompts `chexprt`; did you mean `chexpert`"):
        find_prompts("chexprt", toy.manifest)
    with pytest.raises(UsageError, match="no prompts are known for data set `spreadsheet`"):
        find_prompts(None, toy.manifest)


def test_missing_file_and_folder_are_refused(toy, tmp_path):
    for path in (tmp_path / "mine.yaml", tmp_path):
        with pytest.raises(UsageError, match="no such file of prompts") as caught:
            find_prompts(str(path), toy.manifest)
        assert str(tmp_path) in str(caught.value.where)
