"""Sweeps: variants tuned alike, repeated over seeds, measured once."""

import json

import numpy as np
import pytest
from scipy import stats

from featcache.config import list_configs
from featcache.errors import ConfigError
from featcache.heads.sweep import SweepConfig, interval_over_seeds, load_sweep_config, sweep
from featcache.workspace import Workspace

BASE = {
    "adaptor": {"dim": 16, "layers": 1, "heads": 2, "feedforward": 16},
    "epochs": 2,
    "batch_size": 16,
    "logger": "none",
}
VARIANTS = {"dual": ["adaptor.objective=dual"], "all-pairs": ["adaptor.objective=allpairs"]}


def config(**changes) -> SweepConfig:
    values = {"base": BASE, "variants": VARIANTS, "learning_rates": [1e-3, 1e-2], "seeds": 3}
    return SweepConfig.model_validate(values | {"label": "class", "fractions": [100]} | changes)


@pytest.fixture(scope="module")
def asked(toy):
    names = {"backbone": str(toy.images.folder), "text_encoder": str(toy.texts.folder)}
    return {**names, "manifest": str(toy.manifest.folder), "device": "cpu"}


@pytest.fixture(scope="module")
def made(toy, asked, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("sweep"))
    return workspace, sweep(workspace, config(), "both", **asked)


def test_every_variant_has_a_line_with_all_seeds_and_stands_beside_what_needs_no_adaptor(made):
    _, results = made
    rows = {row["method"]: row for row in results.values["rows"]}
    others = ["raw backbone", "linear map (ridge) on raw features", "chance (exact)"]
    assert list(rows) == ["dual", "all-pairs", "all-pairs minus dual", *others]
    for variant in VARIANTS:
        assert {len(one["values"]) for one in rows[variant]["figures"].values()} == {3}
    assert set(rows["dual"]["figures"]) == {
        "mrr",
        "i2t_recall_at_5",
        "t2i_recall_at_5",
        "auroc_100",
    }
    assert set(rows["raw backbone"]["figures"]) == {"auroc_100"}


def test_differences_are_paired_by_seed(made):
    _, results = made
    rows = {row["method"]: row["figures"]["mrr"]["values"] for row in results.values["rows"][:3]}
    gap = np.subtract(rows["all-pairs"], rows["dual"])
    np.testing.assert_allclose(rows["all-pairs minus dual"], gap, atol=2e-6)


def test_the_learning_rate_is_the_one_validation_likes_best(made):
    workspace, results = made
    for row in results.values["rows"][:2]:
        tried = row["validation_mrr"]
        assert len(tried) == 2
        assert row["setting"]["lr"] == max(tried, key=tried.get)
        folder = workspace.root / "sweeps/both/runs" / f"{row['method']}-lr{row['setting']['lr']}"
        for seed in range(3):
            run = json.loads((folder.parent / f"{folder.name}-seed{seed}/run.json").read_text())
            assert run["status"] == "finished"


def test_run_again_it_trains_and_reads_nothing_anew(made, asked):
    workspace, results = made
    files = sorted(path for path in workspace.root.rglob("*") if path.is_file())
    before = {path: path.stat().st_mtime_ns for path in files if "sweeps/both/runs" in str(path)}
    again = sweep(workspace, config(), "both", **asked)
    assert again.values["rows"] == results.values["rows"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_learning_rate_that_is_added_later_may_be_chosen(toy, asked, tmp_path):
    """The figures that no Adaptor has a part in are then those of another run's folder."""
    few = {"seeds": 1, "variants": {"dual": VARIANTS["dual"]}, "label": None}
    first = sweep(Workspace(tmp_path), config(**few, learning_rates=[1e-5]), "wider", **asked)
    second = sweep(
        Workspace(tmp_path), config(**few, learning_rates=[1e-5, 1e-2]), "wider", **asked
    )
    chosen = [one.values["rows"][0]["setting"]["lr"] for one in (first, second)]
    assert chosen == ["1e-05", "0.01"]
    assert first.values["rows"][1:] == second.values["rows"][1:]


def test_a_variant_that_does_not_fit_is_named_before_anything_is_trained(asked, tmp_path):
    wrong = config(variants={**VARIANTS, "odd": ["adaptor.heads=3"]})
    with pytest.raises(ConfigError, match="heads"):
        sweep(Workspace(tmp_path), wrong, "odd", **asked)
    assert not (tmp_path / "sweeps").exists()


def test_the_interval_is_that_of_student():
    values = [0.2, 0.3, 0.5, 0.4]
    found = interval_over_seeds(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert interval_over_seeds([0.2]) is None


@pytest.mark.parametrize("name", list_configs("sweeps"))
def test_shipped_sweeps_fit_the_trainings_config(name):
    found, values = load_sweep_config(name)
    assert found == name
    for variant in values.variants:
        values.run_config(variant, values.learning_rates[0], 0)
