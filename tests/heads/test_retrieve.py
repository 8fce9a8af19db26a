"""Retrieval, end to end on made-up tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.adaptor.retrieval import unpaired_scores
from featcache.adaptor.saved import load_adaptor
from featcache.cache.reader import open_cache
from featcache.errors import CacheError, StaleFeatureSetError, TrainingError
from featcache.heads.ranking import ranks_both_ways
from featcache.heads.retrieve import (
    RetrieveConfig,
    adaptor_scores,
    candidates_of,
    retrieve,
    retrieve_workspace,
)
from featcache.workspace import Workspace

QUICK = RetrieveConfig(draws=200, batch_size=5)
WAYS = ("image to text", "text to image")


def figures(results, method, way):
    [line] = [
        line
        for line in results.values["rows"]
        if line["method"] == method and line["setting"]["direction"] == way
    ]
    return {name: figure["mean"] for name, figure in line["figures"].items()}, line


@pytest.fixture(scope="module")
def run(toy, make_run):
    return make_run(toy.root / "runs" / "retrieval", toy)


@pytest.fixture(scope="module")
def results(toy, run):
    out = toy.root / "retrieved"
    return retrieve(toy.images, toy.texts, toy.manifest, run, out, QUICK, device="cpu")


def test_both_ways_have_chance_linear_map_and_adaptor(results):
    found = [(r["setting"]["direction"], r["method"]) for r in results.values["rows"]]
    methods = [
        "chance (exact)",
        "linear map (ridge) on raw features",
        "Adaptor",
        "Adaptor minus linear map",
        "Adaptor minus chance",
    ]
    assert found == [(way, method) for way in WAYS for method in methods]


def test_every_pair_of_rows_is_compared_on_the_same_draws(results):
    methods = ["chance (exact)", "linear map (ridge) on raw features", "Adaptor"]
    expected = [
        (way, b, a) for way in WAYS for n, a in enumerate(methods) for b in methods[n + 1 :]
    ]
    pairs = results.values["differences"]
    found = {(one["direction"], one["first"], one["second"]): one["figures"] for one in pairs}
    assert sorted(found) == sorted(expected)
    for (way, first, second), gap in found.items():
        ours, theirs = figures(results, first, way)[0], figures(results, second, way)[0]
        for name in ("recall_at_1", "mrr", "median_rank"):
            assert gap[name]["mean"] == pytest.approx(ours[name] - theirs[name], abs=3e-6)
    _, line = figures(results, "Adaptor minus chance", WAYS[0])
    assert line["figures"]["mrr"] == found[WAYS[0], "Adaptor", "chance (exact)"]["mrr"]
    assert line["figures"]["mrr"]["low"] < line["figures"]["mrr"]["high"]


def test_chance_is_exact_and_has_no_interval(results):
    _, line = figures(results, "chance (exact)", WAYS[1])
    assert all(one["low"] is None for one in line["figures"].values())


def test_linear_map_finds_what_is_linear(results):
    for way in WAYS:
        chance, _ = figures(results, "chance (exact)", way)
        linear, line = figures(results, "linear map (ridge) on raw features", way)
        assert linear["recall_at_1"] > 3 * chance["recall_at_1"]
        assert "chosen on validate" in line["remark"]


def test_untrained_adaptor_is_near_chance(results):
    chance, _ = figures(results, "chance (exact)", "image to text")
    found, _ = figures(results, "Adaptor", "image to text")
    assert found["recall_at_1"] < chance["recall_at_1"] + 0.25


def test_candidates_are_each_image_and_text_once(results, toy):
    cache = open_cache(toy.images, toy.texts, toy.manifest, split="test")
    candidates = candidates_of(cache, toy.manifest)
    assert len(candidates.image_rows) == len(set(candidates.image_rows)) == 36
    assert len(candidates.text_rows) == len(set(candidates.text_rows)) < 36
    _, line = figures(results, "Adaptor", "image to text")
    assert line["setting"]["queries"] == "36"
    assert line["setting"]["candidates"] == str(len(candidates.text_rows))
    pairs = set(zip(candidates.image_of.tolist(), candidates.text_of.tolist(), strict=True))
    found = candidates.positives(slice(0, 36))
    assert {(int(i), int(j)) for i, j in np.argwhere(found)} == pairs


def test_patient_of_each_query_comes_from_the_manifest(toy):
    cache = open_cache(toy.images, toy.texts, toy.manifest, split="test")
    candidates = candidates_of(cache, toy.manifest)
    for row, subject in zip(candidates.image_rows, candidates.image_subjects, strict=True):
        number = int(toy.images.keys[row].removeprefix("img-"))
        assert subject == f"pat-{number // 2:03d}"


def test_scores_in_blocks_equal_all_at_once(toy, run):
    cache = open_cache(toy.images, toy.texts, toy.manifest, split="test")
    candidates = candidates_of(cache, toy.manifest)
    trained = load_adaptor(run)
    blocks = adaptor_scores(trained, cache, candidates, device="cpu", batch_size=5)
    found = np.concatenate(list(blocks))
    images = torch.from_numpy(toy.images.read_tokens(candidates.image_rows)).float()
    texts = []
    for row in candidates.text_rows:
        tokens = torch.from_numpy(toy.texts.read_tokens(np.array([row]))).float()[None]
        texts.append((tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)))
    expected = unpaired_scores(trained.objective, trained.adaptor, [images], texts)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["dual", "paper"])
def test_every_objective_can_be_ranked(toy, make_run, tmp_path, objective):
    run = make_run(tmp_path / objective, toy, objective=objective)
    small = QUICK.model_copy(update={"linear_map": False})
    found = retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, small, device="cpu")
    _, line = figures(found, "linear map (ridge) on raw features", "image to text")
    assert "switched off" in line["remark"]
    assert 0 < figures(found, "Adaptor", "text to image")[0]["mrr"] <= 1


def test_perfect_scores_reach_rank_one_despite_shared_texts(toy):
    cache = open_cache(toy.images, toy.texts, toy.manifest, split="test")
    candidates = candidates_of(cache, toy.manifest)
    perfect = candidates.positives(slice(0, 36)).astype(np.float32)
    for ranks in ranks_both_ways(lambda: [perfect], candidates):
        assert (ranks == 1).all()


def test_same_request_is_returned_untouched_and_another_is_refused(results, toy, run):
    again = retrieve(toy.images, toy.texts, toy.manifest, run, results.folder, QUICK, device="cpu")
    assert not again.is_new
    assert again.table.to_markdown() == results.table.to_markdown()
    other = QUICK.model_copy(update={"seed": 1})
    with pytest.raises(TrainingError, match="the test split was read before"):
        retrieve(toy.images, toy.texts, toy.manifest, run, results.folder, other, device="cpu")


def test_same_seed_gives_the_same_bytes(results, toy, run, tmp_path):
    retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, QUICK, device="cpu")
    expected = (results.folder / "results.json").read_bytes()
    assert (tmp_path / "results.json").read_bytes() == expected


def test_validation_is_ranked_without_the_gate(toy, run, tmp_path):
    config = QUICK.model_copy(update={"split": "validate"})
    retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, config, device="cpu")
    assert not (tmp_path / "test_reads.json").exists()


@pytest.mark.parametrize("side", ["image", "text"])
def test_adaptor_of_other_features_is_refused(toy, make_run, tmp_path, side):
    foreign = make_run(tmp_path / "foreign", toy, **{side: "e" * 32})
    with pytest.raises(StaleFeatureSetError, match=f"trained on {side} features"):
        retrieve(toy.images, toy.texts, toy.manifest, foreign, tmp_path, QUICK, device="cpu")


def test_split_without_pairs_is_refused(make_toy, make_run, tmp_path):
    def edit(columns):
        columns["split"] = ["train" if s == "test" else s for s in columns["split"]]

    toy = make_toy(tmp_path, edit=edit)
    run = make_run(tmp_path / "run", toy)
    with pytest.raises(CacheError, match="no split `test`"):
        retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, QUICK, device="cpu")


def test_no_training_pairs_leave_the_linear_map_with_its_reason(make_toy, make_run, tmp_path):
    def edit(columns):
        columns["split"] = [None if s == "train" else s for s in columns["split"]]

    toy = make_toy(tmp_path, edit=edit)
    run = make_run(tmp_path / "run", toy)
    found = retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, QUICK, device="cpu")
    _, line = figures(found, "linear map (ridge) on raw features", "image to text")
    assert line["remark"].startswith("not computed: the manifest has no split `train`")
    assert "Adaptor minus linear map" not in {r["method"] for r in found.values["rows"]}


def test_no_validation_pairs_leave_the_penalty_unchosen(make_toy, make_run, tmp_path):
    def edit(columns):
        columns["split"] = ["train" if s == "validate" else s for s in columns["split"]]

    toy = make_toy(tmp_path, edit=edit)
    run = make_run(tmp_path / "run", toy)
    found = retrieve(toy.images, toy.texts, toy.manifest, run, tmp_path, QUICK, device="cpu")
    _, line = figures(found, "linear map (ridge) on raw features", "image to text")
    assert line["remark"].startswith("penalty not chosen: the manifest has no split `validate`")


def test_validation_images_without_texts_leave_the_penalty_unchosen(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path)
    splits = dict(zip(toy.manifest.keys, toy.manifest.splits(), strict=True))
    said = toy.manifest.texts.filter(
        [splits[key] != "validate" for key in toy.manifest.texts["key"].to_pylist()]
    )
    silent = replace(toy.manifest, texts=said)
    run = make_run(tmp_path / "run", toy)
    found = retrieve(toy.images, toy.texts, silent, run, tmp_path, QUICK, device="cpu")
    _, line = figures(found, "linear map (ridge) on raw features", "image to text")
    assert line["remark"].startswith("penalty not chosen: no pair is left")


def test_workspace_finds_both_feature_sets_of_the_run(make_toy, make_run, tmp_path):
    toy = make_toy(tmp_path)
    make_run(tmp_path / "runs" / "first", toy)
    workspace = Workspace(tmp_path)
    workspace.use(manifest="toy", run="first")
    found = retrieve_workspace(workspace, QUICK, device="cpu")
    assert found.folder == tmp_path / "runs" / "first" / "retrieve" / "toy-test"
    assert "text to image" in found.to_text()
