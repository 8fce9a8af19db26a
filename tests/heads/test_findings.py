"""Several findings of each image: labels, probes, figures, and the table."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from featcache.errors import ManifestError, UsageError
from featcache.heads.answers import Answers
from featcache.heads.classify import ProbeConfig, finetune
from featcache.heads.findings import count_unsettled, finding_names, labelled_findings
from featcache.heads.judge import Judge
from featcache.heads.labels import LabelPolicy, labelled_images, training_subsets
from featcache.heads.probe import train_probes

NAMES = ("Edema", "Effusion", "Fracture")
QUICK = ProbeConfig(
    findings=NAMES, fractions=(10, 100), subsets=2, seeds=1, weight_decays=(0.1, 1.0), draws=200
)


def with_findings(columns):
    """Effusion follows the class; Edema too, half of it blank or uncertain; Fracture is rare."""
    kinds = np.array(columns["label:class"])
    generator = np.random.default_rng(0)
    edema = np.where(kinds == "normal", 0, 1).astype(object)
    edema[generator.random(len(kinds)) < 0.3] = None
    edema[generator.random(len(kinds)) < 0.2] = -1
    fracture = np.zeros(len(kinds), dtype=object)
    fracture[:2] = 1  # one patient of the training split
    columns["label:Edema"] = pa.array(edema.tolist(), pa.int8())
    columns["label:Effusion"] = pa.array((kinds == "effusion").astype(int).tolist(), pa.int8())
    columns["label:Fracture"] = pa.array(fracture.tolist(), pa.int8())


@pytest.fixture(scope="module")
def study(make_toy, tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("findings"), edit=with_findings)


@pytest.fixture(scope="module")
def results(study, make_run):
    run = make_run(study.root / "runs" / "first", study)
    return finetune(study.images, study.manifest, run, study.root / "out", QUICK, device="cpu")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (LabelPolicy(), [1, 0, -1, -1]),
        (LabelPolicy(uncertain="positive"), [1, 0, 1, -1]),
        (LabelPolicy(uncertain="negative", blank="negative"), [1, 0, 0, 0]),
        (LabelPolicy(blank="negative"), [1, 0, -1, 0]),
    ],
)
def test_policy_decides_what_uncertain_and_blank_labels_are(policy, expected):
    column = pa.chunked_array([pa.array([1, 0, -1, None], pa.int8())])
    assert policy.settle(column).tolist() == expected


def test_image_stays_when_one_finding_is_known(study):
    found = labelled_findings(study.images, study.manifest, NAMES, LabelPolicy())
    assert len(found.keys) == 120
    assert found.classes == NAMES
    assert set(np.unique(found.targets[:, 0])) == {-1, 0, 1}
    alone = labelled_findings(study.images, study.manifest, ("Edema",), LabelPolicy())
    assert len(alone.keys) == int((found.targets[:, 0] >= 0).sum())
    assert alone.left_out == {"without a known finding": 120 - len(alone.keys)}


def test_one_finding_is_the_same_as_a_binary_label(study):
    policy = LabelPolicy(uncertain="positive", blank="negative")
    binary = labelled_images(study.images, study.manifest, "Edema", policy)
    one = labelled_findings(study.images, study.manifest, ("Edema",), policy)
    assert binary.keys == one.keys
    assert binary.classes == ("Edema", "no Edema")
    np.testing.assert_array_equal(binary.targets == 0, one.targets[:, 0] == 1)


def test_unsettled_labels_are_counted(study):
    uncertain, blank = count_unsettled(study.manifest, ("Edema",))
    values = study.manifest.images.column("label:Edema").to_pylist()
    assert (uncertain, blank) == (values.count(-1), values.count(None))


def test_all_findings_are_the_columns_of_whole_numbers(study):
    assert finding_names(study.manifest) == NAMES


def test_class_names_are_no_finding(study):
    with pytest.raises(UsageError, match="`class` holds class names, not a finding"):
        labelled_findings(study.images, study.manifest, ("Edema", "class"), LabelPolicy())


def test_findings_that_nobody_lacks_cannot_be_learnt(make_toy, tmp_path):
    def edit(columns):
        columns["label:Edema"] = pa.array([1, None] * 60, pa.int8())

    toy = make_toy(tmp_path, edit=edit)
    with pytest.raises(ManifestError, match="no finding is present") as caught:
        labelled_findings(toy.images, toy.manifest, ("Edema",), LabelPolicy())
    assert "blank=negative" in caught.value.fix


def test_subsets_hold_the_rarest_finding(study):
    found = labelled_findings(study.images, study.manifest, NAMES, LabelPolicy())
    for subset in training_subsets(found, 10, count=3, seed=0):
        assert found.class_counts(subset.members)["Fracture"] == 2
        assert subset.missing == ()


def test_probes_of_findings_are_those_of_each_finding_alone():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(80, 6)).astype(np.float32)
    targets = (vectors[:, :3] + generator.normal(size=(80, 3)) > 0).astype(np.int64)
    targets[generator.random((80, 3)) < 0.25] = -1
    rows = np.arange(60)
    options = {"decays": (0.05, 0.5), "seeds": (0, 1), "tolerance": 1e-8}
    together = train_probes(vectors, targets, [rows, rows[:40]], num_classes=3, **options)
    assert together.converged.all()
    found = together.probabilities(vectors)
    assert found.shape == (8, 80, 3)
    own = vectors[rows].astype(np.float64)
    spread = own.std(axis=0)
    usual = np.sort(spread)[(len(spread) - 1) // 2]
    scaled = (vectors - own.mean(axis=0)) / np.sqrt(spread**2 + (0.01 * usual) ** 2)
    for finding in range(3):
        known = rows[targets[rows, finding] >= 0]
        peer = LogisticRegression(C=1 / (0.05 * len(known)), tol=1e-10, max_iter=5000)
        peer.fit(scaled[known], targets[known, finding])
        expected = peer.predict_proba(scaled)[:, 1]
        np.testing.assert_allclose(found[0, :, finding], expected, atol=1e-5)


def test_unknown_answers_and_undefined_findings_enter_no_figure():
    targets = np.array([[1, 0, -1], [0, 0, -1], [1, 0, 1], [0, -1, -1]] * 5, dtype=np.int64)
    generator = np.random.default_rng(0)
    scores = generator.random((2, 20, 3))
    judge = Judge(targets, [f"p{i}" for i in range(20)], NAMES, 200, seed=0)
    assert judge.undefined_classes() == {"Effusion": (0, 15), "Fracture": (5, 5)}
    judged = judge.judge(Answers(scores))
    expected = [roc_auc_score(targets[:, 0], run[:, 0]) for run in scores]
    assert judged.figures["auroc"].values == pytest.approx(expected)
    assert judged.figures["auroc of Edema"].values == pytest.approx(expected)
    assert np.isnan(judged.figures["auroc of Effusion"].mean)
    assert judged.figures["auroc of Effusion"].interval is None
    assert judged.figures["auroc"].interval is not None


def test_table_has_the_mean_at_every_share_and_each_finding_at_the_largest(results):
    lines = results.values["rows"]
    means = [line for line in lines if line["setting"]["finding"] == "mean of 2"]
    assert {line["percent"] for line in means} == {10.0, 100.0}
    assert means[0]["figures"]["auroc"]["mean"] == 0.5  # majority
    [effusion] = [
        line
        for line in lines
        if line["setting"]["finding"] == "Effusion" and line["method"] == "raw backbone"
    ]
    assert effusion["figures"]["auroc"]["mean"] > 0.9
    rare = [line for line in lines if line["setting"]["finding"] == "Fracture"]
    assert all(line["figures"]["auroc"]["mean"] is None for line in rare)
    assert all("undefined (0 of " in line["remark"] for line in rare)


def test_table_states_the_policy_and_what_is_undefined(results):
    text = results.table.to_markdown()
    assert "uncertain ones are left out (uncertain=ignore)" in text
    assert "blank ones left out (blank=ignore)" in text
    assert "none or all of the test images having it, for Fracture (0 of" in text
    assert "being undefined on validate: Fracture" in text
    assert "Effusion" in results.to_text()


def test_shots_of_several_findings_are_refused(study, tmp_path):
    config = QUICK.model_copy(update={"shots": 5})
    with pytest.raises(UsageError, match="shots are of a single label"):
        finetune(study.images, study.manifest, None, tmp_path, config, device="cpu")


def test_mlp_takes_several_findings(study, tmp_path):
    changed = {"head": "mlp", "hidden": 8, "epochs": 5, "fractions": (100,)}
    config = QUICK.model_copy(update=changed)
    found = finetune(study.images, study.manifest, None, tmp_path, config, device="cpu")
    assert found.values["title"].startswith("MLP heads: toy, findings")
    [line] = [r for r in found.values["rows"] if r["method"] == "raw backbone"][:1]
    assert len(line["learning_rates"]) == 1
