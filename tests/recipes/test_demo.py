"""The main job of the README, whole."""

import json
import time

import pytest

from featcache.cli import main

pytestmark = pytest.mark.weights


@pytest.mark.slow
def test_the_demo_runs_from_pictures_to_scores_and_a_second_one_takes_seconds(tmp_path, capsys):
    started = time.monotonic()
    assert main(["demo", "--root", str(tmp_path), "--quiet", "--json"]) == 0
    first_s = time.monotonic() - started
    first = json.loads(capsys.readouterr().out)
    probes, retrieval = first["tables"]
    methods = {row["method"] for row in probes["rows"]}
    assert {"majority class", "random encoder", "raw backbone", "Adaptor"} <= methods
    shares = {row["setting"]["labels"] for row in probes["rows"]}
    assert shares == {"1 %", "10 %", "100 %"}
    assert any("composed from the published labels" in note for note in probes["notes"])
    assert any("chance" in row["method"] for row in retrieval["rows"])

    started = time.monotonic()
    assert main(["demo", "--root", str(tmp_path), "--quiet", "--json"]) == 0
    assert time.monotonic() - started < first_s / 3
    second = json.loads(capsys.readouterr().out)
    assert [table["rows"] for table in second["tables"]] == [t["rows"] for t in first["tables"]]


def test_a_workspace_that_was_trained_is_left_alone(clone, capsys):
    assert main(["demo", "--unless-trained", "--root", str(clone.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"] == []
