"""Data sets by name, and what holds for all of them."""

import json

import pytest

from featcache.cli import main
from featcache.datasets.registry import (
    check_manifest,
    dataset_module,
    dataset_names,
    make_manifest,
)
from featcache.datasets.sample import sample_folder
from featcache.errors import ConfigError, UsageError
from featcache.manifest.units import TextOptions
from featcache.workspace import Workspace


def test_every_name_has_its_reader():
    assert {"covidx", "mimic-cxr-jpg", "sample", "spreadsheet"} <= set(dataset_names())
    for name in dataset_names():
        assert dataset_module(name).read


def test_the_sample_by_report_and_by_sentence(tmp_path):
    workspace = Workspace.open(tmp_path)
    whole = make_manifest(workspace, "sample", sample_folder(), name="whole")
    cut = make_manifest(workspace, "sample", sample_folder(), name="cut", text_unit="sentence")
    assert cut.images.equals(whole.images)
    assert whole.texts.num_rows == 1290
    assert cut.texts.num_rows == 3 * 1290
    assert workspace.current("manifest") == "cut"
    assert make_manifest(workspace, "sample", sample_folder(), text_unit="report").meta.hash == (
        whole.meta.hash
    )


def test_the_command_takes_the_unit(tmp_path, capsys):
    line = ["manifest", "sample", str(sample_folder()), "--text-unit", "sentence", "--json"]
    assert main([*line, "--root", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sentences"]["sentences"] == 3 * result["sentences"]["reports"]
    assert result["pairs"] == 3 * result["images"]


@pytest.mark.parametrize("name", dataset_names())
def test_a_data_set_has_the_unit_as_an_option_or_refuses_it(name, tmp_path):
    workspace = Workspace.open(tmp_path)
    if issubclass(dataset_module(name).Options, TextOptions):
        with pytest.raises(ConfigError, match="text_unit"):
            make_manifest(workspace, name, tmp_path, text_unit="word")
    else:
        with pytest.raises(UsageError, match="has no reports"):
            make_manifest(workspace, name, tmp_path, text_unit="sentence")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"dataset": "other"}', b"{}"])
def test_a_damaged_manifest_of_another_data_set_is_named_and_stops_nothing(tmp_path, content):
    workspace = Workspace.open(tmp_path)
    mine = make_manifest(workspace, "sample", sample_folder())
    broken = workspace.manifests / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_bytes(content)
    findings = check_manifest(workspace, mine).findings
    [one] = [one for one in findings if "broken" in one.text]
    assert (one.check, one.level, one.count) == (9, "warning", 1)
    assert one.text == "the manifest broken cannot be read and was not compared with"


def test_the_command_decodes_on_request(mimic_cxr_jpg_tree, tmp_path, capsys):
    line = ["manifest", "mimic-cxr-jpg", str(mimic_cxr_jpg_tree), "--root", str(tmp_path)]
    assert main([*line, "--decode", "--no-checks"]) == 2
    assert "--no-checks leaves them out" in capsys.readouterr().err
    assert main([*line, "--decode", "--quiet"]) == 0
    assert "! check  6: 2 of 63 pictures cannot be decoded: " in capsys.readouterr().out
    assert (tmp_path / "manifests" / "mimic-cxr-jpg" / "decoded.parquet").is_file()
